// One trajectory: its numbers, its group, a strip of its mask, and its text.
function drawDetail(box, context, row, tokens) {
  const { rows, meta, query } = context;
  const result = outcome(rows, row);
  box.replaceChildren(...[
    where(context, row),
    element("h2", {}, rows.question[row] || "(no question)"),
    answers(rows, row, result),
    rows.error[row] ? element("p.notice", {}, rows.error[row]) : null,
    numbers(rows, meta, row),
    groupRow(context, row),
    otherSteps(context, row),
    maskLegend(rows.trained[row], rows.masked[row]),
    heatLegend(),
    maskStrip(tokens.trained),
    element("div.text", { tabindex: 0, "aria-label": "tokens" },
      promptBlock(meta.prompts[rows.prompt[row]]),
      ...turnBlocks(rows.text[row], tokens, rows.golden[row], query)),
  ].filter(Boolean));
  box.scrollTop = 0;
}

function where({ rows, meta }, row) {
  return element("div.where", {},
    meta.runs.length > 1 ? element("b.run", {}, runMark(rows.run[row]), meta.runs[rows.run[row]].name) : null,
    element("span", {}, `step ${count(rows.step[row])}`),
    element("span", {}, `no. ${count(rows.index[row])}`),
    rows.data_source[row] ? element("span", {}, rows.data_source[row]) : null,
    rows.id[row] ? element("span", {}, rows.id[row]) : null);
}

function answers(rows, row, result) {
  const golden = rows.golden[row];
  const retrieved = { 1: "retrieved", 0: "not retrieved" }[rows.gold[row]];
  return element("dl.answers", {},
    element("dt", {}, "Answer"),
    element(`dd.${result}`, {}, rows.answer[row] ?? "none",
      element(`span.verdict.${result}`, {}, `${VERDICTS[result]} ${result}`)),
    element("dt", {}, "Expected"),
    element("dd", {}, golden.length ? golden.join(" · ") : "–",
      retrieved && rows.calls[row] ? element(`span.verdict.${rows.gold[row] ? "gold-found" : "flat"}`, {}, retrieved) : null));
}

function numbers(rows, meta, row) {
  const entries = [
    ["reward", decimal(rows.reward[row], 3)],
    ...meta.rewards.map((name, i) => [words(name), decimal(rows.rewards[row][i], 3)]),
    ["advantage", signed(rows.advantage[row], 3)],
    [meta.runs[rows.run[row]].call_words[1], count(rows.calls[row])],
    ["malformed", count(rows.malformed[row])],
    ["ended by", words(rows.stop_reason[row]) || "–"],
    ["generation", `${decimal(rows.generation_s[row])} s`],
    ["search", `${decimal(rows.search_s[row])} s`],
  ];
  return element("dl.numbers", {}, ...entries.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// The group: the trajectories that were sampled for the same question, with which the advantage compares.
function groupOf(rows, row) {
  const members = [];
  for (let i = 0; i < rows.step.length; i++) {
    if (rows.run[i] === rows.run[row] && rows.step[i] === rows.step[row] && rows.group[i] === rows.group[row]) members.push(i);
  }
  return members;
}

function groupRow(context, row) {
  const members = groupOf(context.rows, row);
  if (members.length < 2) return null;
  return element("div.group", {}, element("span", {}, `Its group of ${members.length}, by reward`),
    ...members.map((i) => rewardButton(context, i, row)),
    element("button.side-by-side", { type: "button", onclick: () => context.compareGroup(row) }, "Side by side"));
}

function rewardButton({ rows, open }, i, current) {
  return element(`button.${outcome(rows, i)}`, { type: "button", "aria-pressed": String(i === current),
    title: `advantage ${signed(rows.advantage[i])}`, onclick: () => open(i) }, decimal(rows.reward[i]));
}

// The same question at other steps and in other runs.
function otherSteps(context, row) {
  const { rows, meta } = context;
  if (!rows.question[row]) return null;
  const asked = [];
  for (let i = 0; i < rows.step.length; i++) if (rows.question[i] === rows.question[row]) asked.push(i);
  const times = [...Map.groupBy(asked, (i) => `${rows.run[i]}.${rows.step[i]}.${rows.group[i]}`).values()];
  if (times.length < 2) return null;
  times.sort(([a], [b]) => rows.run[a] - rows.run[b] || rows.step[a] - rows.step[b]);
  return element("details.asked", { open: times.length <= 8 },
    element("summary", {}, `The same question was asked ${times.length} times`),
    ...times.map((members) => element("div.group", {},
      element("span.at", {}, meta.runs.length > 1 ? runMark(rows.run[members[0]]) : null, `step ${count(rows.step[members[0]])}`),
      ...members.map((i) => rewardButton(context, i, row)))));
}

function maskLegend(trained, masked) {
  const total = trained + masked;
  const share = (n) => (total ? ` · ${Math.round((100 * n) / total)} %` : "");
  return element("div.legend", {},
    element("span", {}, element("i.swatch.trained", { "aria-hidden": "true" }), element("b", {}, "Trained"),
      ` ${plural(trained, "token")}${share(trained)}, in the loss`),
    element("span", {}, element("i.swatch.masked", { "aria-hidden": "true" }), element("b", {}, "Masked"),
      ` ${plural(masked, "token")}${share(masked)}, no gradient`),
    element("button.quiet.heat-switch", { type: "button", title: "Colour the policy's tokens by the probability with which they were sampled",
      onclick: () => heat.set(!heat.on) }, heat.label()));
}

function heatLegend() {
  const names = [`p ≥ ${HEAT[0]}`, ...HEAT.slice(1).map((least) => `≥ ${least}`), `< ${HEAT.at(-1)}`];
  return element("div.heat-legend", {}, element("span", {}, "Sampled with probability"),
    ...names.map((name, i) => element("span", {}, element("i.swatch", { "data-heat": i, "aria-hidden": "true" }), name)));
}

// Whether tokens are coloured by probability instead of mask.
const heat = {
  on: false,
  label: () => (heat.on ? "Show the mask" : "Show probabilities"),
  set(on) {
    heat.on = on;
    byId("trajectories").classList.toggle("heat", on);
    for (const button of document.querySelectorAll(".heat-switch")) button.textContent = heat.label();
    heat.onchange?.();
  },
};

function maskStrip(trained) {
  const strip = element("div.strip", { role: "img", "aria-label": "The mask from the first token to the last" });
  for (let start = 0, end; start < trained.length; start = end) {
    end = start + 1;
    while (end < trained.length && trained[end] === trained[start]) end++;
    const part = element(trained[start] ? "i.trained" : "i.masked");
    part.style.flexGrow = end - start;
    strip.append(part);
  }
  return strip;
}

function promptBlock(prompt) {
  if (!prompt) return null;
  return element("details.turn.prompt", {},
    element("summary", {}, element("b", {}, "Prompt"), element("span", {}, "given, never trained on")),
    element("pre", {}, ...decorated(prompt, tags(prompt))));
}
