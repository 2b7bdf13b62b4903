"""Eigenvalues of K: at one step, and over training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.style import (
    GREY,
    ORANGE,
    VIRIDIS,
    Figure,
    empty,
    kernel_words,
    layout_of,
    line,
    log_axis,
    measured,
    nearest,
    numbers,
    run_colours,
    thinned,
    upright,
    value_axis,
    word,
)
from ntk_monitor.snapshot import ARRAYS, Floats, Snapshot

# A heat map has at most this many columns and rows: more cells than pixels only make the page slow.
_COLUMNS, _ROWS = 200, 80

# Points of a line on a logarithmic axis, where late modes lie on top of each other.
_POINTS = 240


def spectrum(snapshots: Sequence[Snapshot], step: int | None = None, *, log: bool = True) -> Figure:
    """Return the eigenvalues of K against mode index, at the probe nearest to a step (default: the last).

    Dotted: the first probe of the same samples; dashed: the noise floor.
    """
    return spectra({"": snapshots}, step, log=log)


def spectra(runs: Mapping[str, Sequence[Snapshot]], step: int | None = None, *, log: bool = True) -> Figure:
    """Return the same of several runs, one colour each, every one at its probe nearest to the step."""
    held = {name: [s for s in measured(snapshots) if s.eigenvalues.size] for name, snapshots in runs.items()}
    shown = {name: nearest(snapshots, step) for name, snapshots in held.items() if snapshots}
    if not shown:
        return empty("Spectrum", "No probe has been measured yet.")
    data: list[Figure] = []
    floors: list[float] = []
    values: list[Floats] = []
    alone = len(shown) == 1
    colours = run_colours(runs)
    for name, one in shown.items():
        colour = colours[name]
        first = next(s for s in held[name] if s.probe == one.probe)
        label = f"step {one.step}" if alone else f"{word(name)}, step {one.step}"
        if first is not one:
            dotted = {"color": GREY if alone else colour, "dash": "dot", "width": 1.5}
            data.append(_line(first, f"step {first.step}", colour, line=dotted, showlegend=alone))
            values.append(first.eigenvalues)
        data.append(_line(one, label, colour, line={"color": colour, "width": 2}))
        values.append(one.eigenvalues)
        if np.isfinite(one.noise_floor) and one.noise_floor > 0:
            floors.append(float(one.noise_floor))
            dashed = {"color": ORANGE if alone else colour, "dash": "dash", "width": 1.5}
            floor = f"noise floor {one.noise_floor:.1e}"
            ends = numbers([one.noise_floor] * 2)
            data.append(line([1, max(one.eigenvalues.size, 2)], ends, floor, ORANGE, line=dashed, showlegend=alone))
    some = next(iter(shown.values()))
    heights = np.concatenate(values) if values else np.empty(0)
    yaxis = value_axis(f"eigenvalue ({ARRAYS['eigenvalues'].unit})", heights, log=log)
    if floors and log:
        top = max(float(np.nanmax(one, initial=floors[0])) for one in values)
        least = min(float(one[one > 0].min(initial=top)) for one in values)
        # Rounding noise reaches far below the floor; a decade of it is enough to see that it is there. A floor far
        # below every eigenvalue stays in the legend alone.
        yaxis |= _decades(float(np.log10(max(min(floors), 1e-5 * least))) - 1, float(np.log10(top)) + 0.5)
    others = "" if alone else " Kernels of different probes or networks have scales of their own."
    layout = layout_of(
        f"Spectrum, step {some.step}" if alone else "Spectrum",
        f"Eigenvalues of the {kernel_words(some)}. A large eigenvalue is a direction learned fast. Dotted: the first "
        f"probe. Dashed: the noise floor, below which eigenvalues are rounding.{others}",
        xaxis=log_axis("mode index", exponentformat="none"),
        yaxis=yaxis,
        showlegend=True,
        # Eigenvalues of one run descend, so that its upper right corner is free.
        legend={"x": 0.98, "y": 0.98, "xanchor": "right", "yanchor": "top"}
        if alone
        else {"orientation": "h", "y": -0.22},
    )
    layout["meta"]["click"] = "mode"
    return {"data": data, "layout": layout}


def _decades(low: float, high: float) -> Figure:
    """Return a logarithmic range with a tick at every decade, or at every second or third where they are many."""
    return {"range": [low, high], "dtick": int(max(1, -(-(high - low) // 9)))}


def _line(snapshot: Snapshot, name: str, colour: str, **trace: Any) -> Figure:
    values = snapshot.eigenvalues
    n = values.size
    kept = np.arange(n) if n <= _POINTS else np.unique(np.geomspace(1, n, _POINTS).round().astype(int)) - 1
    # A line needs two points; markers keep a kernel of a few rows visible.
    mode = "lines+markers" if n <= 24 else "lines"
    hover = "mode %{x}: %{y:.4g}<extra>%{fullData.name}</extra>"
    y = numbers(values[kept], positive=True)
    return line((kept + 1).tolist(), y, name, colour, mode=mode, hovertemplate=hover, **trace)


def spectrum_over_training(snapshots: Sequence[Snapshot], step: int | None = None, unit: Unit = "step") -> Figure:
    """Return log10 eigenvalue as a heat map, steps across and mode index (logarithmic) upwards.

    Cells at or below that probe's noise floor are blank. Long histories and large kernels are thinned evenly. Dotted:
    the step that is looked at, where one is given.
    """
    held = [snapshot for snapshot in measured(snapshots) if snapshot.eigenvalues.size]
    if not held:
        return empty("Spectrum over training", "No probe has been measured yet.")
    columns = [held[i] for i in thinned(len(held), _COLUMNS)]
    modes = max(snapshot.eigenvalues.size for snapshot in columns)
    ranks = np.unique(np.geomspace(1, modes, _ROWS).round().astype(int)) if modes > _ROWS else np.arange(1, modes + 1)
    table = np.full((ranks.size, len(columns)), np.nan)
    for j, snapshot in enumerate(columns):
        values = snapshot.eigenvalues
        floor = snapshot.noise_floor if np.isfinite(snapshot.noise_floor) else 0.0
        present = ranks[ranks <= values.size]
        kept = values[present - 1]
        resolved = kept > max(floor, 0.0)
        table[: present.size, j][resolved] = np.log10(kept[resolved])
    at = abscissa(snapshots, unit)
    heat = {
        "type": "heatmap",
        "x": at([snapshot.step for snapshot in columns]),
        "y": ranks.tolist(),
        # Colours resolve no more than a hundredth of a decade.
        "z": [numbers(row.round(2)) for row in table],
        "colorscale": VIRIDIS,
        "colorbar": {"title": {"text": "log10 eigenvalue", "side": "right"}},
        "hovertemplate": f"{at.word} %{{x}}, mode %{{y}}: 10^%{{z:.2f}}<extra></extra>",
    }
    tooltip = f"log10 of the eigenvalues of the {kernel_words(columns[-1])}. Blank: below the noise floor."
    layout = layout_of(
        "Spectrum over training",
        tooltip,
        xaxis={"title": {"text": at.title}},
        yaxis=log_axis("mode index", exponentformat="none"),
        shapes=[] if step is None else [upright(at([nearest(held, step).step])[0], "step")],
    )
    return {"data": [heat], "layout": layout}
