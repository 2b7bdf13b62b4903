"""Forecasts of a live run: made at one probe from the kernel of that moment, scored at the next by what happened.

Training samples drive the forecast. The probe alone would not do: forecast from its own kernel, 20 first steps came out
twice too good, and later ones diverged. Where the probe belongs to the training set it drives too, else it rides along.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntk_monitor.batch import joined, take
from ntk_monitor.dynamics.flow import Learning, residual_of, times_to_learn
from ntk_monitor.dynamics.linearise import coupled, linearise
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.dynamics.simulate import simulate
from ntk_monitor.dynamics.verdict import Verdict, verdict
from ntk_monitor.losses import Loss, Terms
from ntk_monitor.optimizers import OptimizerState
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import FULL_KERNEL_PRODUCTS, Recipe

Array = NDArray[np.float64]

LEARNED = 10**-0.5
"""A mode or direction counts as learned when its residual is this fraction of today's, its energy a tenth."""

# Rows of a forecast's kernel: each simulated step reads all of it, and long horizons factorise it.
_ROWS = 1536

# Longer intervals are not scored: a kernel that is thousands of steps old forecasts nothing.
_LONGEST = 2000

# Without a planned length, forecasts look this far ahead.
_AHEAD = 1000

# The forecast loss is stored at about so many steps.
_TICKS = 60


class ForecastUnavailableError(Exception):
    """There is no forecast, and the message says why in one sentence."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the forecast of the previous probe was worth."""

    forecast: Verdict
    """With the kernel of the start."""
    explained: Verdict | None
    """With the mean of both kernels: what is left is the optimizer's or the batches', not the kernel's."""


@dataclass(frozen=True, slots=True)
class Made:
    """A forecast that waits for the next probe."""

    dynamics: Dynamics
    gradient: Array
    """dL/df (N, C) of the probe at its start."""


@dataclass(frozen=True, slots=True)
class Happened:
    """What became of the probe since a forecast was made."""

    rates: Array
    """Learning rates of the steps since then, (steps, groups)."""
    gradient: Array
    """dL/df (N, C) of the probe now."""
    clip: float | None = None
    """Norm that gradients were clipped to."""


