// Builds the page: head, tabs, overview, trajectories, setup.
const TABS = ["overview", "trajectories", "setup"];

async function main() {
  const meta = await unpack("meta");
  const rows = await unpack("rows");
  rows.callWords = meta.runs.map((run) => run.call_words);
  drawHead(meta, rows);
  const views = { trajectories: drawTrajectories(byId("trajectories"), meta, rows) };
  views.overview = drawOverview(byId("overview"), meta, (step) => {
    if (!rows.step.length) return;
    showTab("trajectories", views, true);
    views.trajectories.atStep(step);
  });
  drawSetup(byId("setup"), meta);
  byId("loading").remove();
  const follow = () => {
    const { tab, values } = address.read();
    const name = TABS.includes(tab) ? tab : "overview";
    if (name === "trajectories" && Object.keys(values).length) {
      showTab(name, views, false, values);
      views.trajectories.follow(values);
    } else showTab(name, views);
  };
  follow();
  addEventListener("popstate", follow);
  for (const name of TABS) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => showTab(name, views, true));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = TABS[(TABS.indexOf(name) + by + TABS.length) % TABS.length];
      showTab(next, views, true);
      byId(`tab-${next}`).focus();
    });
  }
  document.documentElement.dataset.ready = "";
}

function showTab(name, views, remember = false, values = null) {
  for (const other of TABS) {
    byId(other).hidden = other !== name;
    byId(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    byId(`tab-${other}`).tabIndex = other === name ? 0 : -1;
  }
  address.write(name, values ?? {}, remember);
  if (name === "overview" && !views.overview.drawn()) views.overview.redraw();
  if (name === "trajectories" && !values) views.trajectories.shown();
}

function drawHead(meta, rows) {
  const facts = meta.runs.map(({ facts: all }) => all.filter(({ name }) => name === "Model").map(({ value, note }) => [value, note].filter(Boolean).join(" · ")).join());
  byId("subtitle").textContent = [...new Set(facts.filter(Boolean)), plural(rows.step.length, "trajectory", "trajectories"),
    `written ${meta.made.slice(0, 16).replace("T", " ")} UTC`].join(" · ");
  for (const run of meta.runs) {
    const of = meta.runs.length > 1 ? `${run.name}: ` : "";
    if (!run.problems.length) continue;
    byId("notices").append(element("details.notice.problem", { open: run.problems.length <= 3 },
      element("summary", {}, `${of}${plural(run.problems.length, "part")} of this run could not be read`),
      element("ul", {}, ...run.problems.map((problem) => element("li", {}, problem)))));
  }
  const label = () => (byId("theme").textContent = theme.isDark() ? "Light" : "Dark");
  byId("theme").addEventListener("click", () => theme.set(theme.isDark() ? "light" : "dark"));
  document.addEventListener("themechange", label);
  label();
}

main().catch((error) => {
  byId("notices").append(element("p.notice.problem", {}, `This page could not draw itself: ${error.message}`));
  throw error;
});
