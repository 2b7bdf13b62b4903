"""Spectrum of a kernel matrix, with its noise floor. K is n × n, symmetric, PSD up to rounding; λ₁ ≥ … ≥ λₙ.

Solved in float64 on the CPU: GPU solvers have failed or corrupted memory on low-rank float32 matrices.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError, NumericsError

Array = NDArray[np.float64]

# Backpropagation sums many rounded products: its relative error is a few units in the last place, not one.
_JACOBIAN_ULPS = 8

_EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of a kernel and what can honestly be said about them.

    Attributes:
        eigenvalues: (n,) descending, in the unit of the kernel; rounding may leave tiny negative ones at the end.
        eigenvectors: (n, n), column i belongs to eigenvalue i; None when they were not asked for.
        noise_floor: eigenvalues below it are rounding noise.
    """

    eigenvalues: Array
    eigenvectors: Array | None
    noise_floor: float

    def __repr__(self) -> str:
        bound = ">= " if self.condition_is_lower_bound else ""
        return (
            f"Spectrum(n={len(self.eigenvalues)}, lambda_max={self.lambda_max:.4g}, rank={self.rank}, "
            f"condition_number={bound}{self.condition_number:.4g}, noise_floor={self.noise_floor:.2g})"
        )

    @staticmethod
    def of(kernel: Any, *, vectors: bool = True, jacobian_eps: float = 0.0) -> "Spectrum":
        """Solve for the spectrum of a kernel.

        Args:
            kernel: (n, n) array or tensor, or the full layout (N, C, N, C), which is flattened sample-major.
            vectors: also return eigenvectors (about three times the cost).
            jacobian_eps: machine epsilon of the Jacobian behind the kernel, e.g. 1.2e-7 for a float32 one with a
                float64 Gram; 0: the kernel's own dtype alone sets the floor.

        The floor is n ε λ₁ (eigensolver and Gram, ε of the kernel's dtype) plus (8 ε_J)² tr K (Jacobian rounding: an
        error matrix E moves singular values of J by at most its norm, hence eigenvalues near zero by its square).

        Raises:
            InputError: the kernel is not square.
            NumericsError: NaN or infinity in the kernel (checked before LAPACK, which ignores or dies of them).

        Cost: O(n³).
        """
        matrix, eps = _square(kernel)
        if not np.isfinite(matrix).all():
            bad = int((~np.isfinite(matrix)).sum())
            raise NumericsError(f"the kernel must be finite, got {bad} of {matrix.size} entries NaN or infinite")
        matrix = (matrix + matrix.T) / 2
        if vectors:
            ascending, columns = np.linalg.eigh(matrix)
            eigenvectors: Array | None = np.ascontiguousarray(columns[:, ::-1])
        else:
            ascending, eigenvectors = np.linalg.eigvalsh(matrix), None
        eigenvalues = np.ascontiguousarray(ascending[::-1])
        top = max(float(eigenvalues[0]), -float(eigenvalues[-1]), 0.0)
        floor = len(matrix) * eps * top + (_JACOBIAN_ULPS * jacobian_eps) ** 2 * float(max(np.trace(matrix), 0.0))
        return Spectrum(eigenvalues, eigenvectors, floor)

    @property
    def trace(self) -> float:
        """Sum of eigenvalues: squared gradient norms summed over all outputs of all samples."""
        return float(self.eigenvalues.sum())

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def rank(self) -> int:
        """Number of eigenvalues above the noise floor."""
        return int((self.eigenvalues > self.noise_floor).sum())

    @property
    def negative(self) -> int:
        """Number of eigenvalues below minus the noise floor; above 0 the matrix is no kernel."""
        return int((self.eigenvalues < -self.noise_floor).sum())

    @property
    def condition_number(self) -> float:
        """λ₁ over the smallest eigenvalue above the noise floor; NaN for a zero kernel.

        A lower bound when `condition_is_lower_bound`; comparable between kernels only at equal rank and precision.
        """
        return float(self.eigenvalues[0] / self.eigenvalues[self.rank - 1]) if self.rank else float("nan")

    @property
    def condition_is_lower_bound(self) -> bool:
        """True when some eigenvalues lie under the noise floor, so that the true condition number is larger."""
        return self.rank < len(self.eigenvalues)

    @property
    def effective_rank(self) -> float:
        """exp(entropy of λᵢ / Σλ), 1 to n; NaN for a zero kernel. Source: Roy and Vetterli 2007."""
        p = self._shares()
        p = p[p > 0]
        return float(np.exp(-(p * np.log(p)).sum())) if p.size else float("nan")

    @property
    def participation_ratio(self) -> float:
        """(Σλ)² / Σλ², 1 to n; NaN for a zero kernel."""
        p = self._shares()
        return float(1 / (p**2).sum()) if p.any() else float("nan")

    @property
    def intrinsic_dimension(self) -> float:
        """Σλ / λ₁, 1 to n: the stable rank of the Jacobian; NaN for a zero kernel."""
        p = self._shares()
        return float(1 / p.max()) if p.any() else float("nan")

    @property
    def stable_rank(self) -> float:
        """The stable rank ‖J‖²_F / ‖J‖²₂ of the Jacobian, which is `intrinsic_dimension` of the kernel."""
        return self.intrinsic_dimension

    def _shares(self) -> Array:
        positive = self.eigenvalues.clip(min=0)
        total = positive.sum()
        return positive / total if total > 0 else np.zeros_like(positive)


def _square(kernel: Any) -> tuple[Array, float]:
    """Return the kernel as a square float64 matrix, and the machine epsilon of the dtype it came in."""
    name = str(kernel.dtype).removeprefix("torch.") if hasattr(kernel, "dtype") else "float64"
    values = kernel.detach().cpu().double().numpy() if hasattr(kernel, "detach") else np.asarray(kernel)
    if values.ndim == 4 and values.shape[:2] == values.shape[2:]:
        values = values.reshape(values.shape[0] * values.shape[1], -1)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise InputError(
            f"a kernel must be square, (n, n) or (N, C, N, C), got {values.shape}; pass x2=None for the kernel of a set"
        )
    return values.astype(np.float64), _EPS.get(name, _EPS["float64"])
