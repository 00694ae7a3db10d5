// The trajectories tab: filters and list on one side, one trajectory or its group on the other.
function drawTrajectories(section, meta, rows) {
  if (!rows.step.length) {
    section.append(element("p.empty", {}, "This run keeps no trajectories: set log_trajectories to keep some of each step."));
    return { shown() {}, follow() {}, atStep() {} };
  }
  const compared = meta.runs.length > 1;
  const wanted = { ...NO_FILTER };
  const filtering = new Filtering(rows);
  const pane = element("div.detail", { "aria-label": "Trajectory", "aria-live": "off" });
  const box = element("div.list", { role: "listbox", tabindex: 0, "aria-label": "Trajectories" });
  const found = element("output.found");
  const context = { rows, meta, query: "", open: (row) => show(row, true), compareGroup: (row) => show(row, true, true) };
  let latest = null;
  let inGroup = false;

  const list = new TrajectoryList(box, rows, { compared, onselect: (row, chosen) => draw(row, chosen) });

  function show(row, chosen, group = false) {
    inGroup = group;
    list.select(row, chosen);
  }

  async function draw(row, chosen) {
    latest = row;
    if (chosen) section.classList.add("reading");
    remember();
    const members = inGroup ? groupOf(rows, row) : [row];
    const tokens = await Promise.all(members.map((i) => tokensOf(i, meta.block)));
    if (latest !== row) return;
    section.classList.toggle("in-group", inGroup);
    if (inGroup) drawGroup(pane, context, row, members, tokens);
    else {
      drawDetail(pane, context, row, tokens[0]);
      pane.prepend(element("button.quiet.back.narrow", { type: "button", onclick: () => section.classList.remove("reading") }, "← All trajectories"));
    }
  }

  function apply() {
    context.query = wanted.query;
    const left = filtering.apply(wanted);
    found.textContent = left.length === rows.step.length ? plural(left.length, "trajectory", "trajectories")
      : `${count(left.length)} of ${count(rows.step.length)}`;
    list.show(left);
    if (!left.length) {
      pane.replaceChildren(element("p.empty", {}, "No trajectory fits these filters."));
      list.selected = latest = null;
      remember();
    } else if (left.includes(list.selected)) draw(list.selected); // found words change; the list stays at its top
    else show(left[0], false, inGroup);
  }

  // The open trajectory, by its place in the run, because row indices change when the report is written again.
  const nameOf = (row) => (row === null ? "" : [rows.run[row], rows.step[row], rows.index[row]].join("."));
  const named = (name) => {
    const [run, step, index] = name.split(".").map(Number);
    return rows.step.findIndex((_, i) => rows.run[i] === run && rows.step[i] === step && rows.index[i] === index);
  };
  function remember() {
    if (section.hidden) return;
    const changed = Object.entries(wanted).filter(([name, value]) => value !== NO_FILTER[name]);
    address.write("trajectories", { ...Object.fromEntries(changed), open: nameOf(latest), view: inGroup ? "group" : "", colour: heat.on ? "p" : "" });
  }
  heat.onchange = remember;

  const filters = filterForm(meta, rows, wanted, apply);
  const cut = Map.groupBy(meta.runs.filter((run) => run.left_out), (run) => run.left_out);
  const notes = [...cut].map(([note, of]) =>
    element("p.left-out", {}, `${compared ? `${of.map((run) => run.name).join(", ")}: ` : ""}${note}.`));
  section.append(element("div.side", {}, filters.form, ...notes,
    element("div.count", {}, found, element("span.keys", {}, "j k to move · g group · / to search")), box), pane);
  followTokens(pane, byId("tip"));

  document.addEventListener("keydown", (event) => {
    if (section.hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && typing) return event.target.blur();
    const by = { ArrowDown: 1, ArrowUp: -1, ...(typing ? {} : { j: 1, k: -1 }) }[event.key];
    const elsewhere = event.target.matches("select, input[type=number], .text, .columns, [role=tab]") && event.key.startsWith("Arrow");
    if (by && !elsewhere) list.move(by);
    else if (event.key === "/" && !typing) filters.focus();
    else if (event.key === "g" && !typing && latest !== null) show(latest, true, !inGroup);
    else return;
    event.preventDefault();
  });

  let begun = false;
  return {
    // The part of the address: filters and the open trajectory.
    follow(values) {
      for (const name of Object.keys(NO_FILTER)) wanted[name] = values[name] ?? NO_FILTER[name];
      if (!SORTS[wanted.sort]) wanted.sort = NO_FILTER.sort;
      filters.show();
      heat.set(values.colour === "p");
      const row = values.open ? named(values.open) : -1;
      begun = true;
      apply();
      if (row >= 0) show(row, true, values.view === "group");
    },
    // The trajectories of a step, or of the nearest step that has some.
    atStep(step) {
      const nearest = rows.step.reduce((best, at) => (Math.abs(at - step) < Math.abs(best - step) ? at : best), rows.step[0]);
      inGroup = false;
      section.classList.remove("reading");
      this.follow({ from: String(nearest), to: String(nearest) });
    },
    shown() {
      if (begun) {
        list.draw();
        return remember();
      }
      begun = true;
      apply();
    },
  };
}
