// One trajectory: its numbers, a strip of its mask, and every token in the colour of its mask.
const TAG = /<\/?(think|tool_call|tool_response|search|information|answer)>|<\|[^<>|\s]{1,40}\|>/g;
const FAMILIES = { think: "think", tool_call: "call", search: "call", tool_response: "world", information: "world", answer: "answer" };

function drawDetail(box, context, row, tokens) {
  const { rows, meta, query } = context;
  const result = outcome(rows, row);
  const total = rows.trained[row] + rows.masked[row];
  box.replaceChildren(...[
    element("div.where", {},
      meta.runs.length > 1 ? element(`b.run.run-${rows.run[row]}`, {}, meta.runs[rows.run[row]].name) : null,
      element("span", {}, `step ${count(rows.step[row])}`),
      element("span", {}, `no. ${count(rows.index[row])}`),
      rows.data_source[row] ? element("span", {}, rows.data_source[row]) : null,
      rows.id[row] ? element("span", {}, rows.id[row]) : null),
    element("h2", {}, rows.question[row] || "(no question)"),
    answers(rows, row, result),
    rows.error[row] ? element("p.notice", {}, rows.error[row]) : null,
    numbers(rows, meta, row),
    siblings(context, row),
    maskLegend(rows.trained[row], rows.masked[row], total),
    maskStrip(tokens.trained),
    element("div.text", { tabindex: 0, "aria-label": "tokens" },
      promptBlock(meta.prompts[rows.prompt[row]]),
      ...turnBlocks(rows.text[row], tokens, query)),
  ].filter(Boolean));
  box.scrollTop = 0;
}

function answers(rows, row, result) {
  const golden = rows.golden[row];
  return element("dl.answers", {},
    element("dt", {}, "Answer"),
    element(`dd.${result}`, {}, rows.answer[row] ?? "none",
      element(`span.verdict.${result}`, {}, `${VERDICTS[result]} ${result}`)),
    element("dt", {}, "Expected"), element("dd", {}, golden.length ? golden.join(" · ") : "–"));
}

function numbers(rows, meta, row) {
  const entries = [
    ["reward", decimal(rows.reward[row], 3)],
    ...meta.rewards.map((name, i) => [words(name), decimal(rows.rewards[row][i], 3)]),
    ["advantage", signed(rows.advantage[row], 3)],
    ["searches", count(rows.searches[row])],
    ["malformed", count(rows.malformed[row])],
    ["ended by", words(rows.stop_reason[row]) || "–"],
    ["generation", `${decimal(rows.generation_s[row])} s`],
    ["search", `${decimal(rows.search_s[row])} s`],
  ];
  return element("dl.numbers", {}, ...entries.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// The others that were sampled for the same question: an advantage is a comparison with them.
function siblings({ rows, open }, row) {
  const members = [];
  for (let i = 0; i < rows.step.length; i++) {
    if (rows.run[i] === rows.run[row] && rows.step[i] === rows.step[row] && rows.group[i] === rows.group[row]) members.push(i);
  }
  if (members.length < 2) return null;
  return element("div.group", {}, element("span", {}, `Its group of ${members.length}, by reward`), ...members.map((i) =>
    element(`button.${outcome(rows, i)}`, { "aria-pressed": String(i === row), title: `advantage ${signed(rows.advantage[i])}`, onclick: () => open(i) },
      decimal(rows.reward[i]))));
}

function maskLegend(trained, masked, total) {
  const share = (n) => (total ? ` · ${Math.round((100 * n) / total)} %` : "");
  return element("div.legend", {},
    element("span", {}, element("i.swatch.trained", { "aria-hidden": "true" }), element("b", {}, "Trained"),
      ` ${plural(trained, "token")}${share(trained)}, in the loss: the policy sampled them`),
    element("span", {}, element("i.swatch.masked", { "aria-hidden": "true" }), element("b", {}, "Masked"),
      ` ${plural(masked, "token")}${share(masked)}, no gradient`));
}

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
    element("pre", {}, ...tagged(prompt)));
}

