// The settings of each run; for several runs, the differences come first.
function drawSetup(section, meta) {
  const sides = meta.runs.map((run) => ({ folder: run.folder, ...flat(run.info) }));
  const names = [...new Set(sides.flatMap((side) => Object.keys(side)))];
  const differs = (name) => new Set(sides.map((side) => side[name])).size > 1;
  const table = (some) => element("table", {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, ""),
      ...meta.runs.map((run, i) => element("th", { scope: "col" }, meta.runs.length > 1 ? runMark(i) : null, run.name)))),
    element("tbody", {}, ...some.map((name) => element("tr", {}, element("th", { scope: "row" }, name),
      ...sides.map((side) => element("td", {}, side[name] ?? "–"))))));
  if (sides.length > 1) {
    section.append(element("h2", {}, "What differs"), table(names.filter(differs)), element("h2", {}, "What is the same"),
      table(names.filter((name) => !differs(name))));
  } else section.append(element("h2", {}, "How this run was started"), table(names));
}

function flat(value, prefix = "") {
  const entries = {};
  for (const [name, inner] of Object.entries(value)) {
    if (inner !== null && typeof inner === "object" && !Array.isArray(inner)) Object.assign(entries, flat(inner, `${prefix}${name}.`));
    else entries[prefix + name] = typeof inner === "string" ? inner : JSON.stringify(inner);
  }
  return entries;
}
