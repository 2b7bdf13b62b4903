"""Which layers move the outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntk_monitor.figures.abscissa import Abscissa, Unit, abscissa
from ntk_monitor.figures.style import (
    GREY,
    MODE_COLOURS,
    Figure,
    empty,
    layout_of,
    measured,
    nearest,
    numbers,
    thinned,
    upright,
    word,
)
from ntk_monitor.snapshot import Floats, Snapshot

_SHOWN = len(MODE_COLOURS)
_AREAS, _LETTERS = 150, 22

_MEANINGS = {
    "layer_update": "Share of each layer in the change of the outputs since the previous probe, |J_l dtheta_l|^2, "
    "whatever optimizer took the steps",
    "layer_share": "Share of each layer in the trace of lr J D J^T, D the optimizer's preconditioner: how much its "
    "steps could move the outputs",
}
_ADVICE = "A layer with hardly any share can be frozen; one with nearly all of it is the bottleneck."


def layer_updates(snapshots: Sequence[Snapshot], step: int | None = None, unit: Unit = "step") -> Figure:
    """Return the share of each layer in what really moved the outputs: as bars at one step, stacked over training.

    |J_l Δθ_l|² of every layer l, normalised, whatever optimizer took the steps. Runs without it show the share that
    kernel and optimizer would give each layer (`layer_share`). The ten largest layers are named.
    """
    title = "Which layers move the outputs"
    for field in _MEANINGS:
        if held := _held(snapshots, field):
            return _both(held, field, title, nearest(held, step), abscissa(snapshots, unit))
    reasons = [s.texts[key] for s in snapshots for key in ("updates", "layers") if key in s.texts]
    return empty(title, reasons[-1] if reasons else "No second probe has been measured yet.")


def layer_share(snapshots: Sequence[Snapshot], unit: Unit = "step") -> Figure:
    """Return the share of each layer in the trace of lr J D Jᵀ over training, stacked to 1."""
    title = "Kernel by layer"
    held = _held(snapshots, "layer_share")
    if not held:
        reasons = [s.texts["layers"] for s in snapshots if "layers" in s.texts]
        return empty(title, reasons[-1] if reasons else "No share of a layer has been measured yet.")
    at = abscissa(snapshots, unit)
    data = _stacked(held, "layer_share", at)
    layout = _layout(title, _MEANINGS["layer_share"], at, single=len(held) == 1)
    return {"data": data, "layout": layout}


def _held(snapshots: Sequence[Snapshot], field: str) -> list[Snapshot]:
    return [s for s in measured(snapshots) if getattr(s, field).size and getattr(s, field).size == len(s.layers)]


def _shares(snapshot: Snapshot, field: str) -> dict[str, float]:
    return dict(zip(snapshot.layers, getattr(snapshot, field).tolist(), strict=True))


def _named(held: Sequence[Snapshot], field: str) -> dict[str, str]:
    """Return the ten layers with the largest shares over training, in the order of the network, with their colours."""
    weight: dict[str, float] = {}
    for s in held:
        for name, share in _shares(s, field).items():
            weight[name] = weight.get(name, 0.0) + float(np.nan_to_num(share))
    largest = set(sorted(weight, key=lambda name: -weight[name])[:_SHOWN])
    return dict(zip((name for name in weight if name in largest), MODE_COLOURS, strict=False))


def _label(name: str) -> str:
    """Return a layer's name, its end alone where it is long: what differs between layers stands there."""
    return word(name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :].lstrip('.')}") or "the module"


def _split(table: Mapping[str, float], named: Mapping[str, str]) -> Floats:
    """Return the shares of the named layers and, behind them, of all others together."""
    rest = [share for name, share in table.items() if name not in named]
    return np.array([*(table.get(name, np.nan) for name in named), float(np.nansum(rest))])


def _stacked(held: Sequence[Snapshot], field: str, at: Abscissa, **axes: str) -> list[Figure]:
    shown = [held[i] for i in thinned(len(held), _AREAS)]
    named = _named(shown, field)
    rows = np.array([_split(_shares(s, field), named) for s in shown])
    others = max(len(_shares(s, field)) for s in shown) - len(named)
    labels = [*map(_label, named), *([f"{others} others"] if others > 0 else [])]
    x = at([s.step for s in shown])
    data = []
    for k, (label, colour) in enumerate(zip(labels, (*named.values(), GREY), strict=False)):
        trace: dict[str, Any] = {"name": label, "y": numbers(rows[:, k]), "hovertemplate": "%{y:.1%}"} | axes
        if len(shown) == 1:
            data.append(trace | {"type": "bar", "x": [f"step {shown[0].step}"], "marker": {"color": colour}})
        else:
            area = {"stackgroup": "layers", "fillcolor": colour, "line": {"color": colour, "width": 0.5}}
            data.append(trace | area | {"type": "scatter", "mode": "lines", "x": x})
    return data


def _both(held: Sequence[Snapshot], field: str, title: str, shown: Snapshot, at: Abscissa) -> Figure:
    """Return shares over training, and beside them those of one probe as bars."""
    if len(held) == 1:
        return {"data": _stacked(held, field, at), "layout": _layout(title, _MEANINGS[field], at, single=True)}
    named = _named([held[i] for i in thinned(len(held), _AREAS)], field)
    shares = _split(_shares(shown, field), named)
    useful = dict(zip(shown.layers, shown.layer_useful.tolist(), strict=False))
    along = [f", {useful[name]:+.2f} along -dL/df" if name in useful else "" for name in named]
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": f"step {shown.step}",
        "x": numbers(shares[:-1]),
        "y": [_label(name) for name in named],
        "marker": {"color": list(named.values())},
        "hovertext": along,
        "hovertemplate": "%{y}: %{x:.1%}%{hovertext}<extra>%{fullData.name}</extra>",
        "showlegend": False,
        "xaxis": "x2",
        "yaxis": "y2",
    }
    layout = _layout(title, f"{_MEANINGS[field]}: stacked over training, bars at step {shown.step}", at)
    layout["xaxis"] |= {"domain": [0, 0.5]}
    layout["xaxis2"] = {"domain": [0.78, 1], "anchor": "y2", "title": {"text": f"at step {shown.step}"}, "nticks": 3}
    layout["xaxis2"] |= {"rangemode": "tozero", "tickformat": ".0%"}
    layout["yaxis2"] = {"type": "category", "anchor": "x2", "tickfont": {"size": 10}}
    layout |= {"showlegend": False, "shapes": [upright(at([shown.step])[0], "step")]}
    return {"data": [*_stacked(held, field, at), bars], "layout": layout}


def _layout(title: str, meaning: str, at: Abscissa, *, single: bool = False) -> Figure:
    return layout_of(
        title,
        f"{meaning}. {_ADVICE}",
        xaxis={"type": "category"} if single else {"title": {"text": at.title}},
        yaxis={"title": {"text": "share (fraction)"}, "range": [0, 1]},
        showlegend=True,
        legend={"traceorder": "reversed", "font": {"size": 10}},
        hovermode="x unified",
        barmode="stack",
    )
