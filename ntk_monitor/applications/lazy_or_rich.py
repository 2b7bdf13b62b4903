"""Lazy or rich: does training this network leave its kernel as it is, or does it learn features?

Lazy: the kernel stays and the trained network is its tangent model at the start, f₀ + J₀(θ - θ₀). Rich: both move. The
same network is trained at several output scales α (see `output_scale`), from lazy to rich, and where α = 1, the
network as it is, lies among them is the answer; what moving was good for is measured on held-out samples.

Source: Chizat, Oyallon and Bach 2019 (output scale); Fort et al. 2020 (kernel velocity); Geiger et al. 2020.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.output_scale import Scaled, Tangent, scale_sweep, tangent
from ntk_monitor.applications.problem import Problem, problem
from ntk_monitor.applications.regime import LAZY, Regime, alignment_gain, kernel_velocity, movement, regime
from ntk_monitor.applications.regime_figures import checkpoints
from ntk_monitor.applications.regime_run import from_history
from ntk_monitor.applications.regime_words import told
from ntk_monitor.applications.report import Report, Table, Verdict
from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Forward
from ntk_monitor.similarity import alignment

Array = NDArray[np.float64]

__all__ = [
    "EXAMPLE",
    "Regime",
    "Scaled",
    "Tangent",
    "alignment_gain",
    "example",
    "from_history",
    "kernel_velocity",
    "movement",
    "regime",
    "scale_sweep",
    "study",
    "tangent",
]

EXAMPLE = "a tanh network learns the product of two inputs at five output scales"


def study(  # noqa: PLR0913 - a network, samples, and how to train
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    scales: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    states: Mapping[str, Mapping[str, Tensor]] | None = None,
    left: float = 0.05,
    steps: int = 1000,
    momentum: float = 0.9,
    held_out: float = 0.25,
    forward: Forward | None = None,
    seed: int = 0,
) -> Report:
    """Train copies of a network at several output scales and say in which regime it is as it stands.

    Copies in float64 are trained on squared error by full batches; the network's own loss and optimizer play no part.

    Args:
        model: any module with one floating output; class labels become one-hot targets.
        x: inputs, some of which are held out.
        y: targets.
        scales: output scales α, 1 among them.
        states: name → weights of checkpoints, in order: their kernels are compared, and training starts from the first.
        left: fraction of the squared residual at which training ends.
        steps: of training, at most, at each scale.
        momentum: of SGD, Nesterov's.
        held_out: fraction of the samples.
        forward: see `empirical_ntk`.
        seed: of the split.

    Raises:
        InputError: see `problem` and `scale_sweep`; or output scales without 1.

    Cost: for each scale `steps` passes and about ten kernels.
    """
    if y is None:
        raise InputError("lazy_or_rich trains the network and needs targets, got none; pass (inputs, targets)")
    if 1.0 not in [float(a) for a in scales]:
        raise InputError(f"output scales must hold 1, the network as it is, got {list(scales)}")
    ordered = sorted({float(a) for a in scales})
    task = problem(model, x, y, held_out=held_out, forward=forward, seed=seed)
    runs = dict(states or {})
    if runs:
        task = replace(task, model=_loaded(task.model, next(iter(runs.values()))))
    kernel = empirical_ntk(task.model, task.x, forward=task.forward).cpu().numpy().reshape(task.y.size, -1)
    found = scale_sweep(task, ordered, left=left, steps=steps, momentum=momentum, kernel=kernel)
    ahead = tangent(task, kernel, left)
    foretold = [ahead.error(a) for a in ordered]
    report = told(task, found, foretold, ahead.relative_scale(), type(model).__name__)
    return _with_checkpoints(report, task, runs) if len(runs) > 1 else report


def _loaded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    return twin


def _with_checkpoints(report: Report, task: Problem, states: Mapping[str, Mapping[str, Tensor]]) -> Report:
    """Add what the run itself did between its checkpoints."""
    kernels = [
        empirical_ntk(_loaded(task.model, state), task.x, forward=task.forward, outputs="trace").cpu().numpy()
        for state in states.values()
    ]
    moved = np.array([movement(kernels[0], one) for one in kernels])
    aligned = np.array([alignment(one, task.y) for one in kernels])
    turned = [math.nan, *kernel_velocity(kernels, range(len(kernels))).tolist()]
    growth = [float(np.trace(one) / np.trace(kernels[0])) for one in kernels]
    names = [name.rsplit("/", 1)[-1] for name in states]
    columns = ("checkpoint", "moved since the first", "1 - cosine with the one before", "trace", "alignment")
    rows = tuple(zip(names, moved.tolist(), turned, growth, aligned.tolist(), strict=True))
    verdict = Verdict(
        "the run of these checkpoints kept the kernel of the first",
        bool(moved[-1] <= LAZY),
        f"moved by {moved[-1]:.3g} of itself to the last, {LAZY:g} allowed; trained on its own loss",
    )
    return replace(
        report,
        verdicts=(*report.verdicts, verdict),
        tables={**report.tables, "Checkpoints": Table(columns, rows)},
        figures={**report.figures, "checkpoints": checkpoints(names, moved, aligned)},
    )


def example(quick: bool = False) -> Report:
    """Train a small network on scikit-learn's breast cancer data (569 patients) at five output scales."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    count, width = (48, 16) if quick else (160, 64)
    x = torch.from_numpy((data.data - data.data.mean(axis=0)) / data.data.std(axis=0))[:count]
    y = torch.from_numpy(2.0 * data.target - 1)[:count]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    scales = (0.1, 1.0, 10.0) if quick else (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    return study(model, x, y, scales=scales, held_out=0.5, steps=300 if quick else 3000)
