"""Forecasts of real networks against what then happened: figures of theory.md (B2, S5) and of cross-entropy."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.dynamics.flow import residual_of, times_to_learn
from ntk_monitor.dynamics.forecast import Forecast, forecast
from ntk_monitor.dynamics.frozen import frozen
from ntk_monitor.dynamics.linearise import linearise
from ntk_monitor.dynamics.simulate import simulate
from ntk_monitor.errors import InputError
from tests.twins_dynamics import Linear, frozen_adam, targets, train

S = torch.optim
N = 24


class MLP(nn.Module):
    """Three layers by He's initialisation, zero biases, drawn in the order of the generator behind the table."""

    def __init__(self, act: Callable[[Tensor], Tensor], width: int, outputs: int) -> None:
        super().__init__()
        sizes = [6, width, width, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes))
        self.act = act
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = self.act(layer(x))
        last: Tensor = self.layers[-1](x)
        return last


def data(outputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=g, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * 6**0.5
    y = torch.sin(2 * x[:, :1]) + 0.3 * torch.randn(N, 1, generator=g, dtype=torch.float64)
    return x, y if outputs == 1 else torch.cat([y, torch.cos(2 * x[:, 1:2]), x[:, 2:3] * x[:, 3:4]], 1)


@dataclass(frozen=True)
class Row:
    """One row of the table: the rule, steps before and during the forecast, error at tanh-512."""

    make: Callable[..., S.Optimizer]
    lr: float
    warm: int
    steps: int
    error: float
    cosine: bool = False
    outputs: int = 1


TABLE = {
    "SGD": Row(S.SGD, 0.05, 20, 50, 0.006),
    "SGD cosine": Row(S.SGD, 0.1, 20, 80, 0.020, cosine=True),
    "momentum": Row(lambda p, lr: S.SGD(p, lr, momentum=0.9), 0.01, 10, 40, 0.024),
    "Nesterov": Row(lambda p, lr: S.SGD(p, lr, momentum=0.9, nesterov=True), 0.01, 10, 40, 0.004),
    "SGD decay": Row(lambda p, lr: S.SGD(p, lr, weight_decay=0.05), 0.05, 20, 50, 0.011),
    "Adam early": Row(S.Adam, 0.002, 20, 20, 0.075),
    "Adam late": Row(S.Adam, 0.0003, 200, 30, 0.007),
    "AdamW late": Row(lambda p, lr: S.AdamW(p, lr, weight_decay=0.1), 0.0003, 200, 30, 0.006),
    "three outputs": Row(S.SGD, 0.1, 20, 50, 0.009, outputs=3),
}


def measure(row: Row, act: Callable[[Tensor], Tensor], width: int) -> tuple[float, Forecast]:
    """Return the error over motion of the forecast of one row, and the forecast."""
    x, y = data(row.outputs)
    torch.manual_seed(0)
    model = MLP(act, width, row.outputs)
    base = row.lr * 64 / width
    optimizer = row.make(model.parameters(), lr=base)
    total = row.warm + row.steps
    shape = [0.5 * (1 + math.cos(math.pi * t / total)) if row.cosine else 1.0 for t in range(total)]
    rates = torch.tensor(shape, dtype=torch.float64)[:, None] * base
    train(model, optimizer, [(x, y)] * row.warm, F.mse_loss, rates)
    found = forecast(model, optimizer, (x, y), "mse", row.steps, rates[row.warm :, 0].tolist(), freeze="v")
    train(model, optimizer, [(x, y)] * row.steps, F.mse_loss, rates[row.warm :])
    actual = model(x).detach()
    return float((found.outputs[-1] - actual).norm() / (actual - found.outputs[0]).norm()), found


@pytest.mark.parametrize("name", ["momentum", pytest.param("SGD decay", marks=pytest.mark.slow)])
def test_forecasts_of_a_wide_smooth_network_hold(name: str) -> None:
    error, found = measure(TABLE[name], torch.tanh, 512)
    assert error <= 1.5 * TABLE[name].error
    assert found.trust.reliable, found.trust.reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLE))
def test_every_row_of_the_table(name: str) -> None:
    error, found = measure(TABLE[name], torch.tanh, 512)
    assert error <= 1.5 * TABLE[name].error
    assert found.trust.reliable, found.trust.reasons


