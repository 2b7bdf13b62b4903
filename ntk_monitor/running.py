"""What is noted at every step of a run at next to no cost: learning rates, and values whose mean is asked for later."""

import bisect
import math
from dataclasses import dataclass, field
from typing import Any

_TOGETHER = 100


@dataclass(slots=True)
class LearningRates:
    """Learning rates of every parameter group, recorded at each step, kept where they change."""

    steps: list[int] = field(default_factory=list)
    values: list[tuple[float, ...]] = field(default_factory=list)
    latest: int = -1

    def record(self, step: int, rates: tuple[float, ...]) -> None:
        """Note the rates that optimizer step number `step` (from 0) uses."""
        self.latest = step
        if not self.values or self.values[-1] != rates:
            self.steps.append(step)
            self.values.append(rates)

    def between(self, first: int, last: int) -> list[tuple[float, ...]]:
        """Return the rates of steps first to last - 1, or nothing when some of them were not observed."""
        if not self.steps or self.steps[0] > first or last > self.latest + 1:
            return []
        # The change in force at a step is the last one recorded up to it.
        return [self.values[bisect.bisect_right(self.steps, step) - 1] for step in range(first, last)]

    def taken(self) -> tuple[list[int], list[tuple[float, ...]]]:
        """Return the changes since the last call; the rates now in force open the next stretch."""
        widest = max((len(rates) for rates in self.values), default=0)
        # Unfreezing adds parameter groups in the middle of a run.
        found = (self.steps, [rates + (math.nan,) * (widest - len(rates)) for rates in self.values])
        self.steps, self.values = self.steps[-1:], self.values[-1:]
        return found


@dataclass(slots=True)
class Mean:
    """Running mean of values that may live on a device: nothing is read before it is asked for.

    Values wait in a list and are added up a hundred at a time, since one operation on a device's number takes as long
    as everything else that is done at a step.
    """

    total: Any = 0.0
    count: int = 0
    _waiting: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> None:
        """Take one more value, which must not change afterwards."""
        self.count += 1
        self._waiting.append(value)
        if len(self._waiting) >= _TOGETHER:
            self._fold()

    def taken(self) -> float:
        """Return the mean of the values since the last call; NaN without any."""
        self._fold()
        mean = float(self.total) / self.count if self.count else math.nan
        self.total, self.count = 0.0, 0
        return mean

    def _fold(self) -> None:
        for value in self._waiting:
            self.total = self.total + value
        self._waiting.clear()
