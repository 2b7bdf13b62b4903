"""Modes: the residual in the eigenbasis of the loss-weighted kernel, and its decay between two probes in one basis.

M = Sᵀ K S (n × n, n = N·C), u = S⁺ dL/df; K unnormalised, S Sᵀ the loss's curvature in the outputs, its 1/N inside.
Gradient descent with learning rate lr multiplies the coordinate of u along eigenvector i by 1 - lr·rate_i, exactly for
a fixed kernel and a quadratic loss (Jacot et al. 2018), to first order otherwise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.losses import Terms
from ntk_monitor.spectrum import Spectrum

Array = NDArray[np.float64]


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
