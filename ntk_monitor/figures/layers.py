"""Which layers move the outputs."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.style import GREY, STEPS, Figure, empty, layout_of, measured, numbers
from ntk_monitor.snapshot import Snapshot

_COLOURS = (
    "#2a78c2",
    "#e07b00",
    "#2e9e55",
    "#c23b3b",
    "#7d5fb2",
    "#8a5a44",
    "#d45fa5",
    "#17a2b8",
    "#9aa61a",
    "#5b6c7d",
)
_SHOWN = len(_COLOURS)


def layer_updates(snapshots: Sequence[Snapshot]) -> Figure:
    """Return the share of each layer in what really moved the outputs since the previous probe, stacked to 1.

    |J_l Δθ_l|² of every layer l, normalised, whatever optimizer took the steps. Runs without it show the share that
    kernel and optimizer would give each layer (`layer_share`). The ten largest layers are named.
    """
    title = "Which layers move the outputs"
    for field, meaning in (
        ("layer_update", "Share of each layer in the change of the outputs since the previous probe, |J_l dtheta_l|^2"),
        ("layer_share", "Share of each layer in the trace of lr J D J^T, D the optimizer's preconditioner"),
    ):
        drawn = [s for s in measured(snapshots) if getattr(s, field).size and getattr(s, field).size == len(s.layers)]
        if drawn:
            return _stacked(drawn, field, title, meaning)
    reasons = [s.texts[key] for s in snapshots for key in ("updates", "layers") if key in s.texts]
    return empty(title, reasons[-1] if reasons else "No second probe has been measured yet.")


def _stacked(drawn: Sequence[Snapshot], field: str, title: str, meaning: str) -> Figure:
    names = list(dict.fromkeys(name for s in drawn for name in s.layers))
    tables = [dict(zip(s.layers, getattr(s, field).tolist(), strict=True)) for s in drawn]
    weight = {name: float(np.nansum([table.get(name, 0.0) for table in tables])) for name in names}
    named = sorted(sorted(names, key=lambda name: -weight[name])[:_SHOWN], key=names.index)
    steps = [s.step for s in drawn]
    rows = {name: [table.get(name, np.nan) for table in tables] for name in named}
    if len(named) < len(names):
        rest = [name for name in names if name not in named]
        rows[f"{len(rest)} others"] = [float(np.nansum([table.get(name, 0.0) for name in rest])) for table in tables]
    data = []
    for (name, values), colour in zip(rows.items(), (*_COLOURS, GREY), strict=False):
        trace = {"name": name or "the module", "y": numbers(values), "hovertemplate": "%{y:.1%}"}
        if len(steps) == 1:
            data.append(trace | {"type": "bar", "x": [f"step {steps[0]}"], "marker": {"color": colour}})
        else:
            area = {"stackgroup": "layers", "fillcolor": colour, "line": {"color": colour, "width": 0.5}}
            data.append(trace | area | {"type": "scatter", "mode": "lines", "x": steps})
    layout = layout_of(
        title,
        f"{meaning}. A layer with hardly any share can be frozen; one with nearly all of it is the bottleneck.",
        xaxis={"title": {"text": STEPS}} if len(steps) > 1 else {"type": "category"},
        yaxis={"title": {"text": "share (fraction)"}, "range": [0, 1]},
        showlegend=True,
        legend={"traceorder": "reversed", "font": {"size": 10}},
        hovermode="x unified",
        barmode="stack",
    )
    return {"data": data, "layout": layout}
