"""What runs along the horizontal axis: optimizer steps, epochs, or learning rate summed over the steps taken.

Summed learning rate, t(s) = Σ lr of the steps before s, is the time of gradient flow: runs with different schedules
that do the same thing lie on each other. With several parameter groups the largest rate counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.figures.style import STEPS
from ntk_monitor.snapshot import Floats, Snapshot

Unit: TypeAlias = Literal["step", "epoch", "time"]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Abscissa:
    """A map from optimizer steps to what is drawn, linear between its knots and beyond them."""

    title: str = STEPS
    word: str = "step"
    """Before a value, in hovers."""
    steps: Array | None = None
    """(k,) ascending, at least two; None: steps themselves are drawn."""
    values: Array | None = None

    def __call__(self, steps: Iterable[float]) -> list[float]:
        """Return where steps are drawn, as whole numbers where they are steps."""
        asked = np.asarray(list(steps), dtype=np.float64)
        if self.steps is None or self.values is None:
            return [int(step) if step.is_integer() else step for step in asked.tolist()]
        at = np.clip(np.searchsorted(self.steps, asked, side="right") - 1, 0, len(self.steps) - 2)
        slope = np.diff(self.values) / np.diff(self.steps)
        found = self.values[at] + (asked - self.steps[at]) * slope[at]
        return [float(f"{value:.7g}") for value in found.tolist()]


def abscissa(snapshots: Sequence[Snapshot], unit: Unit = "step") -> Abscissa:
    """Return the horizontal axis of a run in a unit; steps, with the reason in the title, where it is not known."""
    if unit == "epoch":
        per = steps_per_epoch(snapshots)
        if not per:
            return Abscissa(f"{STEPS} (epochs are not known)")
        return Abscissa("epochs", "epoch", np.array([0.0, per]), np.array([0.0, 1.0]))
    if unit == "time":
        steps, rates = largest_rates(snapshots)
        if not len(steps) or not rates.any():
            return Abscissa(f"{STEPS} (learning rates were not recorded)")
        end = max(float(steps[-1]), float(snapshots[-1].step)) + 1
        knots = np.append(steps, end)
        return Abscissa(
            "learning rate summed over steps",
            "summed learning rate",
            knots,
            np.concatenate([[0.0], np.cumsum(rates * np.diff(knots))]),
        )
    return Abscissa()


def steps_per_epoch(snapshots: Sequence[Snapshot]) -> float:
    """Return the number of optimizer steps per epoch that the probes' steps and epochs agree on; 0 when there is none.

    epoch = floor(step / S) at every probe leaves an interval of S; its middle is returned.
    """
    known = [(s.step, s.epoch) for s in snapshots if s.epoch is not None]
    # The last probe comes after the last batch, when a trainer may already count the next epoch.
    lower = max((step / (epoch + 1) for step, epoch in known), default=0.0)
    upper = min((step / epoch for step, epoch in known if epoch > 0), default=np.inf)
    return (lower + upper) / 2 if 0 < lower <= upper < np.inf else 0.0


def largest_rates(snapshots: Sequence[Snapshot]) -> tuple[Array, Array]:
    """Return steps (k,) at which learning rates changed, and the largest of all groups from there on (k,)."""
    steps, rates = recorded_rates(snapshots)
    return steps, np.where(np.isfinite(rates), rates, 0.0).max(axis=1, initial=0.0)


def recorded_rates(snapshots: Sequence[Snapshot]) -> tuple[Array, Array]:
    """Return steps (k,) at which learning rates changed, and the rates from there on (k, groups), NaN for no group."""
    pairs = [(s.lr_steps, s.lr_values) for s in snapshots]
    held = [(at, rates) for at, rates in pairs if at.size and rates.ndim == 2 and len(at) == len(rates)]
    if not held:
        return np.empty(0), np.empty((0, 1))
    groups = max(rates.shape[1] for _, rates in held)
    steps = np.concatenate([at for at, _ in held]).astype(np.float64)
    if all(rates.shape[1] == groups for _, rates in held):
        rates = np.concatenate([rates for _, rates in held]).astype(np.float64)
    else:
        rates = np.concatenate([_filled(rates, groups) for _, rates in held])
    # Later records replace earlier ones at the same step; a probe may repeat the rates it started with.
    steps, last = np.unique(steps[::-1], return_index=True)
    rates = rates[::-1][last]
    same = np.isclose(rates[1:], rates[:-1], rtol=0, atol=0, equal_nan=True).all(axis=1)
    new = np.append(True, ~same)
    return steps[new], rates[new]


def _filled(rates: Floats, groups: int) -> Array:
    """Return rates (k, g) with NaN for the groups that are missing, (k, groups)."""
    filled = np.full((len(rates), groups), np.nan)
    filled[:, : rates.shape[1]] = rates
    return filled
