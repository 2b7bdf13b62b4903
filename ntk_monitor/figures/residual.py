"""What is left to learn: the residual by speed of learning, and by when the run will have learned it."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.bands import NAMES, REACH, band_energy, bands, reach, reach_energy, remaining_steps
from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.launch import SHADED, doubtful, launched, launches, limits, marks
from ntk_monitor.figures.style import (
    BAND_COLOURS,
    Figure,
    empty,
    layout_of,
    line,
    looked,
    measured,
    note,
    numbers,
    series,
    thinned,
    value_axis,
)
from ntk_monitor.snapshot import Floats, Snapshot

_REACH_COLOURS = ("#2e9e55", "#7fc48c", "#e07b00", "#a0a0a0")
_AREAS, _DOTS, _BARS = 180, 120, 40
_LEAST = 1e-6
"""Bands that never hold this share of the residual are left out."""


def residual_bands(snapshots: Sequence[Snapshot], unit: Unit = "step") -> Figure:
    """Return the share of the residual's energy in each band of modes over training, stacked to 1.

    Probes without modes leave a note with their reason. A single probe is drawn as one stacked bar.
    """
    title = "Residual by learning speed"
    probes = measured(snapshots)
    held = [snapshot for snapshot in probes if snapshot.coordinates.size]
    held = [held[i] for i in thinned(len(held), _AREAS)] if held else []
    with np.errstate(all="ignore"):  # of a run that broke, numbers overflow; its probes have no energy
        drawn = [(snapshot, energy) for snapshot in held if (energy := band_energy(snapshot))]
    reasons = [snapshot.modes_reason for snapshot in probes if snapshot.modes_reason]
    if not drawn:
        return empty(title, f"Modes are off: {reasons[-1]}" if reasons else "No probe with modes yet.")
    at = abscissa(snapshots, unit)
    steps = at([snapshot.step for snapshot, _ in drawn])
    split = [band for snapshot, _ in drawn for band in bands(snapshot.rates, snapshot.rates_floor)]
    alive = {band.name for band in split if band.mask.any()}
    data: list[Figure] = []
    for name, colour in zip(NAMES, BAND_COLOURS, strict=True):
        shares = numbers([energy[name] for _, energy in drawn])
        trace = {"name": name, "y": shares, "showlegend": name in alive, "hovertemplate": "%{y:.1%}"}
        if len(steps) == 1:
            data.append(trace | {"type": "bar", "x": [f"step {drawn[0][0].step}"], "marker": {"color": colour}})
        else:
            area = {"stackgroup": "energy", "fillcolor": colour, "line": {"color": colour, "width": 0.5}}
            data.append(trace | area | {"type": "scatter", "mode": "lines", "x": steps})
    off = f"Modes are off at {len(reasons)} of {len(probes)} probes: {reasons[-1]}" if reasons else ""
    layout = layout_of(
        title,
        "Share of the probe's residual energy in modes learned at a similar speed; 10x slower needs 10x more steps "
        "of plain gradient descent. Modes are eigenvectors of K weighted by the loss.",
        xaxis={"title": {"text": at.title}} if len(steps) > 1 else {"type": "category"},
        yaxis={"title": {"text": "share of the residual's energy"}, "range": [0, 1]},
        showlegend=True,
        legend={"traceorder": "reversed"},
        hovermode="x unified",
        barmode="stack",
        annotations=[note(off, size=11, width=60, y=1.01, yanchor="bottom")] if off else [],
    )
    return {"data": data, "layout": layout}


def residual_reach(
    snapshots: Sequence[Snapshot], launch: int | None = None, unit: Unit = "step", *, log: bool = True
) -> Figure:
    """Return the residual's energy by when it will be learned: forecast from the probe nearest to `launch`, and found.

    The four bands are those of the launching probe. Lines: their energy, simulated. Dots: what later probes, up to the
    next launch, found in the very modes and curvature of this one. Pale dots, at other probes: the energy in the modes
    of the same ranks. Runs without simulated bands show their shares at every simulating probe.
    """
    title = "Residual in reach of the steps left"
    held = [s for s in measured(snapshots) if s.coordinates.size]
    start = launched(held, launch, "forecast_bands")
    masks = _masks(start) if start is not None else {}
    if start is None or not masks:
        return _reach_shares(snapshots, title)
    at = abscissa(snapshots, unit)
    found, others = _followed(snapshots, start), _same_ranks(held, start, masks)
    data: list[Figure] = []
    least = _LEAST * float(start.forecast_bands[0].sum())
    for k, (name, colour) in enumerate(zip(REACH, _REACH_COLOURS, strict=True)):
        ahead = start.forecast_bands[:, k]
        if max(float(bands[k]) for _, bands in (*found, (start, start.forecast_bands.max(axis=0)))) <= least:
            continue
        legend: Figure = {"legendgroup": name}
        hover = f"forecast from step {start.step}: %{{y:.3g}}<extra>{name}</extra>"
        bold = {"line": {"color": colour, "width": 2.5}, "hovertemplate": hover}
        data.append(
            line(at(start.forecast_steps.tolist()), numbers(ahead, positive=log), name, colour, **bold, **legend)
        )
        for dots, look in ((others, {"opacity": 0.35, "marker": {"size": 5, "color": colour}}), (found, {})):
            points = {"x": at([s.step for s, _ in dots]), "y": numbers([bands[k] for _, bands in dots], positive=log)}
            plain: Figure = {"mode": "markers", "marker": {"size": 7, "color": colour}, "showlegend": False}
            data.append(series(name, colour, points, at.word) | plain | look | legend)
    if not data:
        return empty(title, f"The residual at step {start.step} is zero or not finite.")
    totals = np.array([float(bands.sum()) for _, bands in (*found, *others)])
    layout = layout_of(
        title,
        f"Energy of the probe's residual by when it falls to a tenth, as simulated at step {start.step} with "
        f"{remaining_steps(start):.0f} steps to go. Lines: that simulation, with the kernel frozen there. Dots: "
        f"measured in the modes of that step, up to the next forecast; pale: in modes of the same ranks. {SHADED}",
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis(
            "energy of the residual (loss units)", log=log, **limits(totals, start.forecast_bands.ravel(), log=log)
        ),
        showlegend=True,
        legend={"orientation": "h", "y": -0.22},
        shapes=marks(at, start, _doubted(found, others, start)),
    )
    layout["meta"]["launches"] = launches(at, held)
    return {"data": data, "layout": layout}


def _followed(snapshots: Sequence[Snapshot], start: Snapshot) -> list[tuple[Snapshot, Floats]]:
    """Return what was found in the bands of a launch by the launch itself and by the probes that followed it."""
    after = [s for s in looked(snapshots) if s.launched_bands.size == len(REACH)]
    after = [s for s in after if s.step > start.step and s.facts.get("launch_step") == start.step]
    after = [after[i] for i in thinned(len(after), _DOTS)] if after else []
    return [(start, start.forecast_bands[0]), *((s, s.launched_bands) for s in after)]


def _same_ranks(
    held: Sequence[Snapshot], start: Snapshot, masks: Mapping[str, NDArray[np.bool_]]
) -> list[tuple[Snapshot, Floats]]:
    """Return the energy of other probes in the modes of the same ranks, which is the bands' where the kernel rests."""
    like = [s for s in held if s.coordinates.size == start.coordinates.size and s.probe == start.probe]
    like = [s for s in like if s is not start and s.facts.get("launch_step") != start.step]
    with np.errstate(all="ignore"):  # of a run that broke, numbers overflow
        return [
            (like[i], np.array([float((like[i].coordinates[mask] ** 2).sum()) for mask in masks.values()]))
            for i in (thinned(len(like), _DOTS) if like else [])
        ]


