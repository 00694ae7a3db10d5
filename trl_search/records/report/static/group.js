// One question and its group side by side: rewards, answers, and where the texts diverge.
function drawGroup(box, context, row, members, tokensOfMembers) {
  const { rows } = context;
  const parts = partings(members.map((i) => rows.text[i]));
  const columns = members.map((i, place) => ({ i, tokens: tokensOfMembers[place], parting: parts[place] }))
    .sort((a, b) => compare(rows.reward[a.i], rows.reward[b.i], -1) || a.i - b.i);
  const right = members.filter((i) => rows.correct[i]).length;
  box.replaceChildren(
    element("button.quiet.back", { type: "button", onclick: () => context.open(row) }, "← One trajectory"),
    where(context, row),
    element("h2", {}, rows.question[row] || "(no question)"),
    element("p.expected", {}, "Expected: ", element("b", {}, rows.golden[row].join(" · ") || "–"),
      ` · ${right} of ${members.length} correct`),
    element("div.columns", { tabindex: 0, "aria-label": "The group side by side" },
      ...columns.map((column) => groupColumn(context, column, row, members))));
  box.scrollTop = 0;
}

function groupColumn(context, { i, tokens, parting }, current, members) {
  const { rows } = context;
  const result = outcome(rows, i);
  const others = parting.with.map((place) => `no. ${count(rows.index[members[place]])}`).join(", ");
  const starts = startsOf(tokens);
  const text = { whole: rows.text[i], marks: marked(rows.text[i], tokens, rows.golden[i], context.query) };
  const pieces = [];
  let number = 0;
  for (const [role, start, end] of wholeTurns(tokens)) {
    const name = turnName(role, role === "assistant" ? ++number : 0);
    pieces.push(element(`div.said-by.${role === "assistant" ? "policy" : "tool"}`, {}, element("b", {}, name),
      element("pre", {}, ...forked(text, starts[start], starts[end], parting, others))));
  }
  return element("article.column", { "data-row": i, "aria-current": i === current ? "true" : null },
    element("header", {},
      element("button", { type: "button", onclick: () => context.open(i) }, `no. ${count(rows.index[i])}`),
      element("b.reward", { title: "reward" }, decimal(rows.reward[i])),
      element(`span.${rows.advantage[i] > 0 ? "up" : rows.advantage[i] < 0 ? "down" : "flat"}`, { title: "advantage" }, signed(rows.advantage[i])),
      element("p.answer", {}, element(`span.verdict.${result}`, {}, `${VERDICTS[result]} `), rows.answer[i] ?? "no answer"),
      element("p.note", {}, `${callsOf(rows, i)} · ${plural(rows.trained[i] + rows.masked[i], "token")} · ${words(rows.stop_reason[i])}`)),
    ...pieces);
}

// The text from `from` to `to`: the part shared with another trajectory is faint, with a mark where they diverge.
function forked({ whole, marks }, from, to, parting, others) {
  const until = parting.with.length ? Math.min(Math.max(parting.at, from), to) : from;
  const shared = until > from ? [element("span.shared", {}, ...decorated(whole, marks, from, until))] : [];
  const ends = until === whole.length;
  const parts = parting.with.length && parting.at === until && (until < to || ends)
    ? [element("b.fork", {}, ends ? ` = ${others}` : `↳ parts from ${others} `)] : [];
  return [...shared, ...parts, ...decorated(whole, marks, until, to)];
}

// For each text: the length of the longest prefix that it shares with another text, and the texts that share it.
function partings(texts) {
  return texts.map((text, i) => {
    const shared = texts.map((other, j) => (i === j ? -1 : commonLength(text, other)));
    const at = Math.max(0, ...shared);
    return { at, with: at ? shared.flatMap((length, j) => (length === at ? [j] : [])) : [] };
  });
}

function commonLength(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}
