// The list of trajectories: which of them are shown and in what order, and only the rows in sight on the screen.
const ROW_HEIGHT = 62;
const SORTS = {
  step: ["Step", (rows, i) => rows.step[i]],
  reward: ["Reward", (rows, i) => rows.reward[i]],
  advantage: ["Advantage", (rows, i) => rows.advantage[i]],
  searches: ["Searches", (rows, i) => rows.searches[i]],
  tokens: ["Tokens", (rows, i) => rows.trained[i] + rows.masked[i]],
  trained: ["Trained tokens", (rows, i) => rows.trained[i]],
};
const NO_FILTER = { query: "", from: "", to: "", stop: "", outcome: "", searched: "", run: "", sort: "step", down: false };

class Filtering {
  constructor(rows) {
    this.rows = rows;
    this.haystacks = null;
  }

  // Numbers of the rows that are left, in order.
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
      if (wanted.searched && (rows.searches[i] > 0) !== (wanted.searched === "yes")) continue;
      if (query && !this.haystacks[i].includes(query)) continue;
      left.push(i);
    }
    const value = SORTS[wanted.sort][1];
    const sign = wanted.down ? -1 : 1;
    return left.sort((a, b) => compare(value(rows, a), value(rows, b), sign) || a - b);
  }
}

function compare(a, b, sign) {
  if (a === b) return 0;
  if (a === null) return 1; // what has no number comes last, either way
  if (b === null) return -1;
  return a < b ? -sign : sign;
}

const outcome = (rows, i) => (rows.correct[i] === null ? "failed" : rows.correct[i] ? "correct" : "wrong");

class TrajectoryList {
  constructor(box, rows, { compared, onselect }) {
    Object.assign(this, { box, rows, compared, onselect, shown: [], selected: null });
    this.sheet = element("div.sheet");
    this.box.append(this.sheet);
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.sheet.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (row) this.select(Number(row.dataset.row));
    });
  }

  show(shown) {
    this.shown = shown;
    this.sheet.style.height = `${shown.length * ROW_HEIGHT}px`;
    this.box.scrollTop = 0;
    this.draw();
  }

  select(row) {
    this.selected = row;
    const at = this.shown.indexOf(row);
    if (at >= 0) {
      const top = at * ROW_HEIGHT;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      const below = top + ROW_HEIGHT - this.box.clientHeight;
      if (below > this.box.scrollTop) this.box.scrollTop = below;
    }
    this.draw();
    this.onselect(row);
  }

  move(by) {
    if (!this.shown.length) return;
    const at = this.shown.indexOf(this.selected);
    const next = at < 0 ? 0 : Math.max(0, Math.min(this.shown.length - 1, at + by));
    this.select(this.shown[next]);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(this.shown.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_HEIGHT) + 4);
    const drawn = [];
    for (let at = first; at < last; at++) drawn.push(this.rowAt(at));
    this.sheet.replaceChildren(...drawn);
    if (this.selected === null) this.box.removeAttribute("aria-activedescendant");
    else this.box.setAttribute("aria-activedescendant", `row-${this.selected}`);
  }

  rowAt(at) {
    const { rows } = this;
    const i = this.shown[at];
    const result = outcome(rows, i);
    const made = element(`div.row${i === this.selected ? ".selected" : ""}`, {
      id: `row-${i}`, role: "option", "data-row": i, "aria-selected": i === this.selected,
      "aria-posinset": at + 1, "aria-setsize": this.shown.length,
    },
      element(`span.verdict.${result}`, { title: result, "aria-label": result }, VERDICTS[result]),
      element("span.question", {}, rows.question[i] || "(no question)"),
      element("span.reward", { title: "reward" }, decimal(rows.reward[i])),
      element("span.facts", {},
        this.compared ? element(`b.run.run-${rows.run[i]}`, {}, "AB"[rows.run[i]]) : null,
        element("span", {}, `step ${count(rows.step[i])}`),
        element("span", {}, plural(rows.searches[i], "search", "searches")),
        element("span", {}, plural(rows.trained[i] + rows.masked[i], "token")),
        element("span", {}, words(rows.stop_reason[i]))),
      element(`span.advantage.${rows.advantage[i] > 0 ? "up" : rows.advantage[i] < 0 ? "down" : "flat"}`,
        { title: "advantage" }, signed(rows.advantage[i])));
    made.style.top = `${at * ROW_HEIGHT}px`;
    return made;
  }
}

const VERDICTS = { correct: "✓", wrong: "✗", failed: "!" };
