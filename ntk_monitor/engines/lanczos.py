"""The largest eigenvalues of a symmetric matrix from products with it, as few as possible.

A is n × n, V an orthonormal basis, θ and V y the eigenpairs of Vᵀ A V. The basis grows by the residual A V y - θ V y of
a pair that has not converged and shrinks to the best pairs when it is full: thick-restart Lanczos, with residuals
computed instead of carried along, so that products rounded to float32 do it no harm. Every pair starts from a vector of
its own: a single Krylov space would miss the copies of a multiple eigenvalue, and tangent kernels have many.

Source: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM Journal on Matrix
Analysis and Applications 22 (2000).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from ntk_monitor.errors import NumericsError

# Products after the start that must show nothing larger. A start that is an eigenvector, but not of one of the largest
# eigenvalues, has no residual either.
_EXPLORED = 4


def leading(
    product: Callable[[Float64[ndarray, " n"]], Float64[ndarray, " n"]],
    start: Float64[ndarray, "n m"],
    k: int,
    tolerance: float,
) -> tuple[Float64[ndarray, " k"], Float64[ndarray, "n k"]]:
    """Return the k largest eigenvalues, descending, and their eigenvectors.

    Each has an eigenvalue of A within `tolerance` times the largest. Costs one product for each vector that the basis
    grows by, and memory of 2 n (2 k + 40) doubles.

    Args:
        product: v → A v, A symmetric.
        start: guesses of the eigenvectors; missing ones are drawn from a fixed seed.
        k: 1 to n.
        tolerance: largest residual that counts as converged, relative to the largest eigenvalue.

    Raises:
        NumericsError: a product that is not finite, or no convergence after 100 + 50 k products.
    """
    basis = _Basis(product, len(start), min(len(start), 2 * k + 40))
    for guess in start.T[: basis.width]:
        basis.add(guess)
    while basis.size < k:
        basis.add(None)
    opened, limit = basis.products, 100 + 50 * k
    while True:
        values, inner = basis.pairs()
        wanted = min(k + 1, basis.size)
        residuals = basis.residuals(values[:wanted], inner[:, :wanted])
        sizes = np.linalg.norm(residuals, axis=0)
        open_pairs = np.flatnonzero(sizes > tolerance * np.abs(values).max())
        explored = basis.products - opened >= _EXPLORED
        if basis.size == len(start) or (explored and not (open_pairs < k).any()):
            return values[:k], basis.vectors(inner[:, :k])
        if basis.products >= limit:
            raise NumericsError(
                f"{k} eigenvalues did not converge to {tolerance:.1e} of the largest in {limit} products, "
                f"the worst residual is {sizes[:k].max() / np.abs(values).max():.1e}; ask for fewer, or raise tolerance"
            )
        if basis.size == basis.width:
            basis.shrink(inner[:, : k + (basis.width - k) // 3])
        basis.add(residuals[:, open_pairs[0]] if len(open_pairs) else None)


class _Basis:
    """V, A V and Vᵀ A V, growing by one column at a time."""

    def __init__(self, product: Callable[[ndarray], ndarray], n: int, width: int) -> None:
        self._product = product
        self._v, self._av = np.empty((n, width)), np.empty((n, width))
        self._inner = np.empty((width, width))
        self._random = np.random.default_rng(0)
        self.width, self.size, self.products = width, 0, 0

    def add(self, direction: ndarray | None) -> None:
        """Add a direction, or a random one where it is None or lies in the span already."""
        v = self._fresh(direction)
        while v is None:
            v = self._fresh(self._random.standard_normal(len(self._v)))
        image = np.asarray(self._product(v), dtype=np.float64)
        self.products += 1
        if not np.isfinite(image).all():
            raise NumericsError(
                "a product with the kernel is not finite, so that no eigenvalue exists; "
                "look for NaN or infinity in the weights, the inputs or the preconditioner"
            )
        j = self.size
        self._v[:, j], self._av[:, j] = v, image
        self.size = j + 1
        self._inner[: j + 1, j] = self._inner[j, : j + 1] = self._v[:, : j + 1].T @ image

    def _fresh(self, direction: ndarray | None) -> ndarray | None:
        """Return the unit part of a direction outside the span; None where rounding is all there is."""
        length = 0.0 if direction is None else float(np.linalg.norm(direction))
        if direction is None or length == 0:
            return None
        v, known = direction / length, self._v[:, : self.size]
        for _ in range(2):  # once leaves what rounding of a large projection leaves
            v = v - known @ (known.T @ v)
            rest = float(np.linalg.norm(v))
            if rest < 1e-10:
                return None
            v = v / rest
        return v

    def pairs(self) -> tuple[ndarray, ndarray]:
        """Return all θ, descending, and their y."""
        values, inner = np.linalg.eigh(self._inner[: self.size, : self.size])
        return values[::-1], inner[:, ::-1]

    def vectors(self, inner: ndarray) -> ndarray:
        """Return V y."""
        return np.asarray(self._v[:, : self.size] @ inner)

    def residuals(self, values: ndarray, inner: ndarray) -> ndarray:
        """Return A V y - θ V y."""
        return np.asarray(self._av[:, : self.size] @ inner - self.vectors(inner) * values)

    def shrink(self, inner: ndarray) -> None:
        """Keep these combinations only."""
        m, kept, images = inner.shape[1], self.vectors(inner), self._av[:, : self.size] @ inner
        self._v[:, :m], self._av[:, :m] = kept, images
        gram = kept.T @ images
        self._inner[:m, :m] = (gram + gram.T) / 2
        self.size = m
