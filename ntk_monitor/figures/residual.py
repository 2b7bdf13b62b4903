"""What is left to learn: the residual by speed of learning, and in single modes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ntk_monitor.bands import NAMES, REACH, band_energy, bands, reach_energy
from ntk_monitor.figures.style import (
    BAND_COLOURS,
    MODE_COLOURS,
    STEPS,
    Figure,
    empty,
    layout_of,
    line,
    log_axis,
    measured,
    note,
    numbers,
)
from ntk_monitor.snapshot import ARRAYS, Snapshot

_REACH_COLOURS = ("#2e9e55", "#9fd3a8", "#e07b00", "#b0b0b0")


def residual_bands(snapshots: Sequence[Snapshot]) -> Figure:
    """Return the share of the residual's energy in each band of modes over training, stacked to 1.

    Probes without modes leave a note with their reason. A single probe is drawn as one stacked bar.
    """
    title = "Residual by learning speed"
    probes = measured(snapshots)
    drawn = [(snapshot, energy) for snapshot in probes if (energy := band_energy(snapshot))]
    reasons = [snapshot.modes_reason for snapshot in probes if snapshot.modes_reason]
    if not drawn:
        return empty(title, f"Modes are off: {reasons[-1]}" if reasons else "No probe with modes yet.")
    steps = [snapshot.step for snapshot, _ in drawn]
    split = [band for snapshot, _ in drawn for band in bands(snapshot.rates, snapshot.rates_floor)]
    alive = {band.name for band in split if band.mask.any()}
    data: list[Figure] = []
    for name, colour in zip(NAMES, BAND_COLOURS, strict=True):
        shares = numbers([energy[name] for _, energy in drawn])
        trace = {"name": name, "y": shares, "showlegend": name in alive, "hovertemplate": "%{y:.1%}"}
        if len(steps) == 1:
            data.append(trace | {"type": "bar", "x": [f"step {steps[0]}"], "marker": {"color": colour}})
        else:
            area = {"stackgroup": "energy", "fillcolor": colour, "line": {"color": colour, "width": 0.5}}
            data.append(trace | area | {"type": "scatter", "mode": "lines", "x": steps})
    off = f"Modes are off at {len(reasons)} of {len(probes)} probes: {reasons[-1]}" if reasons else ""
    layout = layout_of(
        title,
        "Share of the probe's residual energy in modes learned at a similar speed; 10x slower needs 10x more steps "
        "of plain gradient descent. Modes are eigenvectors of K weighted by the loss.",
        xaxis={"title": {"text": STEPS}} if len(steps) > 1 else {"type": "category"},
        yaxis={"title": {"text": "share of the residual's energy"}, "range": [0, 1]},
        showlegend=True,
        legend={"traceorder": "reversed"},
        hovermode="x unified",
        barmode="stack",
        annotations=[note(off, size=11, width=60, y=1.01, yanchor="bottom")] if off else [],
    )
    return {"data": data, "layout": layout}


def residual_reach(snapshots: Sequence[Snapshot]) -> Figure:
    """Return the share of the residual that the remaining steps will learn, at every probe that simulated it, to 1."""
    title = "Residual in reach of the steps left"
    drawn = [(s, energy) for s in measured(snapshots) if (energy := reach_energy(s))]
    if not drawn:
        reasons = [s.texts[key] for s in snapshots for key in ("ahead", "forecast") if key in s.texts]
        return empty(title, f"Not simulated: {reasons[-1]}" if reasons else "The rest of the run was not simulated.")
    at = [f"step {s.step}" for s, _ in drawn]
    data = []
    for name, colour in zip(REACH, _REACH_COLOURS, strict=True):
        shares = numbers([energy[name] for _, energy in drawn])
        bar = {"type": "bar", "x": at, "y": shares, "name": name, "marker": {"color": colour}}
        data.append(bar | {"hovertemplate": "%{y:.1%}"})
    layout = layout_of(
        title,
        "Share of the probe's residual energy in modes whose energy falls to a tenth within the remaining steps, from "
        "a simulation with the kernel of that step and the learning rates to come.",
        xaxis={"type": "category"},
        yaxis={"title": {"text": "share of the residual's energy"}, "range": [0, 1]},
        showlegend=True,
        legend={"orientation": "h", "y": -0.2},
        hovermode="x unified",
        barmode="stack",
    )
    return {"data": data, "layout": layout}


def mode_decay(snapshots: Sequence[Snapshot], modes: Sequence[int]) -> Figure:
    """Return the residual's energy in single modes, and how fast each decayed between neighbouring probes.

    `modes` are ranks, 1 the fastest. Above, dots: coordinate² (loss units) of that rank in each probe's own basis;
    lines: the same residual followed in the basis of the earlier probe, the only comparison that means decay. Below:
    that decay, -ln|end / start| per step; negative where the residual grew. Ranks beyond the last mode are left out.
    """
    drawn = [snapshot for snapshot in measured(snapshots) if snapshot.coordinates.size]
    if not drawn or not modes:
        reasons = [snapshot.modes_reason for snapshot in measured(snapshots) if snapshot.modes_reason]
        return empty("Single modes", f"Modes are off: {reasons[-1]}" if reasons else "No probe with modes yet.")
    data: list[Figure] = []
    for k, rank in enumerate(modes):
        colour, i = MODE_COLOURS[k % len(MODE_COLOURS)], rank - 1
        own = [snapshot for snapshot in drawn if 0 <= i < snapshot.coordinates.size]
        energy = numbers([snapshot.coordinates[i] ** 2 for snapshot in own], positive=True)
        dots = {"mode": "markers", "marker": {"color": colour, "size": 7}, "legendgroup": f"mode {rank}"}
        data.append(line([snapshot.step for snapshot in own], energy, f"mode {rank}", colour, **dots))
        x: list[int | None] = []
        followed: list[float | None] = []
        speed: list[float | None] = []
        for before, after in pairwise(own):
            if after.previous_step != before.step or after.carried.size <= i or after.step == before.step:
                continue
            start, end = float(before.coordinates[i]), float(after.carried[i])
            with np.errstate(divide="ignore", invalid="ignore"):
                rate = -np.log(np.abs(np.divide(end, start))) / (after.step - before.step)
            x += [before.step, after.step, None]
            followed += [*numbers([start**2, end**2], positive=True), None]
            speed += [*numbers([rate, rate]), None]
        quiet = {"showlegend": False, "legendgroup": f"mode {rank}"}
        data.append(line(x, followed, f"mode {rank}, followed", colour, **quiet))
        data.append(line(x, speed, f"mode {rank}, decay", colour, xaxis="x2", yaxis="y2", **quiet))
    layout = layout_of(
        "Single modes: energy and decay",
        "Dots: each probe's own basis. Lines: one residual followed in the basis of the earlier probe.",
        xaxis={"anchor": "y", "matches": "x2", "showticklabels": False},
        yaxis=log_axis(f"energy ({ARRAYS['coordinates'].unit.removeprefix('sqrt(').removesuffix(')')})"),
        xaxis2={"anchor": "y2", "title": {"text": STEPS}},
        yaxis2={"title": {"text": "decay per step"}, "domain": [0, 0.36]},
        showlegend=True,
    )
    layout["yaxis"]["domain"] = [0.44, 1]
    return {"data": data, "layout": layout}
