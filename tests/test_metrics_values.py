"""Metrics equal their slow twins, and the figures that theory gives for them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_monitor.metrics import METRICS, Measured, evaluate
from ntk_monitor.metrics.change import laziness
from ntk_monitor.metrics.gradients import balance, loss_decrease
from ntk_monitor.metrics.labels import label_energies
from ntk_monitor.metrics.measured import Array
from ntk_monitor.metrics.shares import shares
from ntk_monitor.metrics.spectral import power_law, relative_gaps
from ntk_monitor.metrics.speed import steps_to_learn
from tests import reference
from tests import twins_metrics as twins
from tests.test_metrics import measured


def value(probe: Measured, name: str) -> float:
    return METRICS[name].function(probe)


def relu_kernel(x: Array, z: Array, bias: float = 0.0) -> Array:
    """Kernel of a wide two-layer ReLU network without its scale (arc-cosine kernels; Cho and Saul 2009)."""
    x = np.hstack([x, np.full((len(x), 1), bias)])
    z = np.hstack([z, np.full((len(z), 1), bias)])
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(z, axis=1)
    u = (x @ z.T / norms).clip(-1, 1)
    angle = np.arccos(u)
    return np.asarray(norms * (2 * u * (np.pi - angle) + np.sqrt(1 - u * u)) / np.pi)


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 9), st.integers(1, 3), st.integers(0, 99))
def test_spectral_metrics_equal_loops(n: int, c: int, seed: int) -> None:
    probe = measured(n, c, seed)
    k = probe.kernel
    values = np.linalg.svd(k, compute_uv=False)
    ridge = 1e-3 * sum(values) / len(values)
    averaged = twins.means(k, n)
    centre = np.eye(n) - np.ones((n, n)) / n
    wanted = {
        "trace": sum(k[i, i] for i in range(len(k))),
        "lambda_max": values[0],
        "mean_diagonal": sum(k[i, i] for i in range(len(k))) / len(k),
        "frobenius": sum(v * v for row in k for v in row) ** 0.5,
        "condition_log10": np.log10(values[0] / values[-1]),
        "condition_regularised_log10": np.log10((values[0] + ridge) / (values[-1] + ridge)),
        "effective_rank": reference.effective_rank(values),
        "centred_effective_rank": twins.entropy_rank(centre @ averaged @ centre),
        "participation_ratio": sum(values) ** 2 / sum(v * v for v in values),
        "intrinsic_dimension": sum(values) / values[0],
        "top_share": values[0] / sum(values),
        "spectral_gap": values[0] / values[1],
        "outlier": max(averaged.diagonal()) / sorted(averaged.diagonal())[n // 2] if n % 2 else None,
    }
    for name, right in wanted.items():
        if right is not None:
            assert value(probe, name) == pytest.approx(right, rel=1e-8), name


def test_effective_ranks_of_theory() -> None:
    probe = Measured(kernel=np.diag([8.0, 4, 2, 1]), samples=4)
    assert value(probe, "effective_rank") == pytest.approx(3.117142, abs=1e-6)
    assert value(probe, "participation_ratio") == pytest.approx(2.647059, abs=1e-6)
    assert value(probe, "intrinsic_dimension") == pytest.approx(1.875)
    np.testing.assert_allclose(relative_gaps(np.array([8.0, 4, 2, 0])), [0.5, 0.5, 1])
    assert np.isnan(relative_gaps(np.array([1.0, 0, 0]))[1])
    assert value(Measured(kernel=np.ones((3, 3)), samples=3), "spectral_gap") == np.inf
    assert "spectral_gap" not in evaluate(Measured(kernel=np.ones((1, 1)), samples=1))


@settings(max_examples=8, deadline=None)
@given(st.integers(4, 7), st.integers(1, 3), st.integers(0, 99))
def test_label_metrics_equal_loops(n: int, c: int, seed: int) -> None:
    probe = measured(n, c, seed)
    assert probe.targets is not None
    assert probe.labels is not None
    averaged = twins.means(probe.kernel, n)
    energies = twins.mode_energies(averaged, probe.targets)
    assert value(probe, "label_energy") == pytest.approx(energies[0][1], rel=1e-7)  # a tenth of 4 to 7 is one
    total, k = 0.0, 0
    while total < 0.9 - 1e-9:
        total += energies[k][1]
        k += 1
    assert value(probe, "k90") == k
    orders = list(itertools.permutations(range(n)))[:: 1 if n < 6 else 7]
    if n < 6:
        shuffled = [twins.mode_energies(averaged, probe.targets[list(order)])[0][1] for order in orders]
        assert value(probe, "label_energy_chance") == pytest.approx(np.mean(shuffled), rel=1e-7)
    assert value(probe, "class_contrast") == pytest.approx(twins.class_contrast(averaged, probe.labels), rel=1e-9)
    gram = (probe.targets - probe.targets.mean(0)) @ (probe.targets - probe.targets.mean(0)).T
    hsic = reference.hsic
    right = hsic(averaged, gram) / np.sqrt(hsic(averaged, averaged) * hsic(gram, gram))
    if np.isfinite(right):
        assert value(probe, "alignment") == pytest.approx(right, rel=1e-7, abs=1e-10)
    inverse = np.linalg.inv(averaged + 1e-3 * np.trace(averaged) / n * np.eye(n))
    complexity = sum(probe.targets[:, d] @ inverse @ probe.targets[:, d] for d in range(probe.targets.shape[1]))
    assert value(probe, "label_complexity") == pytest.approx((2 * complexity / n) ** 0.5, rel=1e-8)


def test_smooth_targets_lie_in_fast_modes_and_random_ones_do_not() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 10))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = relu_kernel(x, x)
    smooth = Measured(kernel=kernel, samples=200, targets=np.sign(x[:, :1]))
    random = Measured(kernel=kernel, samples=200, targets=generator.choice([-1.0, 1.0], size=(200, 1)))
    assert value(smooth, "label_energy") > 0.6
    assert value(random, "label_energy") == pytest.approx(value(random, "label_energy_chance"), abs=0.08)
    assert value(smooth, "k90") < 0.9 * value(random, "k90")
    assert value(smooth, "label_complexity") < 0.8 * value(random, "label_complexity")
    vectors = smooth.modes.eigenvectors
    assert vectors is not None
    assert label_energies(vectors, smooth.centred_targets).sum() == pytest.approx(1, rel=1e-12)


@settings(max_examples=8, deadline=None)
@given(st.integers(4, 6), st.integers(1, 2), st.integers(0, 99))
def test_change_metrics_equal_loops(n: int, c: int, seed: int) -> None:
    probe = measured(n, c, seed)
    for name, trend, likeness, other in (
        ("kernel_change", "trace_growth", "cka_previous", probe.previous),
        ("kernel_distance", "trace_growth_total", "cka_first", probe.first),
    ):
        assert other is not None
        a, b = probe.kernel, other
        inner = sum(x * y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
        sizes = [sum(x * x for p in m for x in p) ** 0.5 for m in (a, b)]
        assert value(probe, name) == pytest.approx(1 - inner / sizes[0] / sizes[1], abs=1e-12)
        assert value(probe, trend) == pytest.approx(np.log(np.trace(a) / np.trace(b)), rel=1e-9)
        p, q = twins.means(a, n), twins.means(b, n)
        hsic = reference.hsic
        both = hsic(p, p) * hsic(q, q)
        if hsic(p, p) > 0 and both > 0:
            assert value(probe, likeness) == pytest.approx(hsic(p, q) / both**0.5, rel=1e-7, abs=1e-9)
    assert laziness(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(0.1)
    assert np.isnan(laziness(np.zeros(2), np.ones(2)))


def test_gradient_metrics_equal_loops() -> None:
    probe = measured(10, 2, 3)
    k, g = probe.kernel, np.asarray(probe.gradient).reshape(-1)
    values, vectors = np.linalg.eigh(k)
    jacobian = vectors * np.sqrt(values.clip(min=0))
    own = np.array([10 * (g[2 * i] * jacobian[2 * i] + g[2 * i + 1] * jacobian[2 * i + 1]) for i in range(10)])
    signal, noise = twins.noise_scale(own)
    error = twins.signal_error(own)
    assert value(probe, "noise_scale_bound") == pytest.approx(noise / (max(signal, 0) + 2 * error), rel=1e-8)
    few = Measured(kernel=np.eye(10) * 1e-3 + 1, samples=10, gradient=np.ones((10, 1)))
    # One common gradient of length 1 per sample times N g = 10, and a thousandth of its own.
    assert value(few, "noise_scale") == pytest.approx(1e-3, rel=1e-6)

    sums = {}
    for one, rows in probe.terms.items():
        for other, columns in probe.terms.items():
            sums[one + other] = sum(
                g[i] * k[i, j] * g[j] for i in range(20) for j in range(20) if rows.flat[i] and columns.flat[j]
            )
    cosine = sums["uv"] / (sums["uu"] * sums["vv"]) ** 0.5
    assert value(probe, "worst_conflict") == pytest.approx(cosine, rel=1e-9)


def test_attribution_sums_to_the_gradient_norm_and_predicts_a_small_step() -> None:
    generator = np.random.default_rng(4)
    x, y, w = generator.normal(size=(8, 5)), generator.normal(size=8), generator.normal(size=5)
    g = 2 / 8 * (x @ w - y)
    rates, vectors = np.linalg.eigh(2 / 8 * x @ x.T)
    coordinates = vectors.T @ g / (2 / 8) ** 0.5
    found = loss_decrease(rates, coordinates, 0.01)
    assert found.sum() == pytest.approx(-0.01 * np.sum((x.T @ g) ** 2), rel=1e-12)
    assert (found <= 0).all()
    lr = 1e-6
    after = w - lr * x.T @ g
    drop = np.mean((x @ after - y) ** 2) - np.mean((x @ w - y) ** 2)
    probe = Measured(kernel=x @ x.T, samples=8, rates=rates, coordinates=coordinates, lr=lr)
    assert value(probe, "first_order_decrease") == pytest.approx(drop, rel=1e-4)


def test_terms_of_different_size_are_balanced_by_their_mean_speed() -> None:
    generator = np.random.default_rng(5)
    j = np.vstack([generator.normal(size=(30, 6)), 3 * generator.normal(size=(5, 6))])
    inside = (np.arange(35) < 30)[:, None]
    terms = {"pde": inside, "boundary": ~inside}
    weights = balance(j @ j.T, terms)
    assert sum(1 / w for w in weights.values()) == pytest.approx(1, rel=1e-12)
    # Root weights on the rows, means over each term's own: both terms are then as fast.
    speeds = [weights[name] * np.mean([j[i] @ j[i] for i in np.flatnonzero(rows)]) for name, rows in terms.items()]
    assert speeds[0] == pytest.approx(speeds[1], rel=1e-12)
    imbalance = value(Measured(kernel=j @ j.T, samples=35, terms=terms), "term_imbalance")
    assert imbalance == pytest.approx(weights["pde"] / weights["boundary"], rel=1e-12)
    assert (
        balance(np.diag([1.0, 0.0]), {"a": np.array([[True], [False]]), "b": np.array([[False], [True]])})["b"]
        == np.inf
    )


def test_shares_of_layers() -> None:
    probe = measured()
    assert shares({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    assert np.isnan(shares({"a": 0.0})["a"])
    assert value(probe, "largest_share") == pytest.approx(2 / 3)
    assert value(probe, "head_share") == 0.75
    even = Measured(kernel=np.eye(2), samples=2, layer_speed=dict.fromkeys("abcd", 0.3) | {"dead": 0.0})
    assert value(even, "active_layers") == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.3),
        ({}, 1.7),
        ({"momentum": 0.9}, 0.0005),
        ({"momentum": 0.9}, 0.5),
        ({"momentum": 0.8, "nesterov": True}, 0.005),
        ({"momentum": 0.8, "nesterov": True}, 1.1),
        ({"momentum": 0.9, "dampening": 0.5}, 0.4),
    ],
)
def test_steps_to_learn_are_those_of_torch(options: dict[str, float], rate: float) -> None:
    found = float(steps_to_learn(np.array([rate]), 1.0, 0.1, **options)[0])  # type: ignore[arg-type]
    assert found == pytest.approx(twins.mode_steps(rate, 1.0, 0.1, options), rel=0.02)


def test_underdamped_modes_take_the_same_time_and_unstable_ones_forever() -> None:
    times = steps_to_learn(np.array([0.01, 1.0, 3.0, 3.9, 0.0]), 1.0, momentum=0.9)
    np.testing.assert_allclose(times[:3], np.log(0.1) / np.log(0.9**0.5), rtol=1e-9)
    assert times[3] == times[4] == np.inf


def test_residuals_by_speed() -> None:
    rates, coordinates = np.array([10.0, 5.0, 0.5, 0.01]), np.array([1.0, 2.0, 3.0, 4.0])
    probe = Measured(kernel=np.eye(4), samples=4, rates=rates, coordinates=coordinates, lr=0.01, loss="mse")
    assert value(probe, "fast_energy") == pytest.approx(5 / 30)
    # Half of the energy, 15, is reached with the fourth mode.
    assert value(probe, "median_steps_to_learn") == pytest.approx(np.log(0.1) / np.log(1 - 1e-4), rel=1e-9)
    other = Measured(kernel=np.eye(4), samples=4, rates=rates, coordinates=coordinates, lr=0.01, loss="cross_entropy")
    assert "median_steps_to_learn" not in evaluate(other, METRICS)


@pytest.mark.parametrize(("dimension", "exponent"), [(1, 2.0), (2, 1.5)])
def test_the_spectrum_of_a_relu_network_falls_by_its_law(dimension: int, exponent: float) -> None:
    generator = np.random.default_rng(6)
    x = generator.normal(size=(600, dimension + 1))
    if dimension == 1:
        angles = 2 * np.pi * np.arange(600) / 600
        x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    probe = Measured(kernel=relu_kernel(x, x, bias=1.0), samples=600)
    found, error = power_law(probe.spectrum.eigenvalues, probe.spectrum.noise_floor)
    assert found == pytest.approx(exponent, abs=0.25)
    assert error < 0.1
    assert value(probe, "power_law_exponent") == found
    exact = np.arange(1, 101.0) ** -1.7
    assert power_law(exact) == pytest.approx((1.7, 0.0), abs=1e-10)
    assert np.isnan(power_law(exact[:8])[0])
