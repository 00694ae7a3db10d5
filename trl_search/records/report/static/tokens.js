// The text of a trajectory, token by token: marks for tags, golden answers and found words; colours for mask or log-prob.
const TAG = /<\/?(think|tool_call|tool_response|search|information|answer)>|<\|[^<>|\s]{1,40}\|>/g;
const FAMILIES = { think: "think", tool_call: "call", search: "call", tool_response: "tool", information: "tool", answer: "answer" };
// A token's heat is the number of these probabilities that exceed its own.
const HEAT = [0.9, 0.5, 0.2, 0.05];

// The turns of a trajectory, one block each, and the tokens between turns.
function turnBlocks(text, tokens, golden, query) {
  const starts = startsOf(tokens);
  const marks = { all: marked(text, tokens, golden, query), next: 0 };
  const blocks = [];
  let number = 0;
  for (const [role, start, end] of wholeTurns(tokens)) {
    const policy = role === "assistant";
    const lines = element("pre");
    let trained = 0;
    for (let i = start; i < end; i++) {
      trained += tokens.trained[i];
      lines.append(tokenSpan(text, starts[i], starts[i + 1], i, tokens, policy, marks));
    }
    const counts = [[trained, "trained"], [end - start - trained, "masked"]].filter(([of]) => of);
    blocks.push(element(`section.turn.${trained ? "trained" : "masked"}`, { "data-role": role },
      element("header", {}, element("b", {}, turnName(role, policy ? ++number : 0)),
        element("span", {}, counts.map(([of, kind]) => `${plural(of, "token")} ${kind}`).join(", "))),
      lines));
  }
  return blocks;
}

// The start of each token in the text, and the end of the last one.
function startsOf(tokens) {
  const starts = [0];
  for (const length of tokens.lengths) starts.push(starts.at(-1) + length);
  return starts;
}

const turnName = (role, number) => (role === "assistant" ? `Turn ${number} · policy` : role ? "Tool result" : "Outside of the turns");

// [role, first token, end] of each turn, and of the tokens between them.
function wholeTurns(tokens) {
  const turns = [];
  let done = 0;
  const add = (role, start, end) => {
    if (end > start) turns.push([role, start, end]);
    done = Math.max(done, end);
  };
  for (const [role, start, end] of tokens.turns) {
    add("", done, start);
    add(role, Math.max(start, done), end);
  }
  add("", done, tokens.lengths.length);
  return turns;
}

function tokenSpan(text, start, end, i, tokens, policy, marks) {
  const part = text.slice(start, end);
  const token = element(`span.t.${tokens.trained[i] ? "trained" : "masked"}`, { "data-i": i });
  if (policy) {
    const logprob = tokens.logprobs[i];
    token.dataset.logprob = logprob === null ? "not finite" : (logprob / 1000).toFixed(3);
    if (logprob !== null) token.dataset.heat = HEAT.filter((least) => Math.exp(logprob / 1000) < least).length;
  }
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

// The positions of tags, golden answers in tool results, and found words. If two overlap, the first wins.
function marked(text, tokens, golden, query) {
  const starts = startsOf(tokens);
  const toolTexts = tokens.turns.filter(([role]) => role !== "assistant").map(([, start, end]) => [starts[start], starts[end]]);
  const all = tags(text);
  const add = (found) => {
    const before = all.slice();
    all.push(...found.filter((one) => !before.some((other) => other.start < one.end && one.start < other.end)));
  };
  for (const answer of golden) {
    if (answer.trim()) add(matches(text, wholeWords(answer), "mark.gold").filter((one) =>
      toolTexts.some(([start, end]) => start <= one.start && one.end <= end)));
  }
  if (query.trim()) add(matches(text, new RegExp(escaped(query.trim()), "giu"), "mark"));
  return all.sort((a, b) => a.start - b.start);
}

const matches = (text, expression, kind) => [...text.matchAll(expression)].map((match) =>
  ({ start: match.index, end: match.index + match[0].length, kind }));
const escaped = (words) => words.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
const wholeWords = (answer) => new RegExp(`(?<![\\p{L}\\p{N}])${escaped(answer.trim()).replace(/\s+/g, "\\s+")}(?![\\p{L}\\p{N}])`, "giu");

function tags(text) {
  return [...text.matchAll(TAG)].map((match) => ({
    start: match.index, end: match.index + match[0].length,
    kind: `b.tag.${match[1] ? FAMILIES[match[1]] : "special"}`,
  }));
}

// The text from `from` to `to` with its marks, without its tokens.
function decorated(text, marks, from = 0, to = text.length) {
  const parts = [];
  let at = from;
  for (const { start, end, kind } of marks) {
    if (end <= at || start >= to) continue;
    parts.push(text.slice(at, Math.max(at, start)), element(kind, {}, text.slice(Math.max(at, start), Math.min(end, to))));
    at = Math.min(end, to);
  }
  return [...parts, text.slice(at, to)];
}

// The tooltip of a token.
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
      element("span", {}, logprob === undefined ? "written by the environment: no log-prob" : `log-prob ${logprob.replace("-", "−")}${chance}`));
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
