"""Patterns: which samples and which outputs a mode is about.

N samples, C outputs, n = N·C rows, sample-major. A mode is an eigenvector v (n,), read as a matrix V (N, C) of norm 1.
Its best rank-one part u wᵀ, with |w| = 1, says which samples load on it (u) along which outputs (w); |u| ≤ 1 is how
much of the mode that is: 1 for one output, and where all samples move along the same outputs.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEADING = 16
"""Modes whose patterns are stored."""


def patterns(vectors: Array, samples: int, coordinates: Array | None = None) -> tuple[Array, Array]:
    """Return u (k, N) and w (k, C) of k modes.

    The largest entry of w is positive, and u has the sign that makes the residual's coordinate along the mode positive:
    gradient descent takes from u wᵀ as it is written here. Without a coordinate the largest entry of u is positive.

    Args:
        vectors: (n, k), a mode in each column, of length 1.
        samples: N.
        coordinates: (k,) or more, of the residual along them; None: not known.

    Cost: k singular value decompositions of N × C.

    Source: Eckart and Young 1936: the leading singular pair is the best approximation of rank one.
    """
    matrices = np.asarray(vectors, dtype=np.float64).T.reshape(vectors.shape[1], samples, -1)
    left, sizes, right = np.linalg.svd(matrices, full_matrices=False)
    u, w = left[:, :, 0] * sizes[:, :1], right[:, 0, :]
    flip = _signs(w)
    u, w = u * flip, w * flip
    sign = _signs(u)
    if coordinates is not None:
        along = np.sign(coordinates[: len(u), None])
        sign = np.where(along == 0, sign, along)
    return u * sign, w


def _signs(rows: Array) -> Array:
    """Return the sign of the largest entry of each row, as a column; 1 for a row of zeros."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return np.where(largest < 0, -1.0, 1.0)


def leading(kernel: Array, count: int = LEADING) -> Array:
    """Return the eigenvectors (n, k ≤ count) of the largest eigenvalues of a symmetric kernel (n, n), descending.

    Cost: O(n³), about half of all eigenvectors.
    """
    # Imported here: only kernels without modes need it.
    from scipy.linalg import eigh

    n = len(kernel)
    _, vectors = eigh(kernel, subset_by_index=[max(0, n - count), n - 1])
    return np.ascontiguousarray(vectors[:, ::-1])


def sample_residual(residual: Array, samples: int) -> Array:
    """Return the norm (N,) of each sample's part of a residual u (n,); their squares add up to |u|²."""
    return np.asarray(np.linalg.norm(residual.reshape(samples, -1), axis=1))
