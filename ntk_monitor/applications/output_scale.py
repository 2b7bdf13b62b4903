"""The same network trained at several output scales α, from the same weights to the same loss.

h_α = f₀ + α (f - f₀) learns y under the loss |h - y|² / (2α²): at α = 1 it is the network itself, and the outputs start
to move equally fast at every α. A large α needs small changes of the weights, within which f is linear (lazy); a small
α needs large ones (rich). The gradient (1/α) Jᵀ(h - y) is that of ½|f - f₀ - (y - f₀)/α|², so that training h_α is
training f towards f₀ + (y - f₀)/α.

Source: Chizat, Oyallon and Bach 2019.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.problem import Problem, times
from ntk_monitor.applications.regime import Regime, movement, regime
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk

Array = NDArray[np.float64]

_ROOM = 4
"""The kernel may grow so many times before training diverges: the rate is a quarter of what the first one allows."""
_SLOWER = (1, 4, 16, 64)
_LOOKS = 8
_UNSTABLE = 1.5
"""Squared residual, relative to its start, from which a run is begun again more slowly: it may be jumping away."""
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Training at one output scale.

    Attributes:
        scale: α.
        steps: at which the kernel was measured, the first and the last among them.
        kernels: (N, N) there, outputs summed.
        left: of the squared residual when training ended.
        arrived: the loss that was asked for was reached.
        error: of the tangent model, |f - f₀ - J₀ Δθ| / |f - f₀| over training and held-out samples.
        weights: |Δθ| / |θ₀|.
        squares: (M,) squared errors of h on held-out samples, mean over outputs.
        slower: what the learning rate had to be divided by.
    """

    scale: float
    steps: tuple[int, ...]
    kernels: tuple[Array, ...]
    left: float
    arrived: bool
    error: float
    weights: float
    squares: Array
    slower: int

    @property
    def moved(self) -> float:
        """Return |K - K₀| / |K₀|."""
        return movement(self.kernels[0], self.kernels[-1])

    @property
    def growth(self) -> float:
        """Return tr K / tr K₀."""
        return float(np.trace(self.kernels[-1]) / np.trace(self.kernels[0]))

    @property
    def regime(self) -> Regime:
        """Return lazy, in between or rich."""
        return regime(self.moved, self.error)


@dataclass(frozen=True, slots=True)
class Tangent:
    """The step v that the tangent model takes to its targets, and what the network makes of it.

    Attributes:
        task: network and samples.
        step: v = Jᵀ (K + ρI)⁻¹ (y - f₀), one tensor per trained weight.
        change: J v, (N, C).
    """

    task: Problem
    step: tuple[Tensor, ...]
    change: Array

    def error(self, scale: float = 1.0) -> float:
        """Return |f(θ₀ + v/α) - f₀ - J v/α| / |f(θ₀ + v/α) - f₀|: how far training at α should miss its tangent model.

        Known before training, one pass. Training may take another way, along which the network is more curved.
        """
        moved = self._at(1 / scale) - self._at(0.0)
        whole = float(np.linalg.norm(moved))
        return float(np.linalg.norm(moved - self.change / scale)) / whole if whole > 0 else math.inf

    def relative_scale(self) -> float:
        """Return κ = |y - f₀| |D²f(v, v)| / |Df v|²: how curved f is on its way to y; at the output scale α, κ/α.

        By finite differences, a thousandth of the step, kinks on it included. `error` is about κ/(2α) where that is
        small.

        Source: Chizat, Oyallon and Bach 2019, with one direction in place of operator norms.
        """
        part = 1e-3
        start = self._at(0.0)
        second = np.linalg.norm(self._at(part) - 2 * start + self._at(-part)) / part**2
        return float(np.linalg.norm(self.task.y - start) * second / np.linalg.norm(self.change) ** 2)

    def _at(self, part: float) -> Array:
        return _stepped(self.task, self.step, part)


def tangent(task: Problem, kernel: Array, left: float = 0.05) -> Tangent:
    """Return the tangent model's step to where `left` of the squared residual is left (all that can be, for low ranks).

    Args:
        task: network and samples.
        kernel: (N·C, N·C), its training kernel.
        left: fraction of the squared residual; the ridge ρ is found by bisection.

    Raises:
        InputError: nothing to learn, or outputs that cannot move.
    """
    residual = task.y - task.outputs(task.x)
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    values = values.clip(min=0)
    energy = (vectors.T @ residual.ravel()) ** 2
    if not energy.sum() > 0 or not values[-1] > 0:
        raise InputError("the outputs are the targets already, or cannot move: nothing to learn")
    low, high = -14.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = (10.0**middle / (values / values[-1] + 10.0**middle)) ** 2 @ energy / energy.sum()
        low, high = (middle, high) if kept < left else (low, middle)
    ridge = 10.0**low * values[-1]
    solved = vectors @ ((vectors.T @ residual.ravel()) / (values + ridge))
    # One step of descent at the rate 1 on ½|f - (f₀ + a)|² is Jᵀ a.
    aimed = replace(task, y=task.outputs(task.x) + solved.reshape(residual.shape))
    step = tuple(_changes(task.model, aimed.descend(1, 1.0)))
    return Tangent(task, step, task.pushed(task.x, step))


