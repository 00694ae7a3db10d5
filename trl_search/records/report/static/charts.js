// The charts, one card each. A line has the colour of its metric, or of its run if runs are compared.
const ALARM_HALF = 0.5; // an alarm's band extends half a step to both sides

function drawCharts(box, meta, onstep) {
  const cards = [];
  const sections = Map.groupBy(meta.charts, (chart) => chart.section);
  for (const [name, charts] of sections) {
    const grid = element("div.grid");
    box.append(element("section.charts", { "aria-label": name }, element("h2.section", {}, name), grid));
    for (const chart of charts) {
      const plot = element("div.plot");
      grid.append(element("article.card", { "aria-label": chart.title, id: chartId(chart.title) },
        element("h3", {}, chart.title), element("p.note", {}, chart.note), plot, ...advice(chart.alarms)));
      cards.push({ draw: () => drawChart(chart, plot, meta, onstep), plot: null });
    }
    if (name === "Behaviour" && meta.runs.some((run) => run.reflection)) cards.push(reflectionCard(grid, meta.runs));
  }
  const redraw = () => {
    if (box.closest("[hidden]")) return;
    for (const card of cards) {
      card.plot?.destroy();
      card.plot = card.draw();
    }
  };
  let width = 0;
  new ResizeObserver(() => {
    const now = box.querySelector(".card")?.clientWidth ?? 0;
    if (now && now !== width) {
      width = now;
      redraw();
    }
  }).observe(box);
  document.addEventListener("themechange", redraw);
  return { redraw, drawn: () => cards.every((card) => card.plot) };
}

// The meaning and the advice of each alarm on a chart.
function advice(alarms) {
  const named = new Map(alarms.filter((alarm) => alarm.means).map((alarm) => [alarm.name, alarm]));
  return [...named.values()].map((alarm) => element("p.advice", {}, element("b", {}, words(alarm.name)), ` ${alarm.means}: ${alarm.advice}.`));
}

