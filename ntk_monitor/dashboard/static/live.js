// What shows the answer to one question, and asks again once the question is another one.

import { ask } from "./server.js";

const all = new Set();
let began = null;

export class Live {
  /** @param node where the answer is shown; `node.dataset.state` is loading, drawn or failed. */
  constructor(node) {
    this.node = node;
    this.visible = true;
    this.asked = null;
    this.busy = false;
    all.add(this);
  }

  /** The address to ask, or null while there is nothing to ask. */
  question() { return null; }
  /** Draws the answer. */
  async show(_answer) {}
  /** Says what went wrong. */
  fail(_error) {}

  get due() {
    const url = this.visible ? this.question() : null;
    return url !== null && url !== this.asked;
  }

  /** One question at a time: while a slider moves, what was passed in between is never asked. */
  async update() {
    if (this.busy || !this.due) return;
    this.busy = true;
    began ??= performance.now();
    while (this.due) {
      const url = this.question();
      if (this.node.dataset.state !== "drawn") this.node.dataset.state = "loading";
      this.node.classList.add("waiting");
      try {
        await this.show(await ask(url));
        this.node.dataset.state = "drawn";
      } catch (error) {
        this.node.dataset.state = "failed";
        this.fail(error);
      }
      this.asked = url;
      this.node.classList.remove("waiting");
    }
    this.busy = false;
    settle();
  }

  forget() { all.delete(this); }
}

/** Whether everything in view shows what it should. */
export function settled() {
  return ![...all].some((one) => one.busy || one.due);
}

export function update() {
  for (const one of all) one.update();
}

let waiting = [];
/** Resolves once everything in view is drawn. */
export function idle() {
  return settled() ? Promise.resolve() : new Promise((resolve) => waiting.push(resolve));
}

// Waits are measured from the first question to the last redraw; they can be read from the browser's timeline.
function settle() {
  if (!settled() || began === null) return;
  performance.measure("ntk-redraw", { start: began, end: performance.now() });
  began = null;
  const resolved = waiting;
  waiting = [];
  for (const resolve of resolved) resolve();
}
