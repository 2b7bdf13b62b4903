"""A session of several processes: rank 0 conducts, the others are hands that compute parts of its probes.

They meet at steps that rank 0 announces: at each meeting it says whether a probe follows and when to meet next, since
cadence from wall time differs from process to process. Between two verdicts hands serve orders, each of which begins
with a vote, so that what fails on one process is known to all before anything is exchanged. What a probe does beyond
the kernel (stability, forecasts, writing) runs on rank 0 alone and talks to nobody; the others wait, because scalars
that checkpoints and early stopping look at must be the same everywhere when training goes on.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ntk_monitor.batch import take
from ntk_monitor.crew import Crew, Hand, Processes
from ntk_monitor.errors import said
from ntk_monitor.guard import undisturbed
from ntk_monitor.losses import candidates, recognised
from ntk_monitor.matching import Matching
from ntk_monitor.monitor import Monitor
from ntk_monitor.network import Mode, Network
from ntk_monitor.parts import Shared
from ntk_monitor.recipe import Recipe
from ntk_monitor.say import say
from ntk_monitor.session import Session
from ntk_monitor.sharded import Standin, sharded
from ntk_monitor.silence import Silence, SpeechError

# Seconds between two meetings while nothing better is known. One takes about a millisecond.
_MEETING = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What rank 0 announces at a meeting, and after a probe.

    Attributes:
        probe: a probe follows.
        next: the step of the next meeting.
        early: the next meeting is at the start of the coming batch already.
        over: why the monitor rests, or "".
        metrics: the newest scalars.
    """

    probe: bool = False
    next: int = 0
    early: bool = False
    over: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


