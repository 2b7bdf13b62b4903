"""Noise of batches: unbiased where the plain formula saturates, and moments equal to those over every batch."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ntk_monitor.errors import InputError
from ntk_monitor.noise import (
    Array,
    NoiseScale,
    batch_forecast,
    batch_sharpness,
    gradient_gram,
    mean_square_limit,
    noise_scale,
    noise_scale_from_batches,
    pooled,
)
from tests import twins_metrics as twins


@settings(max_examples=15)
@given(st.integers(3, 8), st.integers(1, 6), st.integers(0, 99))
def test_signal_noise_and_error_equal_loops(m: int, p: int, seed: int) -> None:
    gradients = np.random.default_rng(seed).normal(size=(m, p)) + 0.5
    found = noise_scale(gradients @ gradients.T)
    signal, noise = twins.noise_scale(gradients)
    assert found.signal == pytest.approx(signal, rel=1e-9, abs=1e-12)
    assert found.noise == pytest.approx(noise, rel=1e-9, abs=1e-12)
    assert found.error == pytest.approx(twins.signal_error(gradients), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_gram_of_gradients_is_that_of_each_samples_own_loss(outputs: int) -> None:
    generator = np.random.default_rng(0)
    n, p = 5, 7
    jacobian, g = generator.normal(size=(n, outputs, p)), generator.normal(size=(n, outputs))
    own = np.array([n * sum(g[i, c] * jacobian[i, c] for c in range(outputs)) for i in range(n)])
    flat = jacobian.reshape(n * outputs, p)
    found = gradient_gram(flat @ flat.T, g)
    np.testing.assert_allclose(found, own @ own.T, rtol=1e-12)
    # The mean of the samples' gradients is the gradient of the mean.
    assert found.mean() == pytest.approx(np.sum((flat.T @ g.reshape(-1)) ** 2), rel=1e-12)


class Network:
    """One hidden layer on 1400 digits with cross-entropy, trained by full-batch gradient descent."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        inputs, labels = load_digits(return_X_y=True)
        kept = generator.permutation(len(inputs))[:1400]
        inputs = (inputs - inputs.mean()) / inputs.std()
        self.inputs = np.hstack([inputs[kept], np.ones((1400, 1))]) / 8
        self.targets = np.eye(10)[labels[kept]]
        self.below = generator.normal(size=(65, 128)) * 2**0.5
        self.above = generator.normal(size=(129, 10)) / 128**0.5
        self.hidden = self.residual = self.inner = np.empty(0)
        self.train(0)

    def train(self, steps: int) -> None:
        for step in range(steps + 1):
            z = self.inputs @ self.below
            self.hidden = np.hstack([np.maximum(z, 0), np.ones((1400, 1))])
            p = np.exp(self.hidden @ self.above)
            self.residual = p / p.sum(1, keepdims=True) - self.targets
            self.inner = (self.residual @ self.above[:-1].T) * (z > 0)
            if step < steps:
                self.below -= 0.05 * self.inputs.T @ self.inner / 1400
                self.above -= 0.05 * self.hidden.T @ self.residual / 1400

    def gram(self, rows: Any = ...) -> Array:
        h, r, d, x = (a[rows] for a in (self.hidden, self.residual, self.inner, self.inputs))
        return np.asarray((r @ r.T) * (h @ h.T) + (d @ d.T) * (x @ x.T))


def estimates(network: Network, size: int, draws: int = 120) -> list[NoiseScale]:
    return [
        noise_scale(network.gram(np.random.default_rng(seed).choice(1400, size, replace=False)))
        for seed in range(draws)
    ]


def test_ninety_is_ninety_and_twenty_three_hundred_is_not_resolved() -> None:
    network = Network()
    network.train(12)
    truth = noise_scale(network.gram()).value
    assert 80 < truth < 100
    for size in (64, 102, 256):
        found = estimates(network, size)
        assert np.median([e.noise / e.signal for e in found]) == pytest.approx(truth, rel=0.2)
        assert np.mean([e.signal for e in found]) == pytest.approx(network_signal(network), rel=0.1)
        assert np.mean([e.bound > truth for e in found]) < 0.06
    assert all(e.resolved for e in estimates(network, 256, draws=50))
    # The plain formula knows no noise scale above the number of samples.
    grams = [network.gram(np.random.default_rng(s).choice(1400, 64, replace=False)) for s in range(50)]
    plain = np.median([(g.diagonal().mean() - g.mean()) / g.mean() for g in grams])
    assert plain < 0.5 * truth

    network.train(168)
    truth = noise_scale(network.gram()).noise / noise_scale(network.gram()).signal
    assert 1900 < truth < 2700
    for size in (64, 256):
        found = estimates(network, size, draws=100)
        assert np.mean([e.resolved for e in found]) <= 0.01
        assert np.mean([e.bound > truth for e in found]) <= 0.03
        assert all("not resolved: more than" in e.text for e in found if not e.resolved)


