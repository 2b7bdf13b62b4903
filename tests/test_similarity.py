"""Alignment is unbiased, change is exact where cosines cancel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_monitor.similarity import _hsic, alignment, kernel_change
from tests import reference


def gram(n: int, p: int, seed: int) -> np.ndarray:
    j = np.random.default_rng(seed).normal(size=(n, p))
    return np.asarray(j @ j.T)


@settings(max_examples=12)
@given(st.integers(4, 8), st.integers(1, 4), st.integers(0, 99))
def test_the_unbiased_estimate_is_the_average_over_quadruples(n: int, p: int, seed: int) -> None:
    k, y = gram(n, p, seed), gram(n, 2, seed + 1)
    assert _hsic(k, y) == pytest.approx(reference.hsic(k, y), rel=1e-10, abs=1e-10)


def test_targets_are_aligned_with_their_own_kernel() -> None:
    one_hot = np.eye(3)[np.arange(20) % 3]
    assert alignment(one_hot @ one_hot.T, one_hot) == pytest.approx(1, abs=1e-12)
    assert alignment(5 * one_hot @ one_hot.T + 100, one_hot) == pytest.approx(1, abs=1e-9)
    assert alignment(-one_hot @ one_hot.T, one_hot) == pytest.approx(-1, abs=1e-12)


def test_unrelated_targets_have_no_alignment_on_average() -> None:
    found = []
    for seed in range(400):
        labels = np.random.default_rng(seed).integers(2, size=12)
        found.append(alignment(gram(12, 40, seed + 1000), np.eye(2)[labels]))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert error < 0.02  # else anything would pass


def test_the_number_of_samples_does_not_move_the_estimate_as_it_moves_the_biased_one() -> None:
    def biased(k: np.ndarray, y: np.ndarray) -> float:
        h = np.eye(len(k)) - 1 / len(k)
        k, y = h @ k @ h, h @ y @ h
        return float((k * y).sum() / np.linalg.norm(k) / np.linalg.norm(y))

    def mean(estimate: object, n: int) -> float:
        values = []
        for seed in range(150):
            generator = np.random.default_rng(seed)
            labels = generator.integers(2, size=n)
            features = generator.normal(size=(n, 30))
            features[:, 0] += 2.0 * labels
            t = np.eye(2)[labels]
            k = features @ features.T
            values.append(alignment(k, t) if estimate is alignment else biased(k, t @ t.T))
        return float(np.nanmean(values))

    assert abs(mean(alignment, 12) - mean(alignment, 96)) < 0.06
    assert abs(mean(biased, 12) - mean(biased, 96)) > 0.1


@pytest.mark.parametrize(
    ("kernel", "targets"),
    [
        (np.eye(3), np.eye(3)),
        (np.zeros((6, 6)), np.arange(6.0)[:, None]),
        (gram(6, 3, 0), np.ones((6, 1))),
    ],
    ids=["three samples", "zero kernel", "constant targets"],
)
def test_where_there_is_no_alignment_there_is_no_number(kernel: np.ndarray, targets: np.ndarray) -> None:
    assert np.isnan(alignment(kernel, targets))


@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_growth_alone_is_no_change(n: int, factor: float, seed: int) -> None:
    k = gram(n, 3, seed)
    assert kernel_change(k, factor * k) < 1e-30


def test_tiny_changes_are_resolved() -> None:
    a, b = np.diag([1.0, 0.0]), np.diag([1.0, 1e-5])
    # 1 - cos = 1 - 1/√(1 + 1e-10) = 5e-11 to eleven digits; computed as 1 - cos it has five.
    exact = 0.5e-10 * (1 - 0.75e-10)
    assert kernel_change(a, b) == pytest.approx(exact, rel=1e-11)
    tiny = np.diag([1.0, 1e-11])
    assert kernel_change(a, tiny) == pytest.approx(0.5e-22, rel=1e-9)


def test_orthogonal_kernels_and_missing_ones() -> None:
    assert kernel_change(np.diag([1.0, 0.0]), np.diag([0.0, 1.0])) == pytest.approx(1, rel=1e-15)
    for bad in (np.zeros((2, 2)), np.full((2, 2), np.nan), np.full((2, 2), np.inf)):
        assert np.isnan(kernel_change(np.eye(2), bad))
        assert np.isnan(kernel_change(bad, np.eye(2)))
