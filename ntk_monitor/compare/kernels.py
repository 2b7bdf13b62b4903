"""Differences between the kernels of two probes of the same samples. λ are eigenvalues of K, p_i = λ_i / Σλ."""

import math
from collections.abc import Iterator

import numpy as np

from ntk_monitor.clusters import OVERLAP
from ntk_monitor.compare.difference import Difference, apart, difference, factor, number, times
from ntk_monitor.compare.turn import Turn
from ntk_monitor.errors import InputError
from ntk_monitor.snapshot import Floats, Snapshot


def mismatch(left: Snapshot, right: Snapshot) -> str:
    """Return why the kernels of two probes are not comparable, as half a sentence; empty when they are."""
    if not (left.eigenvalues.size and right.eigenvalues.size):
        return "one of them has no spectrum"
    if not (left.probe and right.probe):
        return "a record does not say which samples were measured"
    if left.probe != right.probe:
        return "the probes hold different samples"
    for name, field in (("kernel layout", "kernel"), ("mode", "mode"), ("outputs", "outputs"), ("samples", "samples")):
        ours, theirs = getattr(left, field), getattr(right, field)
        if ours != theirs:
            return f"their {name} differ{'' if name in ('outputs', 'samples') else 's'} ({ours} and {theirs})"
    return ""


def spectrum_distance(left: Floats, right: Floats) -> float:
    """Return the part of the trace that sits at another place of the spectrum, ½ Σ |p_i - q_i|, 0 to 1.

    Total variation of the eigenvalues' shares of the trace, descending: blind to growth and to rotation. NaN for a
    spectrum whose sum is not positive.

    Raises:
        InputError: spectra of different length.
    """
    if left.shape != right.shape:
        raise InputError(f"two spectra must have the same modes, got {left.size} and {right.size}; use one probe")
    p, q = np.sort(left)[::-1], np.sort(right)[::-1]
    if not (p.sum() > 0 and q.sum() > 0):
        return math.nan
    return float(0.5 * np.abs(p / p.sum() - q / q.sum()).sum())


def kernel_rows(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    """Yield what differs between two comparable kernels (`mismatch` is empty)."""
    yield from _size(left, right)
    yield _spectrum(left, right)
    yield from _rank(left, right)
    yield from _alignment(left, right)


def _size(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    sums = float(left.eigenvalues.sum()), float(right.eigenvalues.sum())
    ratio = factor(*sums)
    speed = times(ratio, "faster than", "slower than", "about as fast as")
    meaning = f"At one learning rate the outputs on the right can move {speed} on the left."
    if left.parameters != right.parameters:
        meaning += " The networks differ in size, and the trace with them."
    yield difference("trace of K", (number(value) for value in sums), meaning, apart(ratio))


def _spectrum(left: Snapshot, right: Snapshot) -> Difference:
    distance = spectrum_distance(left.eigenvalues, right.eigenvalues)
    floors = (left.noise_floor, right.noise_floor)
    floor = [value if math.isfinite(value) else 0.0 for value in floors]
    both = (left.eigenvalues > floor[0]) & (right.eigenvalues > floor[1])
    meaning = (
        f"{number(distance)} of the trace sits at another place of the spectrum (0: same shape, 1: nothing alike)."
    )
    if both.any():
        decades = np.log10(right.eigenvalues[both] / left.eigenvalues[both])
        middle = float(np.median(decades))
        meaning += f" The median of {int(both.sum())} resolved eigenvalues changes by a factor of {number(10**middle)}."
    tops = [f"largest {number(float(one.eigenvalues[0]))}" for one in (left, right)]
    return difference("spectrum", tops, meaning, distance >= 0.05)


def _rank(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    n = left.eigenvalues.size
    ranks = [one.metrics.get("effective_rank", math.nan) for one in (left, right)]
    ratio = factor(*ranks)
    if not math.isnan(ratio):
        wider = "spreads over more" if ratio > 1 else "is narrowed to fewer"
        meaning = f"The kernel on the right {wider} directions." if apart(ratio) else "Both spread over equally many."
        yield difference("effective rank", (f"{number(rank)} of {n}" for rank in ranks), meaning, apart(ratio))
    conditions = left.condition_number, right.condition_number
    ratio = factor(*conditions)
    if not math.isnan(ratio):
        bounds = [
            f"{'at least ' if one.condition_is_lower_bound else ''}{number(one.condition_number)}"
            for one in (left, right)
        ]
        lost = left.condition_is_lower_bound or right.condition_is_lower_bound
        meaning = "Fastest over slowest direction of plain gradient descent."
        meaning += " A lower bound says how far rounding lets one see, no more." if lost else ""
        yield difference("condition number", bounds, meaning, apart(ratio, 2.0) and not lost)


def _alignment(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    values = [one.metrics.get("alignment", math.nan) for one in (left, right)]
    change = values[1] - values[0]
    if math.isnan(change):
        return
    # The same samples on both sides: most of the noise of a small probe cancels in the difference.
    matters = abs(change) >= 0.05
    more = "share their target more often" if change > 0 else "share their target less often"
    meaning = f"On the right, samples that learn together {more}." if matters else "Equal ties to the targets."
    few = " With under 100 samples this number is noisy." if left.samples < 100 else ""
    yield difference("alignment", (f"{value:.2f}" for value in values), meaning + few, matters)


def drift_row(drift: float, steps: tuple[int, int]) -> Difference:
    """Return 1 - cosine of the Gram matrices stored at two steps."""
    where = f"0 (step {steps[0]})", f"{number(drift)} (step {steps[1]})"
    word = "hardly turned" if drift < 0.01 else "turned a little" if drift < 0.2 else "turned far"
    meaning = f"1 - cosine of the two stored Gram matrices: the kernel {word}. Growth does not count."
    return difference("kernel drift", where, meaning, drift >= 0.01)


def turn_rows(found: Turn, steps: tuple[int, int]) -> Iterator[Difference]:
    """Yield drift and rotation of the centred Gram matrices."""
    where = f"0 (step {steps[0]})", f"{number(found.drift)} (step {steps[1]})"
    meaning = "The same without what all samples share: how far the ties between samples changed."
    yield difference("centred drift", where, meaning, found.drift >= 0.01)
    space = "the top eigenvector" if found.dimension == 1 else f"the space of the {found.dimension} top eigenvectors"
    meaning = (
        f"{found.overlap:.0%} of {space} of the centred mean Gram is shared ({found.chance:.0%} by chance), the "
        f"largest angle is {found.angle:.0f} degrees; {found.found} of {found.looked} leading modes are found again."
    )
    modes = f"{found.dimension} {'mode' if found.dimension == 1 else 'modes'}"
    held = [f"{modes}, {share:.0%} of the trace" for share in found.held]
    yield difference("top eigenspace", held, meaning, found.overlap < OVERLAP)