@pytest.mark.parametrize(
    "name", [name if name == "Adam early" else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
)
def test_forecasts_of_a_narrow_network_with_kinks_call_themselves_unreliable(name: str) -> None:
    error, found = measure(TABLE[name], torch.relu, 64)
    assert error > 0.1
    assert not found.trust.reliable
    assert found.trust.linearisation > 0.15
    assert "off the forecast" in found.trust.reasons[0]


def test_frozen_jacobian_with_sgd_is_the_simulation() -> None:
    torch.manual_seed(0)
    model = MLP(torch.tanh, 16, 2)
    x, y, rider = torch.randn(5, 6).double(), torch.randn(5, 2).double(), torch.randn(3, 6).double()
    optimizer = S.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1)
    train(model, optimizer, [(x, y)] * 3, F.mse_loss)
    rates = torch.linspace(0.02, 0.01, 8, dtype=torch.float64)[:, None]
    wanted = simulate(linearise(model, optimizer, (x, y), "mse", riding=rider), rates, clip=0.5)
    for dense in (2**27, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ntk_monitor.dynamics.frozen.DENSE", dense)
            path = frozen(model, optimizer, (x, y), "mse", rates, riding=rider, clip=0.5)
        assert torch.allclose(path, wanted, atol=1e-12)


REAL: dict[str, Callable[[Any], S.Optimizer]] = {
    "AdamW": lambda p: S.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True),
    "coupled Adam": lambda p: S.Adam(p, lr=0.02, weight_decay=0.1),
    "RMSprop": lambda p: S.RMSprop(p, lr=0.01, momentum=0.5),
    "Adafactor": lambda p: S.Adafactor(p, lr=0.02),
    "NAdam": lambda p: S.NAdam(p, lr=0.02),
    # A few iterations: later ones amplify rounding a million times.
    "LBFGS": lambda p: S.LBFGS(p, lr=0.2, max_iter=4),
}


@pytest.mark.parametrize("name", list(REAL))
def test_any_real_rule_is_exact_on_a_linear_model(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = Linear(), torch.randn(7, 4).double(), targets("mse", 7, 3)
    optimizer = REAL[name](model.parameters())
    if name != "LBFGS":
        train(model, optimizer, [(x, y)] * 4, F.mse_loss)
    steps = 3 if name == "LBFGS" else 10
    found = forecast(model, optimizer, (x, y), "mse", steps, lambda t: 1 - 0.05 * t)
    assert found.trust.optimizer
    assert found.trust.linearisation < 1e-8
    assert found.trust.reliable
    if name == "LBFGS":

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        for lr in found.rates[:, 0].tolist():
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step(closure)  # type: ignore[arg-type]
    else:
        train(model, optimizer, [(x, y)] * steps, F.mse_loss, found.rates)
    assert torch.allclose(found.outputs[-1], model(x).detach(), atol=1e-8)


def test_probe_rates_and_modes() -> None:
    torch.manual_seed(0)
    model, x, y = Linear(), torch.randn(9, 4).double(), targets("mse", 9, 3)
    probe = (torch.randn(4, 4).double(), targets("mse", 4, 3))
    optimizer = S.SGD(model.parameters(), lr=0.05)
    found = forecast(model, optimizer, (x, y), "mse", 12, 0.1)
    assert torch.equal(found.rates, torch.full((12, 1), 0.1, dtype=torch.float64))
    # Plain descent on squares: each mode shrinks by its own factor.
    decayed = found.mode_residuals[0] * (1 - found.speeds) ** 12
    assert np.allclose(found.mode_residuals[-1], decayed, atol=1e-10)
    energies = (found.mode_residuals**2).sum(1)
    assert np.allclose(energies, 2 * found.loss, atol=1e-12)  # |u|² = s |f - y|², twice the loss
    assert found.time_to(found.loss[5]) == 5
    assert found.time_to(0.0) == math.inf
    elsewhere = forecast(model, optimizer, (x, y), "mse", 12, [0.1] * 12, probe=probe)
    assert elsewhere.outputs.shape == (13, 4, 3)
    assert elsewhere.mode_residuals.shape == (13, 12)
    train(model, optimizer, [(x, y)] * 12, F.mse_loss, found.rates)
    assert torch.allclose(elsewhere.outputs[-1], model(probe[0]).detach(), atol=1e-10)
    assert elsewhere.loss[-1] == pytest.approx(float(F.mse_loss(model(probe[0]), probe[1]).detach()))
    for wrong in ({"steps": 0}, {"lr": [0.1, 0.2]}):
        with pytest.raises(InputError, match="wanted"):
            forecast(model, optimizer, (x, y), "mse", **{"steps": 12, **wrong})  # type: ignore[arg-type]


def test_a_learning_rate_over_the_bound_is_no_forecast() -> None:
    torch.manual_seed(0)
    model, x, y = Linear(), torch.randn(9, 4).double(), targets("mse", 9, 3)
    optimizer = S.SGD(model.parameters(), lr=0.05)
    edge = 2 / forecast(model, optimizer, (x, y), "mse", 1).speeds[0] * 0.05
    below, above = (forecast(model, optimizer, (x, y), "mse", 100, lr * edge).trust for lr in (0.98, 1.02))
    assert below.reliable
    assert below.stability == pytest.approx(0.98)
    assert not above.reliable
    assert any("1 times the full-batch bound" in reason for reason in above.reasons)


def test_adam_says_how_much_depends_on_its_second_moment() -> None:
    torch.manual_seed(0)
    model, x, y = Linear(), torch.randn(9, 4).double(), targets("mse", 9, 3)
    optimizer = S.Adam(model.parameters(), lr=0.02)
    train(model, optimizer, [(x, y)] * 11, F.mse_loss)
    kept, grown = (forecast(model, optimizer, (x, y), "mse", 30, freeze=freeze) for freeze in ("vhat", "v"))
    gap = float((kept.outputs[-1] - grown.outputs[-1]).norm() / (kept.outputs[-1] - kept.outputs[0]).norm())
    assert kept.trust.rule == pytest.approx(gap)
    assert not kept.trust.reliable
    frozen_adam(model, optimizer, (x, y), F.mse_loss, kept.rates, "vhat")
    assert torch.allclose(model(x).detach(), kept.outputs[-1], atol=1e-6)  # but for ε


@pytest.mark.slow
@pytest.mark.parametrize(("act", "width"), [(torch.tanh, 128), (torch.tanh, 512), (torch.relu, 512)])
@pytest.mark.parametrize("seed", [0, 1])
def test_time_to_a_loss(act: Callable[[Tensor], Tensor], width: int, seed: int) -> None:
    x, y = data(1)
    torch.manual_seed(seed)
    model = MLP(act, width, 1)
    optimizer = S.SGD(model.parameters(), lr=1.0)
    start = linearise(model, optimizer, (x, y), "mse")
    lr = 0.3 * N / 2 / float(torch.linalg.eigvalsh(start.parts[0].kernel)[-1])
    steps = 3000
    rates = torch.full((steps, 1), lr, dtype=torch.float64)
    residual = residual_of(start, "mse", y)
    found = times_to_learn(start, rates, {"first": np.eye(1, N)}, residual)
    losses = np.array(train(model, optimizer, [(x, y)] * steps, F.mse_loss, rates))
    for fraction in (0.5, 0.2, 0.1, 0.05):
        measured = int(np.flatnonzero(losses <= fraction * losses[0])[0])
        assert found.time_to(fraction * losses[0]) == pytest.approx(measured, rel=0.1, abs=1)


@pytest.mark.slow
def test_cross_entropy_is_learned_when_the_forecast_says_and_not_when_the_closed_form_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6).double()
    x = x / x.norm(dim=1, keepdim=True) * 6**0.5
    y = (x @ torch.randn(6, 4).double()).argmax(1)
    model = MLP(torch.tanh, 512, 4)
    optimizer = S.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, [(x, y)] * 2500, F.cross_entropy)
    start = linearise(model, optimizer, (x, y), "cross_entropy")
    values, vectors = torch.linalg.eigh(start.parts[0].kernel)
    naive = math.log(2) / (0.01 * float(values[-1]) / 40)  # steps to a half by lr λ/N
    residual = residual_of(start, "cross_entropy", y)
    rates = torch.full((3000, 1), 0.01, dtype=torch.float64)
    top = vectors[:, -4:].T.numpy() / residual.inverse.numpy()  # so that the component is that of g = dL/df
    found = times_to_learn(start, rates, {"top": top}, residual, fraction=0.5)
    first = np.abs(top @ residual.of(start.outputs))
    large = first > 0.3 * first.max()  # a component near zero crosses its half at any time
    assert large.sum() >= 2
    measured = np.full(len(top), math.inf)
    for t in range(1, 3001):
        train(model, optimizer, [(x, y)], F.cross_entropy)
        now = np.abs(top @ residual.of(model(x).detach()))
        measured = np.where(np.isinf(measured) & (now <= 0.5 * first), t, measured)
    assert measured[large].min() > 100 * naive
    assert np.allclose(found.times["top"][large], measured[large], rtol=0.1)


