"""The change of the outputs by layer, against rows of the Jacobian; laws of its parts."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.dynamics.kept import Kept
from ntk_monitor.dynamics.updates import Updates, blocks, decompose, distance, kernel_share
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.losses import cross_entropy, mse
from tests import twins_updates

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Sign(torch.optim.Optimizer):
    """A rule that no theory of kernels knows: lr · sign(g)."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.002})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


OPTIMIZERS: dict[str, Optimizer] = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.1),
    "sign": Sign,
}


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _train(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    running = optimizer(list(model.parameters()))
    for _ in range(steps):
        running.zero_grad()
        F.mse_loss(model(x), y).backward()
        running.step()


def _interval(optimizer: Optimizer, steps: int = 5) -> tuple[nn.Module, nn.Module, Kept, Tensor, Tensor]:
    model, x, y = _net(), torch.randn(7, 4).double(), torch.randn(7, 3).double()
    before, kept = copy.deepcopy(model), Kept.of(model)
    _train(model, optimizer, x, y, steps)
    gradient = torch.as_tensor(mse().terms(before(x), y).gradient)
    return before, model, kept, x, gradient


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_number_is_that_of_the_slow_twin(optimizer: Optimizer) -> None:
    before, after, kept, x, gradient = _interval(optimizer)
    found = decompose(after, kept, x, gradient)
    parts, g = twins_updates.parts(before, after, x), gradient.reshape(-1)
    assert found.layers == tuple(parts) == ("0", "2", "4")
    energy = [float(part @ part) for part in parts.values()]
    np.testing.assert_allclose(found.share, np.array(energy) / sum(energy), rtol=1e-9)
    useful = [float(-(part @ g) / part.norm() / g.norm()) for part in parts.values()]
    np.testing.assert_allclose(found.useful, useful, rtol=1e-9)
    np.testing.assert_allclose(found.gain, [float(-(part @ g)) for part in parts.values()], rtol=1e-9)
    moved = (after(x) - before(x)).detach().reshape(-1)
    assert found.motion == pytest.approx(float(moved.norm()), rel=1e-9)
    along = float(-(moved @ g) / moved.norm() / g.norm())
    assert found.along == pytest.approx(along, rel=1e-9)
    assert found.wasted == pytest.approx(1 - along**2, rel=1e-9)
    assert found.linearisation.error == pytest.approx(twins_updates.linearisation(before, after, x)[0], rel=1e-9)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, value in zip(found.layers, found.moved, strict=True):
        both = [
            torch.cat([p[f"{name}.{leaf}"].detach().reshape(-1) for leaf in ("weight", "bias")]) for p in (old, new)
        ]
        assert value == pytest.approx(float((both[1] - both[0]).norm() / both[0].norm()), rel=1e-9)


def test_gains_are_the_first_order_change_of_the_loss() -> None:
    model, x, y = _net(), torch.randn(7, 4).double(), torch.randn(7, 3).double()
    before, kept = F.mse_loss(model(x), y), Kept.of(model)
    gradient = torch.as_tensor(mse().terms(model(x), y).gradient)
    _train(model, lambda p: torch.optim.SGD(p, lr=1e-6), x, y, 1)
    found = decompose(model, kept, x, gradient)
    assert found.gain.sum() == pytest.approx(float((before - F.mse_loss(model(x), y)).detach()), rel=1e-4)
    assert (found.gain > 0).all()  # plain descent on the whole batch helps with every layer
    assert 0 < found.along < 1


def test_the_middle_adds_up_better_than_the_start() -> None:
    _, after, kept, x, gradient = _interval(OPTIMIZERS["adamw"], steps=20)
    start, middle = (decompose(after, kept, x, gradient, at=at).linearisation.error for at in (0.0, 0.5))
    assert middle < 0.3 * start


def test_steps_against_the_gradient_are_wasted() -> None:
    model, x, y = _net(), torch.randn(7, 4).double(), torch.randn(7, 3).double()
    kept, gradient = Kept.of(model), torch.as_tensor(mse().terms(model(x), y).gradient)
    _train(model, lambda p: torch.optim.SGD(p, lr=1e-3, maximize=True), x, y, 1)
    found = decompose(model, kept, x, gradient)
    assert found.along < 0
    assert found.wasted == 1
    assert (found.useful < 0).all()


def test_what_stands_still_has_no_share() -> None:
    model, x = _net(), torch.randn(7, 4).double()
    kept = Kept.of(model)
    with torch.no_grad():
        model.get_parameter("2.weight").add_(0.1)
    found = decompose(model, kept, x, torch.ones(7, 3))
    np.testing.assert_array_equal(found.share, [0, 1, 0])
    np.testing.assert_array_equal(np.isnan(found.useful), [True, False, True])
    still = decompose(model, Kept.of(model), x, torch.ones(7, 3))
    np.testing.assert_array_equal(still.share, [0, 0, 0])
    assert math.isnan(still.along)


def test_batchnorm_in_evaluation_mode_under_the_old_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4).double(), torch.randn(16, 3).double()
    _train(model, lambda p: torch.optim.SGD(p, lr=0.05), x, y, 5)
    before, kept = copy.deepcopy(model), Kept.of(model)
    _train(model, lambda p: torch.optim.SGD(p, lr=0.05), x, y, 1)
    found = decompose(model, kept, x, torch.ones(16, 3))
    parts = twins_updates.parts(before.eval(), copy.deepcopy(model).eval(), x)
    energy = np.array([float(part @ part) for part in parts.values()])
    np.testing.assert_allclose(found.share, energy / energy.sum(), rtol=1e-8)
    assert found.layers == ("0", "1", "3")
    assert found.linearisation.buffers > 0


