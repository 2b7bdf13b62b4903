"""Session: one monitored run, between a trainer's hooks and the record. Knows no trainer; nothing in it raises.

A callback hands over what only its trainer knows (probe, optimizers, loss of each batch) and asks at each step. What
fails becomes one warning and a recorded skip; what keeps failing puts the monitor to rest.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from torch import Tensor, nn

from ntk_monitor.errors import LossUnknownError
from ntk_monitor.guard import random_state
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.look import Measurement
from ntk_monitor.matching import Matching
from ntk_monitor.monitor import Monitor
from ntk_monitor.recipe import Recipe
from ntk_monitor.say import say
from ntk_monitor.snapshot import Snapshot

# After this many failed probes in a row the cause is not going away.
_PATIENCE = 3


class Sink(Protocol):
    """Where a trainer's probes are written."""

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Make the scalars known to the trainer."""
        ...

    def write(self, snapshot: Snapshot) -> None:
        """Log and store one probe."""
        ...

    def flush(self) -> None:
        """Push what was written towards the disk."""
        ...


class Session:
    """What the callbacks of all trainers share.

    Attributes:
        monitor: measures; None before the probe is known and when the monitor rests.
        sink: where probes are written; None: nowhere yet.
        last: the newest Snapshot.
        resting: why nothing is measured any more, or "".
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.monitor: Monitor | None = None
        self.sink: Sink | None = None
        self.last: Snapshot | None = None
        self.resting = ""
        self._root: nn.Module | None = None
        self._matching: Matching | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._pending: list[Measurement] = []
        self._failures = 0
        self._looked = False

    def guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run one step; what it raises becomes one warning, and the monitor rests. Its time belongs to the budget."""
        if self.resting:
            return
        start, paid = time.perf_counter(), self._paid()
        try:
            # Our own code draws nothing, but loggers and data sets may.
            with random_state():
                step(*arguments)
        except Exception as error:
            if self.recipe.strict:
                raise
            self.rest(f"{type(error).__name__}: {error}")
        if self.monitor is not None:
            # Writing, drawing and matching cost time too, and belong to the budget.
            rest = time.perf_counter() - start - (self._paid() - paid)
            self.monitor.schedule.pay(max(0.0, rest))

    def rest(self, reason: str) -> None:
        """Measure nothing more in this run, and say why."""
        with suppress(Exception):
            self.settle()  # what was measured is kept
            if self.last is None and self.sink is not None:  # the history says why it holds nothing else
                self.sink.write(Snapshot(step=0, wall_time=time.time(), status="skipped", reason=reason))
        self.resting = reason
        self.monitor = self._matching = None
        say(f"the monitor rests for the remainder of this run, training goes on: {reason}")

    # Steps: each may raise, and is only called through `guarded`.

    def begin(self, monitor: Monitor, root: nn.Module, matching: Matching | None) -> None:
        """Start with this monitor.

        Args:
            monitor: ready to measure.
            root: the module whose state a probe must leave untouched.
            matching: finds the loss from the first batches; None: the loss is known, or nobody will tell.
        """
        self.monitor, self._root, self._matching = monitor, root, matching
        monitor.schedule.start()

    @property
    def matching(self) -> bool:
        """True while batches are needed to find out which loss it is."""
        return self._matching is not None

    def due(self, step: int) -> bool:
        """True when a probe should be made after `step` optimizer steps."""
        return self.monitor is not None and not self.resting and self.monitor.due(step)

    def observe(self, step: int, optimizers: list[Any]) -> None:
        """Record the learning rates that the coming optimizer step uses."""
        if self.monitor is None or self.resting:
            return
        self.monitor.steps, self.monitor.optimizers = step, optimizers
        try:
            self.monitor.observe()
        except Exception as error:
            if self.recipe.strict:
                raise
            self.rest(f"{type(error).__name__}: {error}")

    def expect(self, see: Callable[[], tuple[Tensor, Tensor] | None]) -> None:
        """Note outputs and targets of the batch whose loss comes next."""
        if self._matching is None:
            return
        try:
            self._seen = see()
        except Exception as error:  # noqa: BLE001 - then the loss stays unknown, the kernel does not
            self._unmatched(f"{type(error).__name__}: {error}")

    def compare(self, value: float | None) -> None:
        """Compare the loss of the batch with what each candidate makes of its outputs and targets."""
        matching, seen = self._matching, self._seen
        if matching is None or self.monitor is None:
            return
        self._seen = None
        if seen is None or value is None:
            self._unmatched("training_step returned no loss" if value is None else "the batch has no tensor of targets")
            return
        f, y = seen
        matching.add(f, y, value)
        if matching.over:
            self.settle()

    def probe(self, step: int, epoch: int | None) -> None:
        """Measure now, check that nothing was disturbed, write."""
        monitor = self.monitor
        if monitor is None:
            return
        check = self.recipe.verify and monitor.probes == 0 and not self._pending
        before = self._fingerprint() if check else None
        try:
            raw = monitor.measure(step, epoch)
        except LossUnknownError:
            if self._matching is None:
                raise
            return  # a few batches more will tell; the probe stays due
        except Exception as error:
            if self.recipe.strict:
                raise
            self.settle()  # records must be written in the order of their steps
            self._write(monitor.skipped(step, error, epoch))
            self._failures += 1
            if self._failures == _PATIENCE:
                self.rest(f"{_PATIENCE} probes in a row failed, the last with {type(error).__name__}: {error}")
            return
        finally:
            self._rest_if_changed(before)
        self._failures = 0
        if self._matching is not None:
            self._pending.append(raw)  # which loss it is will be known after a few batches
        elif not self.resting:
            self._look(raw)

    def settle(self) -> None:
        """Decide which loss it is, from the evidence so far, and finish the probes that waited for it."""
        if self._matching is not None and self.monitor is not None:
            self.monitor.loss = self._matching.match
            self.monitor.loss_status = self._matching.status
            self._matching = None
        self._release()

    def flush(self) -> None:
        """Push what was written towards the disk."""
        if self.sink is not None:
            self.sink.flush()

    def _paid(self) -> float:
        return 0.0 if self.monitor is None else self.monitor.schedule.spent

    def _fingerprint(self) -> Fingerprint | None:
        return None if self._root is None else Fingerprint.of(self._root)

    def _unmatched(self, reason: str) -> None:
        if self.monitor is not None:
            self.monitor.loss_status = f"not verified: {reason}; pass loss="
        self._matching = None
        self._release()

    def _release(self) -> None:
        waiting, self._pending = self._pending, []
        for raw in waiting:
            self._write(self._finished(raw, fresh=False))

    def _finished(self, raw: Measurement, *, fresh: bool) -> Snapshot:
        assert self.monitor is not None
        try:
            return self.monitor.finish(raw, fresh=fresh)
        except Exception as error:
            if self.recipe.strict:
                raise
            return self.monitor.skipped(raw.step, error, raw.epoch)

    def _look(self, raw: Measurement) -> None:
        """Finish a probe at the weights of now, and the first time check that this changes nothing either."""
        before = self._fingerprint() if self.recipe.verify and not self._looked else None
        self._write(self._finished(raw, fresh=True))
        self._looked = True
        self._rest_if_changed(before)

    def _rest_if_changed(self, before: Fingerprint | None) -> None:
        after = None if before is None else self._fingerprint()
        changed = before.changes(after) if before is not None and after is not None else []
        if changed:
            self.rest(f"a probe would change this run ({', '.join(changed[:3])})")

    def _write(self, snapshot: Snapshot) -> None:
        if self.last is None and snapshot.kernel == "full" and snapshot.modes_reason:
            say(f"residual modes are off: {snapshot.modes_reason}")
        self.last = snapshot
        if self.sink is not None:
            self.sink.write(snapshot)
