"""Descent that is stopped as a filter on kernel modes, and the ridge that would do the same: all in closed form.

A mode of eigenvalue λ whose residual has fallen to the factor q is learned to the share φ = 1 - q; a ridge μ learns
λ/(λ + μ), so φ is the ridge μ = λ q/(1 - q) of this mode. Gradient flow for the time τ has q = exp(-τλ), hence
μ = λ/expm1(τλ); a step of descent at the rate α multiplies q by 1 - αλ. μ depends on λ: no single ridge does the same
as stopping (within a factor 1.69 in risk it does, Ali, Kolter and Tibshirani 2019). λ in squared output units; α = s·lr
with s = 2/(N·C) for torch's mean squared error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError

Array = NDArray[np.float64]

_SCALES = {"mse(mean)": 2.0, "mse(sum)": 2.0, "half_sum": 1.0}


def scale_of(loss: str, samples: int, outputs: int) -> float:
    """Return s, the factor of the residual in the gradient of a squared error.

    Raises:
        InputError: another loss, which has no modes of its own.
    """
    if loss not in _SCALES:
        raise InputError(f"stopping is a filter for {', '.join(_SCALES)} only, got {loss!r}")
    return _SCALES[loss] / (samples * outputs if loss == "mse(mean)" else 1)


def flow_filter(eigenvalues: Any, time: float) -> Array:
    """Return 1 - exp(-τλ), the share of each mode that gradient flow has learned at the time τ.

    Raises:
        InputError: a negative time, or eigenvalues that are not finite.
    """
    return -np.expm1(-_checked(time) * _spectrum(eigenvalues))


def equivalent_ridge(eigenvalues: Any, time: float) -> Array:
    """Return μ = λ/expm1(τλ), the ridge that learns each mode to the share that flow has at the time τ.

    It falls from 1/τ at λ = 0 (where it stays for λ < 0, rounding) to 0 where expm1 overflows.

    Raises:
        InputError: a time that is not positive, or eigenvalues that are not finite.
    """
    values = _spectrum(eigenvalues)
    if not _checked(time) > 0:
        raise InputError(f"a ridge needs a time above 0, got {time}")
    # exp overflows at 709.78 in float64; long before, μ is zero to all digits.
    exponent = np.clip(time * values, 0.0, 700.0)
    ridge = np.full_like(values, 1 / time)
    np.divide(values, np.expm1(exponent), out=ridge, where=exponent > 0)
    return np.where(time * values > 700, 0.0, ridge)


def residual_factors(
    eigenvalues: Any,
    rates: Any,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    at: Sequence[int] | None = None,
) -> Array:
    """Return q, what is left of each mode after steps of descent, (len(at), modes); exact for a fixed kernel.

    Args:
        eigenvalues: λ, (modes,).
        rates: α = s·lr of each step, (steps,), in order.
        momentum: as torch.optim.SGD has it, from an empty buffer.
        nesterov: likewise.
        at: numbers of steps, increasing; None: after all.

    Raises:
        InputError: rates or momentum out of range, or steps beyond the rates.

    Cost: steps x modes. A mode with αλ > 2 grows, and overflows to infinity in the end.
    """
    values, alpha = _spectrum(eigenvalues), np.asarray(rates, dtype=np.float64).reshape(-1)
    if not (np.isfinite(alpha).all() and (alpha >= 0).all()):
        raise InputError("learning rates must be finite and at least 0")
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must be at least 0 and below 1, got {momentum}")
    wanted = [len(alpha)] if at is None else list(at)
    if wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] > len(alpha):
        raise InputError(f"steps must increase from 0 to {len(alpha)}, got {wanted[:4]}")
    q, buffer = np.ones_like(values), np.zeros_like(values)
    found = np.empty((len(wanted), len(values)))
    place = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(wanted[-1] + 1):
            if step == wanted[place]:
                found[place], place = q, place + 1
            if place < len(wanted):
                gradient = values * q
                buffer = momentum * buffer + gradient
                q = q - alpha[step] * (gradient + momentum * buffer if nesterov else buffer)
    return found


def ridge_of_filter(shares: Any, eigenvalues: Any) -> Array:
    """Return μ = λ(1 - φ)/φ of each mode; NaN where 0 < φ < 1 does not hold, since no positive ridge does that."""
    phi, values = np.asarray(shares, dtype=np.float64), _spectrum(eigenvalues)
    found = np.full_like(values, np.nan)
    np.divide(values * (1 - phi), phi, out=found, where=(phi > 0) & (phi < 1) & (values > 0))
    return found


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """What a number of steps does to each mode, and which ridge comes nearest."""

    eigenvalues: Array
    filter: Array
    """φ of each mode: below 0 or above 1 where it oscillates. Read this first."""
    ridge: Array
    """μ of each mode; NaN where there is none."""
    time: float
    """τ = Σ α, the time of the flow that the steps follow (over 1 - momentum)."""
    best: float
    """The single ridge whose function is nearest."""
    mismatch: float
    """|function of the steps - function of that ridge| relative to the former, on the training samples."""


def early_stopping_ridge(  # noqa: PLR0913 - spectrum, schedule, loss and optimizer
    eigenvalues: Any,
    lr: float | Sequence[float],
    steps: int | None = None,
    *,
    samples: int,
    outputs: int = 1,
    loss: str = "mse(mean)",
    momentum: float = 0.0,
    nesterov: bool = False,
    energy: Any = None,
    optimizer: str = "sgd",
) -> EarlyStopping:
    """Return the filter of a run that stops after its steps, each mode's ridge, and the best single one.

    Args:
        eigenvalues: of the unnormalised training kernel K.
        lr: learning rate, or one for each step.
        steps: with a single learning rate.
        samples: N that the loss averages over (all of the training set for full batches, in the mean for others too).
        outputs: C.
        loss: "mse(mean)", "mse(sum)" or "half_sum".
        momentum: of SGD.
        nesterov: likewise.
        energy: of the residual at the start in each mode, (vᵢᵀ r)²; None: the same in all.
        optimizer: "sgd".

    Raises:
        InputError: another loss or optimizer (Adam's modes are those of J D Jᵀ, and D moves), or values out of range.
    """
    if optimizer.lower() != "sgd":
        raise InputError(
            f"stopping is a filter on the modes of K for SGD only, got {optimizer!r}; Adam's modes are those of the "
            "preconditioned kernel, which changes with every step"
        )
    rates = np.asarray(lr if steps is None else np.full(steps, lr), dtype=np.float64).reshape(-1)
    values = _spectrum(eigenvalues)
    alpha = scale_of(loss, samples, outputs) * rates
    shares = 1 - residual_factors(values, alpha, momentum=momentum, nesterov=nesterov)[0]
    time = float(alpha.sum()) / (1 - momentum)
    best, mismatch = best_single_ridge(shares, values, energy)
    return EarlyStopping(values, shares, ridge_of_filter(shares, values), time, best, mismatch)


def best_single_ridge(shares: Any, eigenvalues: Any, energy: Any = None) -> tuple[float, float]:
    """Return the ridge μ whose function on the training samples is nearest to these shares, and the relative distance.

    Minimises Σ eᵢ (φᵢ - λᵢ/(λᵢ + μ))² / Σ eᵢ φᵢ², on a grid and then by golden sections to 1e-6.

    Raises:
        InputError: nothing learned, shares that are not finite, or energies of another length.
    """
    phi, values = np.asarray(shares, dtype=np.float64), _spectrum(eigenvalues)
    weights = np.ones_like(values) if energy is None else np.asarray(energy, dtype=np.float64)
    if phi.shape != values.shape or weights.shape != values.shape or (weights < 0).any():
        raise InputError(f"shares and energies must be as many as the {len(values)} eigenvalues, energies >= 0")
    whole = float(weights @ phi**2)
    if not (whole > 0 and math.isfinite(whole)):
        raise InputError("these steps learn nothing or diverge, so that no ridge comes near")
    positive = values.clip(min=0)

    def distance(log_ridge: float) -> float:
        ridge = math.exp(log_ridge)
        return float(weights @ (phi - positive / (positive + ridge)) ** 2)

    top = math.log(max(float(positive.max()), np.finfo(float).tiny))
    grid = np.linspace(top - 40, top + 20, 241)
    place = int(np.argmin([distance(one) for one in grid.tolist()]))
    log_best = _golden(distance, float(grid[max(place - 1, 0)]), float(grid[min(place + 1, len(grid) - 1)]))
    return math.exp(log_best), math.sqrt(distance(log_best) / whole)


def _golden(function: Any, low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def steps_for_ridge(ridge: float, eigenvalues: Any, rate: float) -> Array:
    """Return after how many steps each mode is learned as far as this ridge learns it: log(1 + λ/μ) / -log(1 - αλ).

    That they differ is the statement that no number of steps is a ridge. Fractions of steps are meant; the slowest
    modes need 1/(αμ), faster ones fewer.

    Args:
        ridge: μ > 0.
        eigenvalues: λ.
        rate: α = s·lr.

    Returns:
        (modes,): NaN where αλ ≥ 1, since such a mode does not approach monotonically.

    Raises:
        InputError: values out of range.
    """
    values = _spectrum(eigenvalues).clip(min=0)
    if not (ridge > 0 and rate > 0 and math.isfinite(ridge) and math.isfinite(rate)):
        raise InputError(f"ridge and rate must be above 0, got {ridge} and {rate}")
    found = np.full_like(values, np.nan)
    found[values == 0] = 1 / (rate * ridge)
    some = (values > 0) & (rate * values < 1)
    found[some] = np.log1p(values[some] / ridge) / -np.log1p(-rate * values[some])
    return found


def stopping_curve(kernel: Any, residual: Any, factors: Any) -> Array:
    """Return the predicted held-out mean square error after each number of steps, from the training samples alone.

    The smoother of a number of steps is S = V (1 - q) Vᵀ. One output: generalised cross-validation,
    n |(I - S) r|² / tr(I - S)². Several: the residual of each sample is divided by its C x C block of I - S, which is
    leave-one-sample-out for a ridge and near to it for stopping.

    Args:
        kernel: (N·C, N·C).
        residual: y - f₀, (N, C).
        factors: q, (steps, N·C), by ascending eigenvalue, see `residual_factors`.

    Raises:
        InputError: shapes that do not fit.

    Lies once (nearly) everything is learned: both sides are 0/0. Source: Craven and Wahba 1978.
    Cost: N²·C³ for each number of steps, with several outputs.
    """
    matrix, r = np.asarray(kernel, dtype=np.float64), np.asarray(residual, dtype=np.float64)
    q = np.asarray(factors, dtype=np.float64)
    samples, outputs = r.shape
    if matrix.shape != (r.size, r.size) or q.ndim != 2 or q.shape[1] != r.size:
        raise InputError(f"residuals {r.shape} need a kernel and factors of {r.size} columns")
    _, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    along = vectors.T @ r.ravel()
    found = np.empty(len(q))
    parts = vectors.reshape(samples, outputs, -1)
    for i, left in enumerate(q):
        if outputs == 1:
            found[i] = samples * float((left * along) @ (left * along)) / max(float(left.sum()) ** 2, 1e-300)
            continue
        blocks = (parts * left) @ parts.transpose(0, 2, 1) + 1e-12 * np.eye(outputs)
        rest = (vectors @ (left * along)).reshape(samples, outputs, 1)
        found[i] = float((np.linalg.solve(blocks, rest) ** 2).mean())
    return found


def _spectrum(eigenvalues: Any) -> Array:
    values = np.asarray(eigenvalues, dtype=np.float64).reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise InputError("eigenvalues must be finite, and at least one")
    return values


def _checked(time: float) -> float:
    if not (time >= 0 and math.isfinite(time)):
        raise InputError(f"a time must be finite and at least 0, got {time}")
    return time
