// What is behind a number: the samples of a mode, and a sample itself. Slides in from the right.

import { h, short } from "./dom.js";
import { Live } from "./live.js";
import { Panel } from "./panel.js";
import { address } from "./server.js";

const OF_MODE = ["mode-samples"];
const OF_SAMPLE = ["sample-row", "sample-residual"];
/** Panels that are drawn here and not among the groups. */
export const BEHIND = new Set([...OF_MODE, ...OF_SAMPLE]);

export class Drawer {
  constructor(page) {
    this.page = page;
    this.back = h("button", { className: "link", textContent: "← back to the mode", onclick: () => page.state.set({ sample: null }) });
    this.title = h("h2");
    this.body = h("div", { className: "behind" });
    this.node = h("aside", { className: "drawer", hidden: true, "aria-label": "details" },
      h("header", {}, this.title, h("button", { className: "round", title: "Close (Esc)", "aria-label": "close", textContent: "✕", id: "close", onclick: () => this.close() })), this.back, this.body);
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.close(); });
    this.lives = [];
  }

  close() { this.page.state.set({ mode: null, sample: null }); }

  /** Builds what the state asks for; the parts then keep themselves up to date. */
  draw() {
    const { mode, sample } = this.page.state;
    const kind = sample !== null ? "sample" : mode !== null ? "mode" : null;
    this.node.hidden = kind === null;
    this.back.hidden = !(sample !== null && mode !== null);
    this.title.textContent = kind === "sample" ? `Sample ${sample}` : kind === "mode" ? `Mode ${mode}` : "";
    if (kind === this.kind) return;
    this.kind = kind;
    for (const live of this.lives) live.forget();
    this.lives = [];
    if (kind === null) return;
    const panels = (names) => this.page.catalogue.panels.filter((entry) => names.includes(entry.name)).map((entry) => new Panel({ ...entry, wide: false }, this.page));
    this.lives = kind === "mode" ? [new OfMode(this.page), ...panels(OF_MODE)] : [new OfSample(this.page), ...panels(OF_SAMPLE)];
    this.body.replaceChildren(...this.lives.map((live) => live.node));
    this.node.scrollTop = 0;
  }
}

class OfMode extends Live {
  constructor(page) {
    super(h("section", { className: "of-mode" }));
    this.page = page;
  }

  question() {
    const { focus, state } = this.page;
    return focus && state.mode !== null ? address("mode", { run: focus, step: state.step, mode: state.mode, v: this.page.version([focus]) }) : null;
  }

  async show(answer) {
    const outputs = answer.outputs?.length ? strongest(answer.outputs) : "";
    const side = (title, samples) => h("section", { className: "side" }, h("h4", { textContent: title }), samples.length ? h("div", { className: "samples" }, samples.map((one) => this.sample(one))) : h("p", { className: "soft", textContent: "none" }));
    this.node.replaceChildren(
      h("p", { className: "soft", textContent: `At step ${answer.step}. Samples of one sign move together when the network learns this mode, those of the other sign the opposite way. ${outputs}` }),
      side("Loads most, positive", answer.positive), side("Loads most, negative", answer.negative));
  }

  sample(one) {
    const named = one.label === null || one.label === undefined ? `#${one.sample}` : `#${one.sample}, label ${one.label}`;
    const picture = one.thumbnail ? h("img", { src: one.thumbnail, alt: "" }) : h("span", { className: "words", textContent: one.text || `#${one.sample}` });
    return h("button", { className: one.thumbnail ? "sample" : "sample worded", title: `Sample ${named}, loading ${short(one.loading)}`, data: { sample: one.sample }, onclick: () => this.page.open({ sample: one.sample }) },
      picture, h("small", { textContent: `${named}` }), h("small", { className: "soft", textContent: short(one.loading) }));
  }

  fail(error) { this.node.replaceChildren(h("p", { className: "failed", textContent: error.message })); }
}

class OfSample extends Live {
  constructor(page) {
    super(h("section", { className: "of-sample" }));
    this.page = page;
  }

  question() {
    const { focus, state } = this.page;
    return focus && state.sample !== null ? address("sample", { run: focus, sample: state.sample, v: this.page.version([focus]) }) : null;
  }

  async show(one) {
    const label = one.label === null || one.label === undefined ? "No label is recorded." : `Label ${one.label}.`;
    this.node.replaceChildren(one.thumbnail ? h("img", { className: "large", src: one.thumbnail, alt: `sample ${one.sample}` }) : "",
      h("p", {}, h("b", { textContent: label }), one.text ? h("q", { textContent: one.text }) : ""));
  }

  fail(error) { this.node.replaceChildren(h("p", { className: "failed", textContent: error.message })); }
}

function strongest(outputs) {
  const found = outputs.map((value, i) => [Math.abs(value ?? 0), i, value]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  return `Strongest on output ${found.map(([, i, value]) => `${i} (${short(value)})`).join(", ")}.`;
}
