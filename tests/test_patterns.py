"""Which samples and outputs a mode is about: against a rank-one part found by iteration, and by laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ntk_monitor.patterns import leading, patterns, sample_residual

Array = NDArray[np.float64]
SHAPES = [(1, 1, 1), (5, 1, 3), (1, 4, 2), (4, 3, 12), (3, 7, 16), (9, 2, 16)]


def modes(samples: int, outputs: int, count: int, seed: int = 0) -> Array:
    """Random orthonormal columns."""
    draw = np.random.default_rng(seed).normal(size=(samples * outputs, samples * outputs))
    return np.asarray(np.linalg.qr(draw)[0][:, :count])


def rank_one(v: Array, samples: int) -> tuple[Array, Array]:
    """Return u and w of one mode by alternating least squares from many starts, the best of them."""
    matrix = v.reshape(samples, -1)
    best, found = -1.0, (np.zeros(samples), np.zeros(matrix.shape[1]))
    for start in np.eye(matrix.shape[1]):
        w = start + 1e-3
        for _ in range(20_000):
            u = matrix @ w
            before, w = w, matrix.T @ u / max(float(np.linalg.norm(matrix.T @ u)), 1e-300)
            if np.abs(w - before).max() < 1e-14:
                break
        if np.linalg.norm(matrix @ w) > best:
            best, found = float(np.linalg.norm(matrix @ w)), (matrix @ w, w)
    return found


@pytest.mark.parametrize(("samples", "outputs", "count"), SHAPES)
def test_patterns_are_the_best_rank_one_part(samples: int, outputs: int, count: int) -> None:
    v = modes(samples, outputs, count)
    u, w = patterns(v, samples, np.ones(v.shape[1]))
    assert u.shape == (v.shape[1], samples)
    assert w.shape == (v.shape[1], outputs)
    for k in range(v.shape[1]):
        slow_u, slow_w = rank_one(v[:, k], samples)
        np.testing.assert_allclose(np.outer(u[k], w[k]), np.outer(slow_u, slow_w), atol=1e-7)
        assert np.linalg.norm(w[k]) == pytest.approx(1.0)
        assert np.linalg.norm(u[k]) <= 1 + 1e-12


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_signs_follow_the_residual(samples: int, outputs: int, seed: int) -> None:
    v = modes(samples, outputs, 16, seed)
    residual = np.random.default_rng(seed + 1).normal(size=samples * outputs)
    u, w = patterns(v, samples, v.T @ residual)
    flipped = patterns(-v, samples, -v.T @ residual)
    np.testing.assert_allclose(u, flipped[0], atol=1e-12)
    np.testing.assert_allclose(w, flipped[1], atol=1e-12)
    for k in range(v.shape[1]):
        assert w[k, np.abs(w[k]).argmax()] > 0
        signed = v[:, k] * np.sign(v[:, k] @ residual)  # along which the residual is positive
        assert np.outer(u[k], w[k]).reshape(-1) @ signed > 0


def test_without_a_coordinate_the_largest_entry_is_positive() -> None:
    v = modes(6, 2, 8)
    for coordinates in (None, np.zeros(12)):
        for sign in (1.0, -1.0):
            u, _ = patterns(sign * v, 6, coordinates)
            assert (u[np.arange(8), np.abs(u).argmax(axis=1)] > 0).all()


def test_one_output_is_the_mode_itself() -> None:
    v = modes(7, 1, 7)
    u, w = patterns(v, 7, np.ones(7))
    np.testing.assert_allclose(u, v.T, atol=1e-12)
    np.testing.assert_array_equal(w, np.ones((7, 1)))


@pytest.mark.parametrize("n", [1, 5, 16, 40])
def test_leading_vectors_are_those_of_the_whole_eigensystem(n: int) -> None:
    draw = np.random.default_rng(n).normal(size=(n, n + 2))
    kernel = draw @ draw.T
    found = leading(kernel)
    whole = np.linalg.eigh(kernel)[1][:, ::-1]
    assert found.shape == (n, min(n, 16))
    np.testing.assert_allclose(np.abs((found * whole[:, : found.shape[1]]).sum(axis=0)), 1.0, atol=1e-10)


def test_sample_residual_is_a_norm_over_outputs() -> None:
    residual = np.random.default_rng(0).normal(size=12)
    slow = [sum(residual[3 * n + c] ** 2 for c in range(3)) ** 0.5 for n in range(4)]
    np.testing.assert_allclose(sample_residual(residual, 4), slow, rtol=1e-14)
