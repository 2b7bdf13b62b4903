"""Modes: the residual in the eigenbasis of the loss-weighted kernel, and its decay between two probes in one basis.

M = Sᵀ K S (n × n, n = N·C), u = S⁺ dL/df; K unnormalised, S Sᵀ the loss's curvature in the outputs, its 1/N inside.
Gradient descent with learning rate lr multiplies the coordinate of u along eigenvector i by 1 - lr·rate_i, exactly for
a fixed kernel and a quadratic loss (Jacot et al. 2018), to first order otherwise.

Decay means nothing between two bases: compare `coordinates` with `carried` of the next probe, or everything with one
fixed basis (`in_basis`). Which mode is which over many probes is said by `Tracks`, which subspace by `clusters`.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.losses import Terms
from ntk_monitor.spectrum import Spectrum

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class InBasis:
    """A later probe in the basis of a reference probe.

    Attributes:
        coordinates: (n,) later residual along the reference's columns; squares sum to |u|².
        rates: (n,) diagonal of V₀ᵀ M V₀, 1 / learning rate: the speed along each column, if nothing else moved.
        off_diagonal: norm of the rest of V₀ᵀ M V₀ relative to the whole (Frobenius), 0 to 1. 0: the columns are modes
            still. Above about 0.5 they mix too much for a column to have a speed of its own.
    """

    coordinates: Array
    rates: Array
    off_diagonal: float


@dataclass(frozen=True, slots=True)
class Modes:
    """Eigenbasis of the loss-weighted kernel at one probe, and the residual in it.

    Attributes:
        rates: (n,) eigenvalues of M, descending, unit 1/learning rate.
        floor: rates below it are rounding noise.
        vectors: (n, n), column i belongs to rate i.
        coordinates: (n,) residual along each column; squares sum to |u|² in every basis.
        terms: loss terms at this probe, which define its coordinates.
    """

    rates: Array
    floor: float
    vectors: Array
    coordinates: Array
    terms: Terms

    @staticmethod
    def of(kernel: Array, terms: Terms, *, jacobian_eps: float = 0.0) -> "Modes":
        """Solve for the modes.

        Args:
            kernel: full kernel (N, C, N, C) or (N·C, N·C), unnormalised.
            terms: loss gradient and curvature at the same outputs.
            jacobian_eps: see `Spectrum.of`.

        Raises:
            InputError: kernel and outputs differ in size.
            NumericsError: the kernel is not finite.

        Cost: one symmetric eigendecomposition, O((N·C)³), and N² C³ for the weighting.
        """
        n, c = terms.gradient.shape
        if kernel.size != (n * c) ** 2:
            raise InputError(f"modes need the full kernel of {n} samples × {c} outputs, got {kernel.shape}")
        spectrum = Spectrum.of(weighted(kernel.reshape(n, c, n, c), terms.root), jacobian_eps=jacobian_eps)
        assert spectrum.eigenvectors is not None
        u = terms.residual()
        return Modes(
            spectrum.eigenvalues, spectrum.noise_floor, spectrum.eigenvectors, spectrum.eigenvectors.T @ u, terms
        )

    def carried(self, gradient: Array) -> Array:
        """Return a later loss gradient (N, C) as coordinates (n,) in this probe's basis: one basis at both ends."""
        return np.asarray(self.vectors.T @ self.terms.residual(gradient))

    @property
    def residual(self) -> Array:
        """The residual u = S⁺ g (n,), sample-major: what `directions` are measured along."""
        return self.terms.residual()

    def in_basis(self, kernel: Array, gradient: Array) -> InBasis:
        """Return a later probe in this one's basis and loss curvature: the basis of a plot over the whole run.

        Args:
            kernel: the later full kernel of the same samples, (N, C, N, C) or (N·C, N·C).
            gradient: the later loss gradient (N, C).

        Raises:
            InputError: a kernel of another size.

        Cost: 4 (N·C)³ multiply-adds, about half of `Modes.of`.
        """
        n, c = self.terms.gradient.shape
        if kernel.size != (n * c) ** 2:
            raise InputError(f"this basis has {n} samples × {c} outputs, the kernel shape {kernel.shape}")
        m = self.vectors.T @ weighted(kernel.reshape(n, c, n, c), self.terms.root) @ self.vectors
        diagonal = np.diag(m).copy()
        norm = float(np.linalg.norm(m))
        np.fill_diagonal(m, 0.0)
        share = float(np.linalg.norm(m)) / norm if norm > 0 else float("nan")
        return InBasis(self.carried(gradient), diagonal, share)


