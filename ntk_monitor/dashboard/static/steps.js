// The step that is looked at, the step from which the forecast starts, and the unit of the abscissa.

import { h, nearest, short } from "./dom.js";
import { idle } from "./live.js";

const UNITS = [
  ["step", "step", "Optimizer steps"],
  ["epoch", "epoch", "Epochs"],
  ["time", "∑ lr", "Integrated learning rate: the time of gradient descent, in which runs of different learning rates compare"],
];
// Playing through a run takes about as many redraws, however many probes it has.
const FRAMES = 60;
const PAUSE = 220;

export class Steps {
  constructor(page) {
    this.page = page;
    this.slider = h("input", { type: "range", id: "step", min: 0, step: 1, "aria-label": "step", oninput: () => this.go(+this.slider.value) });
    this.button = h("button", { id: "play", className: "round", title: "Play through the run", "aria-label": "play", textContent: "▶", onclick: () => this.play() });
    this.said = h("output", { className: "said" });
    this.launch = h("input", { type: "range", id: "launch", min: 0, step: 1, "aria-label": "step from which the forecast starts",
      oninput: () => page.state.set({ launch: page.launches().steps[+this.launch.value] }) });
    this.from = h("output", { className: "said" });
    this.units = UNITS.map(([unit, name, title]) => h("button", { textContent: name, title, data: { unit }, onclick: () => page.state.set({ unit }) }));
    this.forecast = h("label", { className: "launches", title: "Where drawn forecasts start; the handle in the figures does the same" }, "forecast from ", this.launch, this.from);
    this.node = h("div", { className: "steps" }, this.button, h("label", { className: "walk" }, this.slider, this.said), this.forecast,
      h("span", { className: "units", role: "group", "aria-label": "unit of the abscissa" }, this.units));
  }

  go(place) {
    const { steps } = this.page.manifest;
    this.page.state.set({ step: place >= steps.length - 1 ? null : steps[place] });
  }

  draw() {
    const { manifest, state } = this.page;
    const steps = manifest?.steps ?? [];
    const at = state.step === null ? steps.length - 1 : nearest(steps, state.step);
    this.slider.max = Math.max(steps.length - 1, 0);
    this.slider.value = Math.max(at, 0);
    this.slider.disabled = this.button.disabled = steps.length < 2;
    const epoch = manifest?.epochs?.[at];
    const words = [state.step === null ? "latest" : `probe ${at + 1} of ${steps.length}`, typeof epoch === "number" ? `epoch ${short(epoch)}` : ""];
    this.said.replaceChildren(h("b", { textContent: at < 0 ? (manifest ? "no probe" : "") : `step ${steps[at]}` }), h("small", { textContent: at < 0 ? "" : words.filter(Boolean).join(", ") }));
    const { steps: launches, launch } = this.page.launches();
    this.forecast.hidden = launches.length < 2;
    this.launch.max = Math.max(launches.length - 1, 0);
    this.launch.value = Math.max(launches.indexOf(launch), 0);
    this.from.replaceChildren(h("b", { textContent: launch ?? "" }));
    for (const button of this.units) button.setAttribute("aria-pressed", button.dataset.unit === state.unit);
  }

  play() {
    if (this.playing) return this.pause();
    this.playing = {};
    this.button.textContent = "❚❚";
    this.button.title = "Pause";
    if (+this.slider.value >= +this.slider.max) this.go(0);
    this.frames(this.playing);
  }

  pause() {
    this.playing = null;
    this.button.textContent = "▶";
    this.button.title = "Play through the run";
  }

  /** One step after the other, each once the one before is drawn. */
  async frames(mine) {
    const by = Math.max(1, Math.round(+this.slider.max / FRAMES));
    while (true) {
      await Promise.all([idle(), new Promise((resolve) => setTimeout(resolve, PAUSE))]);
      if (this.playing !== mine) return;
      if (+this.slider.value >= +this.slider.max) return this.pause();
      this.go(Math.min(+this.slider.value + by, +this.slider.max));
    }
  }
}
