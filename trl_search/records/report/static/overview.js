// The overview: the main result, a row of numbers, the alarms that fired, and the charts.
function drawOverview(section, meta, onstep) {
  const compared = meta.runs.length > 1;
  section.append(compared ? comparison(meta.runs) : achieved(meta.runs[0]));
  const alarms = meta.runs.flatMap((run) => run.alarms);
  if (alarms.length) section.append(alarmStrip(alarms, meta));
  if (!meta.charts.length) {
    section.append(element("p.empty", {}, "This run has logged no metric yet."));
    return { redraw() {}, drawn: () => true };
  }
  section.append(element("p.hint", {}, "Click a point to read the trajectories of its step · drag to zoom, double-click to go back · click a name to hide its line"));
  return drawCharts(section, meta, onstep);
}

function achieved(run) {
  return element("div.achieved", {},
    element("p.headline", {}, run.headline),
    element("dl.facts", {}, ...run.facts.map((fact) => element("div.fact", {},
      element("dt", {}, fact.name), element("dd", {}, fact.value), fact.note ? element("dd.note", {}, fact.note) : null))));
}

// One row per run, in the colour that its lines have in the charts.
function comparison(runs) {
  const names = [...new Set(runs.flatMap((run) => run.facts.map((fact) => fact.name)))];
  return element("div.compared", { tabindex: 0, "aria-label": "The runs side by side" }, element("table", {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Run"), ...names.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...runs.map((run, number) => element("tr", {},
      element("th", { scope: "row" }, runMark(number), run.name),
      ...names.map((name) => {
        const fact = run.facts.find((one) => one.name === name);
        return element("td", {}, fact?.value ?? "–", fact?.note ? element("span.note", {}, fact.note) : null);
      }))))));
}

function runMark(number) {
  const mark = element(`i.run-mark${number >= 8 ? ".dashed" : ""}`, { "aria-hidden": "true" });
  mark.style.color = `var(--line-${number % 8})`;
  return mark;
}

function alarmStrip(alarms, meta) {
  const chartOf = (alarm) => meta.charts.find((chart) => chart.alarms.some((one) => one.name === alarm.name && one.run === alarm.run));
  return element("p.alarms", { role: "note" }, element("b", {}, plural(alarms.length, "alarm")), ...alarms.flatMap((alarm) => {
    const chart = chartOf(alarm);
    const of = meta.runs.length > 1 ? `${meta.runs[alarm.run].name}: ` : "";
    const said = `${of}${words(alarm.name)} at ${alarm.steps.length > 1 ? `${count(alarm.steps.length)} steps from` : "step"} ${count(alarm.steps[0])}`;
    if (!chart) return [element("span", {}, said)];
    return [element("button", { type: "button", onclick: () => byId(chartId(chart.title)).scrollIntoView({ behavior: "smooth", block: "center" }) }, said)];
  }));
}
