"""Kernel regression beside the network trained on the very same objective, from the same weights.

½|f - y|² + λ/2 |θ - center|², by full-batch descent until the held-out outputs stand still.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ntk_monitor.applications.problem import Problem
from ntk_monitor.applications.ridge import Center, KernelRegression, best_ridge, kernel_regression
from ntk_monitor.errors import InputError

Array = NDArray[np.float64]

SMALLEST = 1e-3
"""Ridge relative to the largest eigenvalue below which training takes too long to end."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Kernel regression beside the network trained on the very same objective."""

    fit: KernelRegression
    predicted: Array
    """Kernel regression on the held-out samples, (M, C)."""
    trained: Array
    start: Array
    y_test: Array
    mean: Array
    """Of the training targets, (C,)."""
    steps: int
    tangent_error: float
    """|f - f₀ - J₀ Δθ| / |f - f₀| on held-out samples: how far the trained network left its tangent model."""
    left: float
    """How far training may still have gone, relative to how far it has: an estimate from its last 20 steps."""

    @property
    def gap(self) -> float:
        """Return |trained - predicted| / |trained - start| on held-out samples; 0: equal, 1: as far as it moved."""
        moved = float(np.linalg.norm(self.trained - self.start))
        return float(np.linalg.norm(self.trained - self.predicted)) / moved if moved > 0 else math.inf

    def error(self, outputs: Array) -> float:
        """Return the mean square error on the held-out samples."""
        return float(((outputs - self.y_test) ** 2).mean())


def compared(task: Problem, ridge: float | None = None, *, center: Center = "init", steps: int = 2000) -> Comparison:
    """Return both: kernel regression from the start, and the network trained with the same penalty.

    Args:
        task: network and samples.
        ridge: λ; None: of the smallest leave-one-out error, no smaller than 1e-3 of the largest eigenvalue, so that
            training ends.
        center: of the penalty.
        steps: of Nesterov's accelerated descent, at most.

    Raises:
        InputError: see `problem`; or training diverges.
    """
    kernel, cross = task.kernels()
    start, start_test = task.outputs(task.x), task.outputs(task.x_test)
    largest = float(np.linalg.eigvalsh(kernel)[-1])
    if ridge is None:
        ridge = max(best_ridge(kernel, task.y - start)[0], SMALLEST * largest)
    pushed = (task.weights_pushed(task.x), task.weights_pushed(task.x_test)) if center == "zero" else (None, None)
    fit = kernel_regression(kernel, task.y, start, ridge, decay_center=center, j_theta0=pushed[0])
    predicted = fit.predict(cross, start_test, pushed[1])
    trained, taken, left = _trained(task, ridge, center, largest, steps)
    reached = task.outputs(task.x_test, trained)
    return Comparison(
        fit=fit,
        predicted=predicted,
        trained=reached,
        start=start_test,
        y_test=task.y_test,
        mean=task.y.mean(0),
        steps=taken,
        tangent_error=_tangent_error(task, trained, reached - start_test),
        left=left,
    )


def _tangent_error(task: Problem, trained: nn.Module, change: Array) -> float:
    pairs = zip(task.model.parameters(), trained.parameters(), strict=True)
    tangent = task.pushed(task.x_test, [(b - a).detach() for a, b in pairs if a.requires_grad])
    moved = float(np.linalg.norm(change))
    return float(np.linalg.norm(change - tangent)) / moved if moved > 0 else math.nan


def _trained(task: Problem, ridge: float, center: Center, largest: float, steps: int) -> tuple[nn.Module, int, float]:
    """Train until the held-out outputs stand still; at a smaller rate where the kernel grows and the first diverges."""
    for slower in (1, 8, 64, 512):
        rate = 1 / (slower * (largest + ridge))
        root = math.sqrt(ridge * rate)
        still = _Still(task)
        try:
            model = task.descend(
                steps,
                rate,
                momentum=(1 - root) / (1 + root),
                nesterov=root < 1,
                pull=ridge,
                center=center,
                watch=still.look,
            )
        except InputError:
            continue
        # Nesterov's method contracts by 1 - root in a step: what is left is a geometric series. Three times for safety.
        return model, still.step, 3 * still.moved * max(1.0, 1 / (20 * root) if root else math.inf)
    raise InputError(
        "training this network diverges even at 1/512 of the rate that its kernel allows: its kernel does not last"
    )


class _Still:
    """Watches the held-out outputs: still when 20 steps, twice in a row, move them by 1e-3 of what training has.

    Less is not asked for: at the kinks of a ReLU network descent hovers at some 1e-4.
    """

    def __init__(self, task: Problem) -> None:
        self._task, self.step, self.moved, self._quiet = task, 0, math.inf, 0
        self._start = self._last = task.outputs(task.x_test)

    def look(self, step: int, model: nn.Module) -> bool:
        """Return True once they are still."""
        self.step = step
        if step and step % 20 == 0:
            now = self._task.outputs(self._task.x_test, model)
            whole = float(np.linalg.norm(now - self._start))
            self.moved = float(np.linalg.norm(now - self._last)) / whole if whole > 0 else 0.0
            self._quiet = self._quiet + 1 if self.moved <= 1e-3 else 0
            self._last = now
        return self._quiet >= 2