class Forecaster:
    """Makes a forecast at each probe and keeps it until the next.

    Args:
        model: the live module.
        probe: whose outputs are forecast.
        reference: further training samples that drive the forecast.
        recipe: sizes, parameters, forward.
    """

    def __init__(self, model: nn.Module, probe: Probe, reference: Probe, recipe: Recipe) -> None:
        self._model, self._probe, self._recipe = model, probe, recipe
        self._reference = reference
        self._last: Made | None = None

    def renew(self, loss: Loss, state: OptimizerState, terms: Terms, *, clip: bool) -> Dynamics:
        """Linearise at this moment.

        Raises:
            ForecastUnavailableError: no forecast is possible or affordable here.
        """
        self._last = None
        if state.reason:
            raise ForecastUnavailableError(state.reason)
        if coupled(self._model):
            raise ForecastUnavailableError(
                "BatchNorm couples the samples of a training batch, whose joint kernel is too expensive for every "
                "probe; ntk_monitor.forecast computes it on demand"
            )
        samples, rides = self._affordable(terms)
        driving, riding = self._batches(samples, rides=rides)
        dynamics = linearise(
            self._model,
            state,
            driving,
            loss,
            riding=riding,
            params=self._recipe.params,
            forward=self._recipe.forward,
            memory_limit=self._recipe.memory_limit,
            dtype=torch.float32,
            clipping=clip and state.family == "adam",
            seed=self._recipe.seed,
        )
        self._last = Made(dynamics, terms.gradient)
        return dynamics

    def forget(self) -> None:
        """Drop the forecast made at the latest probe."""
        self._last = None

    @property
    def last(self) -> Made | None:
        """The forecast made at the latest probe."""
        return self._last

    @property
    def belongs(self) -> bool:
        """True when the probe was drawn from the training set and drives its own forecast."""
        return bool(self._probe.indices)

    def rows(self, dynamics: Dynamics) -> slice:
        """Return which samples of the dynamics are the probe's."""
        return slice(0, self._probe.samples) if self.belongs else slice(dynamics.driving, None)

    def _affordable(self, terms: Terms) -> tuple[int, bool]:
        """Return how many reference samples the kernel may have, and whether the probe rides."""
        n, c = terms.gradient.shape
        rides = not self.belongs
        parameters = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        wanted = max(0, min(self._recipe.reference, _ROWS // c) - (0 if rides else n))
        most = min(wanted, self._reference.samples)
        rows = (n + most) * c
        columns = rows if not rides else most * c
        if most < 1 and rides:
            raise ForecastUnavailableError("there are no training samples beside the probe to drive a forecast")
        if rows * columns * parameters > FULL_KERNEL_PRODUCTS:
            raise ForecastUnavailableError(
                f"the kernel of {rows} x {columns} outputs in {parameters:,} parameters is too expensive for every "
                "probe; a smaller reference= makes it cheaper"
            )
        return most, rides

    def _batches(self, samples: int, *, rides: bool) -> tuple[tuple[Any, Any], Any]:
        chosen = slice(0, samples)
        x, y = take(self._reference.inputs, chosen), take(self._reference.targets, chosen)
        if rides:
            return (x, y), self._probe.inputs
        probe = (self._probe.inputs, self._probe.targets)
        return (probe if samples == 0 else (joined(probe[0], x), joined(probe[1], y))), None


def scored(made: Made, rows: slice, now: Dynamics | None, loss: Loss, targets: Any, happened: Happened) -> Scored:
    """Compare the forecast made at the previous probe with what became of the probe.

    Outputs are compared through the loss gradients they cause: f - y for squares, p - y for probabilities.

    Args:
        made: the forecast.
        rows: which samples of its dynamics are the probe's.
        now: dynamics of this moment, for the explanation by the mean kernel; None: there are none.
        loss: of the run.
        targets: of the probe.
        happened: since then.

    Raises:
        ForecastUnavailableError: rates that are not known, or an interval that is too long.
    """
    rates = happened.rates
    if not rates.size or not np.isfinite(rates).all() or rates.shape[1] != len(made.dynamics.parts):
        raise ForecastUnavailableError("the learning rates since the previous probe are not known")
    if len(rates) > _LONGEST:
        raise ForecastUnavailableError(f"{len(rates)} steps since the previous probe are too many to judge a forecast")
    start = made.gradient

    def judged(dynamics: Dynamics) -> Verdict:
        end = simulate(dynamics, torch.from_numpy(rates), clip=happened.clip)[-1]
        predicted = loss.terms(end[rows], targets).gradient if bool(torch.isfinite(end).all()) else start * np.nan
        return verdict(start, predicted, happened.gradient, start)

    forecast = judged(made.dynamics)
    if now is None or not _alike(now, made.dynamics):
        return Scored(forecast, None)
    return Scored(forecast, judged(made.dynamics.average(now)))


def learned(  # noqa: PLR0913 - what, of which samples, in which loss, along what, how fast
    dynamics: Dynamics,
    rows: slice,
    loss: Loss,
    targets: Any,
    projections: Mapping[str, Array],
    rates: Array,
    clip: float | None,
) -> Learning:
    """Return when the modes and directions of the probe will be learned, and its loss until then."""
    count = len(dynamics.outputs[rows])
    span = slice(rows.start, rows.start + count)
    residual = residual_of(dynamics, loss, targets, span)
    return times_to_learn(dynamics, torch.from_numpy(rates), projections, residual, clip=clip, fraction=LEARNED)


def horizon(step: int, total: int | None) -> int:
    """Return how many steps to look ahead: to the planned end, or a fixed number where there is none."""
    return max(0, total - step) if total is not None else _AHEAD


def coming(steps: int, state: OptimizerState, ahead: Callable[[int], Array | None] | None) -> Array:
    """Return the learning rates of the coming steps, (steps, groups): the schedule's, or those in force."""
    planned = ahead(steps) if ahead is not None and steps else None
    current = np.array([group.lr for group in state.groups])
    if planned is None or planned.shape != (steps, len(current)) or not np.isfinite(planned).all():
        return np.tile(current, (steps, 1))
    return planned


def ticks(steps: NDArray[np.int64], loss: Array) -> tuple[NDArray[np.int64], Array]:
    """Return a forecast of the loss at few enough steps to be stored, denser at first."""
    if len(steps) <= _TICKS:
        return steps, loss
    wanted = np.unique(np.geomspace(1, len(steps), _TICKS).round().astype(int)) - 1
    return steps[wanted], loss[wanted]


def _alike(a: Dynamics, b: Dynamics) -> bool:
    return len(a.parts) == len(b.parts) and all(
        x.kernel.shape == y.kernel.shape for x, y in zip(a.parts, b.parts, strict=True)
    )
