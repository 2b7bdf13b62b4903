"""When will it be learned? Long horizons: exact steps first, then the gradient flow that they follow.

A mode or named direction d is learned when the residual's component |dᵀ u| has fallen to a tenth. u = S⁺ g are the
coordinates of `ntk_monitor.losses` at the start of the forecast. Closed forms of these times hold for MSE only: on
cross-entropy they were wrong by factors up to 500, since probabilities saturate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from ntk_monitor.dynamics.gradient_flow import Flow
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.dynamics.objective import Objective, loss_gradient
from ntk_monitor.dynamics.simulate import Walk
from ntk_monitor.errors import InputError

Array = NDArray[np.float64]

EXACT = 500
"""Steps that are simulated one by one before the flow takes over."""


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual u = S⁺ g of some of the samples, in coordinates of the start."""

    samples: slice
    objective: Objective
    inverse: Tensor
    """S⁺ as a factor of each of their outputs, (n·C,); ones for losses without a closed form, where u = g."""

    def of(self, outputs: Tensor) -> Array:
        """Return u (n·C,) when all samples have these outputs (S, C...)."""
        g = self.objective(outputs[self.samples]).reshape(-1)
        return np.asarray((g * self.inverse).numpy())

    def loss(self, outputs: Tensor) -> float:
        """Return the loss of these samples."""
        return self.objective.value(outputs[self.samples])


def residual_of(dynamics: Dynamics, loss: Any, targets: Any, samples: slice | None = None) -> Residual:
    """Return the residual of these samples (None: the driving ones), whose targets and loss are given.

    Raises:
        InputError: targets that do not fit the samples' outputs.
    """
    chosen = samples or slice(0, dynamics.driving)
    objective = loss_gradient(loss, targets)
    outputs = dynamics.outputs[chosen]
    try:
        inverse = torch.from_numpy(objective.loss.terms(outputs, objective.targets).inverse).reshape(-1)
    except InputError:
        inverse = torch.ones(outputs.numel(), dtype=torch.float64)
    return Residual(chosen, objective, inverse)


@dataclass(frozen=True, slots=True)
class Learning:
    """When what will be learned."""

    times: dict[str, Array]
    """By name of the projection: first step at which each component has fallen to the fraction; inf: not before the
    horizon, or never; 0: there was nothing to learn."""
    steps: NDArray[np.int64]
    """Steps at which the loss was written down, every one at first and then ever fewer."""
    loss: Array
    """There, of the samples of the residual."""
    outputs: Tensor
    """There, of the same samples, (steps, n, C...)."""
    reached: int
    """Last step of the simulation: the horizon, or where it stopped being finite."""

    def time_to(self, target: float) -> float:
        """Return the first step at which the loss is at or below the target; inf: not before the horizon."""
        below = np.flatnonzero(self.loss <= target)
        if not len(below):
            return math.inf
        i = int(below[0])
        if i == 0:
            return float(self.steps[0])
        start, stop, high, low = self.steps[i - 1], self.steps[i], self.loss[i - 1], self.loss[i]
        return _crossing(int(start), int(stop), float(high), float(low), float(target))


def times_to_learn(  # noqa: PLR0913 - a horizon, what to watch over it, and how
    dynamics: Dynamics,
    rates: Float64[Tensor, "t g"],
    projections: Mapping[str, Array],
    residual: Residual,
    *,
    clip: float | None = None,
    fraction: float = 0.1,
    exact: int = EXACT,
) -> Learning:
    """Return when each component of the residual will have fallen to a fraction of what it is now.

    Args:
        dynamics: the model and where it starts.
        rates: learning rates of each of the T steps to the horizon, and group.
        projections: name → (k, n·C): a mode or direction in each row, in the residual's coordinates.
        residual: of which samples.
        clip: see `simulate`; beyond the exact steps the coefficient is taken at the start of each step of the flow.
        fraction: of the component's size now that counts as learned.
        exact: steps to simulate one by one.

    Cost: R·D multiply-adds and one gradient for each exact step; then about 100 to 300 steps of the flow for 10⁵ steps
    of training, of some 10 R·D each, and a factorisation of D equations in every fourth or so. The watched samples'
    outputs are kept at all of these steps, 13 MB for 2048 numbers.

    Valid while J stays. Fast oscillations of an unstable run are seen in the exact steps and not later.
    """
    watch = _Watch(projections, residual, dynamics.outputs, fraction)
    walk = Walk(dynamics, clip=clip)
    for row in rates[:exact].tolist():
        walk.step(row)
        if not watch.see(walk.taken, walk.outputs):
            return watch.learning()
    if len(rates) > exact:
        _follow(watch, walk, dynamics, rates[exact:], clip)
    return watch.learning()


def _follow(watch: "_Watch", walk: Walk, dynamics: Dynamics, rates: Tensor, clip: float | None) -> None:
    moved = (walk.outputs - dynamics.outputs)[: dynamics.driving].square().mean().sqrt()
    flow = Flow(dynamics, walk.outputs.clone(), walk.weights, rates)
    gram = None if clip is None else dynamics.gram()
    coefficient = 1.0
    while True:
        if clip is not None and gram is not None:
            g = dynamics.gradient(flow.outputs[: dynamics.driving]).reshape(-1)
            coefficient = min(1.0, clip / (math.sqrt(max(float(g @ gram @ g), 0.0)) + 1e-6))
        if not flow.advance(coefficient, float(moved)) or not watch.see(walk.taken + flow.now, flow.outputs):
            return


class _Watch:
    """Writes down when components fall below their fraction, and the loss."""

    def __init__(self, projections: Mapping[str, Array], residual: Residual, outputs: Tensor, fraction: float) -> None:
        self._residual, self._names = residual, list(projections)
        self._rows = [len(p) for p in projections.values()]
        self._matrix = np.concatenate([np.asarray(p, dtype=np.float64) for p in projections.values()])
        self._last = np.abs(self._matrix @ residual.of(outputs))
        self._target = fraction * self._last
        self._times = np.where(self._last > 0, np.inf, 0.0)
        self._steps, self._losses = [0], [residual.loss(outputs)]
        self._outputs = [outputs[residual.samples].clone()]

    def see(self, step: int, outputs: Tensor) -> bool:
        """Look at the outputs of a later step; return False where they are not finite, or everything is learned."""
        if not bool(torch.isfinite(outputs).all()):
            return False
        c = np.abs(self._matrix @ self._residual.of(outputs))
        newly = np.isinf(self._times) & (c <= self._target)
        for i in np.flatnonzero(newly):
            high, low, target = (float(v[i]) for v in (self._last, c, self._target))
            self._times[i] = _crossing(self._steps[-1], step, high, low, target)
        self._last = c
        self._steps.append(step)
        self._losses.append(self._residual.loss(outputs))
        self._outputs.append(outputs[self._residual.samples].clone())
        return True

    def learning(self) -> Learning:
        parts = np.split(self._times, np.cumsum(self._rows)[:-1])
        times = dict(zip(self._names, parts, strict=True))
        steps = np.array(self._steps)
        return Learning(times, steps, np.array(self._losses), torch.stack(self._outputs), self._steps[-1])


def _crossing(start: int, stop: int, high: float, low: float, target: float) -> float:
    """Return the first whole step at which an exponential from `high` to `low` is at the target."""
    if stop - start <= 1 or not high > low:
        return float(stop)
    small = 1e-3 * target if low <= 0 else low
    return float(math.ceil(start + (stop - start) * math.log(high / target) / math.log(high / small)))