def test_a_gradient_of_other_samples_is_refused() -> None:
    model = _net()
    with pytest.raises(
        InputError, match=r"shape of the outputs \(7, 3\), got \(6, 3\); pass dL/df on the same samples"
    ):
        decompose(model, Kept.of(model), torch.randn(7, 4).double(), torch.ones(6, 3))


def test_many_layers_are_put_together_by_the_beginnings_of_their_names() -> None:
    names = [f"encoder.{i}.{part}.{leaf}" for i in range(12) for part in ("q", "k", "mlp.0") for leaf in "wb"]
    few = blocks(["embed.weight", *names, "head.weight"])
    assert {few(name) for name in names} == {f"encoder.{i}" for i in range(12)}
    assert few("embed.weight") == "embed"
    exact = blocks(names[:12])
    assert exact(names[5]) == "encoder.0.mlp.0"
    flat = blocks([f"layer{i}.weight" for i in range(40)])
    assert flat("layer7.weight") == "layer7"  # nothing to be put together by


def test_distance_costs_no_pass_and_knows_layers_that_left_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model.get_parameter("1.weight"))
    nn.init.zeros_(model.get_parameter("2.weight"))
    kept = Kept.of(model)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1.5)
        model.get_parameter("0.bias").mul_(1.5)
        model.get_parameter("1.weight").add_(1)
    assert distance(model, kept) == {"0": pytest.approx(0.5, rel=1e-6), "1": math.inf, "2": 0.0}


@pytest.mark.parametrize("outputs", ["full", "trace", "per_output"])
def test_kernel_shares_are_the_same_of_every_layout(outputs: str) -> None:
    model, x = _net(), torch.randn(5, 4).double()
    found = kernel_share(empirical_ntk(model, x, outputs=outputs, by_layer=True))  # type: ignore[arg-type]
    squares: dict[str, float] = {}
    for name, rows in twins_updates.jacobian(model, x).items():
        owner = name.rpartition(".")[0]
        squares[owner] = squares.get(owner, 0.0) + float(rows.square().sum())
    total = sum(squares.values())
    assert found == {name: pytest.approx(value / total, rel=1e-9) for name, value in squares.items()}
    assert kernel_share({"a": torch.zeros(2, 2)}) == {"a": 0.0}


def digits_run(steps: int) -> tuple[Updates, dict[str, float], dict[str, float]]:
    """An MLP on digits with AdamW in minibatches: its next epoch's updates, raw and preconditioned kernel shares."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.as_tensor(data.data / 16).double(), torch.as_tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.randint(len(x), (steps + 30, 64))

    def step(t: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x[order[t]]), y[order[t]]).backward()
        optimizer.step()

    for t in range(steps):
        step(t)
    probe, kept = x[:64], Kept.of(model)
    raw = kernel_share(empirical_ntk(model, probe, outputs="trace", by_layer=True))
    scale = {
        name: 1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**steps)).sqrt() + 1e-8)
        for name, p in model.named_parameters()
    }
    conditioned = kernel_share(empirical_ntk(model, probe, outputs="trace", by_layer=True, preconditioner=scale))
    gradient = cross_entropy().terms(model(probe), y[:64]).gradient
    for t in range(steps, steps + 30):
        step(t)
    return decompose(model, kept, probe, gradient), raw, conditioned


def test_under_adam_the_preconditioned_share_is_nearer_to_what_happened() -> None:
    found, raw, conditioned = digits_run(60)
    actual = dict(zip(found.layers, found.share, strict=True))

    def off(share: dict[str, float]) -> float:
        return sum(abs(share[name] - float(actual[name])) for name in actual)

    assert off(conditioned) < 0.6 * off(raw)