const chartId = (title) => `chart-${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;

const AXIS = () => ({
  stroke: paint("--faint"), font: "11px system-ui, sans-serif", size: 26, gap: 4,
  grid: { stroke: paint("--rule"), width: 1 }, ticks: { show: false },
});

const colourOf = (number) => paint(`--line-${number % 8}`);

function drawChart(chart, box, meta, onstep) {
  const steps = [...new Set([0, chart.last, ...chart.lines.flatMap((line) => line.steps)])].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const data = [steps];
  // Without a pointer on the chart, the legend shows the last value of each line.
  const series = [{ label: "step", value: (_, step) => count(step ?? chart.last) }];
  const add = (line, values, options) => {
    const column = Array(steps.length).fill(undefined); // undefined is bridged: not logged at that step; null is a gap
    line.steps.forEach((step, i) => (column[place.get(step)] = values[i]));
    data.push(column);
    series.push({ width: 1.75, ...options });
  };
  for (const line of chart.lines) {
    const colour = line.level ? paint("--faint") : colourOf(line.colour);
    const shown = {
      label: line.label, stroke: colour,
      dash: line.level ? [2, 4] : line.colour >= 8 ? [6, 4] : undefined,
      points: { show: !line.level && line.steps.length <= 24, size: 5, fill: colour, stroke: colour },
      value: (_, __, ___, at) => figure(valueAt(line, at === null ? null : steps[at])),
      class: line.level ? "unlisted" : undefined,
    };
    if (line.mean.length) {
      add(line, line.values, { stroke: colour, alpha: 0.25, width: 1, class: "unlisted", points: { show: false } });
      add(line, line.mean, { ...shown, points: { show: false } });
    } else add(line, line.values, shown);
  }
  const axis = AXIS();
  const plot = new uPlot({
    width: box.clientWidth, height: 190, padding: [chart.alarms.length ? 16 : 8, 10, 0, 0],
    series,
    scales: { x: { time: false }, y: { range: fromZero } },
    axes: [
      { ...axis, grid: { show: false }, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000], space: 44,
        values: (_, ticks) => ticks.map((tick) => count(tick)) },
      { ...axis, size: 46, values: (_, ticks) => ticks.map((tick) => figure(tick)) },
    ],
    cursor: { sync: { key: "steps", scales: ["x", null] }, points: { size: 7 }, y: false },
    legend: { markers: { width: 2, dash: (_, i) => (series[i].dash ? "dashed" : "solid") } },
    hooks: { drawClear: [(plot) => drawAlarms(plot, chart.alarms, meta)], draw: [(plot) => nameLevels(plot, chart.lines)] },
  }, data, box);
  openOnClick(plot, onstep);
  return plot;
}

// The value at a step, or the last one; a line that was measured less often keeps its value until the next.
function valueAt(line, step) {
  if (step === null) return line.values.at(-1);
  const at = line.level ? 0 : line.steps.indexOf(step);
  return at < 0 ? null : line.values[at];
}

// A click opens the trajectories of the step, after a delay, because a double click zooms out.
function openOnClick(plot, onstep) {
  let waiting = 0;
  plot.over.addEventListener("click", (event) => {
    clearTimeout(waiting);
    const at = plot.cursor.idx;
    if (event.detail === 1 && at !== null && at !== undefined) waiting = setTimeout(() => onstep(plot.data[0][at]), 250);
  });
}

// A band at each step where an alarm fired, with its name at the first one.
function drawAlarms(plot, alarms, meta) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textBaseline = "bottom";
  const first = new Map(); // step -> names
  for (const alarm of alarms) {
    ctx.fillStyle = paint("--alarm");
    for (const [start, end] of stretches(alarm.steps)) {
      const left = Math.max(bbox.left, plot.valToPos(start - ALARM_HALF, "x", true));
      const right = Math.min(bbox.left + bbox.width, plot.valToPos(end + ALARM_HALF, "x", true));
      if (right > left) ctx.fillRect(left, bbox.top, right - left, bbox.height);
    }
    const name = meta.runs.length > 1 ? `${words(alarm.name)}, ${meta.runs[alarm.run].name}` : words(alarm.name);
    first.set(alarm.steps[0], [...(first.get(alarm.steps[0]) ?? []), name]);
  }
  ctx.fillStyle = paint("--alarm-ink");
  for (const [step, names] of first) {
    const text = `▾ ${names.join(", ")}`;
    const at = plot.valToPos(step, "x", true) - 4 * devicePixelRatio;
    const room = bbox.left + bbox.width - ctx.measureText(text).width;
    if (at >= bbox.left - 5 * devicePixelRatio) ctx.fillText(text, Math.min(at, room), bbox.top - 1);
  }
  ctx.restore();
}

// Dotted lines have their names on them.
function nameLevels(plot, lines) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.fillStyle = paint("--faint");
  ctx.textAlign = "right";
  ctx.textBaseline = "bottom";
  for (const line of lines.filter((one) => one.level)) {
    const at = plot.valToPos(line.values[0], "y", true);
    ctx.fillText(`${line.label} ${figure(line.values[0])}`, bbox.left + bbox.width, at - 2 * devicePixelRatio);
  }
  ctx.restore();
}

// Joins neighbouring steps into ranges: [3, 4, 5, 9] is [[3, 5], [9, 9]].
function stretches(steps) {
  const found = [];
  for (const step of steps) {
    if (found.length && found.at(-1)[1] === step - 1) found.at(-1)[1] = step;
    else found.push([step, step]);
  }
  return found;
}

// Reflection against exact match, one point per checkpoint: the reflection figure of Seungyoun Shin's reproduction of
// Search-R1 (June 2025).
function reflectionCard(grid, runs) {
  const box = element("div.plot");
  const reflecting = runs.filter((run) => run.reflection);
  grid.append(element("article.card.wide", { "aria-label": "Reflection and exact match" },
    element("div", {}, element("h3", {}, "Reflection and exact match"),
      element("p.note", {}, "one point per checkpoint: share of reflective trajectories →, held-out exact match ↑"), box),
    element("div.said", {}, ...reflecting.flatMap((run) => run.reflection.words.map((line, i) =>
      element("p", {}, runs.length > 1 && !i ? element("b", {}, `${run.name} `) : null, line))))));
  return { draw: () => drawReflection(box, reflecting, runs), plot: null };
}

function drawReflection(box, reflecting, runs) {
  const points = reflecting.flatMap((run, number) => run.reflection.points.map((point) => ({ ...point, number })))
    .sort((a, b) => a.ratio - b.ratio);
  const series = reflecting.map((run) => {
    const colour = colourOf(runs.length > 1 ? runs.indexOf(run) : 0);
    return {
      label: runs.length > 1 ? run.name : "exact match", stroke: colour, paths: () => null,
      points: { show: true, size: 7, width: 1.5, stroke: colour, fill: colour },
      value: (_, value, __, at) => (value === null || value === undefined || at === null ? "–"
        : `${figure(value)} at step ${count(points[at].step)}`),
    };
  });
  const axis = AXIS();
  return new uPlot({
    width: box.clientWidth, height: 190, padding: [8, 14, 0, 0],
    series: [{ label: "share", value: (_, value) => figure(value) }, ...series],
    scales: { x: { time: false, range: fromZero }, y: { range: fromZero } },
    axes: [{ ...axis, space: 44, values: (_, ticks) => ticks.map(figure) }, { ...axis, size: 46, values: (_, ticks) => ticks.map(figure) }],
    cursor: { y: false, points: { size: 9 }, drag: { x: false } },
    legend: { markers: { show: runs.length > 1, width: 2 } },
  }, [points.map((point) => point.ratio),
    ...reflecting.map((_, number) => points.map((point) => (point.number === number ? point.em : null)))], box);
}

function fromZero(_, low, high) {
  if (low === null || (low === 0 && high === 0)) return [0, 1];
  return uPlot.rangeNum(low, high, { min: { pad: 0.08, soft: 0, mode: 1 }, max: { pad: 0.08, soft: 0, mode: 1 } });
}

// A canvas cannot use CSS variables.
function paint(name) {
  const probe = element("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
