"""Early stopping of a run that was recorded: the filter on kernel modes that its steps were so far.

Needs no network, only the history: the rates s·λ and the residual's coordinates at the first probe, and the learning
rate of every step.
Source: Ali, Kolter and Tibshirani 2019; Yao, Rosasco and Caponnetto 2007.
"""

import numpy as np

from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.applications.stopped import EarlyStopping, early_stopping_ridge
from ntk_monitor.applications.stopping_figures import filters, ridges
from ntk_monitor.errors import InputError
from ntk_monitor.history import History

SAME = 0.01
"""Largest relative difference of two functions that are called the same."""
DRIFT = 0.1
"""Largest distance of a network from its frozen kernel, relative to what it learned, that counts as following it."""


def modes(stopping: EarlyStopping, most: int = 8) -> Table:
    """Return eigenvalue, share learned and ridge of modes spread over the spectrum."""
    picked = np.unique(np.geomspace(1, len(stopping.eigenvalues), most).round().astype(int))
    order = np.argsort(stopping.eigenvalues)[::-1]
    rows = tuple(
        (int(k), *(float(a[order[k - 1]]) for a in (stopping.eigenvalues, stopping.filter, stopping.ridge)))
        for k in picked
    )
    return Table(("mode", "eigenvalue", "share learned", "ridge"), rows)


def from_history(history: History, *, momentum: float = 0.0, nesterov: bool = False) -> Report:
    """Return the filter that a recorded run has applied so far, from its first spectrum and its learning rates.

    Args:
        history: of a run with squared error under SGD, one parameter group (or equal rates).
        momentum: of its SGD, which a history does not hold.
        nesterov: likewise.

    Raises:
        InputError: no modes or rates were recorded, or an optimizer or loss whose run is no filter on these modes.
    """
    probes = [one for one in history.measured if one.rates.size and one.coordinates.size]
    changes, values = history.learning_rates
    if len(probes) < 2 or not changes.size:
        raise InputError("two probes with modes and the learning rates are needed; this history lacks them")
    first, last = probes[0], probes[-1]
    optimizer = first.texts.get("optimizer", last.texts.get("optimizer", ""))
    if optimizer and not optimizer.startswith("SGD"):
        raise InputError(f"stopping is a filter on kernel modes under SGD only; this run used {optimizer}")
    if not first.loss.startswith("mse"):
        raise InputError(f"stopping is a filter for a squared error only; this run's loss is {first.loss}")
    if np.ptp(values, axis=1).max() > 0:
        raise InputError("parameter groups with different learning rates have no common modes of K")
    held = np.searchsorted(changes, np.arange(first.step, last.step), side="right").clip(min=1) - 1
    rates = values[held, 0]
    # The recorded rates are s·λ, so that s is 1 here.
    stopping = early_stopping_ridge(
        first.rates,
        rates.tolist(),
        samples=1,
        loss="half_sum",
        momentum=momentum,
        nesterov=nesterov,
        energy=first.coordinates**2,
    )
    left = float(((1 - stopping.filter) ** 2) @ first.coordinates**2)
    actual = float((last.coordinates**2).sum())
    start = float((first.coordinates**2).sum())
    apart = abs(np.sqrt(left) - np.sqrt(actual)) / np.sqrt(start)
    return Report(
        name="early_stopping",
        title="What the steps of this run are as a filter on kernel modes",
        summary=(
            f"From step {first.step} to {last.step} the kernel of step {first.step} lets {left / start:.1%} of the "
            f"residual's energy stand; {actual / start:.1%} was left. The nearest single ridge gives a function "
            f"{stopping.mismatch:.1%} away from the one that stopping here gives."
        ),
        numbers=(
            Number("residual left, filter", left / start, "of the energy"),
            Number("residual left, measured", actual / start, "of the energy"),
            Number("best single ridge", stopping.best, "1 / learning rate", note="of rates s·λ"),
            Number("mismatch of the best single ridge", stopping.mismatch, "of the learned function"),
            Number("1 / time", 1 / stopping.time, "1 / learning rate"),
        ),
        verdicts=(
            Verdict(
                "stopping here is the same as one ridge",
                stopping.mismatch <= SAME,
                f"functions differ by {stopping.mismatch:.1%}, {SAME:.0%} allowed",
            ),
            Verdict(
                "the run followed the filter of its first kernel",
                bool(apart <= DRIFT),
                f"root of the energy {apart:.1%} of the start away, {DRIFT:.0%} allowed",
            ),
        ),
        tables={"Modes (rates s·λ)": modes(stopping)},
        figures={"ridges": ridges(stopping), "filters": filters(stopping)},
        caveats=(
            "The probe stands for the training set: its N enters the rates as if the loss averaged over the probe.",
            f"Momentum {momentum} is assumed; a history does not hold it.",
        ),
    )
