"""The learning rate: what it was, and by what it could have been multiplied."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntk_monitor.figures.abscissa import Abscissa, Unit, abscissa
from ntk_monitor.figures.style import (
    BLUE,
    GREY,
    MOST,
    ORANGE,
    Figure,
    drawn,
    empty,
    layout_of,
    line,
    numbers,
    run_colours,
    series,
    thinned,
    value_axis,
    word,
)
from ntk_monitor.snapshot import Floats, Snapshot

_GREEN, _AMBER, _RED = "rgba(46, 158, 85, 0.16)", "rgba(224, 161, 0, 0.20)", "rgba(194, 59, 59, 0.16)"
_TITLE = "Learning rate could be multiplied by"
_BELOW = {"orientation": "h", "y": -0.22}
_ABOUT = (
    "Bounds of {} on lr x curvature, from the training operator (loss-weighted, preconditioned, batch statistics), "
    "over the learning rate in use: 1. {}Lower bound: with the noise of the run's batches. Upper: full-batch steps."
)


def _bounded(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    ends = ("lr_headroom_low", "lr_headroom_high")
    return [s for s in snapshots if all(np.isfinite(s.metrics.get(end, np.nan)) for end in ends)]


def learning_rate_interval(snapshots: Sequence[Snapshot], unit: Unit = "step", *, log: bool = True) -> Figure:
    """Return the factors by which the learning rate could be multiplied, lower and upper end, over training.

    Above the upper line even full-batch steps are unstable; between the lines noise of the run's own batches may be
    what decides. Dashed: 1, the learning rate that the run uses; the colour behind it says where it lies. Probes
    without a gauge leave the reason.
    """
    known = _bounded(snapshots)
    if not known:
        reasons = [s.texts["stability"] for s in snapshots if "stability" in s.texts]
        return empty(_TITLE, f"No bound is known: {reasons[-1]}" if reasons else "No bound has been measured yet.")
    at = abscissa(snapshots, unit)
    # The areas between the lines need both at the same steps.
    known = [known[i] for i in thinned(len(known), MOST)]
    x = at([s.step for s in known])
    low, high = ([s.metrics[f"lr_headroom_{end}"] for s in known] for end in ("low", "high"))
    positive = [value for value in (*low, *high, 1.0) if value > 0]
    bottom, top = min(positive) / 2, max(positive) * 2
    mode = "lines+markers" if len(known) <= 60 else "lines"
    shared = {"mode": mode, "marker": {"size": 4}, "hovertemplate": f"{at.word} %{{x}}: x %{{y:.3g}}"}
    quiet: Figure = {"showlegend": False, "hoverinfo": "skip", "line": {"width": 0}}
    ends = [x[0], x[-1] if len(x) > 1 else x[0] + 1]
    data = [
        line(x, [bottom if log else 0] * len(x), "", BLUE, **quiet),
        line(x, numbers(low, positive=log), "bound with batch noise", BLUE, **shared, **_filled(_GREEN)),
        line(x, numbers(high, positive=log), "bound of full batches", ORANGE, **shared, **_filled(_AMBER)),
        line(x, [top] * len(x), "", BLUE, **quiet, **_filled(_RED)),
        line(ends, [1.0, 1.0], "learning rate in use", GREY, line={"color": GREY, "dash": "dash"}),
    ]
    reach = [float(np.log10(bottom)), float(np.log10(top))] if log else [0, top]
    zones = "Green: lower factors are stable by both bounds; amber: between them, where many healthy runs train; red: "
    layout = layout_of(
        _TITLE,
        _ABOUT.format(known[-1].texts.get("optimizer", "the optimizer"), f"{zones}the loss rises or jumps. "),
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis("factor (1: as it is)", log=log, range=reach),
        showlegend=True,
        legend=_BELOW,
    )
    return {"data": data, "layout": layout}


def _filled(colour: str) -> Figure:
    return {"fill": "tonexty", "fillcolor": colour}


def learning_rate_intervals(runs: Mapping[str, Sequence[Snapshot]], unit: Unit = "step", *, log: bool = True) -> Figure:
    """Return the same factors of several runs, one colour each: the lower end dotted, the upper end solid."""
    known = {name: _bounded(snapshots) for name, snapshots in runs.items()}
    if len(runs) == 1 or not any(known.values()):
        return learning_rate_interval(next(iter(runs.values()), ()), unit, log=log)
    data: list[Figure] = []
    ends: list[float] = []
    axes = {name: abscissa(snapshots, unit) for name, snapshots in runs.items()}
    for name, colour in run_colours(runs).items():
        snapshots = known[name]
        for end, dash in (("high", "solid"), ("low", "dot")):
            values = [s.metrics[f"lr_headroom_{end}"] for s in snapshots]
            points = drawn(axes[name], [s.step for s in snapshots], values, log=log)
            ends += points["x"][:1] + points["x"][-1:]
            more: dict[str, Any] = {"legendgroup": word(name), "showlegend": end == "high"}
            look = {"color": colour, "dash": dash, "width": 2 if end == "high" else 1.5}
            data.append(series(word(name), colour, points, axes[name].word, line=look, **more))
    look = {"color": GREY, "dash": "dash"}
    data.append(line([min(ends), max(ends)], [1.0, 1.0], "learning rate in use", GREY, line=look))
    at = next(iter(axes.values()))
    heights = [y for trace in data for y in trace["y"]]
    layout = layout_of(
        _TITLE,
        _ABOUT.format("each run's optimizer", "Dotted: lower bound, solid: upper bound. "),
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis("factor (1: as it is)", heights, log=log),
        showlegend=True,
        legend=_BELOW,
    )
    return {"data": data, "layout": layout}


def learning_rates(
    steps: Sequence[float] | Floats, values: Sequence[Sequence[float]] | Floats, end: int, at: Abscissa | None = None
) -> Figure:
    """Return the learning rate of every parameter group, (change,) and (change, group), until step `end`."""
    title = "Learning rate"
    if not len(steps):
        return empty(title, "No learning rate was recorded.")
    at = at or Abscissa()
    table = np.asarray(values, dtype=np.float64)
    kept = thinned(len(steps), MOST)
    x = at([*(int(steps[i]) for i in kept), max(int(end), int(steps[-1]))])
    data = []
    for group, colour in zip(range(min(table.shape[1], _GROUPS)), (BLUE, ORANGE, GREY) * _GROUPS, strict=False):
        rates = numbers([*table[kept, group], table[-1, group]])
        look = {"color": colour, "shape": "hv"}
        data.append(line(x, rates, f"group {group}", colour, line=look, hovertemplate=f"{at.word} %{{x}}: %{{y:.3g}}"))
    more = f" The first {_GROUPS} of {table.shape[1]} groups." if table.shape[1] > _GROUPS else ""
    layout = layout_of(
        title,
        f"Learning rate of each parameter group at the optimizer steps that used it.{more}",
        xaxis={"title": {"text": at.title}},
        yaxis={"title": {"text": "learning rate"}, "rangemode": "tozero"},
        showlegend=table.shape[1] > 1,
    )
    return {"data": data, "layout": layout}


_GROUPS = 12