def test_long_horizons_agree_with_step_by_step() -> None:
    torch.manual_seed(0)
    x, y = data(1)
    model = MLP(torch.tanh, 32, 1)
    layers: list[Any] = list(model.layers)
    groups: Any = [{"params": layers[0].parameters(), "weight_decay": 1e-3}, {"params": layers[2].parameters()}]
    optimizer = S.SGD(groups, lr=0.004)
    dynamics = linearise(model, optimizer, (x, y), "mse")
    rates = 0.004 * torch.linspace(1, 0.1, 2500, dtype=torch.float64)[:, None].expand(-1, 2)
    residual = residual_of(dynamics, "mse", y)
    modes = torch.linalg.eigh(dynamics.speed()).eigenvectors.T.numpy()
    fast, slow = (times_to_learn(dynamics, rates, {"m": modes}, residual, exact=n) for n in (200, 2500))
    both = np.isfinite(slow.times["m"]) & (slow.times["m"] > 200)
    assert both.sum() >= 5
    assert np.median(np.abs(fast.times["m"][both] / slow.times["m"][both] - 1)) < 0.01
    assert fast.loss[-1] == pytest.approx(slow.loss[-1], rel=1e-2)
    assert len(fast.steps) < 500
    assert fast.reached == 2500


class _Force(nn.Module):
    """Minus the gradient of an energy: its forward takes gradients itself."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -slope


def test_a_forward_that_differentiates_is_forecast() -> None:
    torch.manual_seed(0)
    model, x = _Force().double(), torch.randn(12, 2, dtype=torch.float64)
    y, optimizer = torch.sin(x), torch.optim.SGD(model.parameters(), lr=0.01)
    found = forecast(model, optimizer, (x, y), "mse", steps=5)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert found.trust.reliable, found.trust.reasons
    assert float(found.loss[-1]) == pytest.approx(float(F.mse_loss(model(x), y).detach()), rel=1e-3)
