// The curves: one card a panel, two runs in the same colours, the second one dashed.
function drawCurves(section, meta) {
  const compared = meta.runs.length > 1;
  const grid = element("div.grid");
  const legend = compared ? runLegend(meta.runs) : null;
  const hint = element("p.hint", {}, "Move over a chart to read its values in all of them · drag to zoom, double-click to go back · click a name to hide its line");
  if (meta.panels.length) section.append(element("div.above", {}, legend, hint), grid);
  else section.append(element("p.empty", {}, "This run has logged no metric yet."));
  const cards = meta.panels.map((panel) => {
    const plot = element("div.plot");
    const card = element("article.card", { "aria-label": panel.title },
      element("h2", {}, panel.title), element("p.note", {}, panel.note), plot);
    grid.append(card);
    return { draw: () => drawPanel(panel, plot, meta.runs), chart: null };
  });
  const reflecting = meta.runs.filter((run) => run.reflection.steps.length);
  if (reflecting.length) cards.push(reflectionCard(grid, meta.runs));
  const redraw = () => {
    if (section.hidden) return;
    for (const card of cards) {
      card.chart?.destroy();
      card.chart = card.draw();
    }
  };
  let width = 0;
  new ResizeObserver(() => {
    const now = grid.firstElementChild?.clientWidth ?? 0;
    if (now && now !== width) {
      width = now;
      redraw();
    }
  }).observe(grid);
  document.addEventListener("themechange", redraw);
  return { redraw, cards };
}

function runLegend(runs) {
  return element("p.runs", {}, ...runs.map((run, i) =>
    element("span", {}, element(`i.stroke${i ? ".dashed" : ""}`, { "aria-hidden": "true" }),
      element("b", {}, run.name), i ? " dashed" : " solid")));
}

const AXIS = () => ({
  stroke: paint("--faint"), font: "11px system-ui, sans-serif", size: 26, gap: 4,
  grid: { stroke: paint("--rule"), width: 1 }, ticks: { show: false },
});

// The seed's figure: one point a checkpoint, its share of reflective trajectories against its exact match.
function reflectionCard(grid, runs) {
  const plot = element("div.plot");
  const lines = runs.flatMap((run) => run.reflection.words.map((line) => [run.name, line]));
  const once = lines.filter(([, line], i) => lines.findIndex(([, other]) => other === line) === i);
  const shared = (line) => runs.length < 2 || runs.every((run) => run.reflection.words.includes(line));
  grid.append(element("article.card.wide", { "aria-label": "Reflection and exact match" },
    element("div", {}, element("h2", {}, "Reflection and exact match"),
      element("p.note", {}, "a point a checkpoint: share of reflective trajectories →, held-out exact match ↑"), plot),
    element("div.said", {}, ...once.map(([name, line]) =>
      element("p", {}, shared(line) ? null : element("b", {}, `${name} `), line)))));
  return { draw: () => drawReflection(plot, runs), chart: null };
}

function drawReflection(plot, runs) {
  const points = runs.flatMap(({ reflection }, run) => reflection.steps.map((step, i) =>
    ({ run, step, ratio: reflection.ratio[i], em: reflection.em[i] }))).sort((a, b) => a.ratio - b.ratio);
  const series = runs.map((run, number) => ({
    label: runs.length > 1 ? `${"●○"[number]} ${run.name}` : "exact match", stroke: paint("--line-0"), paths: () => null,
    points: { show: true, size: 7, width: 1.5, stroke: paint("--line-0"), fill: paint(number ? "--card" : "--line-0") },
    value: (_, value, __, at) => (value === null || value === undefined || at === null ? "–"
      : `${figure(value)} at step ${count(points[at].step)}`),
  }));
  const axis = AXIS();
  return new uPlot({
    width: plot.clientWidth, height: 190, padding: [8, 14, 0, 0],
    series: [{ label: "ratio", value: (_, value) => figure(value) }, ...series],
    scales: { x: { time: false, range: fromZero }, y: { range: fromZero } },
    axes: [{ ...axis, space: 44, values: (_, ticks) => ticks.map(figure) }, { ...axis, size: 46, values: (_, ticks) => ticks.map(figure) }],
    cursor: { y: false, points: { size: 9 }, drag: { x: false } },
    legend: { markers: { show: false } },
  }, [points.map((point) => point.ratio), ...runs.map((_, run) => points.map((point) => (point.run === run ? point.em : null)))], plot);
}

function drawPanel(panel, plot, runs) {
  const steps = [...new Set(panel.lines.flatMap((line) => line.runs.flatMap(([at]) => at)))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const data = [steps];
  // Away from the pointer, the legend has what came last.
  const series = [{ label: "step", value: (_, step) => count(step ?? steps.at(-1)) }];
  panel.lines.forEach((line, i) => line.runs.forEach(([at, values], run) => {
    if (!at.length) return;
    const column = Array(steps.length).fill(undefined); // not logged at that step: bridged; null is a gap
    at.forEach((step, j) => (column[place.get(step)] = values[j]));
    data.push(column);
    const colour = paint(`--line-${i % 8}`);
    series.push({
      // Beside its solid line, a dashed one needs no name of its own; uPlot would call "" a Value.
      label: run && line.runs[0][0].length ? "\u200b" : line.label,
      stroke: colour, width: 1.75,
      dash: run ? [5, 4] : undefined,
      points: { show: at.length <= 24, size: 5, fill: run ? paint("--card") : colour, stroke: colour },
      value: (_, value, __, at) => figure(at === null ? values.at(-1) : value),
      dashed: run > 0,
    });
  }));
  const axis = AXIS();
  return new uPlot({
    width: plot.clientWidth, height: 190, padding: [8, 10, 0, 0],
    series,
    scales: { x: { time: false }, y: { range: fromZero } },
    axes: [
      { ...axis, grid: { show: false }, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000], space: 44,
        values: (_, ticks) => ticks.map((tick) => count(tick)) },
      { ...axis, size: 46, values: (_, ticks) => ticks.map((tick) => figure(tick)) },
    ],
    cursor: { sync: { key: "steps", scales: ["x", null] }, points: { size: 7 }, y: false },
    legend: { markers: { width: 2, dash: (_, i) => (series[i].dashed ? "dashed" : "solid") } },
  }, data, plot);
}

function fromZero(_, low, high) {
  if (low === null || (low === 0 && high === 0)) return [0, 1];
  return uPlot.rangeNum(low, high, { min: { pad: 0.08, soft: 0, mode: 1 }, max: { pad: 0.08, soft: 0, mode: 1 } });
}

// A canvas knows no CSS variables.
function paint(name) {
  const probe = element("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