function turnBlocks(text, tokens, query) {
  const marks = spans(text, query);
  const starts = [0];
  for (const length of tokens.lengths) starts.push(starts.at(-1) + length);
  const n = tokens.lengths.length;
  const blocks = [];
  let done = 0;
  let number = 0;
  const add = (role, start, end) => {
    if (end > start) blocks.push(turnBlock(role, role === "assistant" ? ++number : number, start, end));
    done = Math.max(done, end);
  };
  for (const [role, start, end] of tokens.turns) {
    add("", done, start); // what belongs to no turn is shown all the same
    add(role, Math.max(start, done), end);
  }
  add("", done, n);
  return blocks;

  function turnBlock(role, turn, start, end) {
    const policy = role === "assistant";
    const lines = element("pre");
    let trained = 0;
    for (let i = start; i < end; i++) {
      trained += tokens.trained[i];
      lines.append(tokenSpan(text, starts[i], starts[i + 1], i, tokens, policy, marks));
    }
    const counts = [[trained, "trained"], [end - start - trained, "masked"]].filter(([of]) => of);
    return element(`section.turn.${trained ? "trained" : "masked"}`, { "data-role": role },
      element("header", {}, element("b", {}, policy ? `Turn ${turn} · policy` : role ? "World" : "Outside of the turns"),
        element("span", {}, counts.map(([of, kind]) => `${plural(of, "token")} ${kind}`).join(", "))),
      lines);
  }
}

function tokenSpan(text, start, end, i, tokens, policy, marks) {
  const part = text.slice(start, end);
  const token = element(`span.t.${tokens.trained[i] ? "trained" : "masked"}`, { "data-i": i });
  if (policy) token.dataset.logprob = tokens.logprobs[i] === null ? "not finite" : (tokens.logprobs[i] / 1000).toFixed(3);
  if (/^\s*\n\s*$/.test(part)) token.classList.add("newline");
  let at = start;
  while (marks.next < marks.all.length && marks.all[marks.next].end <= start) marks.next++;
  for (let m = marks.next; m < marks.all.length && marks.all[m].start < end; m++) {
    const mark = marks.all[m];
    const from = Math.max(at, mark.start);
    const to = Math.min(end, mark.end);
    if (to <= from) continue;
    if (from > at) token.append(text.slice(at, from));
    token.append(element(mark.kind, {}, text.slice(from, to)));
    at = to;
  }
  if (at < end) token.append(text.slice(at, end));
  return token;
}

// Where tags and found words stand, in order and apart; found words give way to tags.
function spans(text, query) {
  const all = tags(text);
  const wanted = query.trim();
  if (wanted) {
    const found = new RegExp(wanted.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), "giu");
    const inTag = (start, end) => all.some((tag) => tag.start < end && start < tag.end);
    const words = [...text.matchAll(found)].map((match) => ({ start: match.index, end: match.index + match[0].length, kind: "mark" }));
    all.push(...words.filter((word) => !inTag(word.start, word.end)));
    all.sort((a, b) => a.start - b.start);
  }
  return { all, next: 0 };
}

function tags(text) {
  return [...text.matchAll(TAG)].map((match) => ({
    start: match.index, end: match.index + match[0].length,
    kind: `b.tag.${match[1] ? FAMILIES[match[1]] : "special"}`,
  }));
}

function tagged(text) {
  const parts = [];
  let at = 0;
  for (const { start, end, kind } of tags(text)) {
    parts.push(text.slice(at, start), element(kind, {}, text.slice(start, end)));
    at = end;
  }
  return [...parts, text.slice(at)];
}

// What a token is, beside the pointer.
function followTokens(box, tip) {
  box.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".t");
    if (!token) return void (tip.hidden = true);
    const trained = token.classList.contains("trained");
    const logprob = token.dataset.logprob;
    const chance = Number.isNaN(Number(logprob)) ? "" : ` · p ${figure(Math.exp(Number(logprob)))}`;
    tip.replaceChildren(
      element("code", {}, JSON.stringify(token.textContent)),
      element("span", {}, `token ${count(Number(token.dataset.i) + 1)} · `, element("b", {}, trained ? "trained (mask 1)" : "masked (mask 0)")),
      element("span", {}, logprob === undefined ? "written by the world: no logprob" : `logprob ${logprob.replace("-", "−")}${chance}`));
    tip.hidden = false;
    const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.min(at.left, innerWidth - tip.offsetWidth - 12);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 6}px`;
  });
  box.addEventListener("pointerleave", () => (tip.hidden = true));
  box.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
}
