"""Forecasts beside what happened: the loss to come, and by how much forecasts missed."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.style import (
    BLUE,
    GREY,
    MODE_COLOURS,
    ORANGE,
    STEPS,
    Figure,
    empty,
    layout_of,
    line,
    log_axis,
    measured,
    numbers,
    thinned,
)
from ntk_monitor.snapshot import Snapshot

_SHOWN = 8


def loss_forecast(snapshots: Sequence[Snapshot]) -> Figure:
    """Return the loss on the probe, measured (dots) and forecast from single probes (lines that start there).

    At most eight forecasts are drawn, evenly spread, the last one stronger.
    """
    title = "Loss: measured and forecast"
    probes = [s for s in measured(snapshots) if np.isfinite(s.loss_value)]
    if not probes:
        reasons = [s.loss_status for s in measured(snapshots) if s.loss_status]
        return empty(title, f"The loss is not known: {reasons[-1]}" if reasons else "No loss has been measured yet.")
    made = [s for s in probes if s.forecast_steps.size]
    data = []
    for i in thinned(len(made), _SHOWN) if made else []:
        at, newest = made[i], i == len(made) - 1
        look = {"color": ORANGE, "width": 2.5 if newest else 1}
        hover = f"from step {at.step}: loss %{{y:.4g}} at step %{{x}}<extra></extra>"
        values = numbers(at.forecast_loss, positive=True)
        name = f"forecast from step {at.step}" if newest else "earlier forecasts"
        faint = {} if newest else {"opacity": 0.45, "legendgroup": "earlier", "showlegend": i == 0}
        data.append(line(at.forecast_steps.tolist(), values, name, ORANGE, line=look, hovertemplate=hover, **faint))
    dots = {"mode": "markers+lines", "marker": {"size": 6}, "line": {"color": BLUE, "width": 0.7}}
    losses = numbers([s.loss_value for s in probes], positive=True)
    hover = "step %{x}: loss %{y:.4g}<extra></extra>"
    data.append(line([s.step for s in probes], losses, "measured", BLUE, hovertemplate=hover, **dots))
    reasons = [s.texts.get("ahead", s.texts.get("forecast", "")) for s in probes]
    missing = "" if made else f" No forecast: {reasons[-1] or 'none was asked for'}."
    layout = layout_of(
        title,
        "Loss on the probe. Lines: simulation of the rest of the run from the kernel of one step, with the real "
        f"optimizer and the learning rates to come; the kernel is frozen there, so take it as a direction.{missing}",
        xaxis={"title": {"text": STEPS}},
        yaxis=log_axis("loss on the probe (loss units)", dtick=None),
        showlegend=True,
        legend={"orientation": "h", "y": -0.25},
    )
    return {"data": data, "layout": layout}


def forecast_error(snapshots: Sequence[Snapshot]) -> Figure:
    """Return what forecasts from one probe to the next missed, relative to how far the outputs moved.

    1 (dashed) is what forecasting no change misses. "Tangent": what the linearisation itself missed along the steps
    really taken, so that the rest is batch noise or the size of the reference.
    """
    title = "Error of forecasts to the next probe"
    parts = {
        "forecast": ("facts", "forecast_error", BLUE),
        "same steps, mean of both kernels": ("facts", "explained_error", MODE_COLOURS[2]),
        "tangent along the real steps": ("metrics", "linearisation_error", ORANGE),
    }
    data = []
    for name, (where, key, colour) in parts.items():
        found = [(s.step, getattr(s, where).get(key, np.nan)) for s in measured(snapshots)]
        kept = [(step, value) for step, value in found if np.isfinite(value) and value > 0]
        if kept:
            look = {"mode": "lines+markers", "marker": {"size": 5}}
            x, y = [step for step, _ in kept], numbers([value for _, value in kept])
            data.append(line(x, y, name, colour, hovertemplate="step %{x}: %{y:.0%}", **look))
    if not data:
        return empty(title, "No forecast has been compared with what happened yet.")
    steps = [x for trace in data for x in trace["x"]]
    dashed = {"color": GREY, "dash": "dash"}
    data.append(line([min(steps), max(steps)], [1.0, 1.0], "forecasting no change", GREY, line=dashed))
    layout = layout_of(
        title,
        "Distance between forecast and measured outputs of the probe over how far they moved. 0.2 is good, 1 is no "
        "better than forecasting no change.",
        xaxis={"title": {"text": STEPS}},
        yaxis=log_axis("error relative to the motion (fraction)", dtick=None),
        showlegend=True,
        legend={"orientation": "h", "y": -0.25},
    )
    return {"data": data, "layout": layout}
