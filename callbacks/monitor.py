"""NTKMonitor: add it to a Lightning Trainer and see the kernel of the network while it trains.

A hook asks when, calls what, hands the result on. Inside `fit` nothing of ours raises: a probe that fails is one
warning and a recorded skip.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.callbacks.ahead import (
    clipping,
    effective_batch,
    ending,
    planned_steps,
    rates_ahead,
    training_samples,
)
from ntk_monitor.callbacks.averages import Averages
from ntk_monitor.callbacks.checks import check_device, checked_probe, probe_bytes
from ntk_monitor.callbacks.clocked import clocked
from ntk_monitor.callbacks.gradients import clip_coefficient
from ntk_monitor.callbacks.lightning_base import Base, LightningModule, Trainer, callbacks_of
from ntk_monitor.callbacks.placeholders import placeholders
from ntk_monitor.callbacks.ranks import refusal
from ntk_monitor.callbacks.sink import Sink
from ntk_monitor.callbacks.trainer_data import (
    drawn,
    measured_module,
    reference_samples,
    returned_loss,
    training_outputs,
)
from ntk_monitor.errors import NetworkError, said
from ntk_monitor.losses import candidates, recognised
from ntk_monitor.matching import Matching
from ntk_monitor.monitor import Monitor
from ntk_monitor.optimizers import picked
from ntk_monitor.probe import Probe, default_samples, from_batch
from ntk_monitor.recipe import Recipe
from ntk_monitor.say import say
from ntk_monitor.session import Session
from ntk_monitor.snapshot import Snapshot
from ntk_monitor.together import assembled

# A probe larger than this is remembered by its indices in a checkpoint and drawn again, rather than stored in it.
_CHECKPOINT_BYTES = 8 * 2**20

# A training step may leave a batch out and return None; one that has returned so many returns no loss at all.
_SILENT = 8

_T = TypeVar("_T")


class NTKMonitor(Base):
    """Periodically computes the empirical neural tangent kernel on a fixed probe and logs what it says.

    `Trainer(callbacks=[NTKMonitor()])` needs no configuration: the probe is drawn from the training set, the loss is
    found by matching the training loss, the cadence follows from `max_overhead`. Weights, gradients, buffers, flags and
    random states of the run stay bit for bit what they are without it.

    Args:
        probe: None: clip(1024 // C, 64, 512) training samples; an int: that many, stratified by class; (inputs,
            targets); a DataLoader or Dataset to draw from; a Probe.
        every_n_steps: fixed cadence in optimizer steps; None: as often as `max_overhead` allows. The first and the
            last step are always probed.
        max_overhead: share of the wall time after start-up that the monitor may take when `every_n_steps` is None.
        outputs: "full", "trace", "sum", "loss" (see `ntk_monitor.empirical_ntk`); "auto": full while N·C ≤ 2048, else
            loss.
        loss: name, torch loss or callable (outputs, targets) → scalar; None: matched.
        forward: callable (module, inputs) → tensor; None: `module(inputs)`, its `.logits`, or its only floating tensor.
        params: predicate (name, parameter), regular expression or names; None: all with requires_grad.
        reference: training samples that drive forecasts, the probe's included; 0: no forecasts.
        forecast_every: simulate the rest of the run at every this many probes; 0: never.
        optimizer: where several optimizers take turns, the one that drives stability and forecasts and whose steps are
            counted: its place in `configure_optimizers` (0 or "0") or the name of its class; None: all of them, every
            step of each counted. With `params` this watches one player of a game (a generator, say).
        directions: mapping name → (N, C) array of directions of the residual to follow; None: classes or outputs.
        gram_every: store and draw the Gram matrix at every this many probes; 0: never.
        verify: check that no probe changes the run, and rest with a warning if one does. The first two read values, at
            most 2 GiB at a time (2 s on one core for the largest models), all read what torch counts of writes.
        log_prefix: prefix of every tag; two monitors in one Trainer need different ones.
        log_dir: where to write the record when there is no TensorBoard logger.
        engine: "auto", "structured", "reference" or "rows".
        memory_limit: bytes for Jacobian blocks; None: half of what is free at the peak of training.
        device: where to measure; None: where the parameters are.
        seed: of the probe's choice.
        strict: raise instead of skipping (for debugging; the run dies with the probe).

    Raises:
        InputError: an option outside its range, or an empty or inconsistent probe. Only here, never inside `fit`.
    """

    def __init__(  # noqa: PLR0913 - the public door; every option is a plain, typed argument for LightningCLI
        self,
        probe: Any = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.02,
        outputs: Literal["auto", "full", "trace", "sum", "loss"] = "auto",
        loss: str | Callable[..., Any] | None = None,
        forward: Callable[..., Any] | None = None,
        params: str | Sequence[str] | Callable[..., bool] | None = None,
        *,
        reference: int = 512,
        forecast_every: int = 4,
        optimizer: int | str | None = None,
        directions: Mapping[str, Any] | None = None,
        gram_every: int = 10,
        verify: bool = True,
        log_prefix: str = "ntk",
        log_dir: str | None = None,
        engine: Literal["auto", "structured", "reference", "rows"] = "auto",
        memory_limit: int | None = None,
        device: str | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.recipe = Recipe(
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            outputs=outputs,
            loss=loss,
            forward=forward,
            params=params,
            reference=reference,
            forecast_every=forecast_every,
            optimizer=optimizer,
            directions=directions,
            gram_every=gram_every,
            verify=verify,
            log_prefix=log_prefix,
            log_dir=log_dir,
            engine=engine,
            memory_limit=memory_limit,
            device=device,
            seed=seed,
            strict=strict,
        )
        self._wanted = checked_probe(probe, seed)
        if loss is not None:
            recognised(loss)
        check_device(device)
        self._restored: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._session = Session(self.recipe)
        self._averages = Averages(())
        self._chosen: list[Optimizer] = []  # whose steps count; empty: those of all
        self._taken = 0  # steps of the chosen one
        self._trained = 0  # steps taken when the last batch that trains was over
        self._silent = 0

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor that measures; None before the probe is known and when the monitor rests."""
        return self._session.monitor

    @property
    def last(self) -> Snapshot | None:
        """The newest Snapshot."""
        return self._session.last

    @property
    def state_key(self) -> str:
        """Tell two monitors in one Trainer apart by their prefix."""
        return f"NTKMonitor[{self.recipe.log_prefix}]"

    # Hooks: each one only guards a step below.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the probe and measure the weights that training starts from."""
        self._session = assembled(self.recipe)
        self._session.guarded(self._start, trainer, pl_module)
        self._probe_if_due(trainer)

    @clocked
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the probe from the first batch if need be, and note what the loss of this batch will be made of."""
        session = self._session
        early = session.early
        if not session.hand and (self.monitor is None or session.matching):
            session.guarded(self._look_at, trainer, pl_module, batch)
        if early:
            self._probe_if_due(trainer)

    @clocked
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the learning rates that this step uses; schedulers change them right after it."""
        counts = not self._chosen or any(o is optimizer for o in self._chosen)
        if not counts or self._told(self._averages.refreshing, trainer, otherwise=False):
            return
        self._session.observe(self._steps(trainer), self._chosen or trainer.optimizers)
        if self.monitor is not None and self.monitor.clip is not None:
            self._session.guarded(self._note_clipping, trainer)
        self._taken += 1

    @clocked
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe when an optimizer step was taken and the cadence asks for it."""
        session = self._session
        if self._told(self._averages.refreshing, trainer, otherwise=False):
            return
        if session.matching:
            session.guarded(self._compare, trainer, pl_module, outputs)
        if self.monitor is not None:
            session.noted(self._note, trainer, outputs, batch)
        self._trained = self._steps(trainer)
        if self._told(ending, trainer, self._averages, otherwise=False):
            self._finish(trainer)  # once training has ended, other callbacks may have replaced the weights
        else:
            self._probe_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last weights and write what is still waiting."""
        self._finish(trainer, replaced=self._told(self._averages.put_in_place, trainer, self, otherwise=""))
        self._session.guarded(self._session.flush)
        self._session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what was measured before the run broke."""
        self._session.guarded(self._session.settle)
        self._session.guarded(self._session.flush)
        self._session.close()

    def _probe_if_due(self, trainer: Trainer) -> None:
        """Ask on every process of the run: they settle together whether to probe."""
        step = self._steps(trainer)
        if self._session.due(step):
            self._session.guarded(self._session.probe, step, trainer.current_epoch)

    def _finish(self, trainer: Trainer, replaced: str = "") -> None:
        """Measure the last weights that were trained, unless that has been done or they are gone."""
        session = self._session
        session.guarded(session.settle)
        if not session.ending(self._trained):
            return
        if replaced:
            reason = f"{replaced} has replaced the trained weights by their average; list NTKMonitor before it"
            session.guarded(session.skip, self._trained, reason, trainer.current_epoch)
        else:
            session.guarded(session.probe, self._trained, trainer.current_epoch)

    def _told(self, question: Callable[..., _T], *arguments: Any, otherwise: _T) -> _T:
        """Return what the Trainer and its callbacks tell; what fails in them is no reason to miss a meeting."""
        try:
            return question(*arguments)
        except Exception:
            if self.recipe.strict:
                raise
            return otherwise

    def _steps(self, trainer: Trainer) -> int:
        """Return the optimizer steps taken: those of the chosen optimizer, or the Trainer's count of all."""
        return self._taken if self._chosen else trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same history: the probe, the last step, the loss."""
        try:
            return self._state()
        except Exception as error:
            if self.recipe.strict:
                raise
            say(f"this checkpoint holds nothing of the monitor: {said(error)}")  # the run's own state is worth more
            return dict(self._restored)

    def _state(self) -> dict[str, Any]:
        monitor = self.monitor
        if monitor is None:
            return dict(self._restored)
        probe, last_step = monitor.probe, monitor.schedule.last_step
        state = {"version": 1, "hash": probe.hash, "indices": list(probe.indices), "source": probe.source}
        state |= {"last_step": last_step, "probes": monitor.probes, "taken": self._taken}
        state["metrics"] = {} if self.last is None else dict(self.last.metrics)
        if not probe.indices or probe_bytes(probe) <= _CHECKPOINT_BYTES:
            state |= {"inputs": probe.inputs, "targets": probe.targets}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an interrupted run; used at the start of training."""
        self._restored = dict(state_dict)

    # Steps: each may raise, and is only called through `Session.guarded`.

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averages = Averages(callbacks_of(trainer))
        chosen = picked(trainer.optimizers, self.recipe.optimizer)
        self._chosen = [] if len(chosen) == len(trainer.optimizers) else chosen
        self._taken = int(self._restored.get("taken", 0))
        self._silent = 0
        self._trained = self._steps(trainer)
        self._session.sink = sink = Sink(trainer, self.recipe)
        waiting = placeholders(trainer, self.recipe.log_prefix)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in waiting.items()})
        sink.publish(self._restored.get("metrics", {}))
        if reason := refusal(trainer, pl_module):
            raise NetworkError(reason)
        if self._session.enlist(self._measured(pl_module), pl_module, trainer.optimizers):
            return
        probe = self._remembered() or drawn(trainer, self._measured(pl_module), self._remembered_draw(), self.recipe)
        if probe is not None:
            self._begin(trainer, pl_module, probe)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, probe: Probe) -> None:
        optimizers = self._chosen or list(trainer.optimizers)
        monitor = Monitor(self._measured(pl_module), optimizers, probe, recipe=self.recipe)
        monitor.reference = self._reference(trainer, probe)
        # How many steps of a run are the chosen optimizer's depends on what the module does with each batch.
        monitor.total_steps = self.recipe.total_steps or (None if self._chosen else planned_steps(trainer))
        monitor.rates_ahead = partial(rates_ahead, trainer, of=self._chosen)
        monitor.others = [o for o in trainer.optimizers if not any(o is one for one in optimizers)]
        if self._averages.words:
            monitor.words["weights"] = self._averages.words
        monitor.clip = clipping(trainer)
        monitor.population = training_samples(trainer)
        if self._restored.get("hash") == probe.hash:
            monitor.schedule.last_step = self._restored["last_step"]
            monitor.probes = self._restored["probes"]
        elif self._restored:
            say("this probe is not the one of the interrupted run: its history and this one are not comparable")
        self._restored = {}
        session = self._session
        session.begin(monitor, pl_module, Matching(candidates(pl_module)) if self.recipe.loss is None else None)

    def _measured(self, pl_module: LightningModule) -> nn.Module:
        return self._session.plain(measured_module(pl_module) if self.recipe.forward is None else pl_module)

    def _reference(self, trainer: Trainer, probe: Probe) -> Probe | None:
        """Draw what drives forecasts; data that cannot be drawn cost the forecasts, not the monitor."""
        try:
            return reference_samples(trainer, probe, self.recipe)
        except Exception as error:
            if self.recipe.strict:
                raise
            say(f"there will be no forecasts, as no training samples could be drawn for them: {said(error)}")
            return None

    def _remembered(self) -> Probe | None:
        """Return the probe of the run that is being resumed, when its checkpoint holds the samples."""
        state = self._restored
        if state.get("inputs") is None or not (self._wanted is None or isinstance(self._wanted, int)):
            return None  # nothing stored, or a probe was given, which is the newer wish
        return Probe(state["inputs"], state["targets"], state["source"], tuple(state["indices"]))

    def _remembered_draw(self) -> Any:
        """Return what to draw: as many samples as the interrupted run had, so that the seed finds the same ones."""
        indices = self._restored.get("indices")
        return len(indices) if indices and self._wanted is None else self._wanted

    def _look_at(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self.monitor is None:
            wanted = self._wanted if isinstance(self._wanted, int) else default_samples(1)
            self._begin(trainer, pl_module, from_batch(batch, wanted, "the first training batch"))
        monitor = self.monitor
        if monitor is not None:
            self._session.expect(lambda: training_outputs(trainer, monitor.model, batch, self.recipe))

    def _compare(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        """Compare the candidates with the loss of this batch, or wait for one that has a loss."""
        value = returned_loss(trainer, outputs)
        self._silent += value is None
        if value is not None or self._silent >= _SILENT or not pl_module.automatic_optimization:
            self._session.compare(value)

    def _note_clipping(self, trainer: Trainer) -> None:
        """Remember by how much this step's gradients are about to be clipped."""
        if self.monitor is not None and self.monitor.clip is not None:
            coefficient = clip_coefficient(self._chosen or trainer.optimizers, self.monitor.clip)
            if coefficient is not None:
                self.monitor.clipped.add(coefficient)

    def _note(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """Remember the size of batches and the losses of training, without waiting for the device."""
        monitor = self.monitor
        if monitor is None:
            return
        if monitor.batch_size is None:
            monitor.batch_size = effective_batch(trainer, batch)
        value = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
        if isinstance(value, Tensor) and value.numel() == 1:
            value, scale = value.detach(), trainer.accumulate_grad_batches
            # By automatic optimization this is the Trainer's own copy; anything else could change until it is read.
            theirs = trainer.lightning_module.automatic_optimization
            monitor.losses.add(value if scale == 1 and theirs else value * scale)
