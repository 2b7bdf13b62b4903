"""Single modes of the residual: how much is left in each, and how fast it goes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ntk_monitor.figures.abscissa import Abscissa, Unit, abscissa
from ntk_monitor.figures.style import (
    MODE_COLOURS,
    Figure,
    empty,
    layout_of,
    line,
    measured,
    numbers,
    thinned,
    value_axis,
)
from ntk_monitor.snapshot import ARRAYS, Snapshot

_DOTS = 100


def mode_decay(snapshots: Sequence[Snapshot], modes: Sequence[int], unit: Unit = "step", *, log: bool = True) -> Figure:
    """Return the residual's energy in single modes, and how fast each decayed between neighbouring probes.

    `modes` are ranks, 1 the fastest. Above, dots: coordinate² (loss units) of that rank in each probe's own basis;
    lines: the same residual followed in the basis of the earlier probe, the only comparison that means decay. Below:
    that decay, -ln|end / start| per step; negative where the residual grew; crosses: what the simulation at that probe
    forecast. Ranks beyond the last mode are left out; long histories show every k-th interval.
    """
    held = [snapshot for snapshot in measured(snapshots) if snapshot.coordinates.size]
    if not held or not modes:
        reasons = [snapshot.modes_reason for snapshot in measured(snapshots) if snapshot.modes_reason]
        return empty("Single modes", f"Modes are off: {reasons[-1]}" if reasons else "No probe with modes yet.")
    at = abscissa(snapshots, unit)
    data: list[Figure] = []
    for k, rank in enumerate(modes):
        data += _mode(held, rank, MODE_COLOURS[k % len(MODE_COLOURS)], at, log=log)
    heights = [y for trace in data if "yaxis" not in trace for y in trace["y"]]
    layout = layout_of(
        "Single modes: energy and decay",
        "Above: energy of the residual in a mode; dots in each probe's own basis, lines followed in the basis of the "
        "earlier probe. Below: decay of the residual per step between two probes; crosses: as simulated.",
        xaxis={"anchor": "y", "matches": "x2", "showticklabels": False},
        yaxis=value_axis(
            f"energy ({ARRAYS['coordinates'].unit.removeprefix('sqrt(').removesuffix(')')})",
            heights,
            log=log,
            domain=[0.44, 1],
        ),
        xaxis2={"anchor": "y2", "title": {"text": at.title}},
        yaxis2={"title": {"text": "decay per step"}, "domain": [0, 0.36]},
        showlegend=True,
    )
    layout["meta"]["click"] = "mode"
    return {"data": data, "layout": layout}


def _mode(held: Sequence[Snapshot], rank: int, colour: str, at: Abscissa, *, log: bool) -> list[Figure]:
    """Return dots, followed lines, decay, and simulated decay of one mode."""
    i, group = rank - 1, {"legendgroup": f"mode {rank}"}
    own = [snapshot for snapshot in held if 0 <= i < snapshot.coordinates.size]
    shown = [own[j] for j in thinned(len(own), _DOTS)]
    energy = numbers([snapshot.coordinates[i] ** 2 for snapshot in shown], positive=log)
    dots = {"mode": "markers", "marker": {"color": colour, "size": 6}} | group
    found = [line(at([snapshot.step for snapshot in shown]), energy, f"mode {rank}", colour, **dots)]
    found[0]["customdata"] = [rank] * len(shown)
    pairs = [(a, b) for a, b in pairwise(own) if b.previous_step == a.step < b.step and b.carried.size > i]
    x: list[float | None] = []
    followed: list[float | None] = []
    speed: list[float | None] = []
    for before, after in [pairs[j] for j in thinned(len(pairs), _DOTS)] if pairs else []:
        start, end = float(before.coordinates[i]), float(after.carried[i])
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = -np.log(np.abs(np.divide(end, start))) / (after.step - before.step)
        x += [*at([before.step, after.step]), None]
        followed += [*numbers([start**2, end**2], positive=log), None]
        speed += [*numbers([rate, rate]), None]
    quiet = {"showlegend": False} | group
    found.append(line(x, followed, f"mode {rank}, followed", colour, **quiet))
    below = {"xaxis": "x2", "yaxis": "y2"} | quiet
    found.append(line(x, speed, f"mode {rank}, decay", colour, **below))
    told = [s for s in own if s.time_to_learn.size > i and s.time_to_learn[i] > 0]
    if told:
        told = [told[j] for j in thinned(len(told), _DOTS)]
        # Energy a tenth after T steps is a residual that shrinks by ln(10) / 2T a step, were it exponential.
        rates = numbers([np.log(10) / 2 / float(s.time_to_learn[i]) for s in told])
        cross = {"mode": "markers", "marker": {"color": colour, "size": 8, "symbol": "x-thin-open"}} | below
        found.append(line(at([s.step for s in told]), rates, f"mode {rank}, simulated", colour, **cross))
    return found
