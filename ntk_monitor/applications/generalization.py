"""Generalisation: does cross-validation with the network's kernel tell its test error, without a test set?

Leave-one-out (for one output also GCV) of kernel regression with the empirical kernel of some moment, from the training
samples alone, against what that regression and the network itself really do on samples held out: over training steps or
checkpoints. The kernel of the start has not seen the targets. A later one was fitted to them, so that its promise is
too good; how much, and from when on, is the answer.

Source: Craven and Wahba 1978 (GCV); Wei, Hu and Steinhardt 2022 (with empirical kernels); Jacot et al. 2020 (KARE, the
same up to its scaling).
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.estimates import Estimate, agrees, estimate, leave_one_out_path
from ntk_monitor.applications.generalization_words import Point, told
from ntk_monitor.applications.problem import Problem, problem, times
from ntk_monitor.applications.report import Report
from ntk_monitor.batch import Batch, tensored
from ntk_monitor.errors import InputError
from ntk_monitor.network import Forward

Array = NDArray[np.float64]

__all__ = [
    "EXAMPLE",
    "Estimate",
    "Point",
    "agrees",
    "estimate",
    "example",
    "leave_one_out_path",
    "over_checkpoints",
    "over_training",
    "study",
]

EXAMPLE = "a small network learns a noisy measure of diabetes; its test error is told from training samples"
# Squared residual, relative to its start: training ends, or is begun again more slowly.
_FITTED, _UNSTABLE = 0.01, 1.5


def study(  # noqa: PLR0913 - a network, samples, and how to train
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    states: Mapping[str, Mapping[str, Tensor]] | None = None,
    ridge: float | None = None,
    steps: int = 1000,
    momentum: float = 0.9,
    held_out: float = 0.25,
    forward: Forward | None = None,
    seed: int = 0,
) -> Report:
    """Say whether leave-one-out with the kernel of each moment predicts the error on held-out samples.

    Without checkpoints a copy in float64 is trained on squared error by full batches. With two or more of them nothing
    is trained: pass samples that their run has not seen.

    Args:
        model: any module with one floating output; class labels become one-hot targets.
        x: inputs, some of which are held out.
        y: targets.
        states: name → weights of checkpoints, in order.
        ridge: of kernel regression; None: of the smallest leave-one-out error at each moment.
        steps: of training, at most.
        momentum: of SGD, Nesterov's.
        held_out: fraction of the samples.
        forward: see `empirical_ntk`.
        seed: of the split.

    Raises:
        InputError: see `problem`; a ridge or steps out of range; or training diverges.

    Cost: about ten kernels with their cross kernels and eigendecompositions, and `steps` passes.
    """
    if y is None:
        raise InputError("generalization compares with real errors and needs targets, got none; pass (inputs, targets)")
    if ridge is not None and not ridge > 0:
        raise InputError(f"ridge must be above 0, got {ridge}")
    task = problem(model, x, y, held_out=held_out, forward=forward, seed=seed)
    runs = dict(states or {})
    if len(runs) > 1:
        return told(over_checkpoints(task, runs, ridge), type(model).__name__, task, trained=False)
    return told(over_training(task, ridge, steps=steps, momentum=momentum), type(model).__name__, task, trained=True)


def over_checkpoints(
    task: Problem, states: Mapping[str, Mapping[str, Tensor]], ridge: float | None = None
) -> list[Point]:
    """Return what the kernel of each checkpoint promises and keeps, regression starting from the first one's outputs.

    Raises:
        InputError: see `estimate`.
    """
    models = {}
    for name, state in states.items():
        models[name.rsplit("/", 1)[-1]] = twin = copy.deepcopy(task.model)
        twin.load_state_dict(state)
    first = next(iter(models.values()))
    start = task.outputs(task.x, first), task.outputs(task.x_test, first)
    return [_point(task, k, name, one, start, ridge) for k, (name, one) in enumerate(models.items())]


def over_training(
    task: Problem, ridge: float | None = None, *, steps: int = 1000, momentum: float = 0.9, looks: int = 8
) -> list[Point]:
    """Return what the kernel promises and keeps at moments of training, the start and the end among them.

    Training by full-batch descent on squared error ends when 1 % of the squared residual is left.

    Args:
        task: network and samples.
        ridge: see `study`.
        steps: at most.
        momentum: of SGD, Nesterov's.
        looks: moments between start and end, ever further apart.

    Raises:
        InputError: nothing to learn, or training that diverges at 1/64 of the rate that the first kernel allows.
    """
    if steps < 1 or not 0 <= momentum < 1:
        raise InputError(f"at least one step and 0 <= momentum < 1 are needed, got {steps} and {momentum}")
    start = task.outputs(task.x), task.outputs(task.x_test)
    whole = float(((start[0] - task.y) ** 2).sum())
    kernel, _ = task.kernels()
    largest = float(np.linalg.eigvalsh(kernel)[-1])
    if not whole > 0 or not largest > 0:
        raise InputError("the outputs are the targets already, or cannot move: nothing to learn")
    # A quarter of what the first kernel allows, since it may grow.
    rate = (1 + momentum) / (1 + 2 * momentum) / 2 / largest
    found: list[Point] = []
    for slower in (1, 4, 16, 64):
        found = []
        ticks = set(times(steps, looks))

        def look(step: int, model: nn.Module, found: list[Point] = found, ticks: set[int] = ticks) -> bool:
            last = step == steps
            if step % 5 == 0 or step < 10:
                left = float(((task.outputs(task.x, model) - task.y) ** 2).sum()) / whole
                last = last or left <= _FITTED
                if left > _UNSTABLE:
                    raise InputError(f"the loss rises at step {step}")
            if step in ticks or last:
                found.append(_point(task, step, f"step {step}", model, start, ridge))
            return last

        try:
            task.descend(steps, rate / slower, momentum=momentum, nesterov=momentum > 0, watch=look)
        except InputError:
            if slower == 64:
                raise
            continue
        break
    return found


def _point(
    task: Problem, step: int, name: str, model: nn.Module, start: tuple[Array, Array], ridge: float | None
) -> Point:
    now = replace(task, model=model)
    kernel, cross = now.kernels()
    found = estimate(kernel, cross, task.y - start[0], task.y_test - start[1], ridge)
    return Point(step, name, found, task.y - now.outputs(task.x), task.y_test - now.outputs(task.x_test))


def example(quick: bool = False) -> Report:
    """Train a small network on scikit-learn's diabetes data (442 patients), half of it held out."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    count, width = (120, 16) if quick else (400, 64)
    x = torch.from_numpy(data.data / data.data.std(axis=0))[:count]
    y = tensored((data.target - data.target.mean()) / data.target.std())[:count]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1))
    return study(model, x, y, held_out=0.5, steps=100 if quick else 3000)
