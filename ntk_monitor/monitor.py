"""Monitor: module + optimizer + probe → Snapshot. Framework-free; what callback, loop and command line share.

`measure` does what needs the network (kernel, outputs), `finish` what needs only numbers (modes, metrics): the loss may
become known in between.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.coverage import Forwards, nonzero
from ntk_monitor.errors import InputError, LossUnknownError, said
from ntk_monitor.facts import kept_outputs
from ntk_monitor.guard import random_state
from ntk_monitor.kernel import MEMORY_LIMIT, Kernel, measured
from ntk_monitor.look import Measurement, Now, Outlook
from ntk_monitor.losses import Loss, Terms, recognised
from ntk_monitor.metrics import Measured, evaluate
from ntk_monitor.metrics.measured import mean_over_outputs
from ntk_monitor.modes import Modes
from ntk_monitor.outlook import Watch
from ntk_monitor.probe import Probe, beside, dataset_of, default_samples, population_of
from ntk_monitor.recipe import FULL_KERNEL_PRODUCTS, Recipe
from ntk_monitor.say import say
from ntk_monitor.schedule import LearningRates, Mean, Schedule
from ntk_monitor.snapshot import Snapshot, shown_order
from ntk_monitor.spectrum import Spectrum

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
        self.optimizers = _listed(optimizer)
        self.probe = _probe(probe, reference, self.recipe.seed)
        given = loss if loss is not None else self.recipe.loss
        self.loss: Loss | None = None if given is None else recognised(given)
        self.loss_status = "given" if self.loss else "not given: pass loss= for residual modes"
        self.schedule = Schedule(self.recipe.every_n_steps, self.recipe.max_overhead)
        self.learning_rates = LearningRates()
        self.steps = 0
        self.probes = 0
        self.reference: Probe | None = _reference(reference, self.probe, self.recipe)
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
        self._weighed = False
        self._previous: tuple[int, Array, Modes | None] | None = None

    def observe(self) -> None:
        """Record the learning rates in force; call after each `optimizer.step()`, before the scheduler's."""
        self.schedule.start()
        self.learning_rates.record(self.steps, tuple(_rates(self.optimizers)))
        self.steps += 1

    def due(self, step: int | None = None) -> bool:
        """True when the cadence asks for a probe after so many optimizer steps (default: those observed)."""
        return self.schedule.due(self.steps if step is None else step)

    def snapshot(self, step: int | None = None, epoch: int | None = None) -> Snapshot:
        """Measure now. A probe that fails becomes a skipped Snapshot with the reason, unless the recipe is strict."""
        step = self.steps if step is None else step
        self.schedule.start()
        try:
            return self.finish(self.measure(step, epoch))
        except Exception as error:
            if self.recipe.strict:
                raise
            return self.skipped(step, error, epoch)

    def measure(self, step: int, epoch: int | None = None) -> Measurement:
        """Compute kernel, spectrum and outputs of the present weights.

        Raises:
            InputError, NetworkError, NumericsError: as `empirical_ntk` and `Spectrum.of`; whatever the model raises.
        """
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
        kernel = self.measured(
            self.model,
            probe.inputs,
            outputs=layout,
            params=recipe.params,
            forward=recipe.forward,
            engine=recipe.engine,
            memory_limit=recipe.memory_limit,
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
        terms, reason = self._terms(raw)
        modes = None if terms is None else Modes.of(raw.values, terms, jacobian_eps=_eps(raw))
        previous = self._previous
        carried, previous_step = np.empty(0), None
        if modes is not None and terms is not None and previous is not None and previous[2] is not None:
            carried, previous_step = previous[2].carried(terms.gradient), previous[0]
        labels = self._labels()
        means = mean_over_outputs(raw.values, self.probe.samples)
        metrics = self._metrics(raw)
        with_gram = self.recipe.gram_every and self.probes % self.recipe.gram_every == 0
        order = shown_order(labels, self.probe.samples)
        if fresh:
            with random_state():  # a user's own metrics may draw numbers
                seen = self._watch.look(self._now(raw, terms, modes, labels))
            if self.losses.count:
                seen.facts["train_loss"] = self.losses.taken()
            if self.clipped.count:
                seen.facts["clip_coefficient"] = self.clipped.taken()
        else:
            seen = Outlook(texts={"stability": "not measured: the loss was not known yet at this step"})
        seen.texts |= self.words
        lr_steps, lr_values = self.learning_rates.taken()
        self._previous = (raw.step, raw.values, modes)
        self.probes += 1
        seconds = {**raw.seconds, "modes": time.perf_counter() - start}
        self.schedule.pay(seconds["modes"])
        if raw.step > 0:
            metrics["overhead"] = self.schedule.overhead
        return Snapshot(
            step=raw.step,
            epoch=raw.epoch,
            wall_time=raw.wall_time,
            kernel=raw.layout,
            engine=raw.kernel.engine,
            engine_reason=raw.kernel.reason,
            precision=f"{str(raw.kernel.jacobian_dtype).removeprefix('torch.')} Jacobian, float64 Gram",
            samples=self.probe.samples,
            outputs=_outputs(raw.predictions),
            parameters=raw.kernel.parameters,
            probe=self.probe.hash,
            probe_source=self.probe.source,
            noise_floor=raw.spectrum.noise_floor,
            rank=raw.spectrum.rank,
            condition_number=raw.spectrum.condition_number,
            condition_is_lower_bound=raw.spectrum.condition_is_lower_bound,
            negative=raw.spectrum.negative,
            loss=self.loss.name if self.loss else "",
            loss_status=self.loss_status,
            loss_value=terms.value if terms is not None else self._loss_value(raw),
            modes_reason=reason,
            rates_floor=modes.floor if modes else float("nan"),
            previous_step=previous_step,
            metrics={name: value for name, value in (metrics | seen.metrics).items() if np.isfinite(value)},
            facts={name: value for name, value in (raw.coverage.facts() | seen.facts).items() if np.isfinite(value)},
            texts=raw.coverage.texts() | seen.texts,
            layers=seen.layers,
            directions=seen.directions,
            seconds=seconds,
            eigenvalues=raw.spectrum.eigenvalues,
            rates=modes.rates if modes else np.empty(0),
            coordinates=modes.coordinates if modes else np.empty(0),
            carried=carried,
            predictions=kept_outputs(raw.predictions.reshape(self.probe.samples, -1).numpy()),
            labels=np.empty(0) if labels is None else labels.astype(np.float64),
            lr_steps=np.asarray(lr_steps, dtype=np.float64),
            lr_values=np.asarray(lr_values, dtype=np.float64),
            gram=means[np.ix_(order, order)] if with_gram else np.empty(0),
            **seen.arrays,
        )

    def _now(self, raw: Measurement, terms: Terms | None, modes: Modes | None, labels: NDArray[np.int64] | None) -> Now:
        first = None if self._previous is None else self._previous[0]
        rates = [] if first is None else self.learning_rates.between(first, raw.step)
        return Now(
            step=raw.step,
            layout=raw.layout,
            values=raw.values,
            spectrum=raw.spectrum,
            jacobian_eps=_eps(raw),
            targets=self._target_features(),
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
            rates=_table(rates),
            rates_ahead=self.rates_ahead,
        )

    def skipped(self, step: int, error: BaseException | str, epoch: int | None = None) -> Snapshot:
        """Return the record of a probe that failed, and say so once."""
        reason = error if isinstance(error, str) else said(error)
        say(f"probe at step {step} skipped: {reason}")
        self.schedule.done(step, 0.0)
        return Snapshot(
            step=step,
            epoch=epoch,
            wall_time=time.time(),
            status="skipped",
            reason=reason,
            samples=self.probe.samples,
            probe=self.probe.hash,
            probe_source=self.probe.source,
        )

    def _weigh(self, layout: str, outputs: int, parameters: int) -> None:
        """Say before the first probe that it will take long, and refuse one that would not fit in memory."""
        rows = outputs if layout in ("full", "trace") else 1
        # The structured engine holds no Jacobian.
        needed = rows * parameters * 4 if self.recipe.engine in ("rows", "reference") else 0
        if self.recipe.memory_limit is None and needed > 4 * MEMORY_LIMIT:
            raise InputError(
                f"the Jacobian of one sample takes {needed / 2**30:.1f} GiB ({rows} x {parameters:,} parameters); "
                "select some with params=, or set memory_limit= if there is room"
            )
        width = rows if layout == "full" else 1
        products = (self.probe.samples * width) ** 2 * parameters * (rows if layout == "trace" else 1)
        # A Jacobian that does not fit is computed in blocks, and blocks again for each pair of them.
        blocks = self.probe.samples * needed > 2 * (self.recipe.memory_limit or MEMORY_LIMIT)
        if (blocks or products > 2 * FULL_KERNEL_PRODUCTS) and not self._weighed:
            say(
                f"each probe needs about {products:.0e} multiply-adds ({self.probe.samples} samples, {outputs} "
                f"outputs, {parameters:,} parameters), minutes on a CPU; "
                "a smaller probe=, params= or outputs= makes it quicker"
            )
        self._weighed = True

    def _terms(self, raw: Measurement) -> tuple[Terms | None, str]:
        """Return the loss terms on the probe, or None and the reason why there are no modes."""
        if raw.layout != "full" and _outputs(raw.predictions) > 1:
            return None, f"modes need the full kernel; this one is the {raw.layout} kernel"
        if self.loss is None:
            return None, f"loss {self.loss_status}"
        if not isinstance(self.probe.targets, Tensor):
            return None, "the probe has no targets"
        try:
            terms = self.loss.terms(raw.predictions, self.probe.targets)
        except Exception as error:  # noqa: BLE001 - shapes that do not fit cost the modes, not the probe
            return None, said(error)
        return (terms, "") if np.isfinite(terms.gradient).all() else (None, "the loss gradient is not finite")

    def _labels(self) -> NDArray[np.int64] | None:
        """Return class labels (N,): what cross-entropy takes for labels, or integers that look like some."""
        targets = self.probe.targets
        labels = self.probe.labels
        if labels is None and self._classifies() and targets.numel() == self.probe.samples:
            labels = targets.detach().cpu().reshape(-1).numpy().astype(np.int64)
        return labels

    def _classifies(self) -> bool:
        targets = self.probe.targets
        integers = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())
        return integers and self.loss is not None and self.loss.kind == "cross_entropy"

    def _target_features(self) -> Array | None:
        """Return targets as (N, D) for the alignment: one-hot classes, or numbers; None when they are neither."""
        labels, targets = self._labels(), self.probe.targets
        if labels is not None:
            return np.asarray(labels[:, None] == np.unique(labels), dtype=np.float64)
        numbers = isinstance(targets, Tensor) and not targets.is_complex()
        if not numbers or not (targets.is_floating_point() or (self.loss is not None and self.loss.kind == "mse")):
            return None
        return np.asarray(targets.detach().cpu().double().reshape(self.probe.samples, -1).numpy())

    def _loss_value(self, raw: Measurement) -> float:
        if self.loss is None or not isinstance(self.probe.targets, Tensor):
            return float("nan")
        return self.loss.value(raw.predictions, self.probe.targets.cpu())

    def _metrics(self, raw: Measurement) -> dict[str, float]:
        """Return the logged scalars that the kernel alone decides."""
        measured = Measured(
            kernel=raw.values,
            samples=self.probe.samples,
            layout=raw.layout,
            jacobian_eps=_eps(raw),
            targets=self._target_features(),
            previous=None if self._previous is None else self._previous[1],
            solved=raw.spectrum,
        )
        return evaluate(measured, ["trace", "condition_log10", "effective_rank", "alignment", "kernel_change"])


