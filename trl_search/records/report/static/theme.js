// Light or dark theme: the reader's last choice, else the system's. Runs in the head, before anything is drawn.
const theme = {
  key: "trl-search-report-theme",
  chosen() {
    try {
      return localStorage.getItem(this.key);
    } catch {
      return null; // browsers may disable storage for local files
    }
  },
  isDark() {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  set(name) {
    document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem(this.key, name);
    } catch {
      // without storage, the choice lasts for this visit
    }
    document.dispatchEvent(new Event("themechange"));
  },
};
if (["light", "dark"].includes(theme.chosen())) document.documentElement.dataset.theme = theme.chosen();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.dispatchEvent(new Event("themechange")),
);
