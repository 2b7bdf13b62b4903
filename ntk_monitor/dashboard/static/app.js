// The page as a whole: what is known of the runs, which parts there are, and when they look again.

import { Drawer, BEHIND } from "./drawer.js";
import { h, nearest, slug } from "./dom.js";
import { Cards, Findings, go } from "./head.js";
import { dark, listen, seen, watch } from "./host.js";
import { update } from "./live.js";
import { Modes } from "./modes.js";
import { Panel } from "./panel.js";
import { Runs } from "./runs.js";
import { address, ask, script } from "./server.js";
import { MOST_RUNS, State } from "./state.js";
import { Steps } from "./steps.js";

const EVERY = 10000;
const SOON = 2000;
const TABLE_OF_MODES = "residual";

class Page {
  constructor() {
    this.state = new State();
    this.runs = [];
    this.versions = new Map();
    this.manifests = new Map();
    this.chosen = null;
  }

  get theme() { return this.chosen ?? (dark() ? "dark" : "light"); }
  get focus() { return this.state.runs.includes(this.state.focus) ? this.state.focus : this.state.runs[0] ?? null; }
  get manifest() { return this.manifests.get(this.focus); }

  /** The runs that a panel draws, of those of which nothing says that they cannot be read. */
  shown(several) {
    const readable = (run) => this.versions.has(run) && !this.manifests.get(run)?.error;
    if (!this.focus || !readable(this.focus)) return [];
    return several ? this.state.runs.filter(readable) : [this.focus];
  }

  version(runs) { return runs.map((run) => this.versions.get(run) ?? "").join(); }
  kernel() { return this.manifest?.kernel ?? ""; }

  /** Steps whose forecasts can be drawn, their abscissae, and the one that is. */
  launches() {
    const { manifest, state } = this;
    const steps = manifest?.launches ?? [];
    const all = manifest?.steps ?? [];
    const axis = { step: all, epoch: manifest?.epochs ?? [], time: manifest?.times ?? [] }[state.unit] ?? all;
    const chosen = state.launch === null ? manifest?.launch : steps[nearest(steps, state.launch)];
    return { steps, xs: steps.map((step) => axis[all.indexOf(step)] ?? null), launch: chosen ?? null };
  }

  tick(run, on) {
    const ticked = new Set(this.state.runs);
    if (on && ticked.size < MOST_RUNS) ticked.add(run);
    else ticked.delete(run);
    this.state.set({ runs: this.runs.filter((one) => ticked.has(one)) });
  }

  /** Shows what is behind a mode or a sample. */
  open(changes) { this.state.set(changes.mode === undefined ? changes : { sample: null, ...changes }); }

  async load() {
    const [catalogue] = await Promise.all([ask(address("catalogue")), this.list()]);
    this.catalogue = catalogue;
    await this.glance();
  }

  /** Asks which runs there are; names alone, so that many of them cost nothing. */
  async list() {
    const before = this.runs;
    this.runs = (await ask(address("runs"))).runs;
    const kept = this.state.runs.filter((run) => this.runs.includes(run));
    // Where runs turn up for the first time, a few of them are ticked; later that is the reader's choice alone.
    const chosen = kept.length || before.length ? kept : this.runs.slice(this.runs.length <= MOST_RUNS ? 0 : -1);
    this.state.set({ runs: chosen });
    // TensorBoard may not have looked into its logdir yet.
    if (!this.runs.length && seen()) setTimeout(() => this.refresh(), SOON);
  }

  /** Asks every ticked run whether it has grown: little, so that figures are asked for before a long run is read. */
  async glance() {
    await Promise.all(this.state.runs.map(async (run) => {
      try {
        this.versions.set(run, (await ask(address("version", { run }))).version);
      } catch (error) {
        if (!this.manifests.has(run)) this.manifests.set(run, { run, steps: [], error: error.message, notes: [] });
      }
    }));
  }

  /** Asks the ticked runs that have grown, or are seen in another unit now, what can be chosen. */
  async look() {
    const { unit } = this.state;
    await Promise.all(this.state.runs.map(async (run) => {
      const version = this.versions.get(run);
      const known = this.manifests.get(run);
      if (version === undefined || (known?.version === version && known.unit === unit)) return;
      try {
        this.manifests.set(run, { ...await ask(address("manifest", { run, unit })), unit });
      } catch (error) {
        if (!known) this.manifests.set(run, { run, steps: [], error: error.message, notes: [] });
      }
    }));
  }

