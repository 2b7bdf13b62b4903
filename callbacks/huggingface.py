"""NTKMonitorCallback: add it to a Hugging Face Trainer and see the kernel of the model while it trains.

The same session, guard and record as `NTKMonitor` for Lightning; what differs is what this Trainer knows. Needs the
extra `huggingface` (transformers, accelerate).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ntk_monitor.callbacks.checks import check_device, checked_probe
from ntk_monitor.callbacks.clocked import clocked
from ntk_monitor.callbacks.huggingface_data import Called, drawn, matched, outputs_of
from ntk_monitor.callbacks.huggingface_run import (
    effective_batch,
    own_loss,
    plain_optimizer,
    rates_ahead,
    refusal,
    remember,
    remembered,
    smoothing,
    trainer_of,
)
from ntk_monitor.callbacks.huggingface_sink import HuggingFaceSink
from ntk_monitor.callbacks.huggingface_texts import texts_of, tokenizer_of
from ntk_monitor.errors import InputError, said
from ntk_monitor.losses import recognised
from ntk_monitor.monitor import Monitor
from ntk_monitor.probe import Probe, beside, population_of
from ntk_monitor.recipe import FULL_KERNEL_ROWS, Recipe
from ntk_monitor.say import say
from ntk_monitor.session import Session
from ntk_monitor.snapshot import Snapshot
from ntk_monitor.text import Positions

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "NTKMonitorCallback needs transformers and accelerate; pip install 'ntk-monitor[huggingface]'"
    ) from error


class NTKMonitorCallback(TrainerCallback):
    """Periodically computes the empirical neural tangent kernel on a fixed probe of the training set.

    `Trainer(callbacks=[NTKMonitorCallback()])` needs no configuration. The loss is the one that the model returns for
    its labels, recognised by comparing it with known losses on the probe; where the Trainer computes another
    (`compute_loss_func`, an overridden `compute_loss`) it is "not verified" until `loss=` says what it is.

    Language models (logits (N, T, V), labels (N, T)) get the N × N kernel of the losses of whole sequences: labels
    shifted as the model shifts them, -100 dropped, summed over tokens and divided by the mean number of tokens per
    sequence, so that the mean over sequences is the batch's loss, a sum over tokens divided by their number
    (`num_items_in_batch`). Packed documents are taken apart, one row each, where they do not see each other.
    Classifiers get the full kernel as under Lightning.

    Under data parallelism rank 0 measures and the others wait for it at the next step. FSDP and DeepSpeed are refused.

    Args:
        probe: None: training samples, clip(1024 // C, 64, 512) of them, 64 sequences for language models and fewer
            (down to 8) where their logits exceed 2^28 numbers; an int: that many; (inputs, labels); a dataset or loader
            to draw from; a Probe.
        positions: "last" (the last token that is no padding) or token indices: the kernel of these tokens' logits in
            place of the losses', the full one where it fits, else that of their normalised sum (outputs="sum"). No loss
            belongs to them, hence no modes and no learning-rate bounds.
        **options: those of `NTKMonitor` and `ntk_monitor.recipe.Recipe`, which see. loss="model" takes the model's own
            loss for the one that is trained, whatever the Trainer does.

    Raises:
        InputError: an option outside its range, or an empty or inconsistent probe. Only here, never inside `train`.
    """

    def __init__(self, probe: Any = None, *, positions: Any = None, **options: Any) -> None:
        self._trusted = options.get("loss") == "model" if isinstance(options.get("loss"), str) else False
        self.recipe = Recipe(**({**options, "loss": None} if self._trusted else options))
        self._wanted = checked_probe(probe, self.recipe.seed)
        if self.recipe.loss is not None:
            recognised(self.recipe.loss)
        check_device(self.recipe.device)
        self._positions = _checked(positions)
        self._session = Session(self.recipe)

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor that measures; None before training and when the monitor rests."""
        return self._session.monitor

    @property
    def last(self) -> Snapshot | None:
        """The newest Snapshot."""
        return self._session.last

    # Hooks: each one only guards a step below.

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Draw the probe and measure the weights that training starts from."""
        self._session = Session(self.recipe)
        if state.is_world_process_zero:
            self._session.guarded(self._start, args, state, control, known)
            self._probe_if_due(state)

    @clocked
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Record the learning rates that this step uses; the scheduler changes them right after it."""
        if self.monitor is not None:
            self._session.observe(state.global_step, [plain_optimizer(known["optimizer"])])

    @clocked
    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Probe when the cadence asks for it, and after the last step."""
        if control.should_training_stop:
            self._finish(state)  # by the end of training the Trainer may have loaded the best weights
        else:
            self._probe_if_due(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **known: Any) -> None:
        """Note the mean training loss that the Trainer reports."""
        self._session.noted(self._note, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Write into the checkpoint what a resumed run needs to go on with the same history."""
        self._session.guarded(self._remember, args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Measure the last weights, unless that was done or others have taken their place."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._finish(state)
        self._session.guarded(self._session.flush)
        self._session.close()

    def _probe_if_due(self, state: Any) -> None:
        if self._session.due(state.global_step):
            self._session.guarded(self._session.probe, state.global_step, int(state.epoch or 0))

    def _finish(self, state: Any) -> None:
        if self._session.ending(state.global_step):
            self._session.guarded(self._session.probe, state.global_step, int(state.epoch or 0))

    # Steps: each may raise, and is only called through `Session.guarded`.

    def _start(self, args: Any, state: Any, control: Any, known: dict[str, Any]) -> None:
        session, trainer = self._session, trainer_of()
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        session.sink = HuggingFaceSink((args, state, control), callbacks, self.recipe)
        if reason := refusal(args):
            session.rest(reason)
            return
        model, loader = known["model"], known.get("train_dataloader")
        forward = Called(self.recipe.forward, self._positions)
        probe = drawn(loader, model, self._wanted, forward, self.recipe.seed)
        if self._positions is not None:
            probe = Probe(probe.inputs, None, probe.source, probe.indices)
        monitor = self._monitor(model, probe, forward, trainer)
        optimizer, scheduler = known["optimizer"], known.get("lr_scheduler")
        monitor.optimizers = [plain_optimizer(optimizer)]
        monitor.total_steps = self.recipe.total_steps or int(state.max_steps) or None
        monitor.rates_ahead = partial(rates_ahead, optimizer, scheduler)
        monitor.clip = float(args.max_grad_norm) or None
        monitor.population = population_of(loader)
        monitor.batch_size = self.recipe.batch_size or effective_batch(args)
        monitor.reference = self._reference(loader, monitor)
        monitor.portrait.texts = texts_of(probe.inputs, tokenizer_of(known))
        self._resume(monitor, args, state)
        session.begin(monitor, model, None)

    def _monitor(self, model: Any, probe: Probe, forward: Called, trainer: Any) -> Monitor:
        """Return the Monitor, its loss known and its kernel chosen."""
        recipe = self.recipe
        loss, status = recipe.loss, "given"
        if loss is None:
            status = "not verified: " + (own_loss(trainer) or "the probe has no tensor of labels") + "; pass loss="
            if isinstance(probe.targets, Tensor) and (self._trusted or not own_loss(trainer)):
                matching = matched(model, probe, forward, smoothing(trainer, model))
                loss, status = matching.match, matching.status.replace("Trainer's value", "model's own")
        if self._positions is not None:
            status = "none: nothing is trained at chosen positions alone"
        chosen: dict[str, Any] = {"forward": forward}
        if recipe.outputs == "auto":
            chosen["outputs"] = self._layout(model, probe, forward, loss)
        monitor = Monitor(model, None, probe, loss, recipe=replace(recipe, **chosen))
        monitor.loss_status = status
        return monitor

    def _layout(self, model: Any, probe: Probe, forward: Called, loss: Any) -> str:
        """Return which kernel a model gets by default."""
        if self._positions is not None:
            rows = outputs_of(model, probe.inputs, forward).numel()
            return "full" if rows <= FULL_KERNEL_ROWS else "sum"
        return "loss" if loss is not None and "shift" in recognised(loss).options else "auto"

    def _reference(self, loader: Any, monitor: Monitor) -> Probe | None:
        """Draw what drives forecasts, for losses that have some; data that cannot be drawn cost only them."""
        if self.recipe.reference == 0 or monitor.loss is None or monitor.loss.kind == "other":
            return None
        try:
            return beside(loader, monitor.probe, self.recipe.reference, self.recipe.seed + 1)
        except Exception as error:
            if self.recipe.strict:
                raise
            say(f"there will be no forecasts, as no training samples could be drawn for them: {said(error)}")
            return None

    def _resume(self, monitor: Monitor, args: Any, state: Any) -> None:
        known = remembered(_checkpoint(args, state), self.recipe.log_prefix) if state.global_step else {}
        if known.get("hash") == monitor.probe.hash:
            monitor.schedule.last_step, monitor.probes = known["last_step"], known["probes"]
        elif known:
            say("this probe is not the one of the interrupted run: its history and this one are not comparable")

    def _remember(self, args: Any, state: Any) -> None:
        if (monitor := self.monitor) is not None:
            known = {"hash": monitor.probe.hash, "last_step": monitor.schedule.last_step, "probes": monitor.probes}
            remember(_checkpoint(args, state), self.recipe.log_prefix, known)

    def _note(self, logs: dict[str, Any]) -> None:
        if self.monitor is not None and isinstance(logs.get("loss"), (int, float)):
            self.monitor.losses.add(float(logs["loss"]))


def _checked(positions: Any) -> Positions | None:
    if positions is None or positions == "last":
        return positions  # type: ignore[no-any-return]
    indices = isinstance(positions, Sequence) and not isinstance(positions, str) and len(positions) > 0
    if indices and all(isinstance(p, int) and not isinstance(p, bool) for p in positions):
        return tuple(positions)
    raise InputError(f'positions must be "last" or token indices, got {positions!r}')


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
