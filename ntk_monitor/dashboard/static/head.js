// What is read first: numbers with their lights, and what health rules found.

import { h, slug } from "./dom.js";
import { Live } from "./live.js";
import { address } from "./server.js";

export class Cards extends Live {
  constructor(page) {
    super(h("section", { className: "cards", "aria-label": "the run in numbers" }));
    this.page = page;
  }

  question() {
    const { focus, state } = this.page;
    return focus && address("cards", { run: focus, step: state.step, v: this.page.version([focus]) });
  }

  async show({ cards }) {
    const open = new Set([...this.node.querySelectorAll("details[open]")].map((one) => one.dataset.card));
    this.node.replaceChildren(...cards.map((card) => h("details", { className: `card ${card.light}`, open: open.has(card.name), data: { card: card.name } },
      h("summary", {},
        h("span", { className: "name" }, h("i", { className: "light", title: LIGHTS[card.light] }), card.name),
        h("b", { textContent: card.value }), h("span", { className: "sentence" }, lead(card.sentence), h("span", { className: "rest", textContent: card.sentence.slice(lead(card.sentence).length) }))),
      h("button", { className: "link", textContent: `see ${card.group}`, onclick: () => go(card.group) }))));
  }

  fail(error) { this.node.replaceChildren(h("p", { className: "failed", textContent: error.message })); }
}

/** As many whole sentences as fit into a few lines, two where the first says little; the rest unfolds. */
function lead(text) {
  let end = 0;
  for (const sentence of text.match(/.+?[.!?](?=\s|$)|.+$/gs) ?? []) {
    if (end > LITTLE && end + sentence.length > MUCH) break;
    end += sentence.length;
  }
  return text.slice(0, end);
}

const LITTLE = 50, MUCH = 130;
const LIGHTS = { green: "green: as in a healthy run", amber: "amber: look at it", red: "red: act on it", none: "" };

export class Findings extends Live {
  constructor(page) {
    super(h("section", { className: "findings", "aria-label": "findings" }));
    this.page = page;
  }

  question() {
    const { focus } = this.page;
    return focus && address("findings", { run: focus, v: this.page.version([focus]) });
  }

  async show({ findings }) {
    const open = new Set([...this.node.querySelectorAll("details[open]")].map((one) => one.dataset.rule));
    const grave = findings.filter((one) => one.severity !== "info");
    const remarks = findings.filter((one) => one.severity === "info");
    const shown = grave.map((one) => finding(one, open));
    if (!grave.length) shown.push(h("p", { className: "finding fine", textContent: "Health: no error and no warning." }));
    if (remarks.length) {
      shown.push(h("details", { className: "remarks", open: open.has("remarks"), data: { rule: "remarks" } },
        h("summary", { textContent: remarks.length === 1 ? "1 remark" : `${remarks.length} remarks` }), remarks.map((one) => finding(one, open))));
    }
    this.node.replaceChildren(...shown);
  }

  fail(error) { this.node.replaceChildren(h("p", { className: "failed", textContent: error.message })); }
}

function finding(one, open) {
  const [first, last] = one.steps;
  const steps = first === last ? `step ${first}` : `steps ${first} to ${last}`;
  const link = document.getElementById(`group-${slug(one.panel)}`) && h("button", { className: "link", textContent: `see ${one.panel}`, onclick: () => go(one.panel) });
  return h("details", { className: `finding ${one.severity}`, open: open.has(one.rule), data: { rule: one.rule } },
    h("summary", {}, h("b", { textContent: `${one.severity === "info" ? "" : `${one.severity}: `}${one.rule.replaceAll("_", " ")}` }), h("span", { textContent: ` ${one.evidence}` }), h("small", { textContent: ` ${steps}` })),
    h("p", {}, one.meaning, " ", one.severity === "info" ? one.advice : [h("b", { textContent: "Try: " }), one.advice], " ", link));
}

/** Scrolls to a group of panels. */
export function go(group) {
  document.getElementById(`group-${slug(group)}`)?.scrollIntoView({ behavior: "smooth", block: "start" });
}