def _doubted(
    found: Sequence[tuple[Snapshot, Floats]], others: Sequence[tuple[Snapshot, Floats]], start: Snapshot
) -> list[tuple[int, int]]:
    """Return where the forecast of the whole residual is no better than none."""
    after = sorted(((s, bands) for s, bands in (*found, *others) if s.step > start.step), key=lambda one: one[0].step)
    totals = np.array([float(bands.sum()) for _, bands in after])
    ahead = start.forecast_bands.sum(axis=1)
    return doubtful([s for s, _ in after], totals, start, ahead, float(ahead[0]))


def _masks(start: Snapshot) -> dict[str, NDArray[np.bool_]]:
    """Return which modes belong to each band by time to learn, as the simulation at this probe has it."""
    return reach(start.rates, start.rates_floor, start.time_to_learn, remaining_steps(start))


def _reach_shares(snapshots: Sequence[Snapshot], title: str) -> Figure:
    """Return the share of the residual that the remaining steps will learn, at every probe that simulated it, to 1."""
    held = [(s, energy) for s in measured(snapshots) if (energy := reach_energy(s))]
    if not held:
        reasons = [s.texts[key] for s in snapshots for key in ("ahead", "forecast") if key in s.texts]
        return empty(title, f"Not simulated: {reasons[-1]}" if reasons else "The rest of the run was not simulated.")
    held = [held[i] for i in thinned(len(held), _BARS)]
    at = [f"step {s.step}" for s, _ in held]
    data = []
    for name, colour in zip(REACH, _REACH_COLOURS, strict=True):
        shares = numbers([energy[name] for _, energy in held])
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
