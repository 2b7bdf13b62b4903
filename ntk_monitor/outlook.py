"""What one probe says about the steps to come: stability, noise, layers, named directions; and what the last ones did.

Each part is measured on its own. One that cannot be measured leaves a sentence in `texts` and takes nothing else along.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor import directions, facts
from ntk_monitor.batch import take
from ntk_monitor.dynamics.kept import Kept
from ntk_monitor.dynamics.layers import layer_traces
from ntk_monitor.dynamics.linearise import coupled
from ntk_monitor.dynamics.sharpness import affordable
from ntk_monitor.dynamics.stability import Stability, stability
from ntk_monitor.dynamics.updates import blocks, decompose, distance
from ntk_monitor.dynamics.verdict import SMALL_MOTION
from ntk_monitor.dynamics.zeros import structural_zeros
from ntk_monitor.errors import said
from ntk_monitor.foresight import Foresight, Naming
from ntk_monitor.look import Now, Outlook, Since
from ntk_monitor.losses import Terms
from ntk_monitor.memory import out_of_memory, release
from ntk_monitor.metrics import METRICS, NAMES, Measured, evaluate
from ntk_monitor.noise import LEAST, NoiseScale, gradient_gram, noise_scale, pooled
from ntk_monitor.optimizers import OptimizerState, read
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import Recipe
from ntk_monitor.shadow import unwrapped

Array = NDArray[np.float64]

# Probes whose noise estimates are pooled: a run's noise scale grows over thousands of steps, not over ten probes.
_POOLED = 10

# Probes at which the leave-one-out error is computed, which costs a solve.
EARLY = 3

# Cosine of weights and gradient below which a layer's scale does not matter; rounding in float32 is near 1e-6.
_SCALE_FREE = 1e-4

# The gauge of fewer samples says too little.
_FEWEST = 4

# Outputs (N·C) whose change is taken apart by layer: 8 MiB for each of them.
_TAKEN_APART = 2**20

# Copies of the weights: of the first and of the previous probe.
_KEPT_BYTES = 2**30


# Names of the costs in the record; parts that are not here cost little.
_COSTS = {"stability": "gauge", "layers": "layers", "updates": "updates", "forecast": "forecast"}


class Watch:
    """Looks at a run from probe to probe and remembers what the next look compares with."""

    def __init__(self, model: nn.Module, recipe: Recipe, probe: Probe) -> None:
        self._model, self._recipe, self._probe = model, recipe, probe
        self._data: dict[str, float] | None = None
        self.gauge: Stability | None = None
        self._rates: tuple[float, ...] = ()
        self._residual, self._clip = 0.0, 1.0
        self._noise: list[NoiseScale] = []
        self._kept: tuple[Kept, Array | None] | None = None
        self._first: Kept | None = None
        self._foresight = Foresight(model, recipe, probe)
        self._naming: Naming = _nothing
        self._looks = 0
        self._values: Array | None = None
        self._first_values: Array | None = None

    def look(self, now: Now) -> Outlook:
        """Measure all parts."""
        found = Outlook()
        state = self._state(now, found)
        self._guarded(found, "facts", lambda: self._facts(now, found, state))
        self._guarded(found, "noise", lambda: self._noise_scale(now, found))
        if now.loss is None:
            found.texts.setdefault("stability", "not measured: the loss is not known")
        elif state is not None:
            self._guarded(found, "stability", lambda: self._stability(now, found, state))
        self._guarded(found, "layers", lambda: self._layers(found, state))
        self._guarded(found, "metrics", lambda: self._registered(now, found))
        self._guarded(found, "updates", lambda: self._updates(now, found))
        self._guarded(found, "directions", lambda: self._directions(now, found))
        self._guarded(found, "forecast", lambda: self._foresight.look(now, found, state, self._naming))
        return found

    @property
    def since(self) -> Since:
        """What light probes compare with."""
        kept = None if self._kept is None else self._kept[0]
        return Since(kept=kept, residual=self._residual, clipped=self._clip, gauge=self.gauge, rates=self._rates)

    def refresh(self, gauge: Stability | None, rates: tuple[float, ...]) -> None:
        """Take over what a light probe made of the gauge."""
        if gauge is not None:
            self.gauge, self._rates = gauge, rates

    def compare(self, found: Outlook, terms: Terms) -> None:
        """Compare the residual of a light probe with the last forecast."""
        self._foresight.compare(found, terms)

    def handed(self) -> dict[str, Any]:
        """Return what the next look compares with."""
        own = {"kept": self._kept, "first": self._first, "values": self._values, "first_values": self._first_values}
        return own | self._foresight.handed()

    def take(self, handed: dict[str, Any]) -> None:
        """Take over what another Watch has handed on."""
        self._kept, self._first = handed["kept"], handed["first"]
        self._values, self._first_values = handed["values"], handed["first_values"]
        self._foresight.take(handed)

    def begin(self, values: Array) -> None:
        """Take the weights of now, and their kernel, for those of the first probe."""
        self._first, self._first_values = Kept.of(self._model, self._recipe.params), values

    def _guarded(self, found: Outlook, part: str, measure: Callable[[], None]) -> None:
        start, full = time.perf_counter(), False
        try:
            measure()
        except Exception as error:
            if self._recipe.strict:
                raise
            found.texts[part] = f"not measured: {said(error)}"
            full = out_of_memory(error)
        if full:
            release()
        cost = _COSTS.get(part, "facts")
        found.seconds[cost] = found.seconds.get(cost, 0.0) + time.perf_counter() - start

    def _state(self, now: Now, found: Outlook) -> OptimizerState | None:
        if not now.optimizers:
            found.texts["stability"] = "not measured: no optimizer was given"
            return None
        try:
            state = read(self._model, now.optimizers, others=now.others)
        except Exception as error:
            if self._recipe.strict:
                raise
            found.texts["stability"] = f"not measured: {said(error)}"
            return None
        found.texts["optimizer"] = state.name
        if state.uncovered:
            found.texts["uncovered"] = ", ".join(state.uncovered)
        return state

    def _facts(self, now: Now, found: Outlook, state: OptimizerState | None) -> None:
        if self._data is None:
            self._data = facts.of_data(self._probe)
        found.facts |= self._data
        outputs = now.predictions.reshape(len(now.predictions), -1).numpy()
        found.facts |= facts.of_outputs(outputs, now.labels)
        found.facts |= facts.of_parameters(self._model, state.uncovered if state else ())
        if state is not None:
            found.facts["lr"] = max((group.lr for group in state.groups), default=0.0)
        for name, value in (("batch_size", now.batch_size), ("total_steps", now.total_steps)):
            if value is not None:
                found.facts[name] = float(value)

    def _stability(self, now: Now, found: Outlook, state: OptimizerState) -> None:
        if self._probe.targets is None:
            found.texts["stability"] = "not measured: the probe has no targets"
            return
        recipe, outputs = self._recipe, now.predictions[0].numel()
        self._clip = _clipped(now.clip, found.facts)
        samples = affordable(self._probe.samples, outputs)
        if samples < min(self._probe.samples, _FEWEST):
            found.texts["stability"] = f"not measured: {outputs:,} outputs per sample are too many for Lanczos vectors"
            return
        judged = stability(
            self._model,
            state,
            take((self._probe.inputs, self._probe.targets), slice(0, samples)),
            now.loss,
            batch_size=now.batch_size,
            population=now.population,
            clipped=self._clip,
            params=recipe.params,
            forward=recipe.forward,
            start=None if self.gauge is None or now.place else self.gauge.vector,
            seed=recipe.seed,
        )
        self.gauge, self._rates = judged, tuple(group.lr for group in state.groups)
        found.judge(judged)

    def _noise_scale(self, now: Now, found: Outlook) -> None:
        if now.layout == "loss":
            gram = now.values
        elif now.terms is not None and now.layout == "full":
            gram = gradient_gram(now.values, now.terms.gradient)
        else:
            return
        found.facts["gradient_norm"] = float(np.sqrt(max(0.0, gram.mean())))
        if len(gram) < LEAST:
            found.texts["noise"] = f"not measured: a noise scale needs {LEAST} probe samples or more, got {len(gram)}"
            return
        scale = noise_scale(gram)
        if now.batch_size is not None:
            found.facts["batch_gradient_norm"] = float(np.sqrt(max(0.0, scale.signal + scale.noise / now.batch_size)))
        if coupled(self._model):
            found.texts["noise"] = (
                "not measured: BatchNorm couples the samples, which then have no gradients of their own"
            )
            return
        self._noise = [scale] if now.place else [*self._noise, scale][-_POOLED:]
        scale = pooled(self._noise)
        found.texts["noise"] = scale.text
        if scale.resolved:
            found.metrics["noise_scale"] = scale.value
        elif np.isfinite(scale.bound):
            found.facts["noise_scale_bound"] = scale.bound

    def _layers(self, found: Outlook, state: OptimizerState | None) -> None:
        recipe, group = self._recipe, self._group()
        traces = layer_traces(
            self._model,
            self._probe.inputs,
            scale=None if state is None else _speeds(self._model, state),
            group=group,
            params=recipe.params,
            forward=recipe.forward,
            mode="train",
            device=recipe.device,
            seed=recipe.seed,
        )
        if not traces.trace.all():
            zeros = structural_zeros(
                self._model, self._probe.inputs, params=recipe.params, forward=recipe.forward, mode="train"
            )
            found.texts["structural_zeros"] = ", ".join(zeros)
        free = [name for name, radial in zip(traces.names, traces.radial, strict=True) if radial < _SCALE_FREE]
        if free:
            found.texts["scale_free"] = ", ".join(free)
        norms = facts.norms(self._model, group)
        found.layers = traces.names
        found.arrays |= {
            "layer_trace": traces.trace,
            "layer_share": traces.share,
            "layer_norm": np.array([norms.get(name, np.nan) for name in traces.names]),
        }

    def _registered(self, now: Now, found: Outlook) -> None:
        """Evaluate every metric of the registry that is on, a user's own included."""
        measured = Measured(
            kernel=now.values,
            samples=self._probe.samples,
            layout=now.layout,
            jacobian_eps=now.jacobian_eps,
            targets=now.targets,
            labels=now.labels,
            gradient=None if now.terms is None else now.terms.gradient,
            loss="" if now.loss is None else now.loss.kind,
            rates=None if now.modes is None else now.modes.rates,
            coordinates=None if now.modes is None else now.modes.coordinates,
            lr=found.facts.get("lr", float("nan")),
            previous=self._values,
            first=self._first_values,
            layer_trace=dict(zip(found.layers, found.arrays.get("layer_trace", np.empty(0)).tolist(), strict=True)),
            layer_speed=dict(zip(found.layers, found.arrays.get("layer_share", np.empty(0)).tolist(), strict=True)),
            solved=now.spectrum,
        )
        # The noise scale has a part of its own, which pools probes and knows where samples are coupled.
        mine = {*NAMES, "noise_scale_bound"}
        names = [m.name for m in METRICS.values() if m.default and m.name not in mine]
        # The kernel adapts even to random labels of the probe, so that only the first errors say something of the task.
        looks = self._looks if now.place is None else now.place.index
        names += ["sample_loo"] if looks < EARLY else []
        self._looks += 1
        known = found.facts
        found.facts = {name: v for name, v in evaluate(measured, names).items() if np.isfinite(v)} | known
        self._values = now.values
        if self._first_values is None:
            self._first_values = now.values

    def _updates(self, now: Now, found: Outlook) -> None:
        """Compare with the weights of the previous probe, and keep those of this one."""
        kept, first, recipe = self._kept, self._first, self._recipe
        self._kept = None
        needed = Kept.needed(self._model, recipe.params)
        if needed > _KEPT_BYTES:
            found.texts["updates"] = f"not measured: a copy of the weights takes {needed / 2**30:.1f} GiB"
            return
        now_kept = Kept.of(self._model, recipe.params)
        gradient = _gradient(now, self._probe.targets)
        self._kept, self._residual = (now_kept, gradient), 0.0 if gradient is None else _scale(now, gradient)
        self._first = first or now_kept
        group = self._group()
        if first is not None and found.layers:
            far = distance(self._model, first, group)
            found.arrays["layer_moved"] = np.array([far.get(name, np.nan) for name in found.layers])
        if kept is None or kept[1] is None:
            return
        options: dict[str, Any] = {"forward": recipe.forward, "device": recipe.device, "seed": recipe.seed}
        moved = decompose(self._model, kept[0], self._probe.inputs, kept[1], group=group, **options)
        found.facts["buffers_change"] = moved.linearisation.buffers
        # Where the outputs hardly moved, an error relative to that motion is noise.
        if moved.motion > SMALL_MOTION * _scale(now, kept[1]):
            found.metrics["linearisation_error"] = moved.linearisation.error
        if found.layers == moved.layers:
            found.arrays |= {"layer_update": moved.share, "layer_useful": moved.useful}

    def _group(self) -> Callable[[str], str]:
        return blocks([name for name, p in unwrapped(self._model).named_parameters() if p.requires_grad])

    def _directions(self, now: Now, found: Outlook) -> None:
        """Follow the user's directions, or the residual of each class or output."""
        self._naming = _nothing
        if now.modes is None or now.terms is None:
            return
        n, c = now.terms.gradient.shape
        if self._recipe.directions:
            wanted = {name: np.asarray(w, dtype=np.float64) for name, w in self._recipe.directions.items()}
            self._naming = lambda terms: tuple(directions.pattern(name, w, terms.root) for name, w in wanted.items())
        elif groups := directions.default_groups(n, c, now.labels):
            self._naming = lambda terms: directions.parts(groups, terms.residual())
            found.arrays["interference"] = directions.interference(now.values, now.terms.gradient, groups)
        if named := self._naming(now.terms):
            found.directions = tuple(direction.name for direction in named)
            found.arrays["direction_residual"] = directions.residuals(named, now.terms.residual())
            found.arrays["direction_rate"] = directions.rates(named, now.modes.rates, now.modes.vectors)