def network_signal(network: Network) -> float:
    return noise_scale(network.gram()).signal


def test_many_directions_of_noise_are_resolved_by_64_samples() -> None:
    generator = np.random.default_rng(1)
    truth, p = 90.0, 500
    found = []
    for _ in range(100):
        gradients = generator.normal(size=(64, p)) * np.sqrt(truth / p)
        gradients[:, 0] += 1
        found.append(noise_scale(gradients @ gradients.T))
    assert np.mean([e.resolved for e in found]) > 0.95
    assert np.median([e.value for e in found]) == pytest.approx(truth, rel=0.1)
    assert "standard errors" in found[0].text


def test_two_batch_sizes_give_the_same_answer() -> None:
    generator = np.random.default_rng(2)
    p, truth, steps = 40, 30.0, 400
    small, large = [], []
    for _ in range(steps):
        gradients = generator.normal(size=(64, p)) * np.sqrt(truth / p)
        gradients[:, 0] += 1
        small.append(float((gradients[:8].mean(0) ** 2).sum()))
        large.append(float((gradients.mean(0) ** 2).sum()))
    found = noise_scale_from_batches(small, large, (8, 64))
    assert found.resolved
    assert found.value == pytest.approx(truth, rel=0.1)
    assert not noise_scale_from_batches(small[0], large[0], (8, 64)).resolved  # one step has no error bar
    with pytest.raises(InputError, match="b < B"):
        noise_scale_from_batches(small, large, (64, 8))


def test_pooling_smooths_both_ends_and_never_the_ratio() -> None:
    first, last = NoiseScale(1.0, 10.0, 0.1, 64), NoiseScale(-0.5, 20.0, 0.3, 64)
    found = pooled([first, last], decay=0.5)
    assert found.signal == pytest.approx((0.5 * 1 - 0.5) / 1.5)
    assert found.noise == pytest.approx((0.5 * 10 + 20) / 1.5)
    assert found.error == pytest.approx((0.5 * 0.1 + 0.3) / 1.5)
    assert pooled([first]) == first
    with pytest.raises(InputError, match="at least one"):
        pooled([])


def test_where_there_is_nothing_there_is_no_number() -> None:
    zero = noise_scale(np.zeros((4, 4)))
    assert not zero.resolved
    assert np.isnan(zero.value)
    assert np.isnan(zero.bound)
    assert "say nothing" in zero.text
    with pytest.raises(InputError, match="3 or more"):
        noise_scale(np.eye(2))
    with pytest.raises(InputError, match="full"):
        gradient_gram(np.eye(4), np.ones((4, 3)))


@pytest.mark.parametrize(("outputs", "size"), [(1, 1), (1, 2), (2, 2), (1, 4)])
def test_moments_equal_the_mean_over_every_sequence_of_batches(outputs: int, size: int) -> None:
    generator = np.random.default_rng(3)
    samples = 4
    j = generator.normal(size=(samples * outputs, 9))
    weighted, u = j @ j.T / 20, generator.normal(size=samples * outputs)
    found = batch_forecast(weighted, u, [0.3, 0.3, 0.3], samples, size)
    np.testing.assert_allclose(found.expected, twins.batch_losses(weighted, u, 0.3, samples, size, 3), rtol=1e-12)
    mean = [np.linalg.matrix_power(np.eye(len(u)) - 0.3 * weighted, t) @ u for t in range(4)]
    np.testing.assert_allclose(found.of_mean, [m @ m / 2 for m in mean], rtol=1e-12)
    assert found.in_the_mean_only == (size < samples)


@pytest.mark.parametrize(("outputs", "size", "width"), [(1, 1, 9), (1, 3, 9), (2, 2, 20), (1, 2, 2)])
def test_the_limit_is_where_the_moments_of_all_batches_start_to_grow(outputs: int, size: int, width: int) -> None:
    j = np.random.default_rng(4).normal(size=(5 * outputs, width))
    weighted = j @ j.T
    limit = mean_square_limit(weighted, 5, size)
    assert twins.mean_square_radius(weighted, 0.999 * limit, 5, size) < 1
    assert twins.mean_square_radius(weighted, 1.001 * limit, 5, size) > 1


