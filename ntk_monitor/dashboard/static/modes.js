// The table of modes: sorted by any column, a click opens the samples behind a mode.

import { h, download, short } from "./dom.js";
import { Live } from "./live.js";
import { address } from "./server.js";

const FEW = 12;
const NEVER = new Map([["inf", Infinity], ["-inf", -Infinity], ["nan", null]]);
const TELLS = "Which directions of the residual are learned how fast. Click a mode to see the samples that load on it, a heading to sort.";

export class Modes extends Live {
  constructor(page) {
    super(h("figure", { className: "panel wide table", id: "panel-modes", data: { panel: "modes" } }));
    this.page = page;
    this.sorted = { column: 0, down: false };
    this.all = false;
    this.table = h("table");
    this.more = h("button", { className: "link", hidden: true, onclick: () => { this.all = !this.all; this.draw(); } });
    this.caption = h("figcaption", { textContent: TELLS });
    this.about = h("span", { className: "tip", role: "tooltip" });
    this.node.append(
      h("header", {}, h("h3", { textContent: "Modes" }), h("span", { className: "about", tabIndex: 0, "aria-label": "which kernel" }, "i", this.about),
        h("span", { className: "tools" }, h("button", { textContent: "CSV", title: "Save the numbers", onclick: () => this.save(), data: { does: "csv" } }))),
      h("div", { className: "scroll" }, this.table), this.more, this.caption);
  }

  question() {
    const { focus, state } = this.page;
    return focus && address("modes", { run: focus, step: state.step, v: this.page.version([focus]) });
  }

  async show(answer) {
    // JSON has no infinity; the table has: a mode that is never learned.
    this.answer = { ...answer, rows: answer.rows.map((row) => row.map((value) => NEVER.get(value) ?? value)) };
    this.caption.textContent = [TELLS, answer.note].filter(Boolean).join(" ");
    this.draw();
  }

  draw() {
    if (!this.answer) return;
    const { columns, rows } = this.answer;
    const { column, down } = this.sorted;
    const words = columns.map((_, i) => rows.some((row) => typeof row[i] === "string"));
    const heads = columns.map((one, i) => h("th", { scope: "col", title: one.tells, className: words[i] ? "text" : "", "aria-sort": i === column ? (down ? "descending" : "ascending") : "none" },
      h("button", { onclick: () => this.sort(i) }, one.name, i === column ? (down ? " ↓" : " ↑") : "", h("small", { textContent: one.unit ?? "" }))));
    const ordered = [...rows].sort((a, b) => compared(a[column], b[column], down));
    const shown = this.all ? ordered : ordered.slice(0, FEW);
    const lines = shown.map((row) => h("tr", { tabIndex: 0, data: { mode: row[0] },
      onclick: () => this.page.open({ mode: row[0] }), onkeydown: (event) => { if (event.key === "Enter") this.page.open({ mode: row[0] }); } },
    row.map((value, i) => h("td", { textContent: short(value), className: words[i] ? "text" : "" }))));
    this.table.replaceChildren(h("thead", {}, h("tr", {}, heads)), h("tbody", {}, lines));
    this.more.hidden = rows.length <= FEW;
    this.mark();
    this.more.textContent = this.all ? `show the first ${FEW}` : `show all ${rows.length} modes`;
  }

  /** Shows which mode is open, and which kernel it is of. */
  mark() {
    this.about.textContent = [this.page.kernel(), this.page.catalogue.about].filter(Boolean).join(". ");
    for (const row of this.table.querySelectorAll("[data-mode]")) row.classList.toggle("chosen", Number(row.dataset.mode) === this.page.state.mode);
  }

  sort(column) {
    const again = this.sorted.column === column;
    this.sorted = { column, down: again ? !this.sorted.down : column > 0 };
    this.draw();
  }

  save() {
    if (!this.answer) return;
    const { columns, rows } = this.answer;
    const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
    const head = columns.map((one) => quoted(one.unit ? `${one.name} (${one.unit})` : one.name));
    const text = [head, ...rows.map((row) => row.map((value) => (typeof value === "string" ? quoted(value) : value ?? "")))].map((line) => line.join(",")).join("\n");
    const url = URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" }));
    download("ntk-modes.csv", url);
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  fail(error) { this.answer = null; this.table.replaceChildren(h("caption", { className: "failed", textContent: error.message })); this.more.hidden = true; }
}

/** What is missing goes to the end, whichever way the rest is sorted. */
function compared(a, b, down) {
  const missing = (value) => value === null || value === undefined;
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  return down ? -order : order;
}
