"""The logged scalars, one small panel each."""

import textwrap
from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.style import BLUE, Figure, drawn, empty, layout_of, looked, note, series
from ntk_monitor.metrics import SCALARS, Scalar
from ntk_monitor.snapshot import Snapshot


def _span(start: float, end: float) -> list[float]:
    # plotly refuses a domain that rounding pushes outside [0, 1].
    return [max(round(start, 6), 0.0), min(round(end, 6), 1.0)]


def _panel(k: int, count: int, columns: int, scalar: Scalar, across_title: str) -> tuple[Figure, list[Figure]]:
    """Return axes and headings of the k-th of `count` small panels, filled row by row."""
    lines = -(-count // columns)
    across, up = 0.09, 0.48 / lines
    width, height = (1 - across * (columns - 1)) / columns, (1 - up * (lines - 1)) / lines
    left, top = (k % columns) * (width + across), 1 - (k // columns) * (height + up)
    name = "" if k == 0 else str(k + 1)
    heading: Figure = {"x": left, "y": top, "xanchor": "left", "yanchor": "bottom", "align": "left"}
    unit = note(scalar.unit, size=9, width=34, **heading)
    # The name stands above its unit, whatever number of lines that takes.
    word = note(scalar.name, **heading, yshift=13 + 11 * unit["text"].count("<br>"))
    word["text"] = f"<b>{word['text']}</b>"
    word["hovertext"] = "<br>".join(textwrap.wrap(f"{scalar.meaning}. Misleads: {scalar.lies_when}.", 60))
    title = {"text": across_title if k + columns >= count else "", "font": {"size": 10}}
    xaxis = {"domain": _span(left, left + width), "anchor": f"y{name}", "nticks": 4, "title": title}
    axes = {
        f"xaxis{name}": xaxis | ({"matches": "x"} if k else {}),
        f"yaxis{name}": {"domain": _span(top - height, top), "anchor": f"x{name}", "nticks": 4},
    }
    return axes, [unit, word]


def scalars(snapshots: Sequence[Snapshot], unit: Unit = "step", *, columns: int = 3) -> Figure:
    """Return the logged scalars over training, one small panel each, in the order of `metrics.SCALARS`.

    Three columns need about 800 pixels of width; a narrow page wants one.
    """
    probes = looked(snapshots)
    shown = [s for s in SCALARS if any(np.isfinite(snapshot.metrics.get(s.name, np.nan)) for snapshot in probes)]
    if not shown:
        return empty("Scalars", "No scalar has been measured yet.")
    at = abscissa(snapshots, unit)
    layout = layout_of("Scalars", "The numbers every logger receives.", annotations=[])
    data: list[Figure] = []
    for k, scalar in enumerate(shown):
        values = [snapshot.metrics.get(scalar.name, np.nan) for snapshot in probes]
        points = drawn(at, [snapshot.step for snapshot in probes], values)
        name = "" if k == 0 else str(k + 1)
        place = {"xaxis": f"x{name}", "yaxis": f"y{name}", "marker": {"size": 4, "color": BLUE}}
        data.append(series(scalar.name, BLUE, points, at.word, **place))
        axes, words = _panel(k, len(shown), min(len(shown), columns), scalar, at.title)
        layout |= axes
        layout["annotations"] += words
    return {"data": data, "layout": layout}
