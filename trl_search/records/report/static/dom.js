// Helpers for elements and numbers. Text from a run becomes only text nodes or attribute values, never markup.
const byId = (id) => document.getElementById(id);

// element("p.note", {title: "…"}, "text", child, …)
function element(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const whole = new Intl.NumberFormat("en-US");
const short = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

const count = (value) => whole.format(value);

function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(2).replace("-", "−");
  return short.format(value).replace("-", "−");
}

function signed(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
}

const decimal = (value, digits = 2) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
const plural = (n, word, words = `${word}s`) => `${count(n)} ${n === 1 ? word : words}`;
// "2 searches", or with another tool "2 calls of open".
const callsOf = (rows, i) => plural(rows.calls[i], ...rows.callWords[rows.run[i]]);
const words = (name) => name.replaceAll("_", " ");
