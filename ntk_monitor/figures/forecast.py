"""Forecasts beside what happened: the loss to come, and by how much forecasts missed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ntk_monitor.figures.abscissa import Abscissa, Unit, abscissa
from ntk_monitor.figures.launch import SHADED, doubtful, launched, launches, limits, marks
from ntk_monitor.figures.style import (
    BLUE,
    GREY,
    MODE_COLOURS,
    ORANGE,
    Figure,
    drawn,
    empty,
    layout_of,
    line,
    measured,
    numbers,
    series,
    thinned,
    value_axis,
)
from ntk_monitor.snapshot import Snapshot

_SHOWN = 8
_BELOW = {"orientation": "h", "y": -0.22}


def loss_forecast(
    snapshots: Sequence[Snapshot], launch: int | None = None, unit: Unit = "step", *, log: bool = True
) -> Figure:
    """Return the loss on the probe, measured (dots) and forecast from the probe nearest to `launch` (line).

    At most eight other forecasts, evenly spread, are drawn faintly. Shaded: see `ntk_monitor.figures.launch`.
    """
    title = "Loss: measured and forecast"
    probes = [s for s in measured(snapshots) if np.isfinite(s.loss_value)]
    if not probes:
        reasons = [s.loss_status for s in measured(snapshots) if s.loss_status]
        return empty(title, f"The loss is not known: {reasons[-1]}" if reasons else "No loss has been measured yet.")
    at = abscissa(snapshots, unit)
    made = [s for s in probes if s.forecast_steps.size]
    strong = launched(probes, launch)
    data = []
    others = [s for s in made if s is not strong]
    for n, i in enumerate(thinned(len(others), _SHOWN) if others else []):
        faint = {"opacity": 0.4, "legendgroup": "others", "showlegend": n == 0, "line": {"color": ORANGE, "width": 1}}
        data.append(_forecast(others[i], at, "other forecasts", log=log, **faint))
    shapes: list[Figure] = []
    if strong is not None:
        bold = {"line": {"color": ORANGE, "width": 2.5}}
        data.append(_forecast(strong, at, f"forecast from step {strong.step}", log=log, **bold))
        after = [s for s in probes if s.step > strong.step]
        losses = np.array([s.loss_value for s in after])
        reach = at([strong.step, max(float(strong.forecast_steps[-1]), float(probes[-1].step))])
        still = numbers([strong.loss_value] * 2, positive=log)
        look = {"color": GREY, "dash": "dot", "width": 1.5}
        data.append(line(reach, still, "no change", GREY, line=look, hoverinfo="skip"))
        shapes = marks(at, strong, doubtful(after, losses, strong, strong.forecast_loss, strong.loss_value))
    points = drawn(at, [s.step for s in probes], [s.loss_value for s in probes], log=log)
    dots = {"marker": {"size": 6, "color": BLUE}, "line": {"color": BLUE, "width": 0.7}}
    data.append(series("measured", BLUE, points | dots, at.word))
    reasons = [s.texts.get("ahead", s.texts.get("forecast", "")) for s in probes]
    values = np.array([s.loss_value for s in probes])
    told = np.empty(0) if strong is None else strong.forecast_loss
    missing = "" if made else f" No forecast: {reasons[-1] or 'none was asked for'}."
    layout = layout_of(
        title,
        "Loss on the probe. Orange: simulation of the rest of the run from the kernel of one step, with the real "
        "optimizer and the learning rates to come; the kernel is frozen there, so take it as a direction. "
        f"{SHADED if made else ''}{missing}",
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis("loss on the probe (loss units)", log=log, **limits(values, told, log=log)),
        showlegend=True,
        legend=_BELOW,
        shapes=shapes,
    )
    layout["meta"]["launches"] = launches(at, probes)
    return {"data": data, "layout": layout}


def _forecast(made: Snapshot, at: Abscissa, name: str, *, log: bool, **trace: Any) -> Figure:
    hover = f"from step {made.step}: loss %{{y:.4g}}<extra></extra>"
    values = numbers(made.forecast_loss, positive=log)
    x = at(made.forecast_steps.tolist())
    return line(x, values, name, ORANGE, hovertemplate=hover, **trace)


def forecast_error(snapshots: Sequence[Snapshot], unit: Unit = "step", *, log: bool = True) -> Figure:
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
    at = abscissa(snapshots, unit)
    probes = measured(snapshots)
    data = []
    for name, (where, key, colour) in parts.items():
        values = [getattr(s, where).get(key, np.nan) for s in probes]
        points = drawn(at, [s.step for s in probes], values, log=log)
        if points["x"]:
            hover = f"{at.word} %{{x}}: %{{y:.0%}}<extra>%{{fullData.name}}</extra>"
            data.append(series(name, colour, points) | {"hovertemplate": hover})
    if not data:
        return empty(title, "No forecast has been compared with what happened yet.")
    ends = [x for trace in data for x in trace["x"]]
    heights = [1.0, *(y for trace in data for y in trace["y"])]
    dashed = {"color": GREY, "dash": "dash"}
    data.append(line([min(ends), max(ends)], [1.0, 1.0], "forecasting no change", GREY, line=dashed))
    layout = layout_of(
        title,
        "Distance between forecast and measured outputs of the probe over how far they moved. 0.2 is good, 1 is no "
        "better than forecasting no change.",
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis("error relative to the motion (fraction)", heights, log=log),
        showlegend=True,
        legend=_BELOW,
    )
    return {"data": data, "layout": layout}