def test_whole_batches_have_the_bound_of_gradient_descent() -> None:
    j = np.random.default_rng(5).normal(size=(6, 4))
    assert mean_square_limit(j @ j.T, 6, 6) == pytest.approx(2 / np.linalg.norm(j, 2) ** 2, rel=1e-12)
    assert mean_square_limit(np.zeros((3, 3)), 3, 1) == np.inf
    with pytest.raises(InputError, match="1 to N"):
        mean_square_limit(np.eye(3), 3, 4)


def test_batches_of_a_tanh_network_have_the_limits_found_before() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in ((6, 64), (64, 64), (64, 1))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * 6**0.5
    h = x
    for layer in layers[:-1]:
        h = layer(h).tanh()
    out = layers[-1](h)
    rows = []
    for value in out:
        grads = torch.autograd.grad(value, [p for layer in layers for p in layer.parameters()], retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    jacobian = torch.stack(rows).numpy()
    kernel = jacobian @ jacobian.T
    weighted = 2 / 24 * kernel
    full = mean_square_limit(weighted, 24, 24)
    found = [mean_square_limit(weighted, 24, size) / full for size in (1, 2, 6, 12, 24)]
    np.testing.assert_allclose(found, [0.2845, 0.504, 0.884, 0.974, 1.0], atol=0.0006)
    # The quick rule λ₁ + mean trace (1/B - 1/N) asks for smaller steps.
    noise = 2 * kernel.diagonal().mean()
    quick = [2 / full / (2 / full + noise * (1 / size - 1 / 24)) for size in (1, 2, 6, 12, 24)]
    np.testing.assert_allclose(quick, [0.231, 0.385, 0.697, 0.873, 1.0], atol=0.0006)


def sharpness_twin(kernel: Array, g: Array, curvature: Array) -> float:
    motion = kernel @ g
    return float(motion @ curvature @ motion / (g @ motion))


def test_sharpness_of_batches_is_the_second_order_of_their_own_step() -> None:
    generator = np.random.default_rng(6)
    n, c = 4, 3
    j = generator.normal(size=(n * c, 15))
    kernel, g = j @ j.T, generator.normal(size=(n, c))
    root = generator.normal(size=(n, c, c))
    curvature = np.zeros((n * c, n * c))
    for i in range(n):
        curvature[i * c : (i + 1) * c, i * c : (i + 1) * c] = root[i] @ root[i].T
    whole = batch_sharpness(kernel, g, root, n)
    assert whole == pytest.approx(sharpness_twin(kernel, g.reshape(-1), curvature), rel=1e-12)
    # Every batch of one sample, whose loss is weighted N times as much.
    singles = []
    for i in range(n):
        block = slice(i * c, (i + 1) * c)
        singles.append(sharpness_twin(kernel[block, block], n * g[i], n * curvature[block, block]))
    found = batch_sharpness(kernel, g, root, 1, draws=4000)
    assert min(singles) < found < max(singles)
    assert found == pytest.approx(np.mean(singles), rel=4 * np.std(singles) / np.mean(singles) / 4000**0.5)
    diagonal = np.abs(root[:, :, 0])
    stacked = np.stack([np.diag(d) for d in diagonal])
    assert batch_sharpness(kernel, g, diagonal, 2) == pytest.approx(batch_sharpness(kernel, g, stacked, 2), rel=1e-12)


def test_a_batch_step_at_two_over_its_sharpness_changes_nothing() -> None:
    generator = np.random.default_rng(7)
    x, y = generator.normal(size=(6, 3)), generator.normal(size=6)
    w = generator.normal(size=3)
    g = 2 / 6 * (x @ w - y)
    root = np.full((6, 1), np.sqrt(2 / 6))
    lr = 2 / batch_sharpness(x @ x.T, g[:, None], root, 6)
    after = w - lr * x.T @ g
    assert np.mean((x @ after - y) ** 2) == pytest.approx(np.mean((x @ w - y) ** 2), rel=1e-12)
    assert np.isnan(batch_sharpness(x @ x.T, np.zeros((6, 1)), root, 2))
    with pytest.raises(InputError, match="1 to 6"):
        batch_sharpness(x @ x.T, g[:, None], root, 7)
