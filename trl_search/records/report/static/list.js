// The list of trajectories. Only visible rows are in the document.
const ROW_HEIGHT = 62;

class TrajectoryList {
  constructor(box, rows, { compared, onselect }) {
    Object.assign(this, { box, rows, compared, onselect, shown: [], selected: null });
    this.sheet = element("div.sheet");
    this.box.append(this.sheet);
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.sheet.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (row) this.select(Number(row.dataset.row), true);
    });
  }

  show(shown) {
    this.shown = shown;
    this.sheet.style.height = `${shown.length * ROW_HEIGHT}px`;
    this.box.scrollTop = 0;
    this.draw();
  }

  // `chosen`: whether the reader selected the row, or it is only the first match.
  select(row, chosen = false) {
    this.selected = row;
    const at = this.shown.indexOf(row);
    if (at >= 0) {
      const top = at * ROW_HEIGHT;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      const below = top + ROW_HEIGHT - this.box.clientHeight;
      if (below > this.box.scrollTop) this.box.scrollTop = below;
    }
    this.draw();
    this.onselect(row, chosen);
  }

  move(by) {
    if (!this.shown.length) return;
    const at = this.shown.indexOf(this.selected);
    const next = at < 0 ? 0 : Math.max(0, Math.min(this.shown.length - 1, at + by));
    this.select(this.shown[next], true);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(this.shown.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_HEIGHT) + 4);
    const drawn = [];
    for (let at = first; at < last; at++) drawn.push(this.rowAt(at));
    this.sheet.replaceChildren(...drawn);
    if (this.selected === null) this.box.removeAttribute("aria-activedescendant");
    else this.box.setAttribute("aria-activedescendant", `row-${this.selected}`);
  }

  rowAt(at) {
    const { rows } = this;
    const i = this.shown[at];
    const result = outcome(rows, i);
    const made = element(`div.row${i === this.selected ? ".selected" : ""}`, {
      id: `row-${i}`, role: "option", "data-row": i, "aria-selected": i === this.selected,
      "aria-posinset": at + 1, "aria-setsize": this.shown.length,
    },
      element(`span.verdict.${result}`, { title: result, "aria-label": result }, VERDICTS[result]),
      element("span.question", {}, rows.question[i] || "(no question)"),
      element("span.reward", { title: "reward" }, decimal(rows.reward[i])),
      element("span.facts", {},
        this.compared ? runMark(rows.run[i]) : null,
        element("span", {}, `step ${count(rows.step[i])}`),
        element("span", {}, callsOf(rows, i)),
        rows.gold[i] && rows.calls[i] ? element("span.gold-found", { title: "a golden answer was retrieved" }, "gold") : null,
        element("span", {}, plural(rows.trained[i] + rows.masked[i], "token")),
        element("span", {}, words(rows.stop_reason[i]))),
      element(`span.advantage.${rows.advantage[i] > 0 ? "up" : rows.advantage[i] < 0 ? "down" : "flat"}`,
        { title: "advantage" }, signed(rows.advantage[i])));
    made.style.top = `${at * ROW_HEIGHT}px`;
    return made;
  }
}