def assembled(recipe: Recipe, timeout: float | None = None) -> Session:
    """Return the session of this run: one of several processes where `torch.distributed` runs, else a plain one.

    To be called by every process of the run at the same place: connections of the monitor's own are made here.

    Args:
        recipe: of the monitor, the same on every process.
        timeout: seconds that processes wait for each other; None: `ntk_monitor.crew.TIMEOUT`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Session(recipe)
    try:
        crew = Processes() if timeout is None else Processes(timeout)
    except Exception as error:
        if recipe.strict:
            raise
        session = Session(recipe)
        session.rest(f"the processes of this run could not be connected for the monitor: {said(error, kind=True)}")
        return session
    return Together(recipe, crew)


class Together(Session):
    """The session of one process among several.

    Args:
        recipe: as for Session.
        crew: all processes of the run.
    """

    def __init__(self, recipe: Recipe, crew: Crew) -> None:
        super().__init__(recipe)
        self.crew = crew
        self.hand = crew.rank > 0
        self._hand = Hand(crew)
        self._standin: Standin | None = None
        self._others: Sequence[Any] = ()
        self._next = 0
        self._early = False
        self._apart = ""
        self._met: tuple[int, float] | None = None

    # Setting up.

    def enlist(self, module: nn.Module, root: nn.Module, optimizers: Sequence[Any]) -> bool:
        """Return True on every process but rank 0, which becomes a hand."""
        recipe = self.recipe
        if not self.hand:
            return False
        names = ("params", "forward", "engine", "memory_limit", "device", "seed")
        self._hand.options = {name: getattr(recipe, name) for name in names}
        self._hand.losses = lambda: candidates(root) if recipe.loss is None else [recognised(recipe.loss)]
        self._hand.module, self._hand.optimizers = module, optimizers
        return True

    def plain(self, module: nn.Module) -> nn.Module:
        """Return a plain copy, on rank 0, of a module whose parameters are sharded; else the module itself."""
        if self.hand or not sharded(module):
            return module
        if self._standin is None or self._standin.live is not module:
            self._standin = Standin(self.crew, module, self.recipe.device)
        return self._standin.module

    def begin(self, monitor: Monitor, root: nn.Module, matching: Matching | None) -> None:
        """Start with this monitor, whose kernels are computed by all processes unless rank 0 holds the only copy."""
        if self.crew.size > 1:
            _check_silence(monitor.model, monitor.probe.inputs, self.recipe)
        super().begin(monitor, root, matching)
        if self._standin is None:
            monitor.measured = partial(Shared(self.crew), probe=monitor.probe)
        else:
            self._standin.optimizers, self._others = list(monitor.optimizers), list(monitor.others)

    # Meetings.

    @property
    def early(self) -> bool:
        """True when rank 0 said that the next meeting is at the start of a batch."""
        return self._early and not self._apart

    def due(self, step: int) -> bool:
        """Settle with all processes whether a probe is due; only at the steps agreed before."""
        if self._apart or step < self._next:
            return False
        return self._meeting(step, last=False)

    def ending(self, step: int) -> bool:
        """Settle with all processes whether the last weights are probed."""
        return not self._apart and self._meeting(step, last=True)

    def probe(self, step: int, epoch: int | None) -> None:
        """Measure on rank 0; on the others serve it until it is done."""
        if self.hand:
            self._serve()
            return
        try:
            if self._refreshed(step, epoch):
                super().probe(step, epoch)
        finally:
            # Whatever happened here, Ctrl-C included: the others wait for this.
            self._announce(Verdict(next=self._next, early=self._early, metrics=self._scalars()))

    def observe(self, step: int, optimizers: list[Any]) -> None:
        """Record the learning rates that the coming optimizer step uses."""
        self._hand.optimizers = optimizers
        if self._standin is not None:
            self._standin.optimizers = optimizers
        super().observe(step, optimizers)

    def expect(self, see: Any) -> None:
        """Note outputs and targets of the batch whose loss comes next, at the weights of now."""
        if self._standin is not None and self.matching:
            self._standin.refresh()
        super().expect(see)

    def rest(self, reason: str) -> None:
        """Measure nothing more. A hand that failed stays to say so, lest the others wait for it."""
        if not self.hand:
            super().rest(reason)
        elif self._apart:
            self.resting = reason
        else:
            self._hand.unfit = reason

    def close(self) -> None:
        """Leave the crew."""
        self._apart = self._apart or "the run has ended"
        self.crew.close()

    def _meeting(self, step: int, *, last: bool) -> bool:
        if self.hand:
            return self._serve()
        start, paid = time.perf_counter(), self._paid()
        probe, following = False, step + 1
        with self._contained():
            probe = super().ending(step) if last else super().due(step)
            # Copies of sharded weights are refreshed at every batch whose loss is compared.
            self._early = super().early or (self._standin is not None and self.matching)
            following = step if self._early else self._following(step)
        self._next = following
        self._announce(Verdict(probe, self._next, self._early, self.resting, self._scalars()))
        self._pay(start, paid)
        self._met = (step, time.perf_counter())
        return probe and not self._apart

    def _following(self, step: int) -> int:
        """Return the step of the next meeting: of the next probe where it is known, else about a second away."""
        monitor, every = self.monitor, self.recipe.every_n_steps
        if monitor is None or self.matching:
            return step + 1
        if every is not None:
            return (step // every + 1) * every
        foreseen = monitor.schedule.foreseen(step)
        if foreseen is not None:
            return foreseen[0]
        pace = 1.0
        if self._met is not None and step > self._met[0]:
            pace = (time.perf_counter() - self._met[1]) / (step - self._met[0])
        return step + max(1, min(step, int(_MEETING / max(pace, 1e-6))))

    def _announce(self, verdict: Verdict) -> None:
        """Tell the others. Who cannot be reached is left alone from here on."""
        if self._apart:
            return
        try:
            self.crew.shared(verdict)
        except Exception as error:  # noqa: BLE001 - lost processes are the trainer's to deal with
            self._part(said(error))
            return
        if verdict.over:
            self._apart = verdict.over

    def _serve(self) -> bool:
        """Do what rank 0 orders until it gives a verdict; return whether a probe follows."""
        while not self._apart:
            try:
                order = self.crew.shared()
                if isinstance(order, Verdict):
                    return self._heard(order)
                with suppress(Exception):  # was said in the vote; a lost connection shows at the next turn
                    order.serve(self._hand)
            except Exception as error:  # noqa: BLE001 - as above
                self._part(said(error))
        return False

    def _heard(self, verdict: Verdict) -> bool:
        self._next, self._early = verdict.next, verdict.early
        if self.sink is not None and verdict.metrics:
            with suppress(Exception):
                self.sink.publish(verdict.metrics)
        if verdict.over:
            self._apart = self.resting = verdict.over
        return verdict.probe

    def _part(self, reason: str) -> None:
        """Talk to nobody any more, and rest."""
        self._apart = reason
        self.crew.close()
        if self.hand:
            self.resting = reason
            say(f"process {self.crew.rank} takes no further part in probes, training goes on: {reason}")
        elif not self.resting:
            super().rest(reason)

    def _scalars(self) -> Mapping[str, float]:
        return {} if self.last is None else dict(self.last.metrics)

    def _refreshed(self, step: int, epoch: int | None) -> bool:
        """Bring the copy of sharded weights up to date; where that fails the probe is skipped."""
        if self._standin is None or self.monitor is None:
            return True
        try:
            self._standin.refresh()
            self.monitor.optimizers = self._standin.stand_ins(self._standin.optimizers)
            self.monitor.others = self._standin.stand_ins(self._others)
        except Exception as error:
            if self.recipe.strict:
                raise
            self._pending.append(self._skipped(step, error, epoch))
            if self._matching is None:
                self._release()
            self._rest_if_failing()
            return False
        return True


def _check_silence(model: nn.Module, inputs: Any, recipe: Recipe) -> None:
    """Refuse a network that talks to other processes, forwards or backwards; costs four passes of two samples.

    Raises:
        SpeechError: it does.
    """
    modes: tuple[Mode, ...] = ("eval", "train")
    for mode in modes:
        try:
            with undisturbed(seed=recipe.seed), Silence():  # type: ignore[no-untyped-call]
                network = Network(
                    model, params=recipe.params, forward=recipe.forward, mode=mode, device=recipe.device, detached=True
                )
                f = network.outputs(network.prepared(take(inputs, slice(0, 2))))
                torch.autograd.grad(f.sum(), list(network.parameters.values()), allow_unused=True)
        except SpeechError:
            raise
        except Exception:  # noqa: BLE001 - whatever else is wrong with it shows in the probe
            continue