@dataclass(frozen=True, slots=True)
class Followed:
    """Which mode is which at one probe.

    Attributes:
        identities: (count,) number of the track each leading mode belongs to, by rank; never used again once lost.
        overlaps: (count,) squared cosine with the track's eigenvector at the previous probe; NaN for a new track.
    """

    identities: NDArray[np.int64]
    overlaps: Array


@dataclass(slots=True)
class Tracks:
    """Identities of the leading modes over probes, so that a line in a plot stays one mode when eigenvalues cross.

    Assignment of largest total overlap (Hungarian) between eigenvectors of neighbouring probes. A rank is no identity:
    where two eigenvalues cross, both ranks hold another mode than before.

    Attributes:
        count: leading modes that are reported; twice as many are followed, so that one can drop out and come back.
        least: squared cosine from which a mode is the same, at least 1/2. Modes of a degenerate eigenvalue lose their
            identity at each probe, as they should: follow their block (`clusters.matched`).
    """

    count: int = 16
    least: float = 0.5
    _vectors: Array | None = field(default=None, repr=False)
    _identities: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64), repr=False)
    _next: int = field(default=0, repr=False)

    def follow(self, vectors: Array) -> Followed:
        """Return the identities of this probe's leading modes. A probe of another size starts anew.

        Args:
            vectors: (n, n) eigenvectors as columns, leading ones first, of K (`Spectrum.eigenvectors`) or of M
                (`Modes.vectors`). Under cross-entropy those of M turn with the curvature: of 16 modes of an MLP on
                digits, 40 steps apart, K kept 11 and M 5.

        Cost: (2·count)² · n multiply-adds.
        """
        # Imported here: scipy.optimize takes about half a second to load.
        from scipy.optimize import linear_sum_assignment

        vectors = vectors[:, : 2 * self.count]
        size = vectors.shape[1]
        identities = np.full(size, -1, dtype=np.int64)
        overlaps = np.full(size, np.nan)
        if self._vectors is not None and self._vectors.shape[0] == vectors.shape[0]:
            squares = np.square(self._vectors.T @ vectors)
            for i, j in zip(*linear_sum_assignment(squares, maximize=True), strict=True):
                if squares[i, j] >= self.least:
                    identities[j], overlaps[j] = self._identities[i], squares[i, j]
        new = identities < 0
        identities[new] = self._next + np.arange(int(new.sum()))
        self._next += int(new.sum())
        self._vectors, self._identities = vectors.copy(), identities
        return Followed(identities[: self.count].copy(), overlaps[: self.count].copy())


def weighted(kernel: Array, root: Array) -> Array:
    """Return M = Sᵀ K S, (N·C, N·C), from K (N, C, N, C) and S (N, C, C) or diagonal (N, C)."""
    n, c = root.shape[:2]
    if root.ndim == 2:
        m = kernel * root[:, :, None, None] * root
    else:
        # Per-sample products as batched matrix multiplications: first the rows, then the columns.
        m = np.matmul(root.transpose(0, 2, 1), kernel.reshape(n, c, n * c)).reshape(n, c, n, c)
        m = np.matmul(m.transpose(2, 0, 1, 3).reshape(n, n * c, c), root).reshape(n, n, c, c).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(m).reshape(n * c, n * c)
