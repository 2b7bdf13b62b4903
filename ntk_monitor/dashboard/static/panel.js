// One figure: heading, plot, what it tells, and buttons. It asks for nothing until it comes into view.

import { h, plainWords } from "./dom.js";
import { picture, table } from "./exports.js";
import { dressed, OPTIONS } from "./figure.js";
import { Handle } from "./launch.js";
import { Live } from "./live.js";
import { address } from "./server.js";

const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.panel.visible = entry.isIntersecting;
    entry.target.panel.update();
  }
}, { rootMargin: "150px" });

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.panel.heard && target.clientWidth) Plotly.Plots.resize(target);
});

export class Panel extends Live {
  /** @param entry of the catalogue. @param page the whole: state, runs, theme. */
  constructor(entry, page) {
    super(h("figure", { className: entry.wide ? "panel wide" : "panel", id: `panel-${entry.name}`, data: { panel: entry.name } }));
    this.entry = entry;
    this.page = page;
    this.visible = false;
    this.plot = h("div", { className: "plot" });
    this.heading = h("h3", { textContent: entry.name.replaceAll("-", " ") });
    this.about = h("span", { className: "tip", role: "tooltip" });
    this.caption = h("figcaption", { textContent: entry.tells });
    const box = h("div", { className: "box" }, this.plot);
    this.node.append(h("header", {}, this.heading, h("span", { className: "about", tabIndex: 0, "aria-label": "which kernel" }, "i", this.about), this.tools()), box, this.caption);
    if (entry.depends.includes("launch")) this.handle = new Handle(box, () => this.launches(), (launch) => page.state.set({ launch }));
    this.node.panel = this.plot.panel = this;
    inView.observe(this.node);
    resized.observe(this.plot);
  }

  tools() {
    const button = (text, title, onclick) => h("button", { textContent: text, title, onclick, data: { does: text.toLowerCase() } });
    const name = () => `ntk-${this.entry.name}`;
    const found = [
      button("PNG", "Save as a picture", () => this.figure && picture(this.plot, this.figure, name(), "png")),
      button("SVG", "Save as a vector graphic", () => this.figure && picture(this.plot, this.figure, name(), "svg")),
      button("CSV", "Save the numbers", () => this.figure && table(this.plot, name())),
    ];
    if (this.entry.depends.includes("log")) {
      this.log = button("log", "Logarithmic or linear axis", () => {
        const { linear } = this.page.state;
        const off = linear.includes(this.entry.name);
        this.page.state.set({ linear: off ? linear.filter((one) => one !== this.entry.name) : [...linear, this.entry.name] });
      });
      found.unshift(this.log);
    }
    return h("span", { className: "tools" }, found);
  }

  question() {
    const { state } = this.page;
    const logarithmic = !state.linear.includes(this.entry.name);
    this.log?.setAttribute("aria-pressed", logarithmic);
    const runs = this.page.shown(this.entry.several);
    if (!runs.length) return null;
    const fields = { step: state.step, launch: state.launch, unit: state.unit, log: logarithmic ? 1 : 0, mode: state.mode, sample: state.sample };
    const asked = Object.fromEntries(Object.entries(fields).filter(([key]) => this.entry.depends.includes(key)));
    return address("figure", { panel: this.entry.name, run: runs, focus: this.page.focus, ...asked, v: this.page.version(runs) });
  }

  async show(figure) {
    this.figure = figure;
    await this.draw();
    const { title, meta } = figure.layout;
    this.heading.textContent = plainWords(title?.text) || this.heading.textContent;
    if (meta?.tooltip) this.caption.textContent = plainWords(meta.tooltip);
    this.heading.title = this.about.textContent = [plainWords(meta?.kernel) || this.page.kernel(), this.page.catalogue.about].filter(Boolean).join(". ").replace("..", ".");
  }

  async draw() {
    await this.page.plotly;
    if (!this.figure) return;
    const layout = dressed(this.figure.layout, this.page.theme);
    const height = layout.height ?? tall(layout);
    this.plot.style.height = height ? `${height}px` : "";
    // What was zoomed stays so while new probes arrive.
    layout.uirevision = [this.page.focus, this.page.state.unit, this.page.state.linear.includes(this.entry.name)].join();
    await Plotly.react(this.plot, this.figure.data, layout, OPTIONS);
    if (!this.heard) {
      this.heard = true;
      this.plot.on("plotly_click", (event) => this.clicked(event.points[0]));
      this.plot.on("plotly_afterplot", () => this.handle?.place(this.plot));
    }
    this.hold();
    this.plot.classList.toggle("clickable", Boolean(this.figure.layout.meta?.click));
  }

  /** Puts the handle where the page says, once there is a plot to hold. */
  hold() {
    if (this.heard && this.figure) this.handle?.place(this.plot);
  }

  /** A figure says in its meta what a click on one of its points opens, and how the point names it. */
  clicked(point) {
    const { click, order } = this.figure?.layout.meta ?? {};
    if (!point || !click) return;
    const named = [point.customdata].flat()[0];
    const found = click === "mode" ? named ?? point.x : named ?? order?.[point.x];
    if (Number.isInteger(found)) this.page.open({ [click]: found });
  }

  /** The launches along this figure's abscissa. */
  launches() {
    const { steps, xs, launch } = this.page.launches();
    const drawn = this.figure?.layout.meta?.launches;
    return { launch, steps: drawn?.map(([step]) => step) ?? steps, xs: drawn?.map(([, x]) => x) ?? xs };
  }

  fail(error) {
    this.figure = null;
    globalThis.Plotly?.purge(this.plot);
    this.heard = false;
    if (this.handle) this.handle.node.hidden = true;
    this.plot.replaceChildren(h("p", { className: "failed", textContent: error.message }));
  }

  forget() {
    super.forget();
    inView.unobserve(this.node);
    resized.unobserve(this.plot);
    globalThis.Plotly?.purge(this.plot);
  }
}

// Of a figure that stacks plots, each row needs this much.
const ROW = 150;

/** The height of a figure of three rows of plots or more; null for others, which are as high as the page says. */
function tall(layout) {
  const axes = Object.entries(layout).filter(([key, axis]) => /^yaxis\d*$/.test(key) && axis.domain);
  const rows = new Set(axes.map(([, axis]) => axis.domain[0].toFixed(3))).size;
  return rows > 2 ? rows * ROW : null;
}
