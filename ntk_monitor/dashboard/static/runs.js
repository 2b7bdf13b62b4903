// Which runs are shown: a box for each of the ticked ones, and a list to choose from where there are many.

import { h } from "./dom.js";
import { MOST_RUNS } from "./state.js";

// The order of colours in figures that draw several runs.
const COLOURS = ["#2a78c2", "#e07b00", "#2e9e55"];
const FEW = 4;
const LISTED = 200;

export class Runs {
  constructor(page) {
    this.page = page;
    this.chips = h("span", { className: "chips" });
    this.filter = h("input", { type: "search", placeholder: "filter runs", "aria-label": "filter runs", oninput: () => this.list() });
    this.all = h("div", { className: "all" });
    this.summary = h("summary", { title: "Choose runs" });
    this.menu = h("details", { className: "menu" }, this.summary, h("div", { className: "sheet" }, this.filter, this.all,
      h("p", { className: "soft", textContent: `Up to ${MOST_RUNS} runs at once.` })));
    this.menu.addEventListener("toggle", () => { if (this.menu.open) { this.list(); this.filter.focus(); } });
    document.addEventListener("pointerdown", (event) => { if (!this.menu.contains(event.target)) this.menu.open = false; });
    this.focus = h("select", { id: "focus", onchange: () => page.state.set({ focus: this.focus.value }) });
    this.focused = h("label", { className: "focus", title: "Panels that draw one run draw this one" }, "details of ", this.focus);
    this.node = h("div", { className: "runs" }, this.chips, this.menu, this.focused);
  }

  draw() {
    const { runs, state } = this.page;
    // Built anew only when it differs, so that an open list and the keyboard's place survive.
    const drawn = JSON.stringify([runs, state.runs, this.page.focus]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const few = runs.length <= FEW;
    this.chips.replaceChildren(...(few ? runs : state.runs).map((run) => this.box(run)));
    this.menu.hidden = few;
    this.summary.textContent = `${state.runs.length} of ${runs.length} runs`;
    if (this.menu.open) this.list();
    this.focused.hidden = state.runs.length < 2;
    this.focus.replaceChildren(...state.runs.map((run) => h("option", { value: run, textContent: run, selected: run === this.page.focus })));
  }

  list() {
    const wanted = this.filter.value.toLowerCase();
    const found = this.page.runs.filter((run) => run.toLowerCase().includes(wanted));
    this.all.replaceChildren(...found.slice(0, LISTED).map((run) => this.box(run)));
    if (found.length > LISTED) this.all.append(h("p", { className: "soft", textContent: `and ${found.length - LISTED} more: filter them` }));
    if (!found.length) this.all.append(h("p", { className: "soft", textContent: "no run is called that" }));
  }

  box(run) {
    const { state } = this.page;
    const at = state.runs.indexOf(run);
    const full = at < 0 && state.runs.length >= MOST_RUNS;
    const input = h("input", { type: "checkbox", checked: at >= 0, disabled: full, onchange: () => this.page.tick(run, input.checked) });
    const label = h("label", { className: "run", title: full ? `${run}: untick another one first` : run, data: { run } }, input, h("span", { textContent: run }));
    if (at >= 0) label.style.setProperty("--colour", state.runs.length > 1 ? COLOURS[at] : "var(--accent)");
    return label;
  }
}
