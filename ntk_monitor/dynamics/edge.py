"""Is a run at the edge of stability? Read from its history of (sharpness over the full-batch bound, loss).

Full-batch training raises the sharpness until it meets the bound, and then goes on just there: steps along the sharpest
direction overshoot, which flattens it again, while the loss falls unevenly over many steps. A ratio just above 1 is
therefore how such a run looks, not an alarm. A run that has converged can rest near the bound too, by accident, as
every quantity then stands still: what tells the two apart is that the loss still falls.

Source: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically occurs at the edge of
stability", 2021; for Adam Cohen et al. 2022.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Regime: TypeAlias = Literal["below", "edge", "above", "converged", "unknown"]

WINDOW = 8
"""Probes that are judged together, the latest."""
_FEWEST = 4
# Measured ratios of runs at the edge: momentum and Nesterov 1 ± .05, Adam .8 to 1.1 (means over half a run); single
# probes scatter about twice as far, and a probe of 64 samples over-estimates sharpness by a quarter.
_HOVERS = (0.8, 1.25)
_SINGLE = (0.6, 1.5)
SPIKE = 1.5
"""A ratio above this is no edge any more."""
_FALLING = 0.02
"""Part of the loss that must be gone over the window; less is a loss that stands still."""


@dataclass(frozen=True, slots=True)
class Edge:
    """Where a run stands relative to the bound of full-batch steps."""

    regime: Regime
    """"below", "edge" of stability, "above" (a spike is likely), "converged" near the bound, "unknown" (too few)."""
    ratio: float
    """Mean of sharpness over bound in the window."""
    spread: float
    """Standard deviation of the same."""
    decline: float
    """Part of the loss that has gone over the window; negative where it has risen."""


def edge(ratios: Sequence[float] | NDArray[np.float64], losses: Sequence[float] | NDArray[np.float64]) -> Edge:
    """Return the regime of the latest probes of one run, in the order of their steps.

    "above" needs more than a ratio over 1: the mean of the last three over 1.5, or each of the last four over 1 and
    larger than the one before, both while the loss is not falling.

    Args:
        ratios: sharpness over the full-batch bound, `Stability.ratio`; probes without one (NaN) are left out.
        losses: loss at the same probes, on the same samples.
    """
    kept = np.isfinite(np.asarray(ratios, float)) & np.isfinite(np.asarray(losses, float))
    r, loss = np.asarray(ratios, float)[kept][-WINDOW:], np.asarray(losses, float)[kept][-WINDOW:]
    if len(r) < _FEWEST:
        return Edge("unknown", float(r.mean()) if len(r) else float("nan"), float("nan"), float("nan"))
    decline = _decline(loss)
    found = (float(r.mean()), float(r.std()), decline)
    rising = bool((np.diff(r[-4:]) > 0).all() and (r[-4:] > 1).all())
    if decline < _FALLING and (r[-3:].mean() > SPIKE or (rising and _decline(loss[-4:]) < 0)):
        return Edge("above", *found)
    hovers = _HOVERS[0] <= found[0] <= _HOVERS[1] and bool(((r > _SINGLE[0]) & (r < _SINGLE[1])).all())
    if not hovers:
        return Edge("below" if found[0] < 1 else "unknown", *found)
    return Edge("edge" if decline >= _FALLING else "converged", *found)


def _decline(loss: NDArray[np.float64]) -> float:
    """Return the part of the loss that has gone from the first half to the second; medians, as it jumps at the edge."""
    half = len(loss) // 2
    first, last = float(np.median(loss[:half])), float(np.median(loss[half:]))
    return 1 - last / first if first > 0 else 0.0
