"""What all figures share: colours, axes, empty figures, and numbers that JSON can hold."""

import html
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ntk_monitor.snapshot import Snapshot

Figure = dict[str, Any]

STEPS = "optimizer steps"
GREY, BLUE, ORANGE = "#7a7a7a", "#2a78c2", "#e07b00"
BAND_COLOURS = ("#fde08a", "#fdb75e", "#f48849", "#db5c68", "#b83289", "#8b0aa5", "#4c02a1", "#b0b0b0")
"""Warm and light for fast modes, dark for slow ones, grey for what no training time resolves."""
MODE_COLOURS = (
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
"""Of what has no order: modes, classes, layers, runs."""
DIVERGING = [[0.0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1.0, "#b2182b"]]
VIRIDIS = [[0.0, "#440154"], [0.2, "#414487"], [0.4, "#2a788e"], [0.6, "#22a884"], [0.8, "#7ad151"], [1.0, "#fde725"]]


def numbers(values: Iterable[Any], *, positive: bool = False) -> list[float | None]:
    """Return JSON numbers of six digits, None where not finite (or, when asked, not above zero)."""
    array = np.asarray(values, dtype=np.float64).ravel()
    kept = np.isfinite(array) & ((array > 0) if positive else True)
    return [float(f"{value:.6g}") if keep else None for value, keep in zip(array.tolist(), kept, strict=True)]


def measured(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the probes that hold a spectrum."""
    return [snapshot for snapshot in snapshots if snapshot.status == "measured"]


def looked(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the probes that hold scalars: full and light ones."""
    return [snapshot for snapshot in snapshots if snapshot.status != "skipped"]


def nearest(snapshots: Sequence[Snapshot], step: int | None = None) -> Snapshot:
    """Return the one nearest to a step, the earlier of two as near; the last without a step. There must be one."""
    return snapshots[-1] if step is None else min(snapshots, key=lambda snapshot: abs(snapshot.step - step))


def layout_of(title: str, tooltip: str, **layout: Any) -> Figure:
    """Return a layout with its title and the sentence that stands behind it."""
    base = {"title": {"text": title}, "meta": {"tooltip": tooltip}, "hovermode": "closest", "showlegend": False}
    return base | layout


def log_axis(title: str, **axis: Any) -> Figure:
    """Return a logarithmic axis."""
    # dtick=1 labels whole decades only; plotly's minor labels crowd the axis.
    return {"type": "log", "dtick": 1, "exponentformat": "power", "title": {"text": title}} | axis


def note(text: str, *, size: int = 12, width: int = 50, **place: Any) -> Figure:
    """Return a grey annotation, broken into lines of `width` characters; by default in the middle of the figure."""
    place_of = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    return place_of | {"text": "<br>".join(textwrap.wrap(text, width)), "font": {"size": size, "color": GREY}} | place


def empty(title: str, reason: str) -> Figure:
    """Return a figure that says why nothing is drawn."""
    axis = {"visible": False}
    layout = layout_of(title, reason, xaxis=axis, yaxis=axis, annotations=[note(reason)])
    return {"data": [], "layout": layout}


def kernel_words(snapshot: Snapshot) -> str:
    """Return which kernel a probe measured, in words."""
    return (
        f"{snapshot.kernel or 'unnamed'} kernel, unnormalised K = J J^T, N = {snapshot.samples} samples, "
        f"C = {snapshot.outputs} outputs, {snapshot.mode} mode"
    )


def value_axis(title: str, values: Iterable[Any] = (), *, log: bool, **axis: Any) -> Figure:
    """Return a vertical axis, logarithmic or linear, with ticks as `values`, or the range where one is given, ask."""
    if not log:
        return {"title": {"text": title}} | axis
    known = np.array([value for value in numbers(values, positive=True) if value is not None])
    low, high = axis.get("range") or (np.log10([known.min(), known.max()]) if known.size else (0, 0))
    # Within a decade or so 2 and 5 are labelled too; over many, every second or third decade.
    spaced = "D2" if high - low < 1.5 else int(max(1, np.ceil((high - low) / 8)))
    return log_axis(title, **({"dtick": spaced} | axis))


def word(text: str) -> str:
    """Return a name of the user's so that plotly, which reads a little HTML, shows every letter of it."""
    return html.escape(text, quote=False)


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **trace: Any) -> Figure:
    """Return a line; `trace` replaces any of its fields."""
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": {"color": colour}} | trace


def thinned(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 … count-1, evenly spread, first and last included."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


MOST = 360
"""Points of a line: more than a panel has pixels for only makes the page slow."""


def drawn(
    at: Callable[[Sequence[float]], list[float]], steps: Sequence[float], values: Sequence[Any], *, log: bool = False
) -> Figure:
    """Return x, y and mode of one series: finite values only, markers on short ones, long ones thinned to `MOST`.

    Of every stretch of a long series the smallest and the largest value stay, so that no spike is lost.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    kept = np.isfinite(y) & ((y > 0) if log else True)
    x, y = x[kept], y[kept]
    if len(y) > MOST:
        stretches = np.array_split(np.arange(len(y)), MOST // 2 - 1)
        ends = {int(i[pick(y[i])]) for i in stretches for pick in (np.argmin, np.argmax)}
        chosen = np.array(sorted(ends | {0, len(y) - 1}))
        x, y = x[chosen], y[chosen]
    mode = "lines+markers" if len(y) <= 60 else "lines"
    return {"x": at(x.tolist()), "y": numbers(y), "mode": mode, "marker": {"size": 5}}


def series(name: str, colour: str, points: Figure, word: str = "step", **trace: Any) -> Figure:
    """Return a line through the points of `drawn`; `word` stands before its abscissa in hovers."""
    hover = f"{word} %{{x}}: %{{y:.4g}}<extra>%{{fullData.name}}</extra>"
    return line(points["x"], points["y"], name, colour, hovertemplate=hover) | points | trace


def run_colours(runs: Iterable[str]) -> dict[str, str]:
    """Return the colour that stands for each run, by its place among all that are looked at."""
    return {name: MODE_COLOURS[k % len(MODE_COLOURS)] for k, name in enumerate(runs)}


def upright(x: float, name: str, colour: str = ORANGE, **shape: Any) -> Figure:
    """Return a line across the height of the plot, which a page may find by its name and let a reader drag."""
    look = {"color": colour, "width": 1.5, "dash": "dot"}
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return {"type": "line", "name": name, "line": look} | ends | shape


def stripe(start: float, end: float, colour: str = "rgba(194, 59, 59, 0.10)") -> Figure:
    """Return a shaded stretch of the horizontal axis, over the height of the plot and behind what is drawn."""
    ends = {"x0": start, "x1": end, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return {"type": "rect", "fillcolor": colour, "line": {"width": 0}, "layer": "below"} | ends
