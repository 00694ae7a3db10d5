// Puts the page together: head, tabs, curves, trajectories, setup.
const TABS = ["curves", "trajectories", "setup"];

async function main() {
  const meta = await unpack("meta");
  const rows = await unpack("rows");
  drawHead(meta, rows);
  const views = { curves: drawCurves(byId("curves"), meta), trajectories: drawTrajectories(byId("trajectories"), meta, rows) };
  drawSetup(byId("setup"), meta);
  byId("loading").remove();
  showTab(TABS.find((name) => location.hash === `#${name}`) ?? "curves", views);
  for (const name of TABS) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => showTab(name, views));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = TABS[(TABS.indexOf(name) + by + TABS.length) % TABS.length];
      showTab(next, views);
      byId(`tab-${next}`).focus();
    });
  }
  document.documentElement.dataset.ready = "";
}

function showTab(name, views) {
  for (const other of TABS) {
    byId(other).hidden = other !== name;
    byId(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    byId(`tab-${other}`).tabIndex = other === name ? 0 : -1;
  }
  history.replaceState(null, "", `#${name}`);
  if (name === "curves" && views.curves.cards.some((card) => !card.chart)) views.curves.redraw();
  if (name === "trajectories") views.trajectories.shown();
}

function drawHead(meta, rows) {
  const facts = meta.runs.map(({ info }) => [info.model, info.protocol].filter((fact) => typeof fact === "string").join(" · "));
  byId("subtitle").textContent = [...new Set(facts.filter(Boolean)), plural(rows.step.length, "trajectory", "trajectories"),
    `written ${meta.made.slice(0, 16).replace("T", " ")} UTC`].join(" · ");
  for (const run of meta.runs) {
    const of = meta.runs.length > 1 ? `${run.name}: ` : "";
    for (const [name, step, times] of run.alarms) {
      byId("notices").append(element("p.notice", {}, element("b", {}, `${of}Alarm: ${words(name)}`),
        ` rang first at step ${count(step)}, at ${plural(times, "step")} in all.`));
    }
    if (run.problems.length) {
      byId("notices").append(element("details.notice.problem", { open: run.problems.length <= 3 },
        element("summary", {}, `${of}${plural(run.problems.length, "part")} of this run could not be read`),
        element("ul", {}, ...run.problems.map((problem) => element("li", {}, problem)))));
    }
  }
  const label = () => (byId("theme").textContent = theme.isDark() ? "Light" : "Dark");
  byId("theme").addEventListener("click", () => theme.set(theme.isDark() ? "light" : "dark"));
  document.addEventListener("themechange", label);
  label();
}

function drawTrajectories(section, meta, rows) {
  if (!rows.step.length) {
    section.append(element("p.empty", {}, "This run keeps no trajectories: set log_trajectories to keep some of each step."));
    return { shown() {} };
  }
  const compared = meta.runs.length > 1;
  const wanted = { ...NO_FILTER };
  const filtering = new Filtering(rows);
  const pane = element("div.detail", { "aria-label": "Trajectory", "aria-live": "off" });
  const box = element("div.list", { role: "listbox", tabindex: 0, "aria-label": "Trajectories" });
  const found = element("output.found");
  const context = { rows, meta, query: "", open: (row) => list.select(row) };
  let latest = null;
  const show = async (row) => {
    latest = row;
    const tokens = await tokensOf(row, meta.block);
    if (latest === row) drawDetail(pane, context, row, tokens);
  };
  const list = new TrajectoryList(box, rows, { compared, onselect: show });
  const apply = () => {
    context.query = wanted.query;
    const shown = filtering.apply(wanted);
    found.textContent = shown.length === rows.step.length ? plural(shown.length, "trajectory", "trajectories")
      : `${count(shown.length)} of ${count(rows.step.length)}`;
    list.show(shown);
    if (!shown.length) {
      pane.replaceChildren(element("p.empty", {}, "No trajectory fits these filters."));
      list.selected = latest = null;
    } else if (shown.includes(list.selected)) show(list.selected); // found words are marked anew; the list stays at its top
    else list.select(shown[0]);
  };
  const { bar, search } = controls(meta, rows, wanted, apply);
  const notes = meta.runs.filter((run) => run.left_out).map((run) =>
    element("p.left-out", {}, `${compared ? `${run.name}: ` : ""}${run.left_out}.`));
  section.append(element("div.side", {}, bar, ...notes, element("div.count", {}, found, element("span.keys", {}, "j k to move · / to search")), box), pane);
  followTokens(pane, byId("tip"));
  document.addEventListener("keydown", (event) => {
    if (section.hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && typing) return event.target.blur();
    const by = { ArrowDown: 1, ArrowUp: -1, ...(typing ? {} : { j: 1, k: -1 }) }[event.key];
    const elsewhere = event.target.matches("select, input[type=number], .text, [role=tab]") && event.key.startsWith("Arrow");
    if (by && !elsewhere) list.move(by);
    else if (event.key === "/" && !typing) search.focus();
    else return;
    event.preventDefault();
  });
  let begun = false;
  return {
    shown() {
      if (begun) return list.draw();
      begun = true;
      apply();
    },
  };
}

function controls(meta, rows, wanted, apply) {
  const inputs = {};
  const change = (name) => (event) => {
    wanted[name] = event.target.value;
    apply();
  };
  const select = (name, label, options) => {
    inputs[name] = element("select", { "aria-label": label, name, onchange: change(name) },
      ...options.map(([value, text]) => element("option", { value }, text)));
    return inputs[name];
  };
  const stepInput = (name, label, placeholder) => {
    inputs[name] = element("input", { type: "number", "aria-label": label, name, placeholder, oninput: change(name) });
    return inputs[name];
  };
  let waiting = 0;
  const search = element("input", { type: "search", name: "query", "aria-label": "Search", placeholder: "Search question, answer and text",
    oninput: (event) => {
      wanted.query = event.target.value;
      clearTimeout(waiting);
      waiting = setTimeout(apply, 120);
    } });
  inputs.query = search;
  const direction = element("button", { type: "button", name: "direction", onclick: () => turn(!wanted.down) && apply() });
  const turn = (down) => {
    wanted.down = down;
    direction.textContent = down ? "↓" : "↑";
    direction.title = down ? "largest first" : "smallest first";
    direction.setAttribute("aria-label", `Order: ${direction.title}`);
    return true;
  };
  turn(false);
  const reasons = [...new Set(rows.stop_reason)].filter(Boolean).sort();
  const reset = element("button", { type: "button", name: "reset", onclick: () => {
    Object.assign(wanted, NO_FILTER);
    for (const [name, input] of Object.entries(inputs)) input.value = NO_FILTER[name];
    turn(false);
    apply();
  } }, "Reset");
  let lowest = Infinity;
  let highest = -Infinity;
  for (const step of rows.step) {
    lowest = Math.min(lowest, step);
    highest = Math.max(highest, step);
  }
  const bar = element("form.controls", { role: "search", onsubmit: (event) => event.preventDefault() },
    search,
    element("div", {},
      select("outcome", "Outcome", [["", "Any outcome"], ["correct", "Correct"], ["wrong", "Wrong"], ["failed", "Failed"]]),
      select("searched", "Searched", [["", "Any searches"], ["yes", "Searched"], ["no", "Did not search"]]),
      select("stop", "Ended by", [["", "Any ending"], ...reasons.map((reason) => [reason, words(reason)])])),
    meta.runs.length > 1 ? element("div", {},
      select("run", "Run", [["", "Both runs"], ...meta.runs.map((run, i) => [String(i), `${"AB"[i]} · ${run.name}`])])) : null,
    element("div", {},
      element("label", {}, "Steps", stepInput("from", "From step", count(lowest)), "–", stepInput("to", "To step", count(highest))),
      element("label", {}, "Sort", select("sort", "Sort by", Object.entries(SORTS).map(([name, [label]]) => [name, label])), direction),
      reset));
  inputs.sort.value = wanted.sort;
  return { bar, search };
}

// How each run was started; of two runs, what differs first.
function drawSetup(section, meta) {
  const sides = meta.runs.map((run) => ({ folder: run.folder, ...flat(run.info) }));
  const names = [...new Set(sides.flatMap((side) => Object.keys(side)))];
  const differs = (name) => new Set(sides.map((side) => side[name])).size > 1;
  const table = (some) => element("table", {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, ""), ...meta.runs.map((run) => element("th", { scope: "col" }, run.name)))),
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

main().catch((error) => {
  byId("notices").append(element("p.notice.problem", {}, `This page could not draw itself: ${error.message}`));
  throw error;
});
