"""Early stopping: which share of each kernel mode is learned when training stops, and whether a ridge does the same.

The closed forms, with the source of each, are in `stopped`; here they meet a network that is really trained, or the
history of a run. For a squared error under SGD the filter is exact while the kernel lasts. It is never one ridge: the
ridge of each mode falls from 1/τ for slow modes to nothing for fast ones. What is reported is how much that matters
for this spectrum and this target.
Source: Ali, Kolter and Tibshirani 2019; Yao, Rosasco and Caponnetto 2007.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ntk_monitor.applications.problem import Problem, problem, times
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.applications.stopped import (
    EarlyStopping,
    best_single_ridge,
    early_stopping_ridge,
    equivalent_ridge,
    flow_filter,
    residual_factors,
    ridge_of_filter,
    steps_for_ridge,
    stopping_curve,
)
from ntk_monitor.applications.stopping_figures import filters, ridges
from ntk_monitor.applications.stopping_run import DRIFT, SAME, from_history, modes
from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import BLUE, GREY, ORANGE, STEPS, Figure, layout_of, line, log_axis, numbers
from ntk_monitor.network import Forward

__all__ = [
    "EarlyStopping",
    "best_single_ridge",
    "early_stopping_ridge",
    "equivalent_ridge",
    "example",
    "flow_filter",
    "from_history",
    "residual_factors",
    "ridge_of_filter",
    "steps_for_ridge",
    "stopping_curve",
    "study",
]

Array = NDArray[np.float64]

EXAMPLE = "a small network on the progression of diabetes in 442 patients, half of them held out"

CLOSE = 0.05
"""Largest relative excess of a held-out error that counts as none."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """A run of full-batch descent, what the kernel said of it beforehand, and where each would have stopped."""

    stopping: EarlyStopping
    """At the recommended step."""
    steps: NDArray[np.int64]
    measured: Array
    """Held-out mean square error of the network at these steps."""
    linear: Array
    """Of the frozen kernel."""
    expected: Array
    """Predicted from the training samples alone."""
    drift: float
    """|network - frozen kernel| at the recommended step relative to what the network had learned, held-out."""
    recommended: int
    """Index of the smallest predicted error."""
    rate: float
    """Learning rate."""
    scale: float

    @property
    def best(self) -> int:
        """Return the index of the validation optimum."""
        return int(np.argmin(self.measured))

    @property
    def excess(self) -> float:
        """Return by how much the error at the recommended step is above that of the validation optimum, relative."""
        return float(self.measured[self.recommended] / self.measured[self.best] - 1)


def stopped(
    task: Problem, steps: int, *, lr: float | None = None, momentum: float = 0.0, nesterov: bool = False
) -> Stopping:
    """Train a copy on torch's mean squared error and compare every part of the run with the kernel's account of it.

    Args:
        task: network and samples.
        steps: of full-batch descent.
        lr: None: a quarter of what the kernel's largest eigenvalue allows without momentum.
        momentum: of SGD.
        nesterov: likewise.

    Raises:
        InputError: training diverges.
    """
    kernel, cross = task.kernels()
    start, start_test = task.outputs(task.x), task.outputs(task.x_test)
    values, vectors = np.linalg.eigh(kernel)
    scale = 2 / task.y.size
    rate = lr if lr is not None else (1 - momentum) / (2 * scale * float(values[-1]))
    ticks = list(times(steps, 60))
    seen: dict[int, Array] = {}

    def watch(step: int, model: nn.Module) -> bool:
        if step in wanted:
            seen[step] = task.outputs(task.x_test, model)
        return False

    wanted = set(ticks)
    task.descend(steps, rate, momentum=momentum, nesterov=nesterov, scale=scale, watch=watch)
    alpha = np.full(steps, scale * rate)
    factors = residual_factors(values, alpha, momentum=momentum, nesterov=nesterov, at=ticks)
    residual = task.y - start
    along = vectors.T @ residual.ravel()
    solved = np.zeros_like(factors)
    zero = len(values) * np.finfo(float).eps * values[-1]
    np.divide(1 - factors, values, out=solved, where=values > zero)
    lines = [start_test + (cross @ (vectors @ (row * along))).reshape(start_test.shape) for row in solved]
    expected = stopping_curve(kernel, residual, factors)
    # The last tenth of the degrees of freedom is where the prediction becomes 0/0.
    expected[factors.mean(1) < 0.1] = np.inf
    at = int(np.argmin(expected))
    here = at or 1
    moved = np.linalg.norm(seen[ticks[here]] - start_test)
    used = alpha[: ticks[here]] / scale
    return Stopping(
        early_stopping_ridge(
            values,
            used.tolist(),
            samples=len(task.y),
            outputs=task.y.shape[1],
            momentum=momentum,
            nesterov=nesterov,
            energy=along**2,
        ),
        np.array(ticks),
        np.array([float(((seen[tick] - task.y_test) ** 2).mean()) for tick in ticks]),
        np.array([float(((one - task.y_test) ** 2).mean()) for one in lines]),
        expected,
        float(np.linalg.norm(seen[ticks[here]] - lines[here]) / moved) if moved > 0 else np.inf,
        at,
        rate,
        scale,
    )


def study(  # noqa: PLR0913 - a network, samples, how to train
    model: nn.Module,
    x: Batch,
    y: Any,
    *,
    lr: float | None = None,
    steps: int = 1000,
    momentum: float = 0.0,
    nesterov: bool = False,
    held_out: float = 0.25,
    forward: Forward | None = None,
    seed: int = 0,
) -> Report:
    """Say when to stop training this network, from its kernel now, and check it against training and held-out samples.

    The network is copied, in float64, and trained on mean squared error by full-batch SGD.

    Args:
        model: any module with one floating output; class labels become one-hot targets.
        x: inputs, some of which are held out.
        y: targets.
        lr: learning rate; None: a quarter of what the kernel allows.
        steps: of training.
        momentum: of SGD.
        nesterov: likewise.
        held_out: fraction of the samples.
        forward: see `empirical_ntk`.
        seed: of the split.

    Raises:
        InputError: see `problem`; or training diverges.
    """
    if steps < 2:
        raise InputError(f"at least 2 steps are needed, got {steps}")
    task = problem(model, x, y, held_out=held_out, forward=forward, seed=seed)
    found = stopped(task, steps, lr=lr, momentum=momentum, nesterov=nesterov)
    return _report(found, type(model).__name__, steps)


def _report(found: Stopping, name: str, steps: int) -> Report:
    stopping, at, best = found.stopping, found.recommended, found.best
    stop, optimum = int(found.steps[at]), int(found.steps[best])
    tau = 1 / stopping.time
    simple = _single(stopping, tau)
    finite = stopping.ridge[np.isfinite(stopping.ridge)]
    inverse = steps_for_ridge(stopping.best, stopping.eigenvalues, stopping.time / max(stop, 1))
    inverse = inverse[np.isfinite(inverse)]
    caveats = ["Full batches, mean squared error and plain SGD; Adam's modes are those of another kernel."]
    if at == len(found.steps) - 1 or best == len(found.steps) - 1:
        caveats.append(f"An optimum lies at or beyond the last of {steps} steps; train longer to see it.")
    ratio = short(float(finite.max() / finite.min())) if len(finite) and finite.min() > 0 else "above 1e300"
    return Report(
        name="early_stopping",
        title=f"When to stop training {name}",
        summary=(
            f"The kernel recommends to stop after {stop} steps, from the training samples alone; held-out samples were "
            f"best after {optimum}, and their error at the recommended step is {found.excess:.1%} above that. The "
            f"nearest single ridge, {short(stopping.best)}, gives a function {stopping.mismatch:.1%} away from the "
            "stopped one."
        ),
        numbers=(
            Number("recommended step", stop, "steps", note="smallest predicted error, from training samples"),
            Number("validation optimum", optimum, "steps"),
            Number("held-out error at the recommended step", float(found.measured[at]), "mean square"),
            Number("held-out error at the optimum", float(found.measured[best]), "mean square"),
            Number("held-out error at the end", float(found.measured[-1]), "mean square"),
            Number("best single ridge", stopping.best, "squared output units"),
            Number("mismatch of the best single ridge", stopping.mismatch, "of the learned function"),
            Number("1 / time", tau, "squared output units", note=f"as a ridge it is {simple:.1%} away"),
            Number("drift from the frozen kernel", found.drift, "of the change", note="held-out, where one would stop"),
            Number("learning rate", found.rate),
        ),
        verdicts=(
            Verdict(
                "stopping early is the same as one ridge",
                stopping.mismatch <= SAME,
                f"functions differ by {stopping.mismatch:.1%}, {SAME:.0%} allowed; the modes' own ridges span a "
                f"factor {ratio}",
            ),
            Verdict(
                "the recommended step is as good as the validation optimum",
                found.excess <= CLOSE,
                f"held-out error {found.excess:.1%} above the smallest, {CLOSE:.0%} allowed",
            ),
            Verdict(
                "training follows the filter of its kernel until then",
                found.drift <= DRIFT,
                f"outputs {found.drift:.1%} away from the frozen kernel, {DRIFT:.0%} allowed",
            ),
        ),
        tables={
            "Modes": modes(stopping),
            "Steps at which a mode is where that ridge has it": Table(
                ("fewest", "median", "most"),
                ((float(inverse.min()), float(np.median(inverse)), float(inverse.max())),) if len(inverse) else (),
            ),
        },
        figures={"ridges": ridges(stopping), "filters": filters(stopping), "errors": errors(found)},
        caveats=tuple(caveats),
    )


def _single(stopping: EarlyStopping, ridge: float) -> float:
    """Return how far the function of this ridge is from the stopped one, every mode alike."""
    values = stopping.eigenvalues.clip(min=0)
    return float(np.linalg.norm(stopping.filter - values / (values + ridge)) / np.linalg.norm(stopping.filter))


def errors(found: Stopping) -> Figure:
    """Return held-out error over steps: measured, by the frozen kernel, predicted from training samples."""
    shown = found.steps > 0
    x = found.steps[shown].tolist()
    data = [
        line(x, numbers(values[shown], positive=True), name, colour, line={"color": colour, "dash": dash})
        for values, name, colour, dash in (
            (found.measured, "held-out, network", BLUE, "solid"),
            (found.linear, "held-out, frozen kernel", GREY, "dash"),
            (found.expected, "predicted from training samples", ORANGE, "solid"),
        )
    ]
    for at, name, colour in ((found.best, "optimum", BLUE), (found.recommended, "recommended", ORANGE)):
        mark = {"color": colour, "size": 11, "symbol": "diamond"}
        place = line([int(found.steps[at])], numbers([found.measured[at]]), name, colour, mode="markers", marker=mark)
        data.append(place)
    layout = layout_of(
        "Held-out error over training",
        "The recommended step is the minimum of the prediction, which has seen training samples only.",
        xaxis=log_axis(STEPS, exponentformat="none"),
        yaxis={"title": {"text": "mean square error"}},
        showlegend=True,
        legend={"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}


def example(quick: bool = False) -> Report:
    """Train a small network on scikit-learn's diabetes data (442 patients), half of it held out."""
    import torch
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = torch.from_numpy(data.data / data.data.std(axis=0))
    y = torch.from_numpy((data.target - data.target.mean()) / data.target.std())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 128), nn.Tanh(), nn.Linear(128, 1))
    count = 80 if quick else 300
    return study(model, x[:count], y[:count], steps=300 if quick else 3000, held_out=0.5)
