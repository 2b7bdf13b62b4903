"""Test error of kernel regression, estimated from its training samples and measured on others.

K (N·C, N·C) sample-major, residual r = y - f₀ (N, C), ridge ρ. Leave-one-out leaves out samples: rows alone would let a
sample's own other outputs predict it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.metrics.regression import gcv

Array = NDArray[np.float64]

TOLERANCE = 0.25
"""Relative difference up to which an estimate and a measured error are called equal."""
POINTS = 0.05
"""Difference of two shares of wrong samples up to which they are called equal."""


def leave_one_out_path(kernel: Any, residual: Any, ridges: Any) -> Array:
    """Return y - prediction of each sample predicted from all others, (ridges, N, C).

    Exact, from one eigendecomposition: with A = (K + ρI)⁻¹ the residual of sample n is (A_nn)⁻¹ (A r)_n, C × C blocks.

    Args:
        kernel: (N·C, N·C).
        residual: (N, C).
        ridges: ρ, above 0.

    Raises:
        InputError: shapes that do not fit, ridges that are not above 0, or numbers that are not finite.

    Cost: O((N·C)³) and O(N² C³) for each ridge. Source: Wei, Hu and Steinhardt 2022 (with the empirical kernel).
    """
    matrix, r = np.asarray(kernel, dtype=np.float64), np.asarray(residual, dtype=np.float64)
    strengths = np.asarray(ridges, dtype=np.float64).reshape(-1)
    if r.ndim != 2 or len(r) < 3 or matrix.shape != (r.size, r.size):
        raise InputError(f"3 or more samples (N, C) and a kernel of N·C rows are needed, got {r.shape}, {matrix.shape}")
    if not (strengths > 0).all() or not (np.isfinite(matrix).all() and np.isfinite(r).all()):
        raise InputError("ridges must be above 0, kernel and residual finite")
    samples, outputs = r.shape
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    along, parts = vectors.T @ r.ravel(), vectors.reshape(samples, outputs, -1)
    found = np.empty((len(strengths), samples, outputs))
    for k, ridge in enumerate(strengths.tolist()):
        weights = 1 / (values.clip(min=0) + ridge)
        blocks = (parts * weights) @ parts.transpose(0, 2, 1)
        alpha = (vectors @ (weights * along)).reshape(samples, outputs, 1)
        found[k] = np.linalg.solve(blocks, alpha)[..., 0]
    return found


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one kernel promises for samples that it has not seen, and what it keeps.

    Attributes:
        ridge: ρ.
        left: (N, C) leave-one-out residuals of the training samples, y - prediction.
        left_test: (M, C) residuals of the same regression on held-out samples.
        gcv: generalised cross-validation; NaN for several outputs, where it is too small.
        dof: degrees of freedom.
    """

    ridge: float
    left: Array
    left_test: Array
    gcv: float
    dof: float

    @property
    def promised(self) -> Array:
        """Return the leave-one-out squared error of each training sample, (N,), mean over outputs."""
        return squares(self.left)

    @property
    def kept(self) -> Array:
        """Return the squared error of each held-out sample, (M,)."""
        return squares(self.left_test)

    @property
    def loo(self) -> float:
        """Return the mean leave-one-out squared error."""
        return float(self.promised.mean())

    @property
    def error(self) -> float:
        """Return the mean square error on held-out samples."""
        return float(self.kept.mean())


def estimate(kernel: Any, cross: Any, residual: Any, residual_test: Any, ridge: float | None = None) -> Estimate:
    """Return leave-one-out, GCV and the held-out error of kernel regression.

    Args:
        kernel: (N·C, N·C).
        cross: (M·C, N·C), between held-out and training samples.
        residual: y - f₀ of the training samples, (N, C).
        residual_test: of the held-out ones, (M, C).
        ridge: ρ; None: of the smallest leave-one-out error, between 1e-6 and 1e2 times the mean eigenvalue.

    Raises:
        InputError: shapes that do not fit, or a kernel of zeros.

    Cost: O((N·C)³).
    """
    matrix, r, left = (np.asarray(one, dtype=np.float64) for one in (kernel, residual, residual_test))
    mean = float(matrix.trace()) / len(matrix)
    if not mean > 0:
        raise InputError("kernel regression needs a kernel with a positive trace, got zeros")
    if np.shape(cross) != (left.size, r.size):
        raise InputError(f"the cross kernel must be ({left.size}, {r.size}), got {np.shape(cross)}")
    ridges = mean * np.geomspace(1e-6, 1e2, 25) if ridge is None else np.array([ridge])
    path = leave_one_out_path(matrix, r, ridges)
    best = int((path**2).mean(axis=(1, 2)).argmin())
    chosen = float(ridges[best])
    values = np.linalg.eigvalsh(matrix).clip(min=0)
    predicted = np.asarray(cross) @ np.linalg.solve(matrix + chosen * np.eye(len(matrix)), r.ravel())
    alone = gcv(matrix, r, chosen) if r.shape[1] == 1 else math.nan
    return Estimate(
        chosen, path[best], left - predicted.reshape(left.shape), alone, float((values / (values + chosen)).sum())
    )


def squares(residual: Array) -> Array:
    """Return the squared error of each sample, mean over outputs."""
    return np.asarray((residual**2).mean(axis=1))


def wrong(residual: Array, one_hot: Array) -> Array:
    """Return 1 for each sample whose largest prediction, one_hot - residual, is not its class; else 0."""
    found = (one_hot - residual).argmax(axis=1) != one_hot.argmax(axis=1)
    return np.asarray(found, dtype=np.float64)


def agrees(promised: Array, kept: Array) -> tuple[bool | None, float, float]:
    """Return whether two means of squared errors are equal, their ratio, and the half-width of ln(ratio) at 95 %.

    Equal: within `TOLERANCE` or within the noise of the samples. None: so few samples that a factor 1.6 would be noise,
    and no larger difference.
    """
    tiny = float(np.finfo(np.float64).tiny)
    a, b = max(float(promised.mean()), tiny), max(float(kept.mean()), tiny)
    noise = [float(one.std(ddof=1)) / math.sqrt(len(one)) / m if len(one) > 1 else math.inf
             for one, m in ((promised, a), (kept, b))]  # fmt: skip
    wide, off, most = 1.96 * math.hypot(*noise), abs(math.log(a / b)), math.log1p(TOLERANCE)
    holds = False if off > max(most, wide) else None if wide > 2 * most else True
    return holds, a / b, wide


def shares_agree(promised: Array, kept: Array) -> tuple[bool | None, float, float]:
    """Return whether two shares of wrong samples are equal, their difference, and its half-width at 95 %.

    Equal: within `POINTS` or within the noise of the samples. None: noise of more than three times as much, and no
    larger difference. The noise is that of shares with one more sample right and one more wrong.

    Source: Agresti and Caffo 2000.
    """
    shares = [(float(one.sum()) + 1) / (len(one) + 2) for one in (promised, kept)]
    noise = [s * (1 - s) / (len(one) + 2) for s, one in zip(shares, (promised, kept), strict=True)]
    wide, off = 1.96 * math.sqrt(sum(noise)), float(promised.mean() - kept.mean())
    holds = False if abs(off) > max(POINTS, wide) else None if wide > 3 * POINTS else True
    return holds, off, wide
