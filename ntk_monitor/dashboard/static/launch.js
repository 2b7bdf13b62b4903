// The handle that is dragged along a figure to choose the step from which the drawn forecast starts.

import { h, nearest } from "./dom.js";

export class Handle {
  /**
   * @param box the positioned element that holds the plot.
   * @param places returns { steps, xs, launch }: launch steps, their abscissae, and the one that is drawn.
   * @param moved is told the step that was dragged to.
   */
  constructor(box, places, moved) {
    this.box = box;
    this.places = places;
    this.moved = moved;
    this.node = h("div", { className: "launch", tabIndex: 0, role: "slider", hidden: true, "aria-label": "step from which the forecast starts",
      title: "Drag: the forecast starts from this step", onpointerdown: (event) => this.grab(event), onkeydown: (event) => this.key(event) },
    h("span", { className: "knob" }));
    box.append(this.node);
  }

  /** Puts the handle where the launch step is; call it whenever the plot was drawn, zoomed or resized. */
  place(plot) {
    this.plot = plot;
    const axis = plot._fullLayout?.xaxis;
    const { steps, xs, launch } = this.places();
    const at = nearest(steps, launch);
    const x = axis && at >= 0 && xs[at] !== null ? axis.d2p(xs[at]) : NaN;
    this.node.hidden = !(x >= -1 && x <= axis?._length + 1) || steps.length < 2;
    if (this.node.hidden) return;
    const { t, h: height } = plot._fullLayout._size;
    this.node.style.left = `${axis._offset + x}px`;
    this.node.style.top = `${t}px`;
    this.node.style.height = `${height}px`;
    this.node.setAttribute("aria-valuenow", launch);
    this.node.firstChild.textContent = `from ${launch}`;
  }

  grab(event) {
    event.preventDefault();
    this.node.focus();
    this.node.setPointerCapture(event.pointerId);
    this.node.classList.add("held");
    const move = (to) => {
      const axis = this.plot._fullLayout.xaxis;
      const pixel = to.clientX - this.box.getBoundingClientRect().left - axis._offset;
      const { steps, xs } = this.places();
      const found = nearest(xs.map((x) => axis.d2p(x)), pixel);
      if (found >= 0) this.moved(steps[found]);
    };
    const release = () => {
      this.node.classList.remove("held");
      this.node.removeEventListener("pointermove", move);
    };
    this.node.addEventListener("pointermove", move);
    this.node.addEventListener("lostpointercapture", release, { once: true });
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const { steps, launch } = this.places();
    const next = steps[nearest(steps, launch) + by];
    if (by && next !== undefined) {
      event.preventDefault();
      this.moved(next);
    }
  }
}
