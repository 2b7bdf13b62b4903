"""Leaving samples out by formula equals refitting without them, and predicts the error on new samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_monitor.errors import InputError
from ntk_monitor.metrics import Measured, evaluate
from ntk_monitor.metrics.measured import Array
from ntk_monitor.metrics.regression import gcv, sample_loo
from tests import twins_metrics as twins
from tests.test_metrics_values import relu_kernel


def problem(n: int, c: int, seed: int) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    j = generator.normal(size=(n * c, n * c + 2))
    return j @ j.T, generator.normal(size=(n, c))


@settings(max_examples=12, deadline=None)
@given(st.integers(3, 6), st.integers(1, 3), st.integers(0, 99), st.sampled_from([0.0, 0.3]), st.booleans())
def test_leaving_out_equals_refitting(n: int, c: int, seed: int, ridge: float, intercept: bool) -> None:
    kernel, y = problem(n, c, seed)
    found = sample_loo(kernel, y, ridge, intercept=intercept)
    np.testing.assert_allclose(found, twins.sample_loo(kernel, y, ridge, intercept), rtol=1e-5, atol=1e-7)


@settings(max_examples=6, deadline=None)
@given(st.integers(3, 6), st.integers(0, 99))
def test_one_kernel_serves_every_column(n: int, seed: int) -> None:
    kernel, _ = problem(n, 1, seed)
    y = np.random.default_rng(seed + 1).normal(size=(n, 3))
    np.testing.assert_allclose(
        sample_loo(kernel, y, 0.1), twins.sample_loo(kernel, y, 0.1, intercept=True), rtol=1e-6, atol=1e-8
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 8), st.integers(0, 99), st.floats(1e-3, 10))
def test_gcv_equals_its_definition_and_has_its_limits(n: int, seed: int, ridge: float) -> None:
    kernel, y = problem(n, 1, seed)
    assert gcv(kernel, y, ridge) == pytest.approx(twins.gcv(kernel, y[:, 0], ridge), rel=1e-8)
    shifted = kernel + 0.1 * np.eye(n)
    assert gcv(shifted, y, 0) == pytest.approx(twins.gcv(shifted, y[:, 0], 1e-7), rel=1e-4)
    low = kernel[:, :2] @ kernel[:2, :]
    assert gcv(low, y, 0) == pytest.approx(twins.gcv(low, y[:, 0], 1e-6 * np.trace(low)), rel=1e-2)


def test_the_metrics_are_relative_to_predicting_the_mean() -> None:
    n = 12
    y = np.random.default_rng(0).normal(size=(n, 2))
    # Unrelated samples: nothing but the mean of the others can be predicted.
    found = evaluate(Measured(kernel=np.eye(2 * n), samples=n, targets=y), ["sample_loo"])
    assert found["sample_loo"] == pytest.approx(1, rel=1e-10)
    left = sample_loo(np.eye(2 * n), y, 1.0)
    np.testing.assert_allclose(left, [y[i] - np.delete(y, i, axis=0).mean(0) for i in range(n)], rtol=1e-10)
    smooth = np.linspace(0, 1, n)[:, None]
    kernel = np.exp(-((smooth - smooth.T) ** 2) / 0.1)
    names = ["sample_loo", "gcv_error"]
    good = evaluate(Measured(kernel=kernel, samples=n, targets=np.sin(3 * smooth)), names)
    assert set(good) == set(names)
    assert max(good.values()) < 0.1


def test_shapes_and_singular_kernels_are_refused() -> None:
    with pytest.raises(InputError, match="N·D rows"):
        sample_loo(np.eye(5), np.ones((4, 3)), 0.1)
    with pytest.raises(InputError, match="raise ridge"):
        sample_loo(np.zeros((4, 4)), np.ones((4, 1)), 0.0)
    with pytest.raises(InputError, match="use sample_loo"):
        gcv(np.eye(4), np.ones((4, 2)), 0.1)


def splits(n: int, noise: float, ridge: float, count: int) -> dict[str, float]:
    """Mean over splits of each estimate over the error on 500 new samples: three outputs that share features."""
    generator = np.random.default_rng(1)
    coupling = np.array([[1.0, 0.7, 0.3], [0.7, 1.0, 0.5], [0.3, 0.5, 1.0]])
    sums = dict.fromkeys(("test", "samples", "rows", "gcv"), 0.0)
    for _ in range(count):
        x = generator.normal(size=(n + 500, 4))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        clean = np.stack([np.sin(3 * x[:, 0]), np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2], x[:, 1] ** 2], axis=1)
        # Noise too is shared by the outputs of a sample: what makes single rows easy to predict.
        y = clean + noise * generator.normal(size=clean.shape) @ np.linalg.cholesky(coupling).T
        kernel = np.kron(relu_kernel(x, x), coupling)
        m = 3 * n
        inner, outer = kernel[:m, :m], kernel[m:, :m]
        solved = np.linalg.solve(inner + ridge * np.eye(m), y[:n].reshape(-1))
        sums["test"] += float(np.mean((outer @ solved - y[n:].reshape(-1)) ** 2))
        sums["samples"] += float(np.mean(sample_loo(inner, y[:n], ridge, intercept=False) ** 2))
        inverse = np.linalg.inv(inner + ridge * np.eye(m))
        sums["rows"] += float(np.mean((inverse @ y[:n].reshape(-1) / inverse.diagonal()) ** 2))
        sums["gcv"] += gcv(inner, y[:n].reshape(-1), ridge)
    return {name: total / sums["test"] for name, total in sums.items()}


@pytest.mark.parametrize(
    ("n", "noise", "ridge", "count"),
    # Twenty splits of 64 samples scatter by 7 %, so there are eighty of them.
    [
        (128, 0.3, 0.1, 20),
        pytest.param(64, 0.3, 0.1, 80, marks=pytest.mark.slow),
        pytest.param(128, 0.1, 0.01, 80, marks=pytest.mark.slow),
    ],
)
def test_leaving_samples_out_estimates_the_error_on_new_ones(n: int, noise: float, ridge: float, count: int) -> None:
    found = splits(n, noise, ridge, count)
    assert found["samples"] == pytest.approx(1, abs=0.06)
    # Outputs that share their noise predict each other: single rows, and with them the plain formula, promise too much.
    assert found["rows"] < 0.7
    assert found["gcv"] < 0.7
