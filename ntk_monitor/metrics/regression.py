"""Metrics of kernel regression with the present kernel: what it would predict for samples left out.

A = (K + ρI)⁻¹ with an intercept per output eliminated, so that ρ → ∞ predicts the mean. Y (N, D): D = C for the full
kernel; for an (N, N) kernel every column of Y is regressed with the same one.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import metric

Array = NDArray[np.float64]

RELATIVE_RIDGE = 1e-3
"""Ridge ρ of the registered metrics, relative to the mean eigenvalue."""


def sample_loo(kernel: Array, targets: Array, ridge: float, *, intercept: bool = True) -> Array:
    """Return the residuals (N, D) of each sample, predicted from all others by kernel regression.

    Exact, without refitting: with P the inverse (intercept eliminated) and α = P y, the residual of sample n is
    (P_nn)⁻¹ α_n with its C × C block. Leaving out single rows instead of samples lets a sample's own other outputs
    predict it.

    Args:
        kernel: (N·C, N·C) sample-major, C = D; or (N, N), the same for every column of the targets.
        targets: (N, D).
        ridge: added to the diagonal, > 0, or 0 for a kernel of full rank.
        intercept: fit a constant per output too; False: targets are relative to the outputs at the start, y - f₀.

    Raises:
        InputError: a kernel that fits neither N nor N·D rows, fewer than three samples, or a singular kernel.

    Cost: O(n³). Source: Wei, Hu and Steinhardt 2022 (kernel regression with the empirical kernel); with an intercept
    Dubrule 1983.
    """
    samples, columns = targets.shape
    if len(kernel) not in (samples, samples * columns) or samples < 3:
        raise InputError(
            f"3 or more samples and a kernel of N or N·D rows are needed, got targets {targets.shape} and kernel "
            f"{kernel.shape}"
        )
    outputs = len(kernel) // samples
    y = targets.reshape(len(kernel), -1)
    try:
        inverse = np.linalg.inv(kernel + ridge * np.eye(len(kernel)))
        if intercept:
            constants = np.tile(np.eye(outputs), (samples, 1))
            solved = inverse @ constants
            inverse = inverse - solved @ np.linalg.solve(constants.T @ solved, solved.T)
        alpha = (inverse @ y).reshape(samples, outputs, -1)
        same = np.arange(samples)
        blocks = inverse.reshape(samples, outputs, samples, outputs)[same, :, same]
        return np.linalg.solve(blocks, alpha).reshape(samples, columns)
    except np.linalg.LinAlgError as error:
        raise InputError("kernel regression needs a kernel of full rank, got a singular one; raise ridge") from error


def gcv(kernel: Array, targets: Array, ridge: float) -> float:
    """Return the generalised cross-validation estimate of the squared test error of one output.

    (|ρ A y|²/n) / ((ρ/n) tr A)² with A = (K + ρI)⁻¹, no intercept. Its limit for ρ = 0: n yᵀK⁻²y / (tr K⁻¹)², and for
    a kernel of rank r < n, n |y_⊥|² / (n - r)² with y_⊥ the part of y outside its range.

    Args:
        kernel: (n, n).
        targets: (n,) or (n, 1).
        ridge: ρ ≥ 0.

    Raises:
        InputError: more than one output, for which it is 1 to 20 % too small; use `sample_loo`.

    Lies when the samples are not independent, or the kernel was fitted to the same labels. Cost: O(n³).
    Source: Craven and Wahba 1978; equal to KARE of Jacot et al. 2020 up to its scaling.
    """
    y = targets.reshape(len(targets), -1)
    if y.shape != (len(kernel), 1):
        raise InputError(f"one output and {len(kernel)} samples are needed, got {targets.shape}; use sample_loo")
    values, vectors = np.linalg.eigh(kernel)
    energy = (vectors.T @ y[:, 0]) ** 2
    n = len(values)
    null = values <= n * np.finfo(float).eps * max(values[-1], 0.0)
    if ridge > 0:
        kept = ridge / (values.clip(min=0) + ridge)
    elif null.any():
        kept = null.astype(float)
    else:
        kept = values[0] / values
    return float(n * (kept**2 @ energy) / kept.sum() ** 2)


@metric(
    name="sample_loo",
    formula="Σ_n |(P_nn)⁻¹ (P y)_n|² / Σ_n |y_n - mean of the others|², ρ = 1e-3 tr K / n",
    range=(0, math.inf),
    unit="fraction",
    cost="n^3",
    tier="A",
    default=False,
    source="Wei, Hu and Steinhardt 2022",
    lies_when="the network was trained on the probe: hold the probe out; squared error, not accuracy",
)
def sample_loo_error(measured: Measured) -> float:
    """Leave-one-sample-out error of kernel regression relative to predicting the mean: 1 is no better than that."""
    targets = measured.needed("targets")
    measured.centred_targets  # noqa: B018 - raises where there is nothing to predict
    kernel = measured.kernel if measured.outputs == targets.shape[1] else measured.means
    left = sample_loo(kernel, targets, RELATIVE_RIDGE * float(kernel.diagonal().mean()))
    n = measured.samples
    return float((left**2).sum() / (measured.centred_targets**2).sum() * ((n - 1) / n) ** 2)


@metric(
    formula="(|ρ A y|²/n) / ((ρ/n) tr A)² / (|y|²/n), y centred, A = (K + ρI)⁻¹, ρ = 1e-3 tr K / n",
    range=(0, math.inf),
    unit="fraction",
    cost="n^3",
    tier="A",
    default=False,
    source="Craven and Wahba 1978; Wei, Hu and Steinhardt 2022",
    lies_when="several outputs (left out); see sample_loo",
)
def gcv_error(measured: Measured) -> float:
    """Cross-validation estimate of the error of kernel regression relative to predicting the mean, one output."""
    y = measured.centred_targets
    return gcv(measured.kernel, y, RELATIVE_RIDGE * float(measured.kernel.diagonal().mean())) / float((y**2).mean())
