"""Figures of lazy and rich training: over output scales, over steps, over checkpoints."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.output_scale import Scaled
from ntk_monitor.applications.regime import LAZY, RICH
from ntk_monitor.figures.style import (
    BLUE,
    GREY,
    MODE_COLOURS,
    ORANGE,
    STEPS,
    Figure,
    layout_of,
    line,
    log_axis,
    numbers,
)
from ntk_monitor.similarity import alignment, kernel_change

Array = NDArray[np.float64]

_TOP = {"x": 0.98, "y": 0.98, "xanchor": "right", "yanchor": "top", "font": {"size": 10}}
_SCALE = "output scale α"


def scales(found: Sequence[Scaled], foretold: Sequence[float]) -> Figure:
    """Return how far the kernel moved and how far the tangent model missed, and was to miss, by output scale."""
    x = [one.scale for one in found]
    dots = {"mode": "lines+markers", "marker": {"size": 7}}
    data = []
    for level, name, dash in ((RICH, f"above {RICH:g}: rich", "dash"), (LAZY, f"below {LAZY:g}: lazy", "dot")):
        look = {"color": GREY, "dash": dash, "width": 1.5}
        data.append(line([min(x), max(x)], [level] * 2, name, GREY, line=look, hoverinfo="skip"))
    parts = (
        ("kernel movement |K - K₀| / |K₀|", BLUE, [one.moved for one in found]),
        ("error of the tangent model", ORANGE, [one.error for one in found]),
    )
    for name, colour, values in parts:
        hover = {"hovertemplate": "α = %{x}: %{y:.3g}<extra>%{fullData.name}</extra>"}
        data.append(line(x, numbers(values, positive=True), name, colour, **dots, **hover))
    look = {"color": ORANGE, "dash": "dot", "width": 1.5}
    data.append(line(x, numbers(foretold, positive=True), "the same, foretold before training", ORANGE, line=look))
    layout = layout_of(
        "Lazy or rich, by output scale",
        "The same network from the same weights to the same loss, with its outputs multiplied by α. α = 1 is the "
        "network as it is. Both curves low: lazy, a kernel machine. Both high: rich, it learns features.",
        xaxis=_scale_axis(x),
        yaxis=log_axis("relative change"),
        showlegend=True,
        legend=_TOP,
    )
    return {"data": data, "layout": layout}


def _scale_axis(x: Sequence[float], **axis: object) -> Figure:
    ends = [float(np.log10(min(x))) - 0.08, float(np.log10(max(x))) + 0.08]
    ticks = {"tickvals": list(x), "ticktext": [f"{one:g}" for one in x], "range": ends}
    return {"type": "log", "title": {"text": _SCALE}} | ticks | axis


def velocity(found: Sequence[Scaled]) -> Figure:
    """Return how far the kernel had turned from the first one after each number of steps, by output scale."""
    data = []
    for one, colour in zip(found, MODE_COLOURS, strict=False):
        turned = [kernel_change(one.kernels[0], kernel) for kernel in one.kernels[1:]]
        name = f"α = {one.scale:g}"
        hover = {"hovertemplate": f"{name}, step %{{x}}: %{{y:.3g}}<extra></extra>"}
        dots = {"mode": "lines+markers", "marker": {"size": 5}}
        data.append(line(list(one.steps[1:]), numbers(turned, positive=True), name, colour, **dots, **hover))
    layout = layout_of(
        "How the kernel turns while training",
        "1 - cosine with the kernel at the start. Its slope is the kernel velocity: a curve that flattens early has "
        "learned its features early. Curves end where the loss was reached.",
        xaxis=log_axis(STEPS, exponentformat="none"),
        yaxis=log_axis("1 - cosine with the first kernel"),
        showlegend=True,
        legend=_TOP | {"y": 0.02, "yanchor": "bottom"},
    )
    return {"data": data, "layout": layout}


def features(found: Sequence[Scaled], targets: Array) -> Figure:
    """Return what the movement was good for: alignment with the targets, and the held-out error, by output scale."""
    x = [one.scale for one in found]
    after = [alignment(one.kernels[-1], targets) for one in found]
    before = alignment(found[0].kernels[0], targets)
    errors = np.array([one.squares.mean() for one in found])
    wide = np.array([1.96 * one.squares.std(ddof=1) / np.sqrt(len(one.squares)) for one in found])
    dots = {"mode": "lines+markers", "marker": {"size": 7}}
    right = {"xaxis": "x2", "yaxis": "y2", "showlegend": False}
    bars = [value for place, low, high in zip(x, errors - wide, errors + wide, strict=True)
            for value in ((place, low), (place, high), (None, None))]  # fmt: skip
    data = [
        line([min(x), max(x)], numbers([before] * 2), "before training", GREY, line={"color": GREY, "dash": "dash"}),
        line(x, numbers(after), "after training", BLUE, **dots),
        line([a for a, _ in bars], [b for _, b in bars], "95 %", ORANGE, line={"color": ORANGE, "width": 2}, **right),
        line(x, numbers(errors), "held-out error", ORANGE, **dots, **right),
    ]
    # Room above the curves for the legend.
    finite = [value for value in (*after, before) if np.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = 0.05 * max(high - low, 0.02)
    layout = layout_of(
        "What the movement was good for",
        "Left: how much samples that the kernel ties together share their targets. Right: mean square error on "
        "held-out samples with its 95 % interval. Rich training pays where the right curve rises with α.",
        xaxis=_scale_axis(x, domain=[0, 0.45]),
        yaxis={"title": {"text": "alignment with the targets"}, "range": [low - room, high + 4 * room]},
        xaxis2=_scale_axis(x, domain=[0.57, 1], anchor="y2"),
        yaxis2={"title": {"text": "held-out mean square error"}, "anchor": "x2", "rangemode": "tozero"},
        showlegend=True,
        legend={"x": 0.44, "y": 0.98, "xanchor": "right", "yanchor": "top", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}


def checkpoints(names: Sequence[str], moved: Array, aligned: Array) -> Figure:
    """Return the movement of the kernel from the first of some checkpoints, and its alignment with the targets."""
    x = list(range(len(names)))
    dots = {"mode": "lines+markers", "marker": {"size": 7}}
    data = [
        line(x, numbers(moved), "kernel movement since the first", BLUE, **dots),
        line(x, numbers(aligned), "alignment with the targets", ORANGE, **dots),
    ]
    shown = [name if len(name) <= 14 else f"…{name[-13:]}" for name in names]
    layout = layout_of(
        "The run that was: kernels of the checkpoints",
        "Movement above 0.5 means that this run left the lazy regime; whether it learned features of its targets is "
        "what the alignment says.",
        xaxis={"tickvals": x, "ticktext": shown, "title": {"text": "checkpoint"}, "showgrid": False},
        yaxis={"title": {"text": "fraction"}},
        showlegend=True,
        legend={"x": 0.02, "y": 0.98, "xanchor": "left", "yanchor": "top", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}
