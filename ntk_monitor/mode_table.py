"""Single modes of one probe as a table: how strong, how much is left in them, how fast they should and did decay.

Modes are the eigenvectors of the loss-weighted kernel M, rate₁ ≥ rate₂ ≥ … its eigenvalues; without a known loss, of K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ntk_monitor.bands import bands, reach, remaining_steps
from ntk_monitor.history import History
from ntk_monitor.snapshot import Floats, Snapshot

MOST = 1024
"""Rows of the table; slower modes are left out."""

Cell: TypeAlias = float | int | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """What stands in one column."""

    name: str
    unit: str
    tells: str


@dataclass(frozen=True, slots=True)
class ModeTable:
    """Rows in the order of the modes, the fastest first; None where a number is not known."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """Which probes the numbers rest on, or why there are none."""


def mode_table(snapshot: Snapshot, previous: Snapshot | None = None, history: History | None = None) -> ModeTable:
    """Return the modes of a probe.

    Args:
        snapshot: the probe whose modes are listed.
        previous: the measured probe before it, whose modes the measured decay belongs to.
        history: where to find the last simulation of the run to come, if this probe made none itself.
    """
    if not snapshot.rates.size:
        return _eigenvalues(snapshot)
    simulated = _simulated(snapshot, history)
    times = simulated.time_to_learn if simulated is not None else np.full(snapshot.rates.size, np.nan)
    # Energy a tenth after T steps is a residual that shrinks by ln(10) / 2T a step, were it exponential.
    with np.errstate(divide="ignore"):
        predicted = math.log(10) / 2 / times
    followed = _measured(snapshot, previous)
    columns = (
        Column("mode", "", "rank of the mode, 1 the fastest"),
        Column("rate", "1 / learning rate", "eigenvalue of the loss-weighted kernel M"),
        Column("energy", "share of the residual", "how much of what is not learned lies in this mode"),
        Column("half-life", "steps", "until the residual along it is half, by the simulation"),
        Column(
            "time to learn", "steps", "until its energy is a tenth, by the simulation; inf: not before the run ends"
        ),
        Column("predicted decay", "1 / step", "mean decay of the residual along it, by the simulation"),
        Column(
            "measured decay", "1 / step", "the same since the probe before, in that probe's basis; negative: it grew"
        ),
        Column("band", "", "when it is learned, or how much slower than the fastest mode it is"),
    )
    shown = min(snapshot.rates.size, MOST)
    names = _bands(snapshot, times, simulated is snapshot)
    rows = tuple(
        (
            i + 1,
            _number(snapshot.rates[i]),
            _number(snapshot.residual_energy[i]) if snapshot.residual_energy.size > i else None,
            _number(times[i] * math.log(2) / (math.log(10) / 2)),
            _number(times[i]),
            _number(predicted[i]),
            _number(followed[i]) if followed.size > i else None,
            names[i],
        )
        for i in range(shown)
    )
    return ModeTable(columns, rows, _note(snapshot, previous, simulated, followed, shown))


def _number(value: float) -> Cell:
    """Return a number of six digits; "inf" where a mode is never learned, None where nothing is known."""
    if math.isnan(value):
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else "inf"


def _simulated(snapshot: Snapshot, history: History | None) -> Snapshot | None:
    """Return the last probe of the same samples, up to this one, that simulated when each mode is learned."""
    earlier = [] if history is None else [one for one in history.measured if one.step < snapshot.step]
    fits = (
        one
        for one in (snapshot, *reversed(earlier))
        if one.time_to_learn.size == snapshot.rates.size and one.probe == snapshot.probe
    )
    return next(fits, None)


def _measured(snapshot: Snapshot, previous: Snapshot | None) -> Floats:
    """Return -ln|end / start| per step along the modes of the previous probe, (n,), or nothing to compare."""
    if previous is None or snapshot.previous_step != previous.step or snapshot.carried.size == 0:
        return np.empty(0)
    if snapshot.carried.shape != previous.coordinates.shape or snapshot.step <= previous.step:
        return np.empty(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        decay = -np.log(np.abs(snapshot.carried / previous.coordinates)) / (snapshot.step - previous.step)
    return np.where(np.isfinite(decay), decay, np.nan)


def _bands(snapshot: Snapshot, times: Floats, own: bool) -> Sequence[str]:
    """Return the name of each mode's band: by time to learn where this probe simulated it, else by rate."""
    if own and (masks := reach(snapshot.rates, snapshot.rates_floor, times, remaining_steps(snapshot))):
        found = masks.items()
    else:
        found = {band.name: band.mask for band in bands(snapshot.rates, snapshot.rates_floor)}.items()
    names = np.full(snapshot.rates.size, "", dtype=object)
    for name, mask in found:
        names[mask] = name
    return list(names)


def _note(
    snapshot: Snapshot, previous: Snapshot | None, simulated: Snapshot | None, followed: Floats, shown: int
) -> str:
    said = [f"Modes of the probe at step {snapshot.step}."]
    if simulated is None:
        said.append("No simulation of the run to come: half-lives are not known.")
    elif simulated is not snapshot:
        said.append(f"Simulated at step {simulated.step}, for the modes of the same rank there.")
    if followed.size and previous is not None:
        said.append(f"Measured since step {previous.step}.")
    if shown < snapshot.rates.size:
        said.append(f"{snapshot.rates.size - shown} slower modes are not listed.")
    return " ".join(said)


def _eigenvalues(snapshot: Snapshot) -> ModeTable:
    columns = (
        Column("mode", "", "rank, 1 the largest"),
        Column("eigenvalue", "squared output units", "eigenvalue of the unnormalised kernel K"),
        Column("share", "share of the trace", "how much of the kernel's strength lies in this direction"),
    )
    values = snapshot.eigenvalues[:MOST]
    total = float(snapshot.eigenvalues.sum()) if snapshot.eigenvalues.size else math.nan
    rows = tuple((i + 1, _number(v), _number(v / total) if total else None) for i, v in enumerate(values.tolist()))
    reason = snapshot.modes_reason or "the loss is not known"
    return ModeTable(columns, rows, f"Eigenvalues only, no modes of the residual: {reason.rstrip('.')}.")
