"""When to probe: every n optimizer steps, or as often as a share of the wall time allows. No torch, own clock."""

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Schedule:
    """Decides at each optimizer step whether a probe is due, and keeps account of what probes cost.

    Attributes:
        every: fixed cadence in optimizer steps; None: by budget.
        max_overhead: share of wall time that probes may take, used when `every` is None.
        clock: seconds, monotonic; replaced in tests.
    """

    every: int | None
    max_overhead: float
    clock: Callable[[], float] = time.perf_counter
    last_step: int | None = None
    spent: float = 0.0
    cost: float = 0.0
    started: float | None = None

    def start(self) -> None:
        """Start the clock, at the beginning of training; later calls do nothing."""
        if self.started is None:
            self.started = self.clock()

    def due(self, step: int) -> bool:
        """True when a probe should be made after `step` optimizer steps."""
        if self.last_step is None:
            return True
        if step <= self.last_step:
            return False
        if self.every is not None:
            # A step counter may jump (two optimizers per batch): ask whether a multiple of `every` was passed.
            return step // self.every > self.last_step // self.every
        return self.spent + self.cost <= self.max_overhead * self.elapsed

    def done(self, step: int, seconds: float) -> None:
        """Account for a probe at this step that took so many seconds."""
        self.last_step = step if self.last_step is None else max(step, self.last_step)
        self.cost = 0.0
        self.pay(seconds)

    def pay(self, seconds: float) -> None:
        """Account for further work that belongs to the last probe."""
        self.spent += seconds
        self.cost += seconds

    @property
    def elapsed(self) -> float:
        """Seconds since training started."""
        return 0.0 if self.started is None else self.clock() - self.started

    @property
    def overhead(self) -> float:
        """Share of the wall time since training started that the monitor took; 0 before any time has passed."""
        return min(1.0, self.spent / self.elapsed) if self.elapsed > 0 else 0.0


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
    """Running mean of values that may live on a device: nothing is read before it is asked for."""

    total: Any = 0.0
    count: int = 0

    def add(self, value: Any) -> None:
        """Take one more value."""
        self.total = self.total + value
        self.count += 1

    def taken(self) -> float:
        """Return the mean of the values since the last call; NaN without any."""
        mean = float(self.total) / self.count if self.count else math.nan
        self.total, self.count = 0.0, 0
        return mean