def _nothing(_: Terms) -> tuple[directions.Direction, ...]:
    return ()


def _speeds(model: nn.Module, state: OptimizerState) -> dict[str, Tensor] | None:
    """Return lr·D of every trainable parameter, zero for those that no optimizer moves; None without a known step."""
    if state.family == "other":
        return None
    trainable = {name: p.detach() for name, p in unwrapped(model).named_parameters() if p.requires_grad}
    scale: dict[str, Any] | None = state.preconditioner(trainable, floor=1e-3)
    # Shares do not depend on a factor of all rates, and at the end of a schedule all of them may be zero.
    still = not any(group.lr for group in state.groups)
    rates = {name: 1.0 if still else group.lr for group in state.groups for name in group.names}
    one = {name: torch.ones_like(p, dtype=torch.float64, device="cpu") for name, p in trainable.items()}
    return {name: rates.get(name, 0.0) * d for name, d in (scale or one).items()}


def _gradient(now: Now, targets: Any) -> Array | None:
    """Return dL/df (N, C): in closed form, else by autograd; None without a loss, or where C is a whole text's.

    The change of the outputs by each layer is held next to it.
    """
    if now.terms is not None:
        return now.terms.gradient
    if now.loss is None or not isinstance(targets, Tensor) or now.predictions.numel() > _TAKEN_APART:
        return None
    f = now.predictions.detach().clone().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(now.loss.function(f, targets.cpu()), f)
    found: Array = g.reshape(len(g), -1).numpy()
    return found


def _scale(now: Now, gradient: Array) -> float:
    """Return what a motion of the outputs is compared with: the residual in output units, or the outputs themselves."""
    if now.loss is None or now.loss.kind != "mse":
        return float(now.predictions.norm())
    scale = 2.0 if now.loss.options.get("reduction") == "sum" else 2.0 / gradient.size
    return float(np.linalg.norm(gradient)) / scale


def _clipped(clip: float | None, known: dict[str, float]) -> float:
    """Return the factor by which clipping shortens gradients of the present size."""
    norm = known.get("batch_gradient_norm", known.get("gradient_norm", 0.0))
    return min(1.0, clip / norm) if clip is not None and norm > 0 else 1.0
