"""How far a kernel between samples turned from one probe to another. A and B are n × n, symmetric, PSD.

Drift is 1 - cosine of the matrices. Rotation of the top eigenspace: with P_A, P_B the projectors on the d leading
eigenvectors of each, tr(P_A P_B)/d is 1 when the spaces are the same and about d/n by chance. Where the spectrum has no
gap behind mode d, rounding alone turns the space, so d is put behind the widest gap that both spectra have.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.clusters import matched
from ntk_monitor.errors import InputError
from ntk_monitor.similarity import kernel_change

Array = NDArray[np.float64]

SHOWN = 24
"""Leading modes whose overlaps are kept for the figure."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What two kernels of the same samples have in common.

    Attributes:
        drift: 1 - cosine of the matrices, 0 to 1; blind to growth.
        dimension: d, leading modes that are compared as one space.
        held: part of each trace that the d modes hold, fractions.
        overlap: tr(P_A P_B)/d, 0 to 1.
        angle: largest angle between the two spaces, degrees, 0 to 90.
        chance: d/n, what unrelated spaces overlap.
        looked: leading modes that were looked for one by one.
        found: how many of them are found again (`ntk_monitor.clusters.matched`).
        cosines: (k, k) squared cosines of the k leading eigenvectors, rows those of A.
    """

    drift: float
    dimension: int
    held: tuple[float, float]
    overlap: float
    angle: float
    chance: float
    looked: int
    found: int
    cosines: Array


def centred(matrix: Array) -> Array:
    """Return H A H with H = I - 11ᵀ/n: without what all samples share, which alone can hold nine tenths of a trace."""
    return np.asarray(matrix - matrix.mean(axis=0) - matrix.mean(axis=1)[:, None] + matrix.mean(), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Basis:
    rates: Array
    vectors: Array
    floor: float

    @property
    def resolved(self) -> int:
        return int((self.rates > self.floor).sum())


def turn(before: Array, after: Array) -> Turn:
    """Return how far the kernel turned; O(n³).

    Raises:
        InputError: the matrices are not square, not of one size, not finite, or one of them is zero.
    """
    if before.ndim != 2 or before.shape != after.shape or before.shape[0] != before.shape[1]:
        raise InputError(f"two kernels of the same samples must be (n, n), got {before.shape} and {after.shape}")
    a, b = _basis(before), _basis(after)
    n = a.rates.size
    d = _dimension(a, b)
    cosines = a.vectors.T @ b.vectors
    inner = np.linalg.svd(cosines[:d, :d], compute_uv=False)
    found = matched(a, b)
    return Turn(
        drift=kernel_change(before, after),
        dimension=d,
        held=(_held(a, d), _held(b, d)),
        overlap=min(float(np.square(inner).sum()) / d, 1.0),
        angle=float(np.degrees(np.arccos(min(float(inner[-1]), 1.0)))),
        chance=d / n,
        looked=found.count,
        found=found.count - found.lost.size,
        cosines=np.square(cosines[:SHOWN, :SHOWN]),
    )


def _basis(matrix: Array) -> _Basis:
    norm = float(np.linalg.norm(matrix))
    if not (norm > 0 and np.isfinite(norm)):
        raise InputError("a kernel that is zero or not finite has no eigenspace; compare other probes")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    # Stored as float32: that rounding moves an eigenvalue by at most eps/2 · |K|_F (Weyl).
    return _Basis(values[::-1].copy(), vectors[:, ::-1], float(np.finfo(np.float32).eps) / 2 * norm)


def _held(basis: _Basis, d: int) -> float:
    return float(basis.rates[:d].sum() / basis.rates.sum())


def _dimension(a: _Basis, b: _Basis) -> int:
    """Return d: within the modes that hold 9/10 of A's trace, half of all at most, behind the widest gap in both."""
    holding = int(np.searchsorted(np.cumsum(a.rates), 0.9 * a.rates.sum())) + 1
    most = max(min(holding, a.rates.size // 2, a.resolved, b.resolved), 1)
    return max(range(1, most + 1), key=lambda d: min(_gap(a, d), _gap(b, d)))


def _gap(basis: _Basis, d: int) -> float:
    """Return λ_d over λ_{d+1}, with the noise floor for what lies below it."""
    return float(basis.rates[d - 1] / max(float(basis.rates[d]), basis.floor)) if d < basis.rates.size else 0.0
