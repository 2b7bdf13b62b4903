// What the page shows: ticked runs and the view. Kept in TensorBoard's address where the frame may write there.

export const MOST_RUNS = 3;

const START = {
  runs: [], // ticked, in the order of the list
  focus: null, // the run of panels that draw one
  step: null, // null: the latest probe, also when further ones arrive
  launch: null, // step whose forecast is drawn; null: the latest that can be checked
  unit: "step",
  linear: [], // panels whose logarithmic axis was switched off
  mode: null,
  sample: null,
};

const PREFIX = "p.ntk.";
const LISTS = new Set(["runs", "linear"]);
const NUMBERS = new Set(["step", "launch", "mode", "sample"]);

export class State {
  constructor() {
    this.listeners = [];
    Object.assign(this, structuredClone(START), remembered());
  }

  /** Changes fields and tells listeners, if anything is another value than before. */
  set(changes) {
    const changed = Object.keys(changes).filter((key) => JSON.stringify(this[key]) !== JSON.stringify(changes[key]));
    if (!changed.length) return;
    Object.assign(this, changes);
    // Browsers refuse many changes of an address in a row, which a slider would make.
    clearTimeout(this.later);
    this.later = setTimeout(() => remember(this), 250);
    for (const listener of this.listeners) listener(new Set(changed));
  }

  on(listener) { this.listeners.push(listener); }
}

function remembered() {
  const found = {};
  try {
    const words = new URLSearchParams(parent.location.hash.replace(/^#[^&?]*[&?]?/, ""));
    for (const key of Object.keys(START)) {
      const values = words.getAll(PREFIX + key);
      if (!values.length) continue;
      if (LISTS.has(key)) found[key] = values;
      else if (!NUMBERS.has(key)) found[key] = values[0];
      else if (Number.isFinite(Number(values[0]))) found[key] = Number(values[0]);
    }
  } catch { /* another origin: the page begins anew */ }
  return found;
}

function remember(state) {
  const words = new URLSearchParams();
  for (const [key, start] of Object.entries(START)) {
    if (JSON.stringify(state[key]) === JSON.stringify(start)) continue;
    for (const value of [state[key]].flat()) words.append(PREFIX + key, value);
  }
  try {
    // replaceState tells nobody, so TensorBoard's own router does not stir.
    parent.history.replaceState(parent.history.state, "", `#ntk${words.size ? "&" : ""}${words}`);
  } catch { /* another origin: memory alone */ }
}
