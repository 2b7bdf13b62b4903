"""Learning speed: linear models exactly, wide networks closely, narrow ones not, torch's own SGD as the twin."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor import empirical_ntk
from ntk_monitor.applications.learning_speed import (
    component_steps,
    example,
    learned,
    predict_modes,
    squared_error_scale,
    study,
    target_matrix,
    time_to_learn,
    trained,
)
from ntk_monitor.errors import InputError
from ntk_monitor.render import png


class Wide(nn.Module):
    """f = √(2/h) a·φ(W x) with entries N(0, 1): the NTK parametrisation."""

    def __init__(self, width: int, act: str, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(width, 6, generator=g, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(1, width, generator=g, dtype=torch.float64))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = getattr(torch, self.act)(x @ self.first.T)
        return hidden @ self.second.T * math.sqrt(2 / self.second.shape[1])


def data(n: int = 16, outputs: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True), torch.randn(n, outputs, generator=g, dtype=torch.float64)


def linear(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, outputs).double()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_linear_models_follow_the_forecast_exactly(outputs: int, momentum: float, nesterov: bool) -> None:
    """Against torch's SGD and MSELoss; the learning rate changes at every step."""
    model, (x, y) = linear(outputs), data(9, outputs)
    kernel = empirical_ntk(model, x).reshape(9 * outputs, -1)
    values, vectors = torch.linalg.eigh(kernel)
    top = 2 / (9 * outputs) * float(values[-1])
    lrs = [0.9 * (0.97**t) / top for t in range(60)]
    residuals = [(model(x) - y).detach().reshape(-1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum, nesterov=nesterov)
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        residuals.append((model(x) - y).detach().reshape(-1))
    measured = (torch.stack(residuals) @ vectors).numpy()
    scale = squared_error_scale(9, outputs)
    found = predict_modes(measured[0], values.numpy(), lrs, scale=scale, momentum=momentum, nesterov=nesterov)
    np.testing.assert_allclose(found, measured, atol=1e-10)
    again = trained(linear(outputs), x, y, lrs, momentum=momentum, nesterov=nesterov)
    np.testing.assert_allclose(again, torch.stack(residuals).numpy(), atol=1e-12)


@pytest.mark.parametrize(("reduction", "loss"), [("mean", nn.MSELoss()), ("sum", nn.MSELoss(reduction="sum"))])
def test_scales_are_those_of_torchs_losses(reduction: str, loss: nn.Module) -> None:
    f, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(loss(f, y), f)
    scale = squared_error_scale(4, 3, reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, scale * (f - y).detach())


def test_times_are_those_at_which_the_forecast_arrives() -> None:
    values, lrs = np.array([5.0, 1.0, 0.1, 0.0]), [0.2] * 400
    path = predict_modes(np.ones(4), values, lrs, scale=0.5)
    times = time_to_learn(values, 0.2, scale=0.5)
    assert np.ceil(times[:3]).tolist() == learned(path)[:3].tolist()
    assert times[1] == pytest.approx(math.log(10) / -math.log(1 - 0.1))
    assert math.isinf(times[3])
    assert math.isinf(learned(path)[3])


def test_rates_above_two_are_never_learned() -> None:
    assert np.isinf(time_to_learn([10.1, 9.9], 0.2, scale=1.0)).tolist() == [True, False]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1.9), min_size=1, max_size=6), st.integers(1, 30))
def test_momentum_zero_is_the_power_of_one_minus_the_rate(rates: list[float], steps: int) -> None:
    path = predict_modes(np.ones(len(rates)), rates, [1.0] * steps, scale=1.0)
    np.testing.assert_allclose(path[-1], (1 - np.array(rates)) ** steps, atol=1e-12)


def test_components_take_as_long_as_the_modes_they_consist_of() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    values = np.array([0.9, 0.5, 0.1, 0.01, 0.0])
    times = time_to_learn(values, 1.0, scale=1.0)
    assert component_steps(vectors, times, vectors[:, 2]) == pytest.approx(times[2])
    assert math.isinf(component_steps(vectors, times, vectors[:, 4]))
    # A mode that the first step takes away whole delays nothing.
    whole = time_to_learn([1.0, 0.5], 1.0, scale=1.0)
    assert component_steps(np.eye(2), whole, [1.0, 0.0]) == pytest.approx(0, abs=1e-9)
    assert component_steps(np.eye(2), whole, [1.0, 1e-9]) == pytest.approx(0, abs=1e-9)
    assert component_steps(np.eye(2), whole, [1.0, 1.0]) == pytest.approx(math.log(math.sqrt(0.02)) / math.log(0.5))
    mixed = vectors[:, 1] + 2 * vectors[:, 3]
    steps = component_steps(vectors, times, mixed)
    path = predict_modes(vectors.T @ mixed, values, [1.0] * (math.ceil(steps) + 1), scale=1.0)
    norms = np.linalg.norm(path, axis=1) / np.linalg.norm(mixed)
    assert norms[math.floor(steps)] >= 0.1 >= norms[math.ceil(steps)]


