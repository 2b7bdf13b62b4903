"""Learning speed of a run that was recorded: between two probes, did modes decay as their rates say?

rate_i is an eigenvalue of the loss-weighted kernel at the earlier probe, c_i its residual there, c'_i the later one in
the same basis. Full-batch gradient descent at lr on squared error gives -ln|c'_i / c_i| = -steps · ln|1 - lr rate_i|
while the kernel stays. What a real run does instead (momentum, Adam, noise, a moving kernel) is the question.

Source: Jacot, Gabriel and Hongler 2018.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import GREY, MODE_COLOURS, Figure, layout_of, line, log_axis, numbers
from ntk_monitor.history import History
from ntk_monitor.snapshot import Snapshot

Array: TypeAlias = NDArray[np.float64]

# Outside, the decay of an interval is lost in what the other modes leave, or too small to tell from no decay.
_LEAST, _MOST = math.log(1.05), math.log(100)
_VISIBLE = 1e-4
_COLOURS = 6


@dataclass(frozen=True, slots=True)
class Interval:
    """Modes between two neighbouring probes, those with a visible share of the residual and a decay that can be seen.

    Attributes:
        start, end: steps of the probes.
        predicted: (m,) decay per step by the earlier probe's rates and learning rate.
        measured: (m,) decay per step that happened; negative where the residual grew.
    """

    start: int
    end: int
    predicted: Array
    measured: Array


def intervals(snapshots: Iterable[Snapshot]) -> list[Interval]:
    """Return the decays between neighbouring probes of a run that hold modes in one basis and a learning rate."""
    found = []
    for before, after in pairwise(one for one in snapshots if one.status == "measured"):
        steps, m = after.step - before.step, min(before.rates.size, before.coordinates.size, after.carried.size)
        lr = before.facts.get("lr", math.nan)
        if after.previous_step != before.step or steps <= 0 or m == 0 or not lr > 0:
            continue
        rates, start, end = before.rates[:m], before.coordinates[:m], after.carried[:m]
        with np.errstate(divide="ignore", invalid="ignore"):
            predicted = -np.log(np.abs(1 - lr * rates))
            measured = -np.log(np.abs(end / start)) / steps
        seen = (before.residual_energy[:m] > _VISIBLE) & (rates > before.rates_floor) & np.isfinite(measured)
        seen &= (predicted * steps > _LEAST) & (predicted * steps < _MOST)
        if seen.any():
            found.append(Interval(before.step, after.step, predicted[seen], measured[seen]))
    return found


def study_run(snapshots: Iterable[Snapshot]) -> Report:
    """Return whether the modes of a recorded run decayed as fast, and in the order, that their rates said.

    Args:
        snapshots: of a run, e.g. `load_history(path)`.

    Raises:
        InputError: no two neighbouring probes with modes of one basis and a known learning rate.
    """
    found = intervals(snapshots)
    if not found:
        raise InputError(
            "the run holds no two neighbouring probes with modes and a learning rate; modes need a recognised loss and "
            "a full kernel"
        )
    predicted, measured = (np.concatenate([getattr(one, key) for one in found]) for key in ("predicted", "measured"))
    ratio = float(np.median(measured / predicted))
    rank = _rank(predicted, measured)
    faster = "faster than" if ratio > 1.25 else "slower than" if ratio < 0.8 else "about as fast as"
    return Report(
        name="learning_speed",
        title=f"Learning speed of a run: {len(predicted)} decays of modes in {len(found)} intervals",
        summary=(
            f"Between probes, modes of the residual decayed {faster} plain full-batch gradient descent at the same "
            f"learning rate would have it: {ratio:.3g} times, in the median. Momentum and Adam take longer steps, a "
            "growing kernel quickens, noise and a turning basis slow."
        ),
        numbers=(
            Number("speed_ratio", ratio, "", note="median of measured over forecast decay per step"),
            Number("rank_correlation", rank, "", note="of forecast and measured decays, Spearman"),
        ),
        verdicts=_verdicts(len(predicted), ratio, rank),
        tables={"Between probes": _table(found)},
        figures={"learning_run": figure(found)},
        caveats=(
            "Decays below 5 % or above a factor of 100 in an interval, and modes with no residual, are left out.",
        ),
    )


def from_history(history: History) -> Report:
    """Return what `study_run` says of a history; raises as it does."""
    return study_run(history.snapshots)


def _rank(a: Array, b: Array) -> float:
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    # Imported here: scipy.stats takes about a second to load.
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def _verdicts(count: int, ratio: float, rank: float) -> tuple[Verdict, ...]:
    enough = count >= 10 and math.isfinite(rank)
    return (
        Verdict(
            "modes with a larger rate decayed faster in this run",
            rank >= 0.7 if enough else None,
            f"rank correlation {rank:.3f} over {count} decays; 0.7 wanted, of at least 10",
        ),
        Verdict(
            "modes decayed as plain full-batch gradient descent would have it",
            0.8 <= ratio <= 1.25 and rank >= 0.7 if enough else None,
            f"median decay {ratio:.3g} times the forecast; 0.8 to 1.25 wanted, in the right order",
        ),
    )


def _table(found: list[Interval]) -> Table:
    rows = tuple(
        (f"{one.start} to {one.end}", len(one.predicted), float(np.median(one.measured / one.predicted)))
        for one in found
    )
    return Table(("steps", "modes", "measured / forecast, median"), rows)


def figure(found: list[Interval]) -> Figure:
    """Return measured against forecast decay of every mode; on the grey line they agree."""
    data: list[Figure] = []
    for k, one in enumerate(found):
        colour = MODE_COLOURS[k % len(MODE_COLOURS)]
        dots = {"mode": "markers", "marker": {"size": 6, "color": colour}, "showlegend": k < _COLOURS}
        name = f"steps {one.start} to {one.end}"
        data.append(line(numbers(one.predicted), numbers(one.measured, positive=True), name, colour, **dots))
    both = np.concatenate([np.concatenate([one.predicted, one.measured]) for one in found])
    ends = numbers([both[both > 0].min(), both.max()])
    data.append(line(ends, ends, "as forecast", GREY, line={"color": GREY, "dash": "dash"}))
    layout = layout_of(
        "Decay of modes between probes",
        "Each dot is one mode between two probes. On the dashed line it decayed as plain gradient descent would have "
        "it; above, faster (momentum, Adam, a growing kernel); below, slower. Modes that grew are not shown.",
        xaxis=log_axis("forecast decay per step"),
        yaxis=log_axis("measured decay per step"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}
