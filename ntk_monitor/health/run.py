"""Run, what a rule may read: the probes of one history that can be compared, and their numbers over steps.

A number that was not recorded, or is NaN, is simply not there: series keep the finite values only, so a rule that lacks
what it needs finds an empty series and says nothing.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.snapshot import Floats, Snapshot

Array = NDArray[np.float64]

_NOT_FINITE = re.compile(r"\bfinite\b|\bNaN\b|\binf(inity)?\b|overflow", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Series:
    """One number over the probes where it is finite: steps (k,) and values (k,)."""

    steps: NDArray[np.int64]
    values: Array

    def __len__(self) -> int:
        return len(self.values)

    def last(self, count: int) -> "Series":
        """Return the last so many of them."""
        return Series(self.steps[-count:], self.values[-count:])

    def since(self, step: int) -> "Series":
        """Return those measured at or after a step."""
        kept = self.steps >= step
        return Series(self.steps[kept], self.values[kept])

    def span(self) -> tuple[int, int]:
        """Return the first and the last step."""
        return int(self.steps[0]), int(self.steps[-1])


class Run:
    """A history as rules see it: measured probes of the last probe's samples, in order of steps."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        """Take every probe of a run, skipped ones included, in order of steps."""
        self.snapshots = tuple(snapshots)
        measured = [snapshot for snapshot in snapshots if snapshot.status == "measured"]
        # Other samples, other numbers: probes with another hash are not comparable.
        self.measured = tuple(s for s in measured if s.probe == measured[-1].probe)
        self.skipped = tuple(snapshot for snapshot in snapshots if snapshot.status == "skipped")
        # Thirty rules ask for the same numbers of what may be ten thousand probes.
        self._steps = np.array([snapshot.step for snapshot in self.measured], dtype=np.int64)
        self._facts = [snapshot.facts for snapshot in self.measured]
        self._metrics = [snapshot.metrics for snapshot in self.measured]
        self._known: dict[tuple[str, str], Series] = {}

    @property
    def first(self) -> Snapshot:
        """The first comparable probe; there is one whenever a rule is asked."""
        return self.measured[0]

    @property
    def last(self) -> Snapshot:
        """The last one."""
        return self.measured[-1]

    def series(self, read: Callable[[Snapshot], float]) -> Series:
        """Return a number of each probe where it is finite."""
        return self._finite([read(snapshot) for snapshot in self.measured])

    def fact(self, name: str) -> Series:
        """Return a number of `Snapshot.facts`."""
        return self._named("facts", name, self._facts)

    def metric(self, name: str) -> Series:
        """Return a number of `Snapshot.metrics`."""
        return self._named("metrics", name, self._metrics)

    def latest(self, name: str) -> float:
        """Return the last finite value of a fact, or NaN."""
        found = (float(facts[name]) for facts in reversed(self._facts) if name in facts)
        return next((value for value in found if np.isfinite(value)), float("nan"))

    def _named(self, kind: str, name: str, numbers: Sequence[Mapping[str, float]]) -> Series:
        if (kind, name) not in self._known:
            self._known[kind, name] = self._finite([one.get(name, np.nan) for one in numbers])
        return self._known[kind, name]

    def _finite(self, numbers: Sequence[float]) -> Series:
        values = np.array(numbers, dtype=np.float64)
        kept = np.isfinite(values)
        return Series(self._steps[kept], values[kept])

    def text(self, name: str) -> str:
        """Return the last non-empty text of this name."""
        return next((s.texts[name] for s in reversed(self.measured) if s.texts.get(name)), "")

    def losses(self) -> Series:
        """Return the training loss over steps.

        The means of what the trainer returned where there are at least three, else the loss on the probe: the latter is
        in evaluation mode, where BatchNorm's statistics take a while to settle.
        """
        seen = self.fact("train_loss")
        return seen if len(seen) >= 3 else self.probe_losses()

    def probe_losses(self) -> Series:
        """Return the loss on the probe over steps, in evaluation mode."""
        return self.series(lambda snapshot: snapshot.loss_value)

    def loss_ratio(self) -> float:
        """Return the loss at the end (mean of two) over that at the start, or NaN without three positive losses.

        A run may learn most of what it learns before the second probe: the start is the larger of the first mean of
        the trainer's losses and the first loss on the probe.
        """
        values, probed = self.losses().values, self.probe_losses().values
        if len(values) < 3 or values.min() <= 0:
            return float("nan")
        return float(values[-2:].mean() / max(values[0], *probed[:1]))

    @property
    def loss(self) -> str:
        """The name of the loss, where it is known at any probe."""
        return next((s.loss for s in reversed(self.measured) if s.loss), "")

    def non_finite(self) -> tuple[int, ...]:
        """Return the steps of probes, skipped ones included, where outputs, loss or kernel were NaN or infinite."""
        return tuple(
            s.step
            for s in self.snapshots
            if (s.status == "skipped" and _NOT_FINITE.search(s.reason))
            or math.isinf(s.loss_value)
            # A finite root mean square says it of all outputs, which are a large array, before they are read.
            or not (math.isfinite(s.facts.get("output_rms", math.nan)) or np.isfinite(s.predictions).all())
        )

    def progress(self) -> float:
        """Return the share of the planned run that lies before the last probe, or NaN when no plan is known."""
        total = self.latest("total_steps")
        return self.last.step / total if total > 0 else float("nan")

    def family(self) -> str:
        """Return "adam", "sgd" or "" from the optimizer's class."""
        name = self.text("optimizer").lower()
        return "adam" if "adam" in name else "sgd" if "sgd" in name else ""

    def named(self, name: str) -> frozenset[str]:
        """Return the layers or parameters that a text of this name lists at any probe."""
        texts = {snapshot.texts.get(name, "") for snapshot in self.measured}
        return frozenset(word for text in texts for word in re.split(r"[,;:\s]+", text) if word)

    def layers(self, name: str, since: int = 0) -> tuple[tuple[str, ...], NDArray[np.int64], Array]:
        """Return the layers, the steps (k,) and an array over layers (k, L) at probes that have it, from a step on.

        Probes whose layers differ from the last one's are left out.
        """
        layers = self.last.layers
        shape = (len(layers),)
        alike = [s for s in self.measured if s.step >= since and s.layers == layers] if layers else []
        rows: list[tuple[int, Floats]] = [(s.step, getattr(s, name)) for s in alike]
        rows = [(step, values) for step, values in rows if values.shape == shape]
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        table = np.array([values for _, values in rows], dtype=np.float64).reshape(len(rows), len(layers))
        kept = np.isfinite(table).all(axis=1)
        return layers, steps[kept], table[kept]
