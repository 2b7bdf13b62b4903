"""The learning rate: what it was, and by what it could have been multiplied."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.style import BLUE, GREY, ORANGE, STEPS, Figure, empty, layout_of, line, log_axis, numbers
from ntk_monitor.snapshot import Snapshot

_BETWEEN = "rgba(224, 123, 0, 0.18)"


def learning_rate_interval(snapshots: Sequence[Snapshot]) -> Figure:
    """Return the factors by which the learning rate could be multiplied, lower and upper end, over training.

    Above the upper line even full-batch steps are unstable; between the lines noise of the run's own batches may be
    what decides. Grey: 1, the learning rate that the run uses. Probes without a gauge leave the reason.
    """
    title = "Learning rate could be multiplied by"
    known = [
        s for s in snapshots if all(np.isfinite(s.metrics.get(f"lr_headroom_{end}", np.nan)) for end in ("low", "high"))
    ]
    if not known:
        reasons = [s.texts["stability"] for s in snapshots if "stability" in s.texts]
        return empty(title, f"No bound is known: {reasons[-1]}" if reasons else "No bound has been measured yet.")
    steps = [s.step for s in known]
    low, high = ([s.metrics[f"lr_headroom_{end}"] for s in known] for end in ("low", "high"))
    mode = "lines+markers" if len(known) <= 60 else "lines"
    hover = "step %{x}: x %{y:.3g}<extra>%{fullData.name}</extra>"
    shared = {"mode": mode, "marker": {"size": 4}, "hovertemplate": hover}
    fill = {"fill": "tonexty", "fillcolor": _BETWEEN}
    ends = [steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1]
    data = [
        line(steps, numbers(low, positive=True), "noise of the batches", BLUE, **shared),
        line(steps, numbers(high, positive=True), "full batches", ORANGE, **shared, **fill),
        line(ends, [1.0, 1.0], "the learning rate in use", GREY, line={"color": GREY, "dash": "dash"}),
    ]
    last = known[-1]
    optimizer = last.texts.get("optimizer", "the optimizer")
    layout = layout_of(
        title,
        f"Bounds of {optimizer} on lr x curvature, from the training operator (loss-weighted, preconditioned, batch "
        "statistics). Between the lines many healthy runs train; above the upper one the loss rises or jumps.",
        xaxis={"title": {"text": STEPS}},
        yaxis=log_axis("factor"),
        showlegend=True,
        legend={"orientation": "h", "y": -0.25},
    )
    return {"data": data, "layout": layout}


def learning_rates(steps: Sequence[int], values: Sequence[Sequence[float]], end: int) -> Figure:
    """Return the learning rate of every parameter group, (change,) and (change, group), until step `end`."""
    title = "Learning rate"
    if not len(steps):
        return empty(title, "No learning rate was recorded.")
    table = np.asarray(values, dtype=np.float64)
    x = [*(int(s) for s in steps), max(int(end), int(steps[-1]))]
    data = []
    for group, colour in zip(range(table.shape[1]), (BLUE, ORANGE, GREY) * table.shape[1], strict=False):
        rates = numbers([*table[:, group], table[-1, group]])
        look = {"color": colour, "shape": "hv"}
        data.append(line(x, rates, f"group {group}", colour, line=look, hovertemplate="step %{x}: %{y:.3g}"))
    layout = layout_of(
        title,
        "Learning rate of each parameter group at the optimizer steps that used it.",
        xaxis={"title": {"text": STEPS}},
        yaxis={"title": {"text": "learning rate"}, "rangemode": "tozero"},
        showlegend=table.shape[1] > 1,
    )
    return {"data": data, "layout": layout}