def _stepped(task: Problem, along: Sequence[Tensor], step: float) -> Array:
    twin = copy.deepcopy(task.model)
    with torch.no_grad():
        for p, v in zip((p for p in twin.parameters() if p.requires_grad), along, strict=True):
            p.add_(v, alpha=step)
    return task.outputs(task.x, twin)


def scale_sweep(
    task: Problem,
    scales: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    *,
    left: float = 0.05,
    steps: int = 1000,
    momentum: float = 0.9,
    kernel: Array | None = None,
) -> tuple[Scaled, ...]:
    """Return training at each output scale, until `left` of the squared residual is left.

    Args:
        task: network and samples.
        scales: α, above 0.
        left: fraction of the squared residual at which training ends, the same for all.
        steps: of full-batch descent, at most.
        momentum: of SGD, Nesterov's; 0: plain descent.
        kernel: (N·C, N·C) of the training samples, if it is known already.

    Raises:
        InputError: scales, fractions or steps out of range, nothing to learn, or training that diverges at 1/64 of the
            rate that the first kernel allows.

    Cost: for each scale `steps` passes and about ten kernels (N, N).
    """
    if not scales or not all(a > 0 and math.isfinite(a) for a in scales):
        raise InputError(f"output scales must be finite and above 0, got {list(scales)}")
    if not 0 < left < 1 or steps < 1 or not 0 <= momentum < 1:
        raise InputError(f"0 < left < 1, steps >= 1 and 0 <= momentum < 1 are needed, got {left}, {steps}, {momentum}")
    start = task.outputs(task.x)
    if not np.linalg.norm(task.y - start) > 0:
        raise InputError("the outputs are the targets already: nothing to learn")
    if kernel is None:
        kernel = empirical_ntk(task.model, task.x, forward=task.forward).cpu().numpy().reshape(start.size, -1)
    largest = float(np.linalg.eigvalsh(kernel)[-1])
    if not largest > 0:
        raise InputError("the kernel is zero: no output of this network can move")
    summed = np.einsum("ncmc->nm", kernel.reshape(*start.shape, *start.shape))
    return tuple(_trained(task, a, summed, largest, (left, steps, momentum)) for a in scales)


def _trained(task: Problem, scale: float, kernel: Array, largest: float, how: tuple[float, int, float]) -> Scaled:
    left, steps, momentum = how
    # Of Nesterov's method; 2 for plain descent.
    allowed = 2 * (1 + momentum) / (1 + 2 * momentum)
    start = task.outputs(task.x)
    aimed = replace(task, y=start + (task.y - start) / scale)
    for slower in _SLOWER:
        run = _Run(aimed, left, kernel, float(((start - aimed.y) ** 2).sum()), set(times(steps, _LOOKS)))
        try:
            model = aimed.descend(
                steps, allowed / (_ROOM * slower * largest), momentum=momentum, nesterov=momentum > 0, watch=run.look
            )
        except InputError:
            continue
        return run.ended(task, scale, model, slower)
    raise InputError(f"at output scale {scale:g} training diverges even at 1/64 of the rate that the kernel allows")


@dataclass(slots=True)
class _Run:
    """Watches one training: kernels at some steps, and the loss that ends it."""

    task: Problem
    until: float
    first: Array
    whole: float
    """Squared residual at the start."""
    ticks: set[int]
    kernels: dict[int, Array] = field(default_factory=dict)
    left: float = 1.0
    step: int = 0

    def look(self, step: int, model: nn.Module) -> bool:
        """Return True once the loss is small enough; looked at every fifth step, which is cheaper.

        Raises:
            InputError: the loss rises.
        """
        self.step = step
        if step in self.ticks:
            self.kernels[step] = self._kernel(model) if step else self.first
        if step % 5 == 0 or step < 10:
            self.left = self._rest(model) / self.whole
        if self.left > _UNSTABLE:
            raise InputError(f"the loss rises at step {step}")
        return self.left <= self.until

    def _rest(self, model: nn.Module) -> float:
        return float(((self.task.outputs(self.task.x, model) - self.task.y) ** 2).sum())

    def _kernel(self, model: nn.Module) -> Array:
        found = empirical_ntk(model, self.task.x, forward=self.task.forward, outputs="trace")
        return np.asarray(found.cpu().numpy())

    def ended(self, task: Problem, scale: float, model: nn.Module, slower: int) -> Scaled:
        """Return what the run came to."""
        self.kernels[self.step] = self._kernel(model)
        left = self._rest(model) / self.whole
        along = _changes(task.model, model)
        changes, tangents = [], []
        for x in (task.x, task.x_test):
            changes.append(task.outputs(x, model) - task.outputs(x))
            tangents.append(task.pushed(x, along))
        change, tangent = np.concatenate(changes), np.concatenate(tangents)
        predicted = task.outputs(task.x_test) + scale * changes[1]
        return Scaled(
            scale=scale,
            steps=tuple(sorted(self.kernels)),
            kernels=tuple(self.kernels[step] for step in sorted(self.kernels)),
            left=left,
            arrived=left <= self.until,
            error=float(np.linalg.norm(change - tangent) / max(float(np.linalg.norm(change)), _TINY)),
            weights=_length(along) / max(_length(_trainable(task.model)), _TINY),
            squares=((predicted - task.y_test) ** 2).mean(axis=1),
            slower=slower,
        )


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


def _changes(before: nn.Module, after: nn.Module) -> list[Tensor]:
    return [b - a for a, b in zip(_trainable(before), _trainable(after), strict=True)]


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
