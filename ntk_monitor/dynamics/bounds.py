"""How large lr·λ may be: bounds of stability of an optimizer's step on a quadratic loss, in closed form.

One direction of curvature λ, position x, learning rate lr, a = lr·λ, ω = lr·weight_decay, momentum b. Each rule is a
linear recursion of x; it is stable while both roots z of its characteristic polynomial lie inside the unit circle, and
the first to leave does so at z = -1. An update that averages gradients, b ← βb + (1-d) g, gives

    z² - (1 + β - (1-d) a) z + β = 0,        stable while (1-d) a < 2 (1+β),

Adam is the case d = β with the preconditioned curvature for λ; decay beside the preconditioner (AdamW) replaces the
last 2 (1+β) by (1+β)(2-ω); decay inside the gradient adds ω to a; Nesterov's step g + βb has 2 (1+β)/(1+2β).

That is the upper bound, of full-batch steps. The lower one, of small batches, is the bound without momentum for the
step that momentum amounts to over time, lr (1-d)/(1-β): fresh noise at each step does not alternate in sign with the
momentum, so that nothing is gained from it.

Sources: Polyak 1964 and Cohen et al. 2021, 2022 (upper bounds, on neural networks); Andreyev and Beneventano 2024
(small batches settle at the bound without momentum).
"""

import math
from dataclasses import dataclass

from ntk_monitor.errors import InputError
from ntk_monitor.optimizers import Family, Group


@dataclass(frozen=True, slots=True)
class Bounds:
    """What lr·λ must stay under without weight decay, and what weight decay uses up of it at the current lr."""

    low: float
    """With the noise of small batches."""
    high: float
    """For full-batch steps."""
    decay_low: float = 0.0
    """Used up of `low`; grows in proportion to the learning rate, as lr·λ does."""
    decay_high: float = 0.0
    """Used up of `high`."""

    def headroom(self, sharpness: float, noise: float = 0.0) -> tuple[float, float]:
        """Return the factors of the learning rate at which the low and the high bound are reached.

        Args:
            sharpness: largest lr·λ in force.
            noise: what the noise of batches adds to it at the low bound.
        """
        return _ratio(self.low, sharpness + noise + self.decay_low), _ratio(self.high, sharpness + self.decay_high)


def bounds(group: Group, family: Family) -> tuple[float, float]:
    """Return (low, high): what lr·λ must stay under at the group's learning rate and weight decay.

    λ is an eigenvalue of the loss's curvature, for Adam of the preconditioned one. Plain SGD (2, 2), momentum .9
    (.2, 3.8), Nesterov .9 (.2, 1.357), Adam (2, 38), AdamW with lr·wd = ω (2 - ω, 19 (2 - ω)).

    Raises:
        InputError: family "other", whose step is not known.
    """
    found = parts(group, family)
    return found.low - found.decay_low, found.high - found.decay_high


def parts(group: Group, family: Family) -> Bounds:
    """Return the bounds of one group with the share of weight decay apart; raises as `bounds` does."""
    omega = group.lr * group.weight_decay
    if family == "adam":
        beta = group.betas[0]
        low, high = 2.0, _ratio(2 * (1 + beta), 1 - beta)
        # Decay inside Adam's gradient is preconditioned too; its curvature is weight_decay·D, left out here.
        return Bounds(low, high, omega, high * omega / 2) if group.decoupled else Bounds(low, high)
    if family != "sgd":
        raise InputError(f"bounds of stability are known for SGD, Adam and AdamW, got family {family!r}")
    beta = group.momentum
    # Torch ignores dampening without momentum, and refuses it with Nesterov's step.
    fresh = 1 - group.dampening if beta else 1.0
    low = _ratio(2 * (1 - beta), fresh)
    high = 2 * (1 + beta) / (1 + 2 * beta) if group.nesterov else _ratio(2 * (1 + beta), fresh)
    return Bounds(low, high, omega, omega)


def smallest(groups: tuple[Group, ...], family: Family) -> Bounds:
    """Return the strictest bounds of several groups: their directions mix, so that none may exceed its own.

    Raises:
        InputError: no group, or family "other".
    """
    if not groups:
        raise InputError("wanted at least one parameter group, got none; pass the run's optimizer")
    found = [parts(group, family) for group in groups]
    return Bounds(
        min(b.low for b in found),
        min(b.high for b in found),
        max(b.decay_low for b in found),
        max(b.decay_high for b in found),
    )


def _ratio(bound: float, used: float) -> float:
    return bound / used if used > 0 else math.inf