  build(body) {
    this.runsBar = new Runs(this);
    this.steps = new Steps(this);
    this.drawer = new Drawer(this);
    this.subject = h("p", { className: "subject" });
    this.notes = h("div", { className: "notes" });
    this.empty = h("section", { className: "nothing", hidden: true });
    const drawn = this.catalogue.panels.filter((entry) => !BEHIND.has(entry.name));
    const groups = Object.entries(this.catalogue.groups).filter(([group]) => drawn.some((entry) => entry.group === group));
    const theme = h("button", { className: "round", id: "theme", title: "Light or dark", "aria-label": "light or dark", textContent: "◐",
      onclick: () => { this.chosen = this.theme === "dark" ? "light" : "dark"; this.dress(); } });
    const nav = h("nav", { "aria-label": "groups of panels" }, groups.map(([group]) => h("button", { className: "link", textContent: group, onclick: () => go(group) })));
    this.main = h("main", {}, new Findings(this).node, new Cards(this).node, groups.map(([group, question]) => this.group(group, question, drawn)));
    body.append(
      h("div", { className: "bar" }, this.runsBar.node, nav, theme, this.steps.node),
      this.empty, this.subject, this.main,
      h("footer", {}, this.notes, h("p", { textContent: `${this.catalogue.about} Drag in a figure to zoom, double-click to see all of it again.` }), h("p", { textContent: `ntk_monitor ${this.catalogue.version}` })),
      this.drawer.node);
  }

  group(group, question, drawn) {
    const panels = drawn.filter((entry) => entry.group === group).map((entry) => new Panel(entry, this));
    const table = group === TABLE_OF_MODES ? new Modes(this) : null;
    this.modes = table ?? this.modes;
    return h("section", { className: "group", id: `group-${slug(group)}` }, h("h2", {}, h("span", { textContent: group }), h("small", { textContent: question })),
      h("div", { className: "grid" }, panels.map((panel) => panel.node), table?.node));
  }

  draw() {
    const { manifest, focus } = this;
    this.runsBar.draw();
    this.steps.draw();
    this.drawer.draw();
    this.modes?.mark();
    for (const node of document.querySelectorAll("figure.panel")) node.panel?.hold();
    const reason = nothing(this.runs, focus, manifest);
    this.empty.hidden = !reason;
    this.main.hidden = this.subject.hidden = Boolean(reason);
    this.empty.replaceChildren(...(reason ?? []));
    if (manifest && !reason) this.subject.replaceChildren(h("b", { textContent: focus }), h("span", { textContent: subject(manifest) }));
    this.notes.replaceChildren(...(manifest?.notes ?? []).map((note) => h("p", { className: "note", textContent: note })));
    update();
  }

  dress() {
    document.documentElement.dataset.theme = this.theme;
    for (const node of document.querySelectorAll("figure.panel")) node.panel?.draw();
  }

  async refresh() {
    if (this.refreshing) return;
    this.refreshing = true;
    try {
      await this.list();
      await this.glance();
      await this.look();
      this.draw();
    } catch { /* TensorBoard is away; the next look will tell */ } finally {
      this.refreshing = false;
    }
  }
}

function subject(manifest) {
  const last = manifest.steps.at(-1);
  const all = manifest.total_steps ? `trained to step ${last} of ${manifest.total_steps}` : `trained to step ${last}`;
  return ` · ${all} · ${manifest.kernel}`;
}

function nothing(runs, focus, manifest) {
  if (!runs.length) {
    return [h("h2", { textContent: "No run with probes yet" }), h("p", { textContent: "Add the monitor to a training run; the page fills by itself." }),
      h("pre", { textContent: "from ntk_monitor.callbacks import NTKMonitor\ntrainer = Trainer(callbacks=[NTKMonitor()])" })];
  }
  if (!focus) return [h("h2", { textContent: "No run is ticked" }), h("p", { textContent: "Tick one above: nothing is read before." })];
  if (manifest?.error) return [h("h2", { textContent: `${focus} cannot be shown` }), h("p", { textContent: manifest.error })];
  if (manifest && !manifest.steps.length) return [h("h2", { textContent: "No probe was measured yet" }), ...manifest.notes.map((note) => h("p", { textContent: note }))];
  return null;
}

/** Resolves after the next picture on the screen; soon, where nothing is shown. */
function painted() {
  return new Promise((resolve) => {
    requestAnimationFrame(() => setTimeout(resolve));
    setTimeout(resolve, SOON / 10);
  });
}

export async function start(body) {
  document.head.append(h("link", { rel: "stylesheet", href: address("static/page.css") }));
  document.documentElement.lang = "en";
  const page = new Page();
  document.documentElement.dataset.theme = page.theme;
  // Running plotly.js keeps the browser busy for a second: it comes early, and runs once all questions are asked.
  const figures = address("plotly.js");
  document.head.append(h("link", { rel: "preload", as: "script", href: figures }));
  try {
    await page.load();
  } catch (error) {
    body.append(h("p", { className: "failed", textContent: error.message }));
    return;
  }
  page.plotly = painted().then(() => script(figures));
  page.plotly.catch(() => {});
  page.build(body);
  page.draw();
  page.state.on(async (changed) => {
    page.draw();
    if (!changed.has("runs") && !changed.has("unit")) return;
    await page.glance();
    page.draw();
    await page.look();
    page.draw();
  });
  page.look().then(() => page.draw());
  watch(() => page.dress());
  listen(() => page.refresh());
  setInterval(() => { if (seen()) page.refresh(); }, EVERY);
  document.addEventListener("visibilitychange", () => { if (seen()) page.refresh(); });
}
