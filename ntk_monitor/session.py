"""Session: one monitored run, between a trainer's hooks and the record. Knows no trainer; nothing in it raises.

A callback hands over what only its trainer knows (probe, optimizers, loss of each batch) and asks at each step. What
fails becomes one warning and a recorded skip; what keeps failing puts the monitor to rest.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from torch import Tensor, nn

from ntk_monitor.errors import LossUnknownError, said
from ntk_monitor.guard import random_state
from ntk_monitor.harmless import READ, Fingerprint
from ntk_monitor.look import Measurement
from ntk_monitor.manifest import manifest
from ntk_monitor.matching import Matching
from ntk_monitor.monitor import Monitor
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import Manifest
from ntk_monitor.recipe import Recipe
from ntk_monitor.say import say
from ntk_monitor.schedule import Schedule, Tier
from ntk_monitor.settings import kept
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

    def keep(self, probe: Probe, manifest: Manifest) -> None:
        """Store the probe and how it was measured beside the records, once per run."""
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
        hand: True on a process that only computes parts of another's probes (`ntk_monitor.together`).
    """

    hand = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.monitor: Monitor | None = None
        self.sink: Sink | None = None
        self.last: Snapshot | None = None
        self.resting = ""
        self._root: nn.Module | None = None
        self._matching: Matching | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        # Probes that were taken and are not written yet, in the order of their steps; skipped ones are finished.
        self._pending: list[Measurement | Snapshot] = []
        self._failures: list[str] = []
        self._kept = False
        self._verified: Counter[str] = Counter()
        self._tier: Tier | None = "full"

    def guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run one step; what it raises becomes one warning, and the monitor rests. Its time belongs to the budget.

        Only exceptions are ours to keep: KeyboardInterrupt, SystemExit and whatever else ends a process pass through.
        """
        if self.resting:
            return
        start, paid = time.perf_counter(), self._paid()
        # Our own code draws nothing, but loggers and data sets may.
        with self._contained(), random_state(), kept():
            step(*arguments)
        with self._contained():
            # Writing, drawing and matching cost time too, and belong to the budget.
            self._pay(start, paid)

    def noted(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run one step of every batch, which draws nothing and calls nobody's code but ours: `guarded` for less.

        Saving and restoring random generators takes some 50 microseconds, several percent of a small network's step.
        """
        if self.resting or self.monitor is None:
            return
        start, schedule = time.perf_counter(), self.monitor.schedule
        try:
            step(*arguments)
            schedule.pay(time.perf_counter() - start)
        except Exception as error:
            if self.recipe.strict:
                raise
            self.rest(said(error, kind=True))

    def charge(self, schedule: Schedule, seconds: float) -> None:
        """Let the budget bear the seconds of a hook; if it fails at that, the monitor rests."""
        with self._contained():
            schedule.pay(seconds)

    def rest(self, reason: str) -> None:
        """Measure nothing more in this run, and say why. Raises nothing, and frees what the monitor holds."""
        self.resting = reason  # first: whatever happens below, no further step is taken
        with suppress(Exception), random_state():  # loggers may draw numbers
            self._conclude(reason)
        self.monitor = self._matching = self._seen = None
        self._pending = []
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
        if self.monitor is None or self.resting:
            return False
        schedule = self.monitor.schedule
        if step < schedule.asleep:  # as at nearly all steps
            return False
        with self._contained():
            # By budget the monitor waits for the loss: a probe without it would be half a probe.
            schedule.hold = self.matching
            self._tier = self.monitor.tier(step)
            return self._tier is not None
        return False

    def ending(self, step: int) -> bool:
        """True when a run that ends after `step` optimizer steps should be probed once more."""
        self._tier = "full"
        if self.monitor is None or self.resting:
            return False
        schedule = self.monitor.schedule
        # A run that was resumed does not know which tier its last probe had.
        return step != (schedule.last_step if schedule.last_full is None else schedule.last_full)

    @property
    def early(self) -> bool:
        """True while no probe is known yet: ask `due` once more at the start of a batch, which may bring it."""
        return self.monitor is None and not self.resting

    def plain(self, module: nn.Module) -> nn.Module:
        """Return what to measure of a live module: the module itself, or a copy where its parameters are sharded."""
        return module

    def enlist(self, module: nn.Module, root: nn.Module, optimizers: Sequence[Any]) -> bool:
        """Return True on a process that only computes parts of another's probes: nothing more is set up there.

        Args:
            module: what is measured.
            root: the module around it, which holds the loss.
            optimizers: of the run.
        """
        return False

    def close(self) -> None:
        """Leave the run, after everything else."""

    def observe(self, step: int, optimizers: list[Any]) -> None:
        """Record the learning rates that the coming optimizer step uses."""
        if self.monitor is None or self.resting:
            return
        try:
            self.monitor.steps, self.monitor.optimizers = step, optimizers
            self.monitor.observe()
        except Exception as error:
            if self.recipe.strict:
                raise
            self.rest(said(error, kind=True))

    def expect(self, see: Callable[[], tuple[Tensor, Tensor] | None]) -> None:
        """Note outputs and targets of the batch whose loss comes next."""
        if self._matching is None:
            return
        try:
            self._seen = see()
        except Exception as error:  # noqa: BLE001 - then the loss stays unknown, the kernel does not
            self._unmatched(said(error, kind=True))

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
        try:
            matching.add(f, y, value)
        except Exception as error:  # noqa: BLE001 - as above
            self._unmatched(said(error, kind=True))
            return
        if matching.over:
            self.settle()

    def probe(self, step: int, epoch: int | None) -> None:
        """Measure now, check that nothing was disturbed, write."""
        monitor = self.monitor
        if monitor is None:
            return
        if self._tier == "light" and not self._pending:
            self._glance(monitor, step, epoch)
            return
        before = self._fingerprint("measure")
        try:
            self._pending.append(monitor.measure(step, epoch))
        except LossUnknownError:
            if self._matching is None:
                raise
            # A few batches more will tell; the probe stays due.
        except Exception as error:
            if self.recipe.strict:
                raise
            self._pending.append(self._skipped(step, error, epoch))
        # Not in a `finally`: Ctrl-C must not wait for this, nor be replaced by what it raises.
        if changed := self._changed(before):
            self._pending = []
            self.rest(changed)
        elif self._matching is None:
            self._look()
        self._rest_if_failing()

    def skip(self, step: int, reason: str, epoch: int | None) -> None:
        """Record that nothing is measured after `step` optimizer steps, and why. That is no failure."""
        if self.monitor is not None:
            self._release()
            self._write(self.monitor.skipped(step, reason, epoch))

    def settle(self) -> None:
        """Decide which loss it is, from the evidence so far, and write the probes that waited for it."""
        if self._matching is not None and self.monitor is not None:
            self.monitor.loss = self._matching.match
            self.monitor.loss_status = self._matching.status
            self._matching = None
        self._release()

    def flush(self) -> None:
        """Push what was written towards the disk, and let the trainer know what the monitor cost in the end."""
        share = {} if self.monitor is None else self.monitor.schedule.share
        if self.sink is not None:
            if share:
                self.sink.publish(share)
            self.sink.flush()

    @contextmanager
    def _contained(self) -> Iterator[None]:
        """Rest because of an error inside, or pass it on where the user asked for that."""
        try:
            yield
        except Exception as error:
            if self.recipe.strict:
                raise
            self.rest(said(error, kind=True))

    def _conclude(self, reason: str) -> None:
        try:
            self.settle()  # what was measured is kept
        finally:
            if self.last is None and self.sink is not None:  # the history says why it holds nothing else
                self.sink.write(Snapshot(step=0, wall_time=time.time(), status="skipped", reason=reason))

    def _pay(self, start: float, paid: float) -> None:
        if self.monitor is not None:
            self.monitor.schedule.pay(max(0.0, time.perf_counter() - start - (self._paid() - paid)))

    def _paid(self) -> float:
        return 0.0 if self.monitor is None else self.monitor.schedule.accounted

    def _fingerprint(self, stage: str) -> Fingerprint | None:
        """Read the state of the run: values the first two times, as the second probe compares with the first."""
        self._verified[stage] += 1
        return self._read(READ if self._verified[stage] <= 2 else 0) if self.recipe.verify else None

    def _read(self, amount: int) -> Fingerprint | None:
        optimizers = () if self.monitor is None else self.monitor.optimizers
        return None if self._root is None else Fingerprint.of(self._root, optimizers, read=amount)

    def _unmatched(self, reason: str) -> None:
        if self.monitor is not None:
            self.monitor.loss_status = f"not verified: {reason}; pass loss="
        self._matching = None
        self._release()

    def _release(self) -> None:
        """Write what waited. Each probe leaves the list once it is written: Ctrl-C in between loses none."""
        while self._pending:
            raw = self._pending[0]
            self._write(raw if isinstance(raw, Snapshot) else self._finished(raw, fresh=False))
            self._pending = self._pending[1:]

    def _finished(self, raw: Measurement, *, fresh: bool) -> Snapshot:
        assert self.monitor is not None
        try:
            snapshot = self.monitor.finish(raw, fresh=fresh)
        except Exception as error:
            if self.recipe.strict:
                raise
            return self._skipped(raw.step, error, raw.epoch)
        self._failures = []
        return snapshot

    def _skipped(self, step: int, error: Exception, epoch: int | None) -> Snapshot:
        assert self.monitor is not None
        self._failures.append(said(error, kind=True))
        return self.monitor.skipped(step, error, epoch)

    def _look(self) -> None:
        """Finish a probe at the weights of now, and check that this changes nothing either."""
        for raw in self._pending[:1]:
            if isinstance(raw, Measurement):
                before = self._fingerprint("look")
                self._pending[0] = self._finished(raw, fresh=True)
                if changed := self._changed(before):
                    self.rest(changed)
        self._release()

    def _glance(self, monitor: Monitor, step: int, epoch: int | None) -> None:
        """Make a light probe, and check that this changes nothing either."""
        before = self._fingerprint("glance")
        try:
            self._pending.append(monitor.light(step, epoch))
        except Exception as error:
            if self.recipe.strict:
                raise
            self._pending.append(self._skipped(step, error, epoch))
        if changed := self._changed(before):
            self._pending = []
            self.rest(changed)
        else:
            self._release()
            self._rest_if_failing()

    def _rest_if_failing(self) -> None:
        if len(self._failures) >= _PATIENCE and not self.resting:
            self.rest(f"{_PATIENCE} probes in a row failed, the last with {self._failures[-1]}")

    def _changed(self, before: Fingerprint | None) -> str:
        """Return what the probe since `before` did to this run, or ""."""
        after = None if before is None else self._read(before.read)
        changed = before.changes(after) if before is not None and after is not None else []
        return f"a probe would change this run ({', '.join(changed[:3])})" if changed else ""

    def _write(self, snapshot: Snapshot) -> None:
        if self.last is None and snapshot.kernel == "full" and snapshot.modes_reason:
            say(f"residual modes are off: {snapshot.modes_reason}")
        self.last = snapshot
        if self.sink is None:
            return
        start = time.perf_counter()
        try:
            self.sink.write(snapshot)
            if self.monitor is not None:
                self.monitor.written = {"write": time.perf_counter() - start}
        except Exception as error:
            if self.recipe.strict:
                raise
            say(f"the probe at step {snapshot.step} could not be written: {said(error, kind=True)}")
        self._keep(snapshot)

    def _keep(self, snapshot: Snapshot) -> None:
        """Store the samples beside the first record, so that whoever analyses the run later measures the same ones."""
        if self._kept or self.sink is None or self.monitor is None or snapshot.status == "skipped":
            return
        try:
            self.sink.keep(self.monitor.probe, manifest(self.monitor, snapshot))
            self._kept = True
        except Exception as error:
            if self.recipe.strict:
                raise
            self._kept = not isinstance(error, OSError)  # a disk that is full now may have room at the next probe
            say(f"the samples of the probe could not be stored beside the run: {said(error, kind=True)}")
