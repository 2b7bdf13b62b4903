"""Initialisation: closed forms against draws by hand, the verdict that says no, workers, bad input."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.initialization import closed_form, example, expected_trace_relu_mlp, figure, study
from ntk_monitor.applications.initializers import INITS, he
from ntk_monitor.applications.montecarlo import as_built, draws, median_interval, statistics
from ntk_monitor.errors import InputError
from ntk_monitor.render import png

D, H, N = 16, 64, 32
HE, XAVIER, LECUN = [2 / D, 2 / H], [2 / (D + H), 2 / (H + 1)], [1 / D, 1 / H]


def unit_rows(n: int, d: int) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit: Tensor = x / x.norm(dim=1, keepdim=True)
    return unit


def mlp(sizes: list[int], *, bias: bool) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).double()


def two_layer() -> nn.Module:
    return mlp([D, H, 1], bias=False)


def single() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, 1))


def kernels_by_hand(x: Tensor, variances: list[float], count: int) -> Tensor:
    """Return kernels of a bias-free two-layer ReLU network with one output, (draws, N, N), from their definition."""
    g = torch.Generator().manual_seed(1)
    first = torch.randn(count, H, D, generator=g, dtype=torch.float64) * variances[0] ** 0.5
    second = torch.randn(count, 1, H, generator=g, dtype=torch.float64) * variances[1] ** 0.5
    before = torch.einsum("nd,rhd->rnh", x, first)
    gate = (before > 0) * second
    kernels: Tensor = before.relu() @ before.relu().mT + (gate @ gate.mT) * (x @ x.T)
    return kernels


def kernel_by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """Return the kernel of a network with one output, one backward pass per sample."""
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(model(one), list(model.parameters()))]) for one in x]
    return torch.stack([torch.stack([a @ b for b in rows]) for a in rows])


@pytest.mark.parametrize(("variances", "value"), [(XAVIER, 57.1077), (HE, 160.0), (LECUN, 80.0)])
def test_two_layer_traces_match_2000_draws(variances: list[float], value: float) -> None:
    x = unit_rows(N, D)
    closed = expected_trace_relu_mlp([D, H, 1], variances, x)
    assert closed == pytest.approx(value, abs=1e-4)
    traces = kernels_by_hand(x, variances, 2000).diagonal(dim1=1, dim2=2).sum(1)
    assert float(traces.mean()) == pytest.approx(closed, rel=0.015)


@pytest.mark.parametrize(
    ("depth", "rule", "value"),
    [
        *[(2, "he", 2.0), (4, "he", 4.0), (8, "he", 8.0)],
        *[(2, "xavier", 1.48462), (4, "xavier", 0.863462), (8, "xavier", 0.115505)],
    ],
)
def test_depth_grows_under_he_and_vanishes_under_xavier(depth: int, rule: str, value: float) -> None:
    model, x = mlp([64] * depth + [1], bias=False), unit_rows(1, 64)
    assert closed_form(model, x, rule) == pytest.approx(value, rel=1e-5)


def test_a_third_of_he_vanishes_with_depth() -> None:
    x = unit_rows(1, 64)
    for depth, value in ((2, 1 / 3), (4, 0.0185185), (8, 2.8578e-5)):
        assert expected_trace_relu_mlp([64] * depth + [1], [1 / 192] * depth, x) == pytest.approx(value, rel=2e-5)


@pytest.mark.parametrize(("sizes", "value"), [([16, 64, 64, 64, 1], 13.0), ([8, 32, 16, 1], 7.0)])
def test_he_is_the_sum_of_widths_over_the_inputs(sizes: list[int], value: float) -> None:
    model = mlp(sizes, bias=False)
    assert closed_form(model, unit_rows(1, sizes[0]), "he") == pytest.approx(value, rel=1e-12)


def test_torch_default_has_its_own_closed_form() -> None:
    x = unit_rows(N, D)
    by_hand = sum(H * (s + 1) / (6 * D) + 1 + (s + 1) / 6 for s in x.square().sum(1).tolist())
    assert by_hand == pytest.approx(85.3333, abs=1e-4)
    assert closed_form(mlp([D, H, 1], bias=True), x, "pytorch") == pytest.approx(by_hand, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.floats(0.1, 3), st.booleans())
def test_scaling_all_samples_scales_a_bias_free_trace_by_its_square(sizes: list[int], scale: float, wide: bool) -> None:
    variances = [2.0 / (n + wide) for n in sizes[:-1]]
    x = torch.ones(2, sizes[0], dtype=torch.float64)
    one, other = (expected_trace_relu_mlp(sizes, variances, x * c) for c in (1.0, scale))
    assert other == pytest.approx(scale**2 * one, rel=1e-12)


def test_networks_without_a_closed_form_get_none() -> None:
    x = unit_rows(4, D)
    assert closed_form(two_layer(), x, "orthogonal") is None
    assert closed_form(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)), x, "he") is None
    assert closed_form(nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 1)), x, "he") is None
    assert closed_form(nn.Linear(D, 1), x, "he") is None
    frozen = two_layer()
    next(iter(frozen.parameters())).requires_grad_(False)
    assert closed_form(frozen, x, "he") is None


def test_draws_are_those_of_the_definition() -> None:
    x, model = unit_rows(6, D), two_layer()
    found = draws(model, x, {"he": he}, count=3, seed=5)["he"]
    for k in range(3):
        torch.manual_seed(5 + k)
        he(model)
        kernel = kernel_by_autograd(model, x)
        values = torch.linalg.eigvalsh(kernel).flip(0)
        shares = values / values.sum()
        expected = {
            "trace": float(kernel.trace()),
            "condition_log10": math.log10(values[0] / values[-1]),
            "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
            "lambda_max": float(values[0]),
        }
        for name, value in expected.items():
            assert found.values[name][k] == pytest.approx(value, rel=1e-8)


def test_he_is_not_better_conditioned_than_xavier_here() -> None:
    report = study(two_layer(), unit_rows(16, D), count=14, inits={k: INITS[k] for k in ("he", "xavier", "lecun")})
    claims = {verdict.claim: verdict.holds for verdict in report.verdicts}
    assert claims["He is better conditioned than Xavier"] is False
    assert claims["the expected trace under he is the closed form"] is True
    # LeCun is He times ½: the kernels of each draw differ by a factor, and their condition numbers not at all.
    assert report.number("log10 condition, he") == pytest.approx(report.number("log10 condition, lecun"), abs=1e-9)


def test_condition_of_the_mean_kernel_is_not_the_mean_condition() -> None:
    """Acceptance: mean kernels have 61.2 under He and 25.2 under Xavier, single draws of He 101.8."""
    conditions = {}
    for name, variances in (("he", HE), ("xavier", XAVIER)):
        kernels = kernels_by_hand(unit_rows(N, D), variances, 1000)
        mean = torch.linalg.eigvalsh(kernels.mean(0))
        conditions[name] = float(mean[-1] / mean[0])
        if name == "he":
            each = torch.linalg.eigvalsh(kernels)
            assert float((each[:, -1] / each[:, 0]).median()) == pytest.approx(101.8, rel=0.06)
    assert conditions["he"] == pytest.approx(61.2, rel=0.06)
    assert conditions["xavier"] == pytest.approx(25.2, rel=0.06)


def test_a_wrong_closed_form_is_called_wrong() -> None:
    """Weights that share their sign are not symmetric about 0: the closed form fails, and the verdict says so."""

    def positive(module: nn.Module) -> None:
        he(module)
        for parameter in module.parameters():
            parameter.data.abs_()

    report = study(two_layer(), unit_rows(8, D).abs(), inits={"he": positive}, count=8)
    assert [verdict.holds for verdict in report.verdicts] == [False]


def test_models_and_generators_are_left_alone() -> None:
    model, x = two_layer(), unit_rows(4, D)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    study(model, x, count=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_factories_are_also_drawn_as_built() -> None:
    report = study(single, unit_rows(4, D).float(), count=3)
    table = report.tables["Median [quartiles] over draws"]
    rows = {row[0]: row[1:5] for row in table.rows}
    assert rows["as built"] == rows["pytorch"]
    with pytest.raises(InputError, match="factory"):
        draws(two_layer(), unit_rows(4, D), {"as built": as_built}, count=1)


def test_zero_and_infinite_kernels_are_counted_not_raised() -> None:
    def broken(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.data.fill_(math.inf)

    def dead(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.data.zero_()

    found = draws(two_layer(), unit_rows(4, D), {"broken": broken, "dead": dead}, count=2)
    assert np.isnan(found["broken"].values["trace"]).all()
    assert found["dead"].values["trace"].tolist() == [0.0, 0.0]
    assert np.isnan(found["dead"].values["condition_log10"]).all()
    assert found["dead"].deficient == 2


def test_workers_give_the_same_numbers() -> None:
    seen: list[tuple[int, int]] = []
    arguments: dict[str, Any] = {"inits": {"he": INITS["he"]}, "count": 5, "seed": 3}
    one = draws(two_layer, unit_rows(5, D), **arguments)["he"]
    two = draws(two_layer, unit_rows(5, D), **arguments, processes=2, progress=lambda *at: seen.append(at))["he"]
    for name in one.values:
        np.testing.assert_allclose(two.values[name], one.values[name], rtol=1e-9)
    assert seen[-1] == (5, 5)


def test_what_cannot_be_given_to_workers_is_refused() -> None:
    with pytest.raises(InputError, match="pickle"):
        draws(two_layer, unit_rows(4, D), {"none": lambda _: None}, count=2, processes=2)
    with pytest.raises(InputError, match="at least one draw"):
        draws(two_layer(), unit_rows(4, D), {"he": he}, count=0)
    with pytest.raises(InputError, match="L variances"):
        expected_trace_relu_mlp([3, 2, 1], [1.0], torch.ones(1, 3))
    with pytest.raises(InputError, match="must be"):
        expected_trace_relu_mlp([3, 1], [1.0], torch.ones(1, 4))


def test_median_intervals_cover_as_often_as_they_say() -> None:
    g = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        _, low, high = median_interval(g.exponential(size=31))
        hits += low <= math.log(2) <= high
    # Binomial(1000, .97) at n = 31 leaves .95 to .99 with a probability above .999.
    assert 0.95 <= hits / 1000 <= 0.99
    assert median_interval(np.array([2.0, 1.0, 4.0]))[1:] == (-math.inf, math.inf)
    nothing: NDArray[np.float64] = np.array([math.nan])
    assert math.isnan(median_interval(nothing)[0])


def test_statistics_take_a_kernel_that_is_there_already() -> None:
    trace, condition, rank, top, missing = statistics(np.diag([8.0, 2.0]))
    assert (trace, top, missing) == (10.0, 8.0, 0.0)
    assert condition == pytest.approx(math.log10(4))
    assert rank == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))


def test_the_example_draws_its_figure() -> None:
    report = example(quick=True)
    assert len(report.tables["Median [quartiles] over draws"].rows) == 5
    assert png(report.figures["initialization"]).startswith(b"\x89PNG")
    assert "closed form" in report.text()
    lonely = draws(two_layer(), unit_rows(3, D), {"he": he}, count=1)
    assert png(figure(lonely)).startswith(b"\x89PNG")