def _outputs(predictions: Tensor) -> int:
    """Return C, the number of outputs of one sample."""
    return predictions[0].numel()


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _rates(optimizers: Sequence[Optimizer]) -> list[float]:
    return [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]


def _table(rates: list[tuple[float, ...]]) -> Array:
    """Return learning rates as (steps, groups); empty where groups came or went in between."""
    return np.array(rates) if len({len(row) for row in rates}) == 1 else np.empty((0, 0))


def _probe(data: Any, reference: Any, seed: int) -> Probe:
    """Return the probe, with places in the training set only where that is the set it was drawn from."""
    probe = Probe.of(data, default_samples(1), seed)
    drawn = dataset_of(data)
    return probe if reference is None or drawn is None or drawn is dataset_of(reference) else replace(probe, indices=())


def _reference(data: Any, probe: Probe, recipe: Recipe) -> Probe | None:
    if data is None or isinstance(data, Probe):
        return data
    return beside(data, probe, recipe.reference, recipe.seed + 1) if recipe.reference else None


def _eps(raw: Measurement) -> float:
    return float(torch.finfo(raw.kernel.jacobian_dtype).eps)


def _square(kernel: Tensor) -> Array:
    values: Array = kernel.cpu().numpy()
    return values.reshape(values.shape[0] * values.shape[1], -1) if values.ndim == 4 else values