def frozen_error(width: int, act: str, seed: int, target: float = 1.0) -> float:
    x, y = data()
    return study(Wide(width, act, seed), x, target * y, steps=100).number("forecast_error")


def test_a_wide_tanh_network_follows_its_first_kernel() -> None:
    """The error grows with the target, which the kernel has to move for: 1e-3 holds at rms 1/3, not at rms 1."""
    assert max(frozen_error(4096, "tanh", seed, target=1 / 3) for seed in range(3)) < 1e-3
    assert 1e-3 < frozen_error(4096, "tanh", 0) < 1e-2


def test_the_forecast_gets_better_with_width() -> None:
    """Errors of tanh networks fall as about 1/width, four draws each."""
    narrow, wide = (np.mean([frozen_error(width, "tanh", seed) for seed in range(4)]) for width in (64, 1024))
    assert 4 < narrow / wide < 60


def test_wide_networks_are_said_to_follow_and_narrow_ones_not() -> None:
    x, y = data()
    claims = {v.claim: v.holds for v in study(Wide(2048, "tanh", 0), x, y, steps=300).verdicts}
    assert claims["the first kernel predicts the whole run"] is True
    assert claims["modes are learned in the order of their eigenvalues"] is True
    claims = {v.claim: v.holds for v in study(Wide(3, "relu", 1), x, 5 * y, steps=300).verdicts}
    assert claims["the first kernel predicts the whole run"] is False


def test_a_learning_rate_above_the_bound_is_called_unstable() -> None:
    x, y = data(9)
    model = linear(1)
    bound = 2 / (2 / 9 * float(torch.linalg.eigvalsh(empirical_ntk(model, x).reshape(9, 9))[-1]))
    for factor, stable in ((0.98, True), (1.02, False)):
        verdict = study(model, x, y, lr=factor * bound, steps=30).verdicts[0]
        assert verdict.holds is stable


def test_a_kernel_that_is_there_already_is_used() -> None:
    (x, y), model = data(7), linear(1)
    report = study(model, x, y, kernel=empirical_ntk(model, x), steps=5)
    assert report.number("forecast_error") < 1e-10
    doubled = study(model, x, y, kernel=2 * empirical_ntk(model, x), steps=5)
    assert doubled.number("forecast_error") > 0.01


def test_targets_may_be_classes() -> None:
    found = target_matrix(torch.tensor([2, 0]), 2, 3)
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1, 2], [2, -1, -1]], dtype=torch.float64) / 3)
    assert target_matrix(torch.ones(4), 4, 1).shape == (4, 1)


def test_bad_input_is_named() -> None:
    (x, y), model = data(4), linear(1)
    with pytest.raises(InputError, match="pass y="):
        study(model, x)
    with pytest.raises(InputError, match="targets must be"):
        study(model, x, torch.ones(3))
    with pytest.raises(InputError, match="classes must lie"):
        target_matrix(torch.tensor([0, 3]), 2, 3)
    with pytest.raises(InputError, match="positive learning rates"):
        study(model, x, y, lr=-0.1)
    with pytest.raises(InputError, match="4 rows"):
        study(model, x, y, kernel=np.eye(3))
    with pytest.raises(InputError, match="must not be zero"):
        study(model, x, y, kernel=np.zeros((4, 4)))
    with pytest.raises(InputError, match="one eigenvalue"):
        predict_modes([1.0], [1.0, 2.0], [0.1], scale=1.0)
    with pytest.raises(InputError, match="not all zero"):
        component_steps(np.eye(2), np.ones(2), [0.0, 0.0])


def test_the_network_is_left_alone() -> None:
    (x, y), model = data(4), linear(1).float().train()
    before = [p.clone() for p in model.parameters()]
    study(model, x.float(), y, steps=3)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_example_draws_its_figure() -> None:
    report = example(quick=True)
    assert png(report.figures["learning_speed"]).startswith(b"\x89PNG")
    assert len(report.tables["Modes with most of the residual"].rows) == 12
    assert any(one.name.startswith("steps, target of output") for one in report.numbers)
