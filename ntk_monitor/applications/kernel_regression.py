"""Kernel regression: what the network would predict if it trained to the end with the kernel that it has now.

For the linearised network f₀(x) + J(x)(θ - θ₀), with K the training and k(x) the cross kernel, all unnormalised:
  least squares to convergence, no decay:       f = f₀ + k K⁺ (y - f₀)
  + λ/2 |θ - θ₀|² beside ½|r|²:                 f = f₀ + k (K + λI)⁻¹ (y - f₀)
  + λ/2 |θ|², torch's weight decay:             f = g + k (K + λI)⁻¹ (y - g),   g = f₀ - J θ₀
N samples, C outputs: the system has N·C rows, sample-major. Plain training has λ = 0 whatever its length.
Source: Jacot, Gabriel and Hongler 2018; Lee et al. 2019 (section 2.2); Chizat, Oyallon and Bach 2019 (laziness).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntk_monitor.applications.lazy_training import Comparison, compared
from ntk_monitor.applications.problem import Antisymmetric, ReLUNetwork, problem
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.applications.ridge import (
    Center,
    KernelRegression,
    best_ridge,
    floor,
    kernel_regression,
    ridge_from_weight_decay,
)
from ntk_monitor.batch import Batch
from ntk_monitor.figures.style import BLUE, GREY, MODE_COLOURS, Figure, layout_of, line, log_axis, numbers
from ntk_monitor.network import Forward

Array = NDArray[np.float64]

__all__ = [
    "Antisymmetric",
    "Comparison",
    "KernelRegression",
    "best_ridge",
    "compared",
    "example",
    "kernel_regression",
    "ridge_from_weight_decay",
    "study",
]

EXAMPLE = "two-layer ReLU networks of growing width on the progression of diabetes in 442 patients"

CLOSE = 0.1
"""Largest gap between the trained network and kernel regression, relative to what training changed, called equal."""


def study(  # noqa: PLR0913 - a network, samples, and how to compare
    model: nn.Module,
    x: Batch,
    y: Any,
    *,
    ridge: float | None = None,
    decay_center: Center = "init",
    held_out: float = 0.25,
    forward: Forward | None = None,
    steps: int = 2000,
    seed: int = 0,
) -> Report:
    """Compare kernel regression with the network really trained from its present weights, on held-out samples.

    The network is copied, in float64, and trained on squared error with the same penalty. Its own loss and optimizer
    play no part.

    Args:
        model: any module with one floating output; class labels become one-hot targets.
        x: inputs, some of which are held out.
        y: targets.
        ridge: see `compared`.
        decay_center: see `kernel_regression`.
        held_out: fraction of the samples.
        forward: see `empirical_ntk`.
        steps: of training, at most.
        seed: of the split.

    Raises:
        InputError: see `problem`.
    """
    task = problem(model, x, y, held_out=held_out, forward=forward, seed=seed)
    found = compared(task, ridge, center=decay_center, steps=steps)
    return _report(found, type(model).__name__, task.classes)


def _report(found: Comparison, name: str, classes: bool) -> Report:
    fit, gap = found.fit, found.gap
    mean = found.error(np.broadcast_to(found.mean, found.y_test.shape))
    loo = float((fit.leave_one_out() ** 2).mean())
    errors = {
        "network, trained": found.error(found.trained),
        "kernel regression": found.error(found.predicted),
        "network, now": found.error(found.start),
    }
    holds = gap <= CLOSE if abs(gap - CLOSE) > found.left else None
    numbers_ = [
        Number("gap", gap, "of the trained change", note="held-out; 0: training is kernel regression"),
        Number(
            "linearisation error", found.tangent_error, "of the trained change", note="held-out; 0: the tangent model"
        ),
        Number("ridge", fit.ridge, "squared output units", note=f"penalty towards {fit.center}"),
        Number("degrees of freedom", fit.dof(), f"of {len(fit.values)}"),
        Number("leave-one-out error", loo, "mean square", note="predicted for held-out samples, from the others alone"),
        *(Number(f"held-out error, {key}", value, "mean square") for key, value in errors.items()),
    ]
    if fit.residual.shape[1] == 1:
        numbers_.insert(5, Number("GCV", fit.gcv(), "mean square"))
    caveats = ["The copy is trained on squared error with this penalty, not on the run's own loss and optimizer."]
    if classes:
        caveats.append("Class labels are regressed as one-hot targets.")
    if found.left > 0.02:
        caveats.append(f"Training had not come to rest after {found.steps} steps; the gap includes what was left.")
    word = "predicts" if gap <= CLOSE else "does not predict"
    return Report(
        name="kernel_regression",
        title=f"Kernel regression and {name}, trained",
        summary=(
            f"The kernel that the network has now {word} what training it does to held-out samples: the two differ by "
            f"{gap:.1%} of what training changed. Their held-out errors are {short(errors['kernel regression'])} and "
            f"{short(errors['network, trained'])}; the mean target alone gives {short(mean)}."
        ),
        numbers=tuple(numbers_),
        verdicts=(
            Verdict(
                "training this network is kernel regression with its present kernel",
                holds,
                f"gap {gap:.3f} on {len(found.y_test)} held-out samples, {CLOSE} allowed",
            ),
        ),
        figures={"predictions": predictions({name: found}), "filters": filters(fit.values, fit.ridge)},
        caveats=tuple(caveats),
    )


def predictions(found: dict[str, Comparison]) -> Figure:
    """Return held-out predictions of kernel regression against those of the trained networks, by name."""
    data: list[Figure] = []
    everything = np.concatenate([np.r_[one.predicted.ravel(), one.trained.ravel()] for one in found.values()])
    ends = numbers([everything.min(), everything.max()])
    data.append(line(ends, ends, "equal", GREY, line={"color": GREY, "dash": "dash", "width": 1}, hoverinfo="skip"))
    for (name, one), colour in zip(found.items(), MODE_COLOURS, strict=False):
        picked = slice(None, None, -(-one.trained.size // 600))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{name}, gap {one.gap:.3f}",
                "x": numbers(one.predicted.ravel()[picked]),
                "y": numbers(one.trained.ravel()[picked]),
                "marker": {"color": colour, "size": 6, "opacity": 0.7},
                "hovertemplate": "kernel regression %{x:.4g}, trained %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    layout = layout_of(
        "Trained network against kernel regression",
        "Each point is one output of a held-out sample. On the line, training is kernel regression with the kernel at "
        "the start; the spread around it is what the kernel's own change did.",
        xaxis={"title": {"text": "kernel regression (output units)"}, "tickformat": "~g"},
        yaxis={"title": {"text": "trained network (output units)"}},
        showlegend=True,
        legend={"x": 0.02, "y": 0.98, "xanchor": "left", "yanchor": "top", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}


def filters(values: Array, ridge: float) -> Figure:
    """Return which share of each mode is learned under this ridge, and under a hundred times less and more."""
    kept = np.sort(values[values > floor(values)])[::-1]
    ranks = list(range(1, len(kept) + 1))
    strengths: Sequence[float] = (ridge / 100, ridge, 100 * ridge) if ridge > 0 else (0.0,)
    data = [
        line(ranks, numbers(kept / (kept + one)), f"ridge {short(one)}, {(kept / (kept + one)).sum():.3g} dof", colour)
        | {"hovertemplate": "mode %{x}: %{y:.1%} learned<extra>%{fullData.name}</extra>"}
        for one, colour in zip(strengths, ("#8a5a44", BLUE, "#e07b00"), strict=False)
    ]
    layout = layout_of(
        "What a ridge lets through",
        "Share of each kernel mode's target that regression learns: eigenvalue / (eigenvalue + ridge). Their sum is "
        "the degrees of freedom.",
        xaxis=log_axis("mode index", exponentformat="none"),
        yaxis={"title": {"text": "share learned"}, "range": [-0.03, 1.03]},
        showlegend=True,
        legend={"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}


def example(quick: bool = False) -> Report:
    """Compare both on scikit-learn's diabetes data (442 patients) for two-layer ReLU networks of growing width."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = torch.from_numpy(data.data / np.linalg.norm(data.data, axis=1, keepdims=True))
    y = torch.from_numpy((data.target - data.target.mean()) / data.target.std())
    count, widths = (64, (8, 512)) if quick else (200, (32, 128, 512, 2048))
    found: dict[str, Comparison] = {}
    for width in widths:
        task = problem(ReLUNetwork(x.shape[1], width), x[:count], y[:count], held_out=0.5)
        found[f"width {width}"] = compared(task, steps=300 if quick else 1500)
    widest = list(found.values())[-1]
    base = _report(widest, f"a two-layer ReLU network of width {widths[-1]}", classes=False)
    gaps = [one.gap for one in found.values()]
    rows = tuple(
        (width, one.gap, one.error(one.trained), one.error(one.predicted), one.fit.dof())
        for width, one in zip(widths, found.values(), strict=True)
    )
    shrinks = Verdict(
        "the gap closes as the network gets wider",
        gaps[-1] < gaps[0],
        f"{gaps[0]:.3f} at width {widths[0]}, {gaps[-1]:.3f} at {widths[-1]}",
    )
    narrow = Verdict(
        f"it is already closed at width {widths[0]}", gaps[0] <= CLOSE, f"gap {gaps[0]:.3f}, {CLOSE} allowed"
    )
    columns = ("width", "gap", "error, trained", "error, kernel", "dof")
    return Report(
        name=base.name,
        title="Kernel regression and trained ReLU networks on diabetes data",
        summary=base.summary,
        numbers=base.numbers,
        verdicts=(*base.verdicts, shrinks, narrow),
        tables={"By width (held-out mean square errors)": Table(columns, rows)},
        figures={"predictions": predictions(found), "filters": base.figures["filters"]},
        caveats=base.caveats,
    )
