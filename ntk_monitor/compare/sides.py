"""Which two probes stand for two runs, and everything that is said about them."""

from collections.abc import Iterator, Sequence

import numpy as np

from ntk_monitor import figures
from ntk_monitor.compare.difference import Comparison, Difference
from ntk_monitor.compare.kernels import drift_row, kernel_rows, mismatch, turn_rows
from ntk_monitor.compare.training import (
    accuracy_row,
    cost_row,
    layer_rows,
    learning_rate_row,
    loss_row,
    setup_row,
    speed_row,
    time_row,
)
from ntk_monitor.compare.turn import centred, turn
from ntk_monitor.errors import InputError
from ntk_monitor.figures import Figure
from ntk_monitor.history import History
from ntk_monitor.similarity import kernel_change
from ntk_monitor.snapshot import Snapshot

Pair = tuple[Snapshot, Snapshot]


def probes(history: History, steps: tuple[int, int], name: str = "run") -> Comparison:
    """Return what differs between two probes of one history, e.g. of two checkpoints.

    Raises:
        InputError: twice the same step, or no measured probe at one of the steps.
    """
    if steps[0] == steps[1]:
        raise InputError(f"two probes to compare must be at different steps, got {steps[0]} twice")
    pair = _at(history, steps[0]), _at(history, steps[1])
    names = f"step {steps[0]}", f"step {steps[1]}"
    left, right = [pair[0]], [pair[1]]
    rows = [*_own(pair, left, right), *cost_row(left, right)]
    more, notes, drawn = _kernels(pair, names, pair if all(one.gram.size for one in pair) else None)
    if not all(one.gram.size for one in pair) and not mismatch(*pair):
        notes.append(_without_gram(history))
    return Comparison(f"{name}: {names[0]} and {names[1]}", names, (*rows, *more), tuple(notes), drawn)


def runs(left: History, right: History, names: tuple[str, str], steps: tuple[int, int] | None = None) -> Comparison:
    """Return what differs between two runs: over all their probes, and at the last step that both measured.

    Args:
        left: one run.
        right: the other.
        names: what to call them.
        steps: compare the kernels of these probes instead, one of each run.

    Raises:
        InputError: a run without a measured probe, or none at the step asked for.
    """
    for name, history in zip(names, (left, right), strict=True):
        if not history.measured:
            raise InputError(f"a comparison needs a measured probe of each run, {name} has none")
    pair = _pair(left.measured, right.measured) if steps is None else (_at(left, steps[0]), _at(right, steps[1]))
    own = (left.measured, right.measured)
    rows = [*setup_row(*pair), *speed_row(*own), *_own(pair, *own), *cost_row(*own)]
    stored = [[one for one in side if one.gram.size] for side in own]
    grams = _pair(*stored) if steps is None and all(stored) else pair if all(one.gram.size for one in pair) else None
    more, notes, drawn = _kernels(pair, names, grams)
    at = f"step {pair[0].step}" if pair[0].step == pair[1].step else f"steps {pair[0].step} and {pair[1].step}"
    notes.insert(0, f"Loss, layers and kernels are those of {at}; learning rate and cost those of the whole runs.")
    if grams is None and not mismatch(*pair):
        notes.append("Drift and eigenspaces: no Gram matrices are stored on both sides (gram_every).")
    return Comparison(" and ".join(names), names, (*rows, *more), tuple(notes), drawn)


def _own(pair: Pair, left: Sequence[Snapshot], right: Sequence[Snapshot]) -> Iterator[Difference]:
    yield from loss_row(*pair)
    yield from accuracy_row(*pair)
    yield from learning_rate_row(left, right)
    yield from time_row(*pair)
    yield from layer_rows(*pair)


def _kernels(
    pair: Pair, names: tuple[str, str], grams: Pair | None
) -> tuple[list[Difference], list[str], dict[str, Figure]]:
    """Return rows, notes and figures about the kernels; only notes where they are not comparable."""
    layers = figures.layers_compared(dict(zip(names, pair, strict=True)))
    drawn = {"layers-compared": layers} if layers["data"] else {}
    if reason := mismatch(*pair):
        return [], [f"The kernels are not comparable, and are not compared: {reason}."], drawn
    rows = list(kernel_rows(*pair))
    drawn = {"spectra-compared": figures.spectra_compared(dict(zip(names, pair, strict=True)))} | drawn
    notes: list[str] = []
    if grams is not None and not mismatch(*grams):
        left, right = (np.asarray(one.gram, np.float64) for one in grams)
        drift = kernel_change(left, right)
        if np.isfinite(drift):
            rows.append(drift_row(drift, (grams[0].step, grams[1].step)))
        try:
            found = turn(centred(left), centred(right))
        except InputError as error:
            notes.append(f"Eigenspaces: {error}.")
        else:
            rows += turn_rows(found, (grams[0].step, grams[1].step))
            drawn["eigenspaces-compared"] = figures.overlaps(found.cosines, names, found.dimension)
    return rows, notes, drawn


def _pair(left: Sequence[Snapshot], right: Sequence[Snapshot]) -> Pair:
    """Return the probes of the last common step; else the nearest to where the shorter run ended."""
    ours, theirs = {one.step: one for one in left}, {one.step: one for one in right}
    common = ours.keys() & theirs.keys()
    if common:
        return ours[max(common)], theirs[max(common)]
    end = min(max(ours), max(theirs))
    return (
        min(left, key=lambda one: abs(one.step - end)),
        min(right, key=lambda one: abs(one.step - end)),
    )


def _at(history: History, step: int) -> Snapshot:
    found = next((one for one in history.measured if one.step == step), None)
    if found is None:
        near = sorted(history.steps.tolist(), key=lambda known: abs(known - step))[:4]
        raise InputError(
            f"no probe was measured at step {step}; nearest are {', '.join(map(str, sorted(near)))}"
            if near
            else f"no probe was measured at step {step}, nor at any other"
        )
    return found


def _without_gram(history: History) -> str:
    stored = [str(one.step) for one in history.measured if one.gram.size]
    where = f"it is at steps {', '.join(stored[:12])}{' ...' if len(stored) > 12 else ''}" if stored else "at none"
    return f"Drift and rotation need the Gram matrix of both probes, which is not stored at every step ({where})."
