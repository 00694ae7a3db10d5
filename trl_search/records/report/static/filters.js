// The filters and the order of the list.
const SORTS = {
  step: ["Step", (rows, i) => rows.step[i]],
  reward: ["Reward", (rows, i) => rows.reward[i]],
  advantage: ["Advantage", (rows, i) => rows.advantage[i]],
  searches: ["Calls", (rows, i) => rows.calls[i]],
  tokens: ["Tokens", (rows, i) => rows.trained[i] + rows.masked[i]],
  trained: ["Trained tokens", (rows, i) => rows.trained[i]],
};
const NO_FILTER = { query: "", from: "", to: "", stop: "", outcome: "", searched: "", gold: "", run: "", sort: "step", order: "up" };
const VERDICTS = { correct: "✓", wrong: "✗", failed: "!" };

const outcome = (rows, i) => (rows.correct[i] === null ? "failed" : rows.correct[i] ? "correct" : "wrong");

class Filtering {
  constructor(rows) {
    this.rows = rows;
    this.haystacks = null;
  }

  // Indices of the matching rows, in order.
  apply(wanted) {
    const { rows } = this;
    const query = wanted.query.trim().toLowerCase();
    if (query) this.haystacks ??= rows.text.map((text, i) =>
      [rows.question[i], rows.answer[i] ?? "", ...rows.golden[i], rows.id[i], text].join("\n").toLowerCase());
    const from = wanted.from === "" ? -Infinity : Number(wanted.from);
    const to = wanted.to === "" ? Infinity : Number(wanted.to);
    const left = [];
    for (let i = 0; i < rows.step.length; i++) {
      if (rows.step[i] < from || rows.step[i] > to) continue;
      if (wanted.run !== "" && rows.run[i] !== Number(wanted.run)) continue;
      if (wanted.stop && rows.stop_reason[i] !== wanted.stop) continue;
      if (wanted.outcome && outcome(rows, i) !== wanted.outcome) continue;
      if (wanted.searched && (rows.calls[i] > 0) !== (wanted.searched === "yes")) continue;
      if (wanted.gold && rows.gold[i] !== Number(wanted.gold === "yes")) continue;
      if (query && !this.haystacks[i].includes(query)) continue;
      left.push(i);
    }
    const value = SORTS[wanted.sort][1];
    const sign = wanted.order === "down" ? -1 : 1;
    return left.sort((a, b) => compare(value(rows, a), value(rows, b), sign) || a - b);
  }
}

function compare(a, b, sign) {
  if (a === b) return 0;
  if (a === null) return 1; // missing numbers come last in both orders
  if (b === null) return -1;
  return a < b ? -sign : sign;
}

// The form above the list. `wanted` holds its values; `apply` is called when one changes.
function filterForm(meta, rows, wanted, apply) {
  const inputs = {};
  const change = (name) => (event) => {
    wanted[name] = event.target.value;
    apply();
  };
  const select = (name, label, options) => {
    inputs[name] = element("select", { "aria-label": label, name, onchange: change(name) },
      ...options.map(([value, text]) => element("option", { value }, text)));
    return inputs[name];
  };
  const stepInput = (name, label, placeholder) => {
    inputs[name] = element("input", { type: "number", "aria-label": label, name, placeholder, oninput: change(name) });
    return inputs[name];
  };
  let waiting = 0;
  inputs.query = element("input", { type: "search", name: "query", "aria-label": "Search", placeholder: "Search question, answer and text",
    oninput: (event) => {
      wanted.query = event.target.value;
      clearTimeout(waiting);
      waiting = setTimeout(apply, 120);
    } });
  const direction = element("button", { type: "button", name: "direction", onclick: () => {
    wanted.order = wanted.order === "up" ? "down" : "up";
    show();
    apply();
  } });
  // Copies the values into the inputs, for example after a link was followed.
  const show = () => {
    for (const [name, input] of Object.entries(inputs)) input.value = wanted[name];
    direction.textContent = wanted.order === "down" ? "↓" : "↑";
    direction.title = wanted.order === "down" ? "largest first" : "smallest first";
    direction.setAttribute("aria-label", `Order: ${direction.title}`);
  };
  const reset = element("button", { type: "button", name: "reset", onclick: () => {
    Object.assign(wanted, NO_FILTER);
    show();
    apply();
  } }, "Reset");
  const reasons = [...new Set(rows.stop_reason)].filter(Boolean).sort();
  const lowest = rows.step.reduce((least, step) => Math.min(least, step), Infinity);
  const highest = rows.step.reduce((most, step) => Math.max(most, step), -Infinity);
  const form = element("form.controls", { role: "search", onsubmit: (event) => event.preventDefault() },
    element("div", {}, inputs.query,
      element("button.more", { type: "button", onclick: () => form.classList.toggle("open") }, "Filters")),
    element("div.fold", {},
      select("outcome", "Outcome", [["", "Any outcome"], ["correct", "Correct"], ["wrong", "Wrong"], ["failed", "Failed"]]),
      select("gold", "Gold retrieved", [["", "Gold or not"], ["yes", "Gold retrieved"], ["no", "Gold not retrieved"]])),
    element("div.fold", {},
      select("searched", "Calls", [["", "Called or not"], ["yes", "Called a tool"], ["no", "Called none"]]),
      select("stop", "Ended by", [["", "Any ending"], ...reasons.map((reason) => [reason, words(reason)])])),
    meta.runs.length > 1 ? element("div.fold", {},
      select("run", "Run", [["", "All runs"], ...meta.runs.map((run, i) => [String(i), run.name])])) : null,
    element("div.fold", {},
      element("label", {}, "Steps", stepInput("from", "From step", count(lowest)), "–", stepInput("to", "To step", count(highest))),
      element("label", {}, "Sort", select("sort", "Sort by", Object.entries(SORTS).map(([name, [label]]) => [name, label])), direction),
      reset));
  show();
  return { form, show, focus: () => inputs.query.focus() };
}
