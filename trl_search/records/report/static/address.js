// Keeps the state of the screen in the page's address, so that it can be shared as a link:
// #trajectories?step=12&outcome=wrong&open=0.12.5
const address = {
  read() {
    const [tab, query = ""] = location.hash.slice(1).split("?");
    return { tab, values: Object.fromEntries(new URLSearchParams(query)) };
  },
  // Values that are empty or null are left out. `remember` adds an entry to the history, for the back button.
  write(tab, values = {}, remember = false) {
    const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== null)).toString();
    const wanted = `#${tab}${query ? `?${query}` : ""}`;
    if (wanted === location.hash) return;
    try {
      history[remember ? "pushState" : "replaceState"](null, "", wanted);
    } catch {
      // A page in a frame, as in W&B, may be unable to change its address.
    }
  },
};
