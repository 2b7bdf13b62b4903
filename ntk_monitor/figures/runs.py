"""Several runs in one figure."""

from collections.abc import Mapping, Sequence

import numpy as np

from ntk_monitor.figures.abscissa import Abscissa
from ntk_monitor.figures.style import (
    STEPS,
    Figure,
    drawn,
    empty,
    layout_of,
    measured,
    run_colours,
    series,
    value_axis,
    word,
)
from ntk_monitor.snapshot import Snapshot

# What differs between runs and is worth seeing side by side: title of the axis, where it is found, logarithmic.
_SHOWN = (
    ("loss on the probe", "loss_value", True),
    ("factor for the learning rate, upper end", "lr_headroom_high", True),
    ("trace of K", "trace", True),
    ("effective rank", "effective_rank", False),
    ("alignment with the targets", "alignment", False),
    ("kernel change since the last probe", "kernel_change", False),
)
_COLUMNS = 3


def runs_compared(runs: Mapping[str, Sequence[Snapshot]]) -> Figure:
    """Return loss, learning-rate bound and shape of the kernel of several runs over their steps, one colour per run."""
    title = "Runs side by side"
    held = {name: measured(snapshots) for name, snapshots in runs.items() if measured(snapshots)}
    panels = [panel for panel in _SHOWN if any(np.isfinite(_values(s, panel[1])).any() for s in held.values())]
    if not panels:
        return empty(title, "No run has been measured yet.")
    layout = layout_of(
        title,
        "The same quantity of every run over its own optimizer steps. Kernels of different probes or networks have "
        "scales of their own: compare shapes, not heights.",
        showlegend=True,
        legend={"orientation": "h", "y": -0.12},
    )
    data = []
    colours = run_colours(runs)
    lines = -(-len(panels) // _COLUMNS)
    for k, (title_of, key, log) in enumerate(panels):
        axis = "" if k == 0 else str(k + 1)
        column, row = k % _COLUMNS, k // _COLUMNS
        width, height = 0.27, (1 - 0.16 * (lines - 1)) / lines
        left, top = column * (1 - width) / (_COLUMNS - 1), 1 - row * (height + 0.16)
        heights = [v for snapshots in held.values() for v in _values(snapshots, key)]
        words = {"title": {"text": title_of, "font": {"size": 11}}, "anchor": f"x{axis}"}
        layout[f"yaxis{axis}"] = (
            value_axis("", heights, log=log) | words | {"domain": [max(top - height, 0.0), min(top, 1.0)]}
        )
        layout[f"xaxis{axis}"] = {
            "domain": [max(left, 0.0), min(left + width, 1.0)],
            "anchor": f"y{axis}",
            "title": {"text": STEPS if row == lines - 1 else "", "font": {"size": 11}},
        }
        for name, snapshots in held.items():
            points = drawn(Abscissa(), [s.step for s in snapshots], _values(snapshots, key), log=log)
            place = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "legendgroup": word(name), "showlegend": k == 0}
            data.append(series(word(name), colours[name], points | {"mode": "lines"} | place))
    return {"data": data, "layout": layout}


def _values(snapshots: Sequence[Snapshot], key: str) -> list[float]:
    return [s.loss_value if key == "loss_value" else s.metrics.get(key, np.nan) for s in snapshots]
