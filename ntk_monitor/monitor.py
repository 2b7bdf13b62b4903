"""Monitor: module + optimizer + probe → Snapshot. Framework-free; what callback, loop and command line share.

`measure` does what needs the network (kernel, outputs), `finish` what needs only numbers (modes, metrics): the loss may
become known in between.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.coverage import Forwards, nonzero
from ntk_monitor.errors import InputError, LossUnknownError, NumericsError, said
from ntk_monitor.facts import of_outputs
from ntk_monitor.full_record import full_record
from ntk_monitor.given import listed, probe_of, rates_of, reference_of, table
from ntk_monitor.guard import random_state
from ntk_monitor.kernel import Kernel, measured
from ntk_monitor.look import Measurement, Now, Outlook, Place
from ntk_monitor.losses import Loss, Terms, recognised
from ntk_monitor.memory import Room, waited, weighed
from ntk_monitor.metrics import Measured, evaluate
from ntk_monitor.metrics.measured import mean_over_outputs
from ntk_monitor.modes import Modes
from ntk_monitor.outlook import Watch
from ntk_monitor.portrait import Portrait
from ntk_monitor.probe import Probe, population_of
from ntk_monitor.recipe import Recipe
from ntk_monitor.running import LearningRates, Mean
from ntk_monitor.say import say
from ntk_monitor.schedule import SECOND, Schedule, Tier
from ntk_monitor.snapshot import Snapshot, shown_order
from ntk_monitor.spectrum import Spectrum
from ntk_monitor.targets import classes, features, loss_value, terms_of
from ntk_monitor.tiers import Moment, glance, light_record, skipped_record

Array = NDArray[np.float64]


class Monitor:
    """Measures the kernel of a network on a fixed probe, step after step.

    Args:
        model: the live module; it is only read.
        optimizer: one optimizer or several, whose learning rates are recorded; None: none are.
        probe: a Probe, (inputs, targets), a Dataset or a DataLoader over one.
        loss: name, torch loss or callable; None: no modes.
        reference: the training set, in the forms of `probe`, of which `Recipe.reference` samples drive forecasts; None:
            no forecasts.
        recipe: every other option; or give them by keyword.

    Raises:
        InputError: an empty or unusable probe, or an option outside its range.
        NetworkError: no trainable parameter, or a module that cannot be followed (found at the first snapshot).

    Example:
        >>> import torch, ntk_monitor as ntk
        >>> model, x, y = torch.nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = ntk.Monitor(model, optimizer, (x, y), "mse")
        >>> monitor.snapshot(0).rank
        4
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        probe: Any,
        loss: Any = None,
        *,
        reference: Any = None,
        recipe: Recipe | None = None,
        **options: Any,
    ) -> None:
        if recipe is not None and options:
            raise InputError(f"give options in the recipe or by keyword, not both; got {sorted(options)}")
        self.recipe = recipe or Recipe(loss=loss, **options)
        self.model = model
        self.optimizers = listed(optimizer)
        self.probe = probe_of(probe, reference, self.recipe.seed)
        given = loss if loss is not None else self.recipe.loss
        self.loss: Loss | None = None if given is None else recognised(given)
        self.loss_status = "given" if self.loss else "not given: pass loss= for residual modes"
        self.schedule = Schedule(self.recipe.every_n_steps, self.recipe.max_overhead)
        self.learning_rates = LearningRates()
        self.steps = 0
        self.probes = 0
        self.reference: Probe | None = reference_of(reference, self.probe, self.recipe)
        self.batch_size, self.total_steps = self.recipe.batch_size, self.recipe.total_steps
        self.population: int | None = population_of(reference)
        self.clip: float | None = None
        self.rates_ahead: Callable[[int], Array | None] | None = None
        self.losses, self.clipped = Mean(), Mean()
        self.others: list[Optimizer] = []
        self.words: dict[str, str] = {}
        self.measured: Callable[..., Kernel] = measured
        self._watch = Watch(model, self.recipe, self.probe)
        chosen = {name: getattr(self.recipe, name) for name in ("params", "forward", "device", "seed")}
        self._forwards = Forwards(**chosen)
        self._room = Room(self.recipe.memory_limit)
        self._weighed = self._foretold = False
        self._asked: tuple[int, Tier | None] = (0, None)
        self.written: dict[str, float] = {}
        self.place: Place | None = None
        self.portrait = Portrait(self.probe, strict=self.recipe.strict)
        self._previous: tuple[int, Array, Modes | None] | None = None

    def observe(self) -> None:
        """Record the learning rates in force; call after each `optimizer.step()`, before the scheduler's."""
        start = time.perf_counter()
        self.schedule.start()
        self.schedule.close()
        self.learning_rates.record(self.steps, tuple(rates_of(self.optimizers)))
        self.steps += 1
        self.schedule.pay(time.perf_counter() - start)

    def due(self, step: int | None = None) -> bool:
        """True when the cadence asks for a probe after so many optimizer steps (default: those observed)."""
        return self.tier(step) is not None

    def tier(self, step: int | None = None) -> Tier | None:
        """Return which probe the cadence asks for, a "full" or a "light" one; None: none.

        Says once, some steps after the first probe, when few full ones fit into a run of known length.
        """
        step = self.steps if step is None else step
        self.schedule.total = self.total_steps
        if not self._foretold and (words := self.schedule.sparse(step)) is not None:
            self._foretold = True
            if words:
                say(words)
        tier = self.schedule.tier(step)
        self._asked = (step, tier)
        return tier

    def snapshot(self, step: int | None = None, epoch: int | None = None, *, tier: Tier | None = None) -> Snapshot:
        """Measure now. A probe that fails becomes a skipped Snapshot with the reason, unless the recipe is strict.

        Args:
            step: optimizer steps taken; None: those observed.
            epoch: for the record.
            tier: "full" or "light" (see `light`); None: the one that `due` has found for this step, else a full one.
        """
        step = self.steps if step is None else step
        schedule, start = self.schedule, time.perf_counter()
        schedule.start()
        accounted = schedule.accounted
        try:
            light = tier == "light" or (tier is None and self._asked == (step, "light"))
            return self.light(step, epoch) if light else self.finish(self.measure(step, epoch))
        except Exception as error:
            if self.recipe.strict:
                raise
            return self.skipped(step, error, epoch)
        finally:
            schedule.pay(max(0.0, time.perf_counter() - start - (schedule.accounted - accounted)))

    def measure(self, step: int, epoch: int | None = None) -> Measurement:
        """Compute kernel, spectrum and outputs of the present weights.

        Raises:
            InputError, NetworkError, NumericsError: as `empirical_ntk` and `Spectrum.of`; whatever the model raises.
        """
        self.schedule.excuse(waited())
        start = time.perf_counter()
        recipe, probe = self.recipe, self.probe
        predictions, coverage = self._forwards.outputs(self.model, probe.inputs)
        outputs = _outputs(predictions)
        layout = recipe.layout(probe.samples, outputs, coverage.selected)
        self._weigh(layout, outputs, coverage.selected)
        if layout == "loss" and (self.loss is None or probe.targets is None):
            raise LossUnknownError(
                f"{probe.samples} samples × {outputs} outputs need the kernel of the losses, and the loss is "
                f'{self.loss_status.partition(";")[0]}; pass loss= and targets, or outputs="trace" for a large kernel'
            )
        kernel = self._room.within(
            self.model,
            partial(self.measured, self.model, probe.inputs),
            settled=self.steps >= SECOND,
            outputs=layout,
            params=recipe.params,
            forward=recipe.forward,
            engine=recipe.engine,
            targets=probe.targets if layout == "loss" else None,
            loss=self.loss if layout == "loss" else None,
            device=recipe.device,
            seed=recipe.seed,
        )
        computed = time.perf_counter()
        values = _square(nonzero(kernel.values, coverage))
        spectrum = Spectrum.of(values, vectors=False, jacobian_eps=torch.finfo(kernel.jacobian_dtype).eps)
        solved = time.perf_counter()
        seconds = {"kernel": computed - start, "spectrum": solved - computed}
        self.schedule.done(step, solved - start)
        return Measurement(step, epoch, time.time(), layout, kernel, values, spectrum, predictions, seconds, coverage)

    def finish(self, raw: Measurement, *, fresh: bool = True) -> Snapshot:
        """Turn a measurement into the record: modes in the known loss, metrics, cost. Updates the previous probe.

        With `fresh` False the weights have moved on since the measurement, so that nothing more can be asked of them.
        """
        start = time.perf_counter()
        terms, reason = terms_of(self.loss, self.loss_status, self.probe, raw.layout, raw.predictions)
        modes = None if terms is None else Modes.of(raw.values, terms, jacobian_eps=raw.jacobian_eps)
        previous = self._previous
        carried, previous_step = np.empty(0), None
        if modes is not None and terms is not None and previous is not None and previous[2] is not None:
            carried, previous_step = previous[2].carried(terms.gradient), previous[0]
        labels = classes(self.probe, self.loss)
        means = mean_over_outputs(raw.values, self.probe.samples)
        metrics = self._metrics(raw)
        count = self.probes if self.place is None else self.place.index
        with_gram = self.recipe.gram_every and count % self.recipe.gram_every == 0
        order = shown_order(labels, self.probe.samples)
        if fresh:
            with random_state():  # a user's own metrics may draw numbers
                seen = self._watch.look(self._now(raw, terms, modes, labels))
            self.schedule.complete()
            if self.losses.count:
                seen.facts["train_loss"] = self.losses.taken()
            if self.clipped.count:
                seen.facts["clip_coefficient"] = self.clipped.taken()
        else:
            seen = Outlook(texts={"stability": "not measured: the loss was not known yet at this step"})
        self.portrait.show(seen, raw, terms, modes, self.place)
        seen.texts |= self.words
        lr_steps, lr_values = self.learning_rates.taken()
        self._previous = (raw.step, raw.values, modes)
        self.probes += 1
        whole = time.perf_counter() - start
        self.schedule.pay(whole)
        self.schedule.forecast(seen.forecast)
        self.schedule.saving, self.schedule.lights = seen.saving, self.loss is not None
        seconds = raw.seconds | {"modes": whole - sum(seen.seconds.values())} | seen.seconds | self.written
        metrics |= self.schedule.share
        seen.facts["memory_limit"] = float(self._room.limit)
        seen.facts |= self.schedule.begun
        return full_record(
            raw,
            self.probe,
            modes,
            seen,
            metrics,
            loss=self.loss.name if self.loss else "",
            loss_status=self.loss_status,
            loss_value=terms.value if terms is not None else loss_value(self.loss, self.probe, raw.predictions),
            modes_reason=reason,
            previous_step=previous_step,
            seconds=seconds,
            carried=carried,
            labels=np.empty(0) if labels is None else labels.astype(np.float64),
            lr_steps=np.asarray(lr_steps, dtype=np.float64),
            lr_values=np.asarray(lr_values, dtype=np.float64),
            gram=means[np.ix_(order, order)] if with_gram else np.empty(0),
        )

    def _now(self, raw: Measurement, terms: Terms | None, modes: Modes | None, labels: NDArray[np.int64] | None) -> Now:
        first = None if self._previous is None else self._previous[0]
        rates = [] if first is None else self.learning_rates.between(first, raw.step)
        return Now(
            step=raw.step,
            layout=raw.layout,
            values=raw.values,
            spectrum=raw.spectrum,
            jacobian_eps=raw.jacobian_eps,
            targets=features(self.probe, self.loss),
            predictions=raw.predictions,
            terms=terms,
            modes=modes,
            labels=labels,
            loss=self.loss,
            optimizers=self.optimizers,
            others=self.others,
            batch_size=self.batch_size,
            population=self.population,
            total_steps=self.total_steps,
            reference=self.reference,
            clip=self.clip,
            cost=raw.seconds.get("kernel", 0.0),
            rates=table(rates),
            rates_ahead=self.rates_ahead,
            affordable=math.inf if self.place else self.schedule.affordable(raw.seconds.get("kernel", 0.0)),
            place=self.place,
        )

    def light(self, step: int, epoch: int | None = None) -> Snapshot:
        """Measure what a few passes can since the last full probe: see `ntk_monitor.tiers`.

        Raises:
            NetworkError, NumericsError: a module that cannot be followed, outputs that are not finite.
        """
        self.schedule.excuse(waited())
        start = time.perf_counter()
        since, (past, _, modes) = self._watch.since, self._previous or (None, None, None)
        predictions, _ = self._forwards.outputs(self.model, self.probe.inputs)
        if not bool(predictions.isfinite().all()):
            raise NumericsError("the outputs on the probe are NaN or infinite; look at weights and inputs")
        terms = None if modes is None else terms_of(self.loss, self.loss_status, self.probe, "full", predictions)[0]
        outputs = predictions.reshape(self.probe.samples, -1).numpy()
        seconds = {"forward": time.perf_counter() - start}
        moment = Moment(
            loss=self.loss,
            optimizers=self.optimizers,
            others=self.others,
            batch_size=self.batch_size,
            population=self.population,
        )
        with random_state():
            seen, gauge = glance(self.model, self.recipe, self.probe, since, moment)
        self._watch.refresh(gauge, tuple(rates_of(self.optimizers)))
        self.schedule.done(step, time.perf_counter() - start, "light")
        carried = np.empty(0) if modes is None or terms is None else modes.carried(terms.gradient)
        if terms is not None:
            self._watch.compare(seen, terms)
        seen.facts |= of_outputs(outputs, classes(self.probe, self.loss)) | self.schedule.begun
        seen.metrics |= self.schedule.share
        seen.texts |= self.words
        seen.seconds |= seconds | self.written
        return replace(
            light_record(step, epoch, self.probe, self.loss, seen),
            previous_step=past,
            outputs=_outputs(predictions),
            loss_status=self.loss_status,
            loss_value=loss_value(self.loss, self.probe, predictions),
            carried=carried,
            **seen.arrays,
        )

    def skipped(self, step: int, error: BaseException | str, epoch: int | None = None) -> Snapshot:
        """Return the record of a probe that failed, and say so once."""
        reason = error if isinstance(error, str) else said(error)
        say(f"probe at step {step} skipped: {reason}")
        self.schedule.done(step, 0.0)
        return skipped_record(step, epoch, self.probe, reason)

    def handed(self) -> dict[str, Any]:
        """Return what the next probe compares with; see `ntk_monitor.handover`."""
        return {"previous": self._previous} | self._watch.handed()

    def take(self, handed: dict[str, Any]) -> None:
        """Go on where another monitor of the same network and probe stood."""
        self._previous = handed["previous"]
        self._watch.take(handed)

    def begin(self, raw: Measurement) -> None:
        """Take this measurement for that of the first probe, with which later ones compare."""
        self._watch.begin(raw.values)

    def _weigh(self, layout: str, outputs: int, parameters: int) -> None:
        words = weighed(self.recipe, self.probe.samples, layout, outputs, parameters)
        if words and not self._weighed:
            say(words)
        self._weighed = True

    def _metrics(self, raw: Measurement) -> dict[str, float]:
        """Return the logged scalars that the kernel alone decides."""
        measured = Measured(
            kernel=raw.values,
            samples=self.probe.samples,
            layout=raw.layout,
            jacobian_eps=raw.jacobian_eps,
            targets=features(self.probe, self.loss),
            previous=None if self._previous is None else self._previous[1],
            solved=raw.spectrum,
        )
        return evaluate(measured, ["trace", "condition_log10", "effective_rank", "alignment", "kernel_change"])


def _outputs(predictions: Tensor) -> int:
    return predictions[0].numel()  # C, of one sample


def _square(kernel: Tensor) -> Array:
    values: Array = kernel.cpu().numpy()
    return values.reshape(values.shape[0] * values.shape[1], -1) if values.ndim == 4 else values
