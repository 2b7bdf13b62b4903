"""When to probe, and how thoroughly: every n optimizer steps, or as a share of wall time allows. No torch, own clock.

Two tiers: a "full" probe measures the whole kernel; a "light" one, a few passes, keeps what moves quickly fresh between
two of them. Start-up lasts until the first full probe is complete (its loss known, its look taken, written). From then
on the budget counts: the share of wall time after start-up that the monitor takes, everything in its hooks included.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Tier: TypeAlias = Literal["full", "light"]

SECOND = 2
"""Optimizer steps before the first complete probe: the optimizer's state and the peak of memory come with them."""

PLANNED = 20
"""Fewer full probes than this in a run are announced."""

# Light probes between two full ones: at most so many, and for at most half of what a full one costs.
_LIGHTS = 8

# Credit beyond the price of a probe before it is made, as a share of the price.
_RESERVE = 0.25

# Share of what is earned that is saved for a forecast.
_SAVED = 1 / 3

# Until one was made, a light probe is taken to cost this share of a full one.
_GUESS = 0.25

# Steps whose duration is known before the number of probes is foretold.
_TIMED = 20


@dataclass(slots=True)
class Schedule:
    """Decides at each optimizer step whether a probe is due, and keeps account of what probes cost.

    By budget, time after start-up earns credit at the rate `max_overhead` and whatever the monitor does spends it. A
    full probe is due when its price is in credit; light probes are spread evenly over the credit in between. Credit is
    kept up to the price of one full probe, so that a pause is not followed by a burst. Early light probes, when the
    number of steps passes 1, 2, 4, 8, ..., may run up half the price of a full one as debt. Forecasts, which may cost
    many times what a probe does, are saved for apart: a third of what is earned, up to the price of one. Hence at any
    time

        spent after start-up ≤ max_overhead · time after start-up + one probe

    as long as a light probe costs no more than half of a full one; half a full probe more otherwise. The last step of a
    run is probed whatever the credit.

    Attributes:
        every: fixed cadence in optimizer steps, full probes only; None: by budget.
        max_overhead: share of wall time that probes may take, used when `every` is None.
        clock: seconds, monotonic; replaced in tests.
        last_step: of the newest probe, light or full.
        last_full: of the newest full one.
        spent: seconds that the monitor took, start-up included.
        excused: seconds in the monitor's hooks that were not its own: waiting for what training had queued on a device.
        asleep: steps before this one need not ask: by the speed of training nothing can be due earlier.
        hold: True while nothing but the very first probe may be made, since the loss is still being found.
        total: planned length of the run in optimizer steps, where it is known.
        saving: seconds that a forecast is expected to take; 0: nothing is saved for one.
        lights: False where light probes would have nothing to say.
        prices: seconds that the next probe of each tier is expected to take.
    """

    every: int | None
    max_overhead: float
    clock: Callable[[], float] = time.perf_counter
    last_step: int | None = None
    last_full: int | None = None
    spent: float = 0.0
    excused: float = 0.0
    asleep: int = 0
    hold: bool = False
    total: int | None = None
    saving: float = 0.0
    lights: bool = True
    prices: dict[Tier, float] = field(default_factory=dict)
    started: float | None = None
    _complete: bool = False
    _opened: tuple[float, float] | None = None
    _counted: tuple[int, float, float] | None = None
    _credit: float = 0.0
    _debt: float = 0.0
    _advance: float = 0.0
    _early: bool = False
    _saved: float = 0.0
    _seen: float = 0.0
    _lights: int = 0
    _open: tuple[Tier, float] | None = None

    def start(self) -> None:
        """Start the clock, at the beginning of training; later calls do nothing."""
        if self.started is None:
            self.started = self.clock()

    def due(self, step: int) -> bool:
        """True when a probe should be made after `step` optimizer steps."""
        return self.tier(step) is not None

    def tier(self, step: int) -> Tier | None:
        """Return how thorough a probe should be made after `step` optimizer steps; None: none."""
        self.close()
        if self.last_step is None:
            return "full"
        if step <= self.last_step:
            return None
        if step < self.asleep:
            return None
        if self.every is not None:
            # A step counter may jump (two optimizers per batch): ask whether a multiple of `every` was passed.
            return "full" if step // self.every > self.last_step // self.every else None
        if self.hold:
            return None
        if self._opened is None:
            return "full" if step >= SECOND else None
        return self._affordable(step, self.last_step)

    def done(self, step: int, seconds: float, tier: Tier = "full") -> None:
        """Account for a probe at this step that took so many seconds so far; what is paid until `close` is its too."""
        self.close()
        self.last_step = step if self.last_step is None else max(step, self.last_step)
        if tier == "full":
            self.last_full, self._early = self.last_step, False
            self._reconsider(step)
        self.asleep = 0
        self._lights = 0 if tier == "full" else self._lights + 1
        self._open = (tier, 0.0)
        self.pay(seconds)

    def pay(self, seconds: float) -> None:
        """Account for further seconds in the monitor."""
        self.spent += seconds
        self._credit -= seconds
        if self._open is not None:
            self._open = (self._open[0], self._open[1] + seconds)

    def affordable(self, kernel: float) -> float:
        """Return the seconds that a forecast may take at the probe in hand, whose kernel took so many.

        By budget: what was saved for it; in start-up four times the kernel, or a second.
        """
        if self.every is not None:
            return math.inf
        if self._opened is None:
            return max(1.0, 4 * kernel)
        self._earn()
        return max(0.0, self._saved)

    def forecast(self, seconds: float) -> None:
        """Note that so many of the seconds paid for the probe in hand went into a forecast."""
        if self._open is not None:
            self._open = (self._open[0], self._open[1] - seconds)
        if self._opened is not None:
            self._saved -= seconds
            self._credit += seconds

    def excuse(self, seconds: float) -> None:
        """Take seconds in the monitor's hooks for training's own."""
        self.excused += seconds

    def complete(self) -> None:
        """Note that the probe in hand is complete: start-up ends with it."""
        self._complete = True

    def close(self) -> None:
        """Learn the price of the probe in hand: what comes next belongs to training, or to another probe."""
        if self._open is not None:
            (tier, cost), self._open = self._open, None
            if self._early:  # the debt is allowed once
                self._advance, self._early = self._advance - cost, False
            known = self.prices.get(tier)
            self.prices[tier] = cost if known is None else (known + cost) / 2
            if tier == "full" and "light" in self.prices and not self._between():
                # Light probes that seemed too dear are tried again some day: the first one pays for imports.
                self.prices["light"] *= 0.97
        if self._complete and self._opened is None:
            self._seen = self.clock()
            self._opened = (self._seen, self.spent)
            self._credit, self._debt = 0.0, self.prices.get("full", 0.0) / 2
            self._advance = self._debt

    def foreseen(self, step: int) -> tuple[int, Tier] | None:
        """Return step and tier of the next probe at the present speed of training, for several processes to agree on.

        None by a fixed cadence, where all of them count alike, and while the speed is not known.
        """
        pace = self._pace(step)
        if self.every is not None or self._opened is None or not pace:
            return None
        self._earn()
        full, light = self._reserved(self.prices.get("full", 0.0)), self._slot()
        tier: Tier = "full" if light is None or light >= full else "light"
        wanted = full if light is None else min(full, light)
        return step + max(1, math.ceil((wanted - self._credit) / self._rate / pace)), tier

    def sparse(self, step: int) -> str | None:
        """Return one sentence when few full probes fit into the run, "" when enough do; None: not known yet.

        Known some 20 steps after start-up, and only by budget in a run of planned length.
        """
        if self.every is not None or self.total is None:
            return None
        pace = self._pace(step)
        if pace is None:
            return None
        self._reconsider(step)
        total, full = self.total, self.prices.get("full", 0.0)
        price = (full + self._between() * self._light()) / (1 - _SAVED if self.saving else 1)
        probes = self.max_overhead * max(0, total - step) * pace / price if price > 0 else math.inf
        if probes >= PLANNED or total - step < PLANNED:
            return ""
        wanted = self.max_overhead * PLANNED / probes if probes else math.inf
        advice = (
            f"max_overhead={_rounded_up(wanted)} would give {PLANNED}"
            if wanted < 1
            else f"the run is too short for {PLANNED} of them"
        )
        count = "less than one full probe fits" if probes < 0.95 else f"about {_probes(probes)} fit"
        return (
            f"{count} into the {total - step} steps to come at "
            f"max_overhead={self.max_overhead:g}, as one takes {full:.2g} s and a step {pace:.2g} s; {advice}"
        )

    @property
    def elapsed(self) -> float:
        """Seconds since training started."""
        return 0.0 if self.started is None else self.clock() - self.started

    @property
    def accounted(self) -> float:
        """Seconds in the monitor's hooks that have been paid or excused."""
        return self.spent + self.excused

    @property
    def begun(self) -> dict[str, float]:
        """The fact "startup_seconds" once start-up is over."""
        return {} if self._opened is None else {"startup_seconds": self._opened[1]}

    @property
    def share(self) -> dict[str, float]:
        """The metric "overhead" once start-up is over."""
        return {} if self._opened is None else {"overhead": self.overhead}

    @property
    def startup(self) -> float:
        """Seconds that the monitor took in start-up, so far or until it ended."""
        return self.spent if self._opened is None else self._opened[1]

    @property
    def overhead(self) -> float:
        """Share of the wall time after start-up that the monitor took; 0 before any such time has passed."""
        if self._opened is None:
            return 0.0
        passed = self.clock() - self._opened[0]
        return min(1.0, (self.spent - self._opened[1]) / passed) if passed > 0 else 0.0

    def _affordable(self, step: int, last: int) -> Tier | None:
        self._earn()
        full, light = self._reserved(self.prices.get("full", 0.0)), self._slot()
        if self._credit >= full:
            return "full"
        if light is not None and self._credit >= light:
            return "light"
        price = self._light() if self._between() else math.inf
        early = self._advance >= price
        # Powers of two early on: the time scale of what is to be seen grows with the steps taken.
        if early and step.bit_length() > last.bit_length() and self._credit + self._debt >= price:
            self._early = True
            return "light"
        # Half of the way there, since training may slow down or speed up.
        pace = self._pace(step)
        missing = min(full, math.inf if light is None else light) - self._credit
        self.asleep = step + int(missing / self._rate / 2 / pace) if pace else step
        if early:
            self.asleep = min(self.asleep, 1 << step.bit_length())
        return None

    def _earn(self) -> None:
        now = self.clock()
        earned, self._seen = self.max_overhead * max(0.0, now - self._seen), now
        saved = min(_SAVED * earned, max(0.0, self.saving - self._saved))
        self._saved += saved
        most = max(self._credit, self._reserved(self.prices.get("full", 0.0)))
        self._credit = min(self._credit + earned - saved, most)

    def _reconsider(self, step: int) -> None:
        """Save nothing for a forecast that the rest of the run could not pay for."""
        pace = self._pace(step)
        if self.saving and pace is not None and self.total is not None:
            coming = _SAVED * self.max_overhead * pace * max(0, self.total - step)
            if self._saved + coming < self.saving:
                self._credit, self._saved, self.saving = self._credit + self._saved, 0.0, 0.0

    @property
    def _rate(self) -> float:
        """Seconds of credit that a second of time earns."""
        return self.max_overhead * (1 - _SAVED if self._saved < self.saving else 1)

    def _reserved(self, price: float) -> float:
        """Return the credit that must be there for a probe of this price: some take longer than the last ones did."""
        return price * (1 + _RESERVE)

    def _light(self) -> float:
        return self.prices.get("light", _GUESS * self.prices.get("full", 0.0))

    def _between(self) -> int:
        """Return how many light probes go between two full ones."""
        full, light = self.prices.get("full", 0.0), self._light()
        if not self.lights or light <= 0:
            return 0
        return _LIGHTS if full >= 2 * light * _LIGHTS else int(full / (2 * light))

    def _slot(self) -> float | None:
        """Return the credit at which the next light probe is due; None when there is none before the next full one."""
        count, place = self._between(), self._lights + 1
        if place > count:
            return None
        share = place / (count + 1)
        return self._reserved(self.prices["full"]) - (1 - share) * (self.prices["full"] - self._light())

    def _pace(self, step: int) -> float | None:
        """Return seconds of training per step since start-up; None while too few steps were timed."""
        if self._opened is None:
            return None
        if self._counted is None:
            self._counted = (step, self.clock(), self.spent)
        first, then, spent = self._counted
        if step - first < _TIMED:
            return None
        return max(0.0, self.clock() - then - (self.spent - spent)) / (step - first)


def _probes(count: float) -> str:
    return "1 full probe" if round(count) == 1 else f"{count:.0f} full probes"


def _rounded_up(share: float) -> float:
    """Return a share of time with two digits, not below it."""
    scale = 10.0 ** (1 - math.floor(math.log10(share)))
    return min(1.0, math.ceil(share * scale) / scale)
