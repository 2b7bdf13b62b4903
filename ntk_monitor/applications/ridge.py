"""Kernel ridge regression in closed form, with its degrees of freedom and cross-validation; see `kernel_regression`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.metrics.regression import gcv, sample_loo

Array = NDArray[np.float64]
Center = Literal["init", "zero"]

_LOSSES = {"mse(mean)": 2.0, "mse(sum)": 2.0, "half_sum": 1.0}


@dataclass(frozen=True, slots=True)
class KernelRegression:
    """A fitted kernel regression; see `kernel_regression`."""

    kernel: Array
    """(rows, rows), N·C or N."""
    values: Array
    """Eigenvalues of the kernel, ascending, negative rounding errors at zero."""
    coefficients: Array
    """(K + λI)⁻¹ (y - prior), (rows, columns)."""
    residual: Array
    """y - prior, (N, C)."""
    ridge: float
    center: Center

    def predict(self, k_test: Any, f0_test: Any = 0.0, j_theta0_test: Any = None) -> Array:
        """Return predictions (M, C).

        Args:
            k_test: cross kernel, (M, C, N, C), (M·C, N·C), or (M, N) where the kernel was (N, N).
            f0_test: outputs at the start, (M, C).
            j_theta0_test: J θ₀ there, where the decay is towards zero.

        Raises:
            InputError: a cross kernel of other columns, or no J θ₀ where it is needed.
        """
        rows, columns = len(self.kernel), self.residual.shape[1]
        cross = np.asarray(k_test, dtype=np.float64)
        cross = cross.reshape(-1, rows) if cross.size % rows == 0 else cross
        if cross.shape[1] != rows or (cross.size // rows * self.coefficients.shape[1]) % columns:
            raise InputError(f"the cross kernel must have {rows} columns, got shape {np.shape(k_test)}")
        change = (cross @ self.coefficients).reshape(-1, columns)
        return change + _prior(f0_test, j_theta0_test, self.center, change.shape)

    def filter(self) -> Array:
        """Return λᵢ/(λᵢ + λ) by ascending eigenvalue: the share of each mode that is learned; 0 outside the range."""
        shares = np.zeros_like(self.values)
        np.divide(self.values, self.values + self.ridge, out=shares, where=self.values > floor(self.values))
        return shares

    def dof(self) -> float:
        """Return the effective degrees of freedom, the sum of the filter, at most the rank; per output for (N, N)."""
        return float(self.filter().sum())

    def leave_one_out(self) -> Array:
        """Return the residual (N, C) of each sample predicted from all others, without refitting.

        Raises:
            InputError: a singular kernel without ridge.
        """
        return sample_loo(self.kernel, self.residual, self.ridge, intercept=False)

    def gcv(self) -> float:
        """Return the generalised cross-validation estimate of the squared test error; one output only.

        Raises:
            InputError: several outputs, for which it is 1 to 20 % too small; use `leave_one_out`.
        """
        return gcv(self.kernel, self.residual, self.ridge)


def kernel_regression(
    kernel: Any,
    y: Any,
    f0: Any = 0.0,
    ridge: float = 0.0,
    *,
    decay_center: Center = "init",
    j_theta0: Any = None,
) -> KernelRegression:
    """Return kernel (ridge) regression: where training of the linearised network ends.

    Args:
        kernel: of the training samples: (N, C, N, C), (N·C, N·C), or (N, N), then the same for every output.
        y: targets (N, C) or (N,).
        f0: outputs at the start, of the same shape. Zero is right for an antisymmetric start only.
        ridge: λ ≥ 0 beside half the sum of squares; see `ridge_from_weight_decay`. 0: the pseudo-inverse.
        decay_center: "init" for a penalty on |θ - θ₀|², "zero" for weight decay as torch has it.
        j_theta0: J θ₀ on the training samples, needed for "zero"; L·f₀ for a network homogeneous of degree L.

    Raises:
        InputError: shapes that do not fit, a negative ridge, or no J θ₀.

    Valid for the linearised network; how far the real one is from it is what `study` measures. O(rows³).
    """
    targets = np.asarray(y, dtype=np.float64)
    targets = targets.reshape(len(targets), -1)
    samples, outputs = targets.shape
    matrix = np.asarray(kernel, dtype=np.float64)
    matrix = matrix.reshape(math.isqrt(matrix.size), -1) if math.isqrt(matrix.size) ** 2 == matrix.size else matrix
    if matrix.shape not in ((samples, samples), (targets.size, targets.size)):
        raise InputError(f"targets ({samples}, {outputs}) need a kernel of as many rows, got {np.shape(kernel)}")
    if not ridge >= 0 or math.isinf(ridge):
        raise InputError(f"ridge must be finite and at least 0, got {ridge}")
    residual = targets - _prior(f0, j_theta0, decay_center, targets.shape)
    if not (np.isfinite(matrix).all() and np.isfinite(residual).all()):
        raise InputError("kernel, targets and outputs must be finite")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clip(min=0)
    inverse = np.zeros_like(values)
    np.divide(1.0, values + ridge, out=inverse, where=values + ridge > floor(values))
    coefficients = vectors @ (inverse[:, None] * (vectors.T @ residual.reshape(len(matrix), -1)))
    return KernelRegression(matrix, values, coefficients, residual, float(ridge), decay_center)


def _prior(f0: Any, j_theta0: Any, center: Center, shape: tuple[int, ...]) -> Array:
    if center not in ("init", "zero"):
        raise InputError(f'decay_center must be "init" or "zero", got {center!r}')
    start = np.asarray(f0, dtype=np.float64)
    if start.ndim and start.size != math.prod(shape):
        raise InputError(f"f0 must have the shape {shape}, got {start.shape}")
    start = start.reshape(shape) if start.ndim else np.full(shape, float(start))
    if center == "init":
        return start
    if j_theta0 is None or np.size(j_theta0) != math.prod(shape):
        raise InputError(f'decay_center="zero" needs J theta0 of shape {shape} (L·f0 for an L-homogeneous network)')
    return start - np.asarray(j_theta0, dtype=np.float64).reshape(shape)


def floor(values: Array) -> float:
    """Return what rounding makes of a zero eigenvalue: n·ε·λ₁."""
    return len(values) * float(np.finfo(np.float64).eps) * max(float(values.max(initial=0.0)), 0.0)


def ridge_from_weight_decay(
    weight_decay: float, samples: int, outputs: int, *, loss: str = "mse(mean)", optimizer: str = "sgd"
) -> float:
    """Return λ = weight_decay / s, s the factor of the loss: wd·N·C/2 for torch's mean squared error.

    The decay is towards zero: use it with `decay_center="zero"`.

    Args:
        weight_decay: added to the gradient as wd·θ (coupled L2).
        samples: N that the loss averages over.
        outputs: C.
        loss: "mse(mean)", "mse(sum)" or "half_sum".
        optimizer: "sgd", or "adam" with its coupled weight_decay.

    Raises:
        InputError: another loss, or an optimizer whose fixed point is not ridge with K (AdamW: ridge with K_D).
    """
    if optimizer.lower() not in ("sgd", "adam"):
        raise InputError(
            f"weight decay is a ridge for coupled L2 (sgd, adam) only, got {optimizer!r}; the fixed point of AdamW is "
            "ridge with the preconditioned kernel J D J^T"
        )
    if loss not in _LOSSES:
        raise InputError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}; others have no ridge of their own")
    if weight_decay < 0 or samples < 1 or outputs < 1:
        raise InputError(f"weight_decay >= 0 and N, C >= 1 are needed, got {weight_decay}, {samples}, {outputs}")
    return weight_decay / (_LOSSES[loss] / (samples * outputs if loss == "mse(mean)" else 1))


def best_ridge(kernel: Any, residual: Any, count: int = 41) -> tuple[float, float]:
    """Return the ridge of the smallest leave-one-sample-out error, and that mean square error.

    Args:
        kernel: (N·C, N·C) or (N, N).
        residual: y - f₀, (N, C).
        count: of the grid, from 1e-6 to 1e2 times the mean eigenvalue.

    Raises:
        InputError: shapes that do not fit, or a kernel of zeros.
    """
    matrix, left = np.asarray(kernel, dtype=np.float64), np.asarray(residual, dtype=np.float64)
    mean = float(matrix.trace()) / len(matrix)
    if not mean > 0:
        raise InputError("a ridge needs a kernel with a positive trace, got zeros")
    grid = mean * np.geomspace(1e-6, 1e2, count)
    errors = [float((sample_loo(matrix, left, ridge, intercept=False) ** 2).mean()) for ridge in grid.tolist()]
    best = int(np.argmin(errors))
    return float(grid[best]), errors[best]
