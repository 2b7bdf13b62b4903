"""Lazy or rich: what a kernel before and after training says about it. K₀ and K are (N, N), Y targets (N, D).

Lazy training leaves the kernel as it is, so that the network stays its tangent model f₀ + J₀(θ - θ₀); rich training
moves both. Source: Chizat, Oyallon and Bach 2019; Fort et al. 2020 (kernel velocity); Geiger et al. 2020.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.similarity import alignment, kernel_change

Array = NDArray[np.float64]
Regime = Literal["lazy", "in between", "rich"]

LAZY = 0.1
"""Movement of the kernel and error of the tangent model up to which training is called lazy."""
RICH = 0.5
"""Both above it: rich."""


def movement(before: Array, after: Array) -> float:
    """Return |K - K₀| / |K₀|, growth and rotation together, ≥ 0; NaN for a kernel of zeros."""
    start = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / start if start > 0 else math.nan


def regime(moved: float, error: float) -> Regime:
    """Return in which regime a run was.

    Args:
        moved: see `movement`.
        error: of the tangent model, |f - f₀ - J₀ Δθ| / |f - f₀|.

    The two borders, a tenth and a half, are a convention; the numbers are what counts.
    """
    if moved <= LAZY and error <= LAZY:
        return "lazy"
    return "rich" if moved >= RICH and error >= RICH else "in between"


def kernel_velocity(kernels: Sequence[Any], steps: Sequence[float]) -> Array:
    """Return (1 - cosine of neighbouring kernels) / steps between them, one number fewer than kernels.

    High at first and then falling: features are learned early. Blind to pure growth.

    Args:
        kernels: (n, n) each, or any one shape, in order.
        steps: at which they were measured, increasing.

    Raises:
        InputError: fewer than two kernels, shapes that differ, or steps that do not increase.

    Source: Fort et al. 2020.
    """
    arrays = [np.asarray(one, dtype=np.float64) for one in kernels]
    times = np.asarray(steps, dtype=np.float64)
    if len(arrays) < 2 or times.shape != (len(arrays),) or not (np.diff(times) > 0).all():
        raise InputError(
            f"a velocity needs two or more kernels and increasing steps, got {len(arrays)} and {times.tolist()[:5]}"
        )
    if len({one.shape for one in arrays}) > 1:
        raise InputError(f"kernels must have one shape, got {sorted({one.shape for one in arrays})}")
    changes = np.array([kernel_change(a, b) for a, b in pairwise(arrays)])
    return np.asarray(changes / np.diff(times))


def alignment_gain(before: Array, after: Array, targets: Array, groups: int = 20) -> tuple[float, float]:
    """Return how much closer to its targets the kernel came, and the standard error over samples.

    Difference of unbiased centred alignments, -2 to 2; the error by the jackknife, leaving out one group of samples at
    a time. NaN below 8 samples.

    Cost: `groups` · N².
    """
    count = len(targets)
    if count < 8:
        return math.nan, math.nan
    gain = alignment(after, targets) - alignment(before, targets)
    parts = np.array_split(np.random.default_rng(0).permutation(count), min(groups, count // 4))
    left = []
    for part in parts:
        rest = np.setdiff1d(np.arange(count), part)
        within = np.ix_(rest, rest)
        left.append(alignment(after[within], targets[rest]) - alignment(before[within], targets[rest]))
    g = len(parts)
    return gain, float(np.sqrt((g - 1) / g * np.square(np.array(left) - np.mean(left)).sum()))
