"""Activations: analytic values, degrees, exponents and circle spectra; networks in which the claims fail."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor import empirical_ntk
from ntk_monitor.applications.activations import (
    activations_of,
    circle,
    circle_profile,
    example,
    homogeneity_error,
    profile,
    scale_exponent,
    smoothness_exponent,
    study,
)
from ntk_monitor.applications.arccosine import (
    circle_spectrum,
    kappa0,
    kappa1,
    ntk_numeric,
    relu_ntk,
    relu_profile,
)
from ntk_monitor.errors import InputError
from ntk_monitor.render import png

COSINES = np.array([-1, -0.95, -0.9, -0.5, 0, 0.5, 1])
GRID = 2 * np.pi * np.arange(4096) / 4096
FOLDED = np.minimum(GRID, 2 * np.pi - GRID)
TANH_LIKE: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "gelu": (nn.functional.gelu, [2, 2.042, 2.278, 1.996, 1.999]),
    "tanh": (torch.tanh, [2, 1.962, 1.09, 0.868, 0.982]),
    "sigmoid": (torch.sigmoid, [0, 0.01, 0.387, 0.631, 0.931]),
    "softplus": (nn.functional.softplus, [0, 0.028, 1.281, 2.037, 2.004]),
    "silu": (nn.functional.silu, [2, 2.017, 2.354, 1.999, 1.999]),
    "relu": (torch.relu, [2, 2, 2, 2, 2]),
}


def network(act: type[nn.Module], *, bias: bool, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(5, 32, bias=bias), act()]
    for _ in range(depth - 2):
        parts += [nn.Linear(32, 32, bias=bias), act()]
    return nn.Sequential(*parts, nn.Linear(32, 2, bias=bias)).double()


def samples() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("depth", "values"),
    [
        (2, [0, -0.092665, -0.119671, -0.057669, 0.318310, 0.942331, 2]),
        (3, [0.318310, 0.273562, 0.262895, 0.343862, 0.685709, 1.351480, 3]),
    ],
)
def test_relu_kernels_have_the_values_of_the_recursion(depth: int, values: list[float]) -> None:
    np.testing.assert_allclose(relu_profile(np.arccos(COSINES), depth=depth), values, atol=1e-6)
    plane = np.stack([COSINES, np.sqrt(1 - COSINES**2)], 1)
    np.testing.assert_allclose(relu_ntk(np.array([[1.0, 0.0]]), plane, depth=depth)[0], values, atol=1e-6)


def test_the_two_layer_relu_kernel_falls_below_zero() -> None:
    u = np.linspace(-0.9, -0.7, 20001)
    values = u * kappa0(u) + kappa1(u)
    assert values.min() == pytest.approx(-0.136790, abs=1e-6)
    assert u[values.argmin()] == pytest.approx(-0.7941, abs=1e-4)


def test_a_wide_network_has_the_relu_kernel() -> None:
    """f = √(2/h) a·relu(W x): mean over draws of the kernel against the closed form."""
    g, x = torch.Generator().manual_seed(0), samples()
    h, total = 2000, torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(20):
        before = x @ torch.randn(h, 5, generator=g, dtype=torch.float64).T
        gate = (before > 0) * torch.randn(h, generator=g, dtype=torch.float64)
        total += (before.relu() @ before.relu().T + gate @ gate.T * (x @ x.T)) * 2 / h / 20
    # 40,000 units: a standard error of about 1 % of the diagonal.
    np.testing.assert_allclose(total, relu_ntk(x.numpy()), atol=0.04 * float(total.diagonal().max()))


def test_quadrature_agrees_with_the_closed_form_and_with_biases() -> None:
    theta = np.linspace(0, np.pi, 7)
    np.testing.assert_allclose(ntk_numeric(torch.relu, theta), relu_profile(theta), atol=1e-9)
    plane = 1.7 * np.stack([np.cos(theta), np.sin(theta)], 1)
    # The closed form gives the output a bias too, which adds β².
    biased = relu_ntk(plane[:1], plane, bias=0.6)[0] - 0.36
    np.testing.assert_allclose(ntk_numeric(torch.relu, theta, norm=1.7, bias=0.6), biased, atol=1e-8)


@pytest.mark.parametrize("name", TANH_LIKE)
def test_degrees_of_homogeneity(name: str) -> None:
    activation, degrees = TANH_LIKE[name]
    found = profile(activation)
    np.testing.assert_allclose(found.degrees, degrees, atol=2e-3)
    if name != "relu":
        assert found.smoothness == pytest.approx(2.0, abs=0.03)


def test_relu_has_a_kink_in_the_angle() -> None:
    assert smoothness_exponent(relu_profile, np.geomspace(1e-3, 1e-2, 5)) == pytest.approx(1.0, abs=0.05)
    assert (1 - relu_profile(1e-3) / 2) / 1e-3 == pytest.approx(0.1597, abs=1e-4)
    assert (1 - relu_profile(1e-6) / 2) / 1e-6 == pytest.approx(1 / (2 * math.pi), rel=1e-3)


def test_a_bias_or_a_layer_brings_back_odd_harmonics() -> None:
    two = circle_spectrum(relu_profile(FOLDED), 200)
    np.testing.assert_allclose(two[:6], [0.607927, 0.5, 0.157611, 0, 0.017112, 0], atol=1e-6)
    assert np.abs(two[3::2]).max() < 1e-9
    assert 100**2 * two[100] == pytest.approx(0.2035, rel=0.01)
    assert circle_spectrum(relu_profile(FOLDED, depth=3), 4)[3] == pytest.approx(0.048748, abs=1e-6)
    plane = np.stack([np.cos(GRID), np.sin(GRID)], 1) / math.sqrt(2)
    biased = circle_spectrum(relu_ntk(plane[:1], plane, bias=math.sqrt(0.5))[0], 200)
    assert biased[3] == pytest.approx(0.010405, abs=1e-6)
    assert 101**2 * biased[101] == pytest.approx(0.0719, rel=0.01)


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU])
def test_bias_free_networks_are_homogeneous_at_every_width_and_draw(depth: int, act: type[nn.Module]) -> None:
    model = network(act, bias=False, depth=depth)
    assert homogeneity_error(model, samples()) < 1e-10
    np.testing.assert_allclose(scale_exponent(model, samples(), [0.1, 10.0]), 2.0, atol=1e-10)


def test_biases_and_smooth_activations_break_homogeneity() -> None:
    assert homogeneity_error(network(nn.ReLU, bias=True), samples()) > 0.01
    assert homogeneity_error(network(nn.Tanh, bias=False), samples()) > 0.01


def test_saturated_tanh_grows_with_degree_one() -> None:
    """First-layer gradients carry |x| even where the features have stopped growing: not 0."""
    assert profile(torch.tanh).degrees[-1] > 0.9


def test_a_finite_relu_network_without_biases_has_no_odd_harmonics_and_one_with_biases_has() -> None:
    free = circle_spectrum(circle_profile(network(nn.ReLU, bias=False), samples()), 10)
    assert np.abs(free[3::2]).max() < 1e-12 * free[0]
    biased = circle_spectrum(circle_profile(network(nn.ReLU, bias=True), samples()), 10)
    assert np.abs(biased[3::2]).max() > 1e-4 * biased[0]


def test_the_circle_profile_is_the_mean_over_pairs_of_one_angle() -> None:
    model, x = network(nn.Tanh, bias=True), samples()
    points = circle(x)
    assert points.norm(dim=1).numpy() == pytest.approx(float(x.norm(dim=1).median()))
    kernel = empirical_ntk(model, points, outputs="trace")
    pairs = [float(kernel[i, (i + 5) % 64]) for i in range(64)]
    assert circle_profile(model, x)[5] == pytest.approx(sum(pairs) / 64)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 5), st.floats(0.1, 5), st.integers(1, 4))
def test_the_relu_kernel_is_homogeneous_in_each_argument_alone(a: float, b: float, depth: int) -> None:
    x = samples().numpy()
    np.testing.assert_allclose(relu_ntk(a * x, b * x, depth=depth), a * b * relu_ntk(x, depth=depth), atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_the_report_says_no_where_the_claims_fail(bias: bool) -> None:
    report = study(network(nn.ReLU, bias=bias), samples())
    claims = {verdict.claim: verdict.holds for verdict in report.verdicts}
    assert claims["K(cx, cx') = c² K(x, x') for this network"] is not bias
    assert claims["the kernel of this network does not change with the scale of inputs"] is False
    assert claims["the kernel of ReLU is smooth where inputs meet"] is False
    assert claims["a wide two-layer network of ReLU can learn odd harmonics of order 3 and more"] is False
    assert claims["this network can learn odd harmonics of order 3 and more"] is bias


def test_activations_are_found_in_the_network() -> None:
    assert set(activations_of(network(nn.SiLU, bias=True))) == {"SiLU"}
    assert activations_of(nn.Linear(2, 2)) == {}


def test_what_cannot_be_scaled_is_refused() -> None:
    model = network(nn.ReLU, bias=True)
    for wrong in (torch.ones(3, 5, dtype=torch.long), torch.ones(5)):
        with pytest.raises(InputError, match="floating"):
            study(model, wrong)
    with pytest.raises(InputError, match="positive"):
        scale_exponent(model, samples(), [0.0])
    with pytest.raises(InputError, match="two input features"):
        circle(torch.ones(3, 1))
    with pytest.raises(InputError, match="must not be zero"):
        homogeneity_error(nn.Linear(5, 1, bias=False).double(), torch.zeros(2, 5, dtype=torch.float64))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: ntk_numeric(torch.relu, 0.0, norm=0.0), "norm"),
    (lambda: ntk_numeric(lambda t: t[:1], 0.0), "keep the shape"),
    (lambda: profile(lambda t: t * 0), "constant"),
    (lambda: relu_ntk(np.ones((2, 3)), np.ones((2, 4))), "flatten"),
    (lambda: circle_spectrum(np.ones(5), 4), "at least 8"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_example_draws_its_figure() -> None:
    report = example(quick=True)
    assert png(report.figures["activations"]).startswith(b"\x89PNG")
    assert "DOES NOT HOLD" in report.text()
