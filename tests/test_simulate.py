"""Steps in function space against real training of linear models, to rounding; what cannot be simulated is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.dynamics.linearise import linearise
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.dynamics.simulate import simulate
from ntk_monitor.errors import InputError
from tests.twins_dynamics import LOSSES, Linear, frozen_adam, targets, train

S = torch.optim
STEPS = 25

SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "foreach": {"momentum": 0.9, "foreach": True},
    "maximize": {"momentum": 0.5, "weight_decay": 0.05, "maximize": True},
}


def halving(optimizer: S.Optimizer, steps: int = STEPS) -> Tensor:
    """A schedule that falls to a half, group by group."""
    shape = torch.linspace(1, 0.5, steps, dtype=torch.float64)
    return shape[:, None] * torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)


def groups(model: Linear, **options: Any) -> list[dict[str, Any]]:
    return [
        {"params": model.first.parameters(), "lr": 0.03, **options},
        {"params": model.second.parameters(), "lr": 0.08, "weight_decay": 0.0},
    ]


@pytest.fixture
def problem(request: pytest.FixtureRequest) -> tuple[Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return Linear(), torch.randn(7, 4).double(), torch.randn(5, 4).double(), targets("mse", 7, 3)


def error(dynamics: Dynamics, path: Tensor, model: nn.Module, x: Tensor) -> float:
    """Largest error of the last outputs, relative to the largest motion."""
    actual = model(x).detach()
    motion = float((actual - dynamics.outputs).abs().max())
    assert motion > 1e-3
    return float((path[-1] - actual).abs().max()) / motion


KINDS = list(LOSSES)
ADAM: list[dict[str, Any]] = [{}, {"amsgrad": True}, {"maximize": True}, {"foreach": True}]

# A Latin square of the full product, which is slow.
SGD_CASES = [(rule, KINDS[i % 5], *((0, None), (9, 0.2), (9, None))[i % 3]) for i, rule in enumerate(SGD)]
SGD_ALL = list(itertools.product(SGD, KINDS, (0, 9), (None, 0.2)))
ADAM_CASES = [(S.AdamW, ADAM[i % 4], kind, ("vhat", "v")[i % 2]) for i, kind in enumerate(KINDS)]
ADAM_ALL = list(itertools.product((S.Adam, S.AdamW), ADAM, KINDS, ("vhat", "v")))


def sgd_error(rule: str, kind: str, warm: int, clip: float | None) -> float:
    torch.manual_seed(0)
    model, x, rider, y = Linear(), torch.randn(7, 4).double(), torch.randn(5, 4).double(), targets(kind, 7, 3)
    loss, function = LOSSES[kind]
    optimizer = S.SGD(groups(model), lr=0.1, **SGD[rule])
    train(model, optimizer, [(x, y)] * warm, function, clip=clip)
    rates = halving(optimizer)
    dynamics = linearise(model, optimizer, (x, y), loss, riding=rider)
    path = simulate(dynamics, rates, clip=clip)
    train(model, optimizer, [(x, y)] * STEPS, function, rates, clip)
    assert path.shape == (STEPS + 1, 12, 3)
    return error(dynamics, path, model, torch.cat([x, rider]))


def adam_error(kind_of: Any, options: dict[str, Any], kind: str, freeze: Any) -> float:
    torch.manual_seed(0)
    model, x, rider, y = Linear(), torch.randn(7, 4).double(), torch.randn(5, 4).double(), targets(kind, 7, 3)
    loss, function = LOSSES[kind]
    decay = {"weight_decay": 0.1 if kind_of is S.AdamW else 0.0}
    optimizer = kind_of(groups(model, **decay), lr=0.05, eps=1e-14, betas=(0.9, 0.99), **decay, **options)
    train(model, optimizer, [(x, y)] * 12, function)
    rates = halving(optimizer) / 3
    dynamics = linearise(model, optimizer, (x, y), loss, riding=rider, floor=0.0, clipping=True)
    path = simulate(dynamics, rates, freeze=freeze, clip=0.2)
    frozen_adam(model, optimizer, (x, y), function, rates, freeze, clip=0.2)
    return error(dynamics, path, model, torch.cat([x, rider]))


@pytest.mark.parametrize("case", SGD_CASES, ids=str)
def test_sgd_on_a_linear_model_is_exact(case: Any) -> None:
    assert sgd_error(*case) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", SGD_ALL, ids=str)
def test_sgd_on_a_linear_model_is_exact_in_every_combination(case: Any) -> None:
    assert sgd_error(*case) <= 1e-10


@pytest.mark.parametrize("case", ADAM_CASES, ids=str)
def test_adam_on_a_linear_model_is_exact_while_v_stands_still(case: Any) -> None:
    assert adam_error(*case) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", ADAM_ALL, ids=str)
def test_adam_on_a_linear_model_is_exact_in_every_combination(case: Any) -> None:
    assert adam_error(*case) <= 1e-10


def test_frozen_vhat_follows_real_adam_on_minibatches() -> None:
    """20 steps of warm-up, 80 of forecast, batches of 8. Freezing v would take steps as if v still grew from zero."""
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(64, 4).double()
    y = Linear()(x).detach() + 0.5 * torch.randn(64, 3).double()
    optimizer = S.Adam(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    batches = [(x[i], y[i]) for i in (torch.randint(64, (8,), generator=draw) for _ in range(100))]
    train(model, optimizer, batches[:20], F.mse_loss)
    dynamics = linearise(model, optimizer, (x, y), "mse")
    rates = torch.full((80, 1), 2e-3, dtype=torch.float64)
    ends = [simulate(dynamics, rates)[-1], simulate(dynamics, rates, freeze="v")[-1]]
    train(model, optimizer, batches[20:], F.mse_loss)
    actual = model(x).detach()
    kept, grown = (float((end - actual).norm() / (actual - dynamics.outputs).norm()) for end in ends)
    assert kept < 0.25  # .13 to .19 over three seeds
    assert grown > 2 * kept  # .34 to .51


def test_riding_samples_move_as_if_they_were_measured_alone(problem: tuple[Linear, Tensor, Tensor, Tensor]) -> None:
    model, x, rider, y = problem
    optimizer = S.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, [(x, y)] * 3, F.mse_loss)
    rates = halving(optimizer)
    alone = simulate(linearise(model, optimizer, (x, y), "mse"), rates)
    along = simulate(linearise(model, optimizer, (x, y), "mse", riding=rider), rates)
    assert torch.allclose(along[:, :7], alone, atol=1e-12)


def test_average_of_two_kernels_lies_between_them(problem: tuple[Linear, Tensor, Tensor, Tensor]) -> None:
    _, x, _, y = problem
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    optimizer = S.SGD(model.parameters(), lr=0.3)
    before = linearise(model, optimizer, (x, y), "mse")
    train(model, optimizer, [(x, y)] * STEPS, F.mse_loss)
    rates = torch.full((STEPS, 1), 0.3, dtype=torch.float64)
    after = linearise(model, optimizer, (x, y), "mse")
    forecast, explained = (error(before, simulate(d, rates), model, x) for d in (before, before.average(after)))
    assert explained < forecast / 2
    assert torch.allclose(before.average(before).parts[0].kernel, before.parts[0].kernel)


def test_one_step_moves_by_the_speed_times_the_gradient(problem: tuple[Linear, Tensor, Tensor, Tensor]) -> None:
    model, x, _, y = problem
    dynamics = linearise(model, S.SGD(groups(model), lr=0.1), (x, y), "mse")
    path = simulate(dynamics, torch.tensor([[0.03, 0.08]], dtype=torch.float64))
    expected = dynamics.speed() @ dynamics.gradient(dynamics.outputs).reshape(-1)
    assert torch.allclose((path[0] - path[1]).reshape(-1), expected, atol=1e-12)


def test_batchnorm_is_linearised_as_it_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    optimizer = S.SGD(model.parameters(), lr=1e-4)
    dynamics = linearise(model, optimizer, (x, y), "mse")
    train(model, optimizer, [(x, y)], F.mse_loss)
    path = simulate(dynamics, torch.full((1, 1), 1e-4, dtype=torch.float64))
    moved = model(x).detach() - dynamics.outputs
    assert float((path[1] - path[0] - moved).norm() / moved.norm()) < 1e-3
    with pytest.raises(InputError, match="no others can ride along"):
        linearise(model, optimizer, (x, y), "mse", riding=x)


def test_without_second_derivatives_products_go_row_by_row() -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(9, 3, mode="sum").double()  # torch has no derivative of its backward pass
    x, y = torch.randint(9, (5, 4)), torch.randn(5, 3).double()
    optimizer = S.SGD(bag.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    train(bag, optimizer, [(x, y)] * 4, F.mse_loss)
    dynamics = linearise(bag, optimizer, (x, y), "mse")
    rates = halving(optimizer)
    path = simulate(dynamics, rates)
    train(bag, optimizer, [(x, y)] * STEPS, F.mse_loss, rates)
    assert error(dynamics, path, bag, x) <= 1e-10


def test_what_cannot_be_simulated_is_refused(problem: tuple[Linear, Tensor, Tensor, Tensor]) -> None:
    model, x, rider, y = problem
    with pytest.raises(InputError, match="RMSprop has no function-space form"):
        linearise(model, S.RMSprop(model.parameters()), (x, y), "mse")
    adam = S.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(InputError, match="not available before about 10 steps"):
        linearise(model, adam, (x, y), "mse")
    train(model, adam, [(x, y)] * 10, F.mse_loss)
    rates = torch.full((2, 1), 1e-3, dtype=torch.float64)
    with pytest.raises(InputError, match="clipping=True"):
        simulate(linearise(model, adam, (x, y), "mse"), rates, clip=1.0)
    with pytest.raises(InputError, match=r"rates \(steps, 1 groups\)"):
        simulate(linearise(model, adam, (x, y), "mse"), rates.expand(2, 3))
    with pytest.raises(InputError, match="none of the parameters"):
        linearise(model, S.SGD(model.first.parameters(), lr=0.1), (x, y), "mse", params="second")
    with pytest.raises(InputError, match="samples must be alike"):
        linearise(model, adam, (x, y), "mse", riding=rider[:, :3])
