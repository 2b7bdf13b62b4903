"""The gauge against power iteration in the parameters, dense twins, and optimizers that do or do not diverge."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.dynamics.stability import Stability, from_kernel, max_stable_lr, stability
from ntk_monitor.engines.operator import NTKOperator
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.losses import bce_with_logits, cross_entropy, mse
from ntk_monitor.optimizers import Group, OptimizerState, read
from tests import twins_stability as twins
from tests.cases import cnn_batchnorm


def small(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def samples(n: int = 12, outputs: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4).double(), torch.randint(outputs, (n,))


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Tensor], steps: int = 20
) -> torch.optim.Optimizer:
    for _ in range(steps):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    return optimizer


def dense(model: nn.Module, x: Tensor, y: Tensor, loss: Any, steps: dict[str, Tensor]) -> np.ndarray:
    op = NTKOperator(model, x, mode="train", loss=loss, targets=y, preconditioner=steps)
    return op.dense().numpy()


# Scale factors: learning rate once, 1/N once, curvature of the loss always.


@pytest.mark.parametrize("n", [1, 7, 28])
def test_one_linear_output_by_hand(n: int) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.randn(n, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = stability(model, optimizer, (x, torch.randn(n, 1).double()), "mse", batch_size=2)
    # L = mean (w x - y)², d²L/dw² = 2 mean x².
    curvature = 2 * float(x.square().mean())
    assert found.sharpness == pytest.approx(0.3 * curvature)
    assert found.noise == pytest.approx(0.3 * curvature)
    assert found.high == pytest.approx(2 / (0.3 * curvature))
    assert found.low == pytest.approx(2 / (0.3 * curvature * 1.5))
    assert (found.bound_low, found.bound_high, found.samples, found.batch_size) == (2.0, 2.0, n, 2)
    assert found.ratio == pytest.approx(1 / found.high)
    whole = stability(model, optimizer, (x, torch.randn(n, 1).double()), "mse", batch_size=2, population=4)
    assert whole.low == pytest.approx(2 / (0.3 * curvature * 1.25))


def test_copies_of_the_samples_change_nothing_for_a_mean() -> None:
    model, (x, y) = small(), samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    once = stability(model, optimizer, (x, y), "cross_entropy")
    thrice = stability(model, optimizer, (x.repeat(3, 1), y.repeat(3)), "cross_entropy")
    assert thrice.sharpness == pytest.approx(once.sharpness, rel=1e-3)
    assert stability(model, optimizer, (x, y), cross_entropy("sum")).sharpness == pytest.approx(12 * once.sharpness)


def test_sums_count_the_samples_of_a_batch_and_clipping_shortens_steps() -> None:
    model, (x, y) = small(), samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mean = stability(model, optimizer, (x, y), "cross_entropy", batch_size=5)
    total = stability(model, optimizer, (x, y), cross_entropy("sum"), batch_size=5)
    assert total.sharpness == pytest.approx(5 * mean.sharpness)
    assert (total.low, total.high) == pytest.approx((mean.low / 5, mean.high / 5))
    halved = stability(model, optimizer, (x, y), "cross_entropy", batch_size=5, clipped=0.5)
    assert (halved.low, halved.high) == pytest.approx((2 * mean.low, 2 * mean.high))
    with pytest.raises(InputError, match="above 0 and up to 1, got 0"):
        stability(model, optimizer, (x, y), "cross_entropy", clipped=0.0)


@pytest.mark.parametrize(
    "loss", [mse(), cross_entropy(label_smoothing=0.1), bce_with_logits()], ids=lambda loss: str(loss.name)
)
def test_sgd_with_groups_is_power_iteration_in_the_parameters(loss: Any) -> None:
    model, (x, labels) = small(), samples()
    y = labels if loss.kind == "cross_entropy" else F.one_hot(labels, 3).double()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.7}]  # type: ignore[index]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    steps = twins.sgd_steps(model, optimizer)
    found = stability(model, optimizer, (x, y), loss, batch_size=4, tolerance=1e-6)
    wanted = twins.power_iteration(model, x, lambda f: loss.function(f, y), steps)
    assert found.sharpness == pytest.approx(wanted, rel=1e-3)
    trace = float(np.trace(dense(model, x, y, loss, steps)))
    assert found.noise == pytest.approx(trace, rel=0.3)
    assert found.high == pytest.approx(3.8 / wanted, rel=1e-3)
    assert found.low == pytest.approx(0.2 / (wanted + found.noise / 4), rel=1e-3)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_is_power_iteration_with_its_preconditioner(make: Any) -> None:
    model, (x, y) = small(), samples()
    optimizer = make(model.parameters(), lr=0.01)
    trained(model, optimizer, lambda: F.cross_entropy(model(x), y), 30)
    wanted = twins.power_iteration(model, x, lambda f: F.cross_entropy(f, y), twins.adam_steps(model, optimizer))
    found = stability(model, optimizer, (x, y), "cross_entropy")
    # The step to come squares one more gradient, a thousandth of what is there.
    assert found.sharpness == pytest.approx(wanted, rel=5e-3)
    assert found.available
    assert found.bound_high == pytest.approx(38.0 if make is torch.optim.Adam else 19 * (2 - 1e-4))


def test_a_waking_unit_does_not_have_steps_of_one_over_epsilon() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(16, 3).double(), torch.randn(16, 1).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    asleep = x.clone()
    asleep[:, 0] = 0.0
    trained(model, optimizer, lambda: F.mse_loss(model(asleep), y), 30)
    stale = twins.power_iteration(model, x, lambda f: F.mse_loss(f, y), twins.adam_steps(model, optimizer))
    found = stability(model, optimizer, (x, y), "mse")
    # What the next step on these samples would really divide by.
    trained(model, optimizer, lambda: F.mse_loss(model(x), y), 1)
    weights = twins.adam_steps(model, optimizer)
    wanted = twins.power_iteration(model, x, lambda f: F.mse_loss(f, y), weights)
    assert stale > 1e4 * wanted
    assert found.sharpness == pytest.approx(wanted, rel=1e-2)
    before = copy.deepcopy(optimizer.state_dict())
    stability(model, optimizer, (x, y), "mse")
    assert str(before) == str(optimizer.state_dict())


def test_batch_norm_is_measured_as_training_feels_it() -> None:
    torch.manual_seed(0)
    model = cnn_batchnorm().double()
    x, y = torch.randn(10, 2, 6, 6).double(), torch.randint(2, (10,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer, lambda: F.cross_entropy(model(x), y), 3)
    wanted = twins.power_iteration(model, x, lambda f: F.cross_entropy(f, y), twins.sgd_steps(model, optimizer))
    kept = copy.deepcopy(model.state_dict())
    found = stability(model, optimizer, (x, y), "cross_entropy")
    assert found.sharpness == pytest.approx(wanted, rel=2e-3)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert stability(model, optimizer, (x, y), "cross_entropy", mode="eval").sharpness > 1.2 * wanted


def test_parameters_without_optimizer_do_not_move() -> None:
    model, (x, y) = small(), samples()
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)  # type: ignore[index]
    found = stability(model, head, (x, y), "cross_entropy")
    alone = stability(model, head, (x, y), "cross_entropy", params="^2")
    assert found.sharpness == pytest.approx(alone.sharpness, rel=2e-3)
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    assert stability(model, everything, (x, y), "cross_entropy").sharpness > 1.05 * found.sharpness


# The largest stable learning rate, tried out.

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "decay": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
    "dampening": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, dampening=0.3),
}


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Linear(4, 2).double()
    return model, torch.randn(20, 4).double(), torch.randn(20, 2).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_full_batch_steps_diverge_just_above_the_largest_stable_rate(name: str) -> None:
    model, x, y = linear()
    rate = max_stable_lr(model, OPTIMIZERS[name](model.parameters(), lr=0.01), (x, y), "mse", tolerance=1e-8)

    def distance(lr: float) -> float:
        twin = copy.deepcopy(model)
        optimizer = OPTIMIZERS[name](twin.parameters(), lr=lr)
        trained(twin, optimizer, lambda: F.mse_loss(twin(x), y), 600)
        before = [p.detach().clone() for p in twin.parameters()]
        trained(twin, optimizer, lambda: F.mse_loss(twin(x), y), 1)
        moved = torch.cat([(a - b).detach().flatten() for a, b in zip(before, twin.parameters(), strict=True)])
        return float(moved.norm())

    assert distance(1.02 * rate) > 1e3
    assert distance(0.98 * rate) < 1e-3


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_adam_with_its_second_moment_frozen_diverges_just_above_it(decay: float) -> None:
    model, x, y = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
    trained(model, optimizer, lambda: F.mse_loss(model(x), y), 50)
    rate = max_stable_lr(model, optimizer, (x, y), "mse", tolerance=1e-8)
    trained(model, optimizer, lambda: F.mse_loss(model(x), y), 1)
    steps = twins.adam_steps(model, optimizer)

    def distance(lr: float) -> float:
        twin = copy.deepcopy(model)
        averages = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
        change = 0.0
        for _ in range(800):
            twin.zero_grad()
            F.mse_loss(twin(x), y).backward()
            change = 0.0
            for name, p in twin.named_parameters():
                averages[name] = 0.9 * averages[name] + 0.1 * (p.grad if p.grad is not None else 0)
                delta = -lr * decay * p.detach() - lr / 0.01 * steps[name] * averages[name]
                p.data += delta
                change += float(delta.square().sum())
            if change > 1e8:
                break
        return math.sqrt(change)

    assert distance(1.02 * rate) > 1e3
    assert distance(0.98 * rate) < 1e-2


def test_ratios_of_groups_are_kept() -> None:
    model, (x, y) = small(), samples()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.1}]  # type: ignore[index]
    rate = max_stable_lr(model, torch.optim.SGD(groups), (x, y), "cross_entropy", tolerance=1e-6)
    for group, factor in zip(groups, (1, 5), strict=True):
        group["lr"] = rate * factor
    at = stability(model, torch.optim.SGD(groups), (x, y), "cross_entropy", tolerance=1e-6)
    assert at.ratio == pytest.approx(1.0, rel=1e-4)
    # Before a warm-up from zero, one rate for all.
    zero = torch.optim.SGD(model.parameters(), lr=0.0)
    same = torch.optim.SGD(model.parameters(), lr=0.5)
    for_zero, for_same = (max_stable_lr(model, o, (x, y), "cross_entropy") for o in (zero, same))
    assert for_zero == pytest.approx(for_same, rel=1e-3)
    groups[0]["lr"] = 0.0
    with pytest.raises(InputError, match="first parameter group has learning rate 0"):
        max_stable_lr(model, torch.optim.SGD(groups), (x, y), "cross_entropy")


# Where there is none.


def test_what_has_no_gauge_says_why() -> None:
    model, (x, y) = small(), samples()

    def reason(optimizer: Any) -> str:
        found = stability(model, optimizer, (x, y), "cross_entropy")
        assert not found.available
        assert math.isnan(found.low)
        return found.reason

    adam = torch.optim.Adam(model.parameters())
    assert reason(adam) == "not available before about 10 steps of Adam, got 0: its preconditioner is forming"
    trained(model, adam, lambda: F.cross_entropy(model(x), y), 10)
    assert stability(model, adam, (x, y), "cross_entropy").available
    assert "RMSprop" in reason(torch.optim.RMSprop(model.parameters()))
    assert reason(torch.optim.SGD(model.parameters(), lr=0.0)) == "the learning rate is 0 at this step"
    assert "climbs" in reason(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    other = nn.Linear(2, 2)
    assert "updates none" in reason(torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(InputError, match=r"no largest stable learning rate is known: .*RMSprop"):
        max_stable_lr(model, torch.optim.RMSprop(model.parameters()), (x, y), "cross_entropy")
    with pytest.raises(InputError, match="count samples, got 0 and None"):
        stability(model, adam, (x, y), "cross_entropy", batch_size=0)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)  # type: ignore[index]
    assert "not finite" in reason(torch.optim.SGD(model.parameters(), lr=0.1))


# Losses without a root of their curvature.


def test_a_callable_is_measured_by_whole_matrices() -> None:
    model, (x, y) = small(), samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    known = stability(model, optimizer, (x, y), "cross_entropy", batch_size=3)
    found = stability(model, optimizer, (x, y), functools.partial(F.cross_entropy), batch_size=3)
    assert found.sharpness == pytest.approx(known.sharpness, rel=2e-3)
    assert found.low == pytest.approx(known.low, rel=0.2)
    assert found.negative == 0.0
    assert "Hessian" in found.how


def test_negative_curvature_of_a_loss_is_told() -> None:
    model, (x, y) = small(), samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def saturating(f: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(F.cross_entropy(f, t, reduction="none").square()).mean()

    found = stability(model, optimizer, (x, y), saturating)
    wanted = twins.power_iteration(model, x, lambda f: saturating(f, y), twins.sgd_steps(model, optimizer))
    assert found.negative < 0
    assert max(found.sharpness, -found.negative) == pytest.approx(abs(wanted), rel=1e-3)
    flat = stability(model, optimizer, (x, y), lambda f, t: f.sum())
    assert "no positive curvature" in flat.reason
    many = stability(model, optimizer, (torch.randn(400, 4).double(), y), lambda f, t: f.square().sum())
    assert "more than the 1024" in many.reason


# From kernels that are there already; the jackknife.


@pytest.mark.parametrize("loss", [mse(), cross_entropy()], ids=lambda loss: str(loss.name))
def test_from_kernels_of_groups(loss: Any) -> None:
    model, (x, labels) = small(), samples()
    y = labels if loss.kind == "cross_entropy" else F.one_hot(labels, 3).double()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.7}]  # type: ignore[index]
    optimizer = torch.optim.SGD(groups)
    state = read(model, optimizer)
    wanted = stability(model, optimizer, (x, y), loss, tolerance=1e-6)
    root = loss.terms(model(x), y).root
    kernels = [empirical_ntk(model, x, params=list(group.names)) for group in state.groups]
    found = from_kernel(kernels, state, root, batch_size=4)
    assert found.sharpness == pytest.approx(wanted.sharpness, rel=1e-4)
    assert found.noise == pytest.approx(float(np.trace(dense(model, x, y, loss, twins.sgd_steps(model, optimizer)))))
    summed = [torch.einsum("ncmc->nm", kernel) for kernel in kernels]
    low = from_kernel(summed, state, root)
    assert found.sharpness / 3 <= low.sharpness <= 1.001 * found.sharpness
    assert low.how.endswith("an underestimate")
    with pytest.raises(InputError, match="wanted 2 kernels of shape"):
        from_kernel(kernels[:1], state, root)
    other = OptimizerState(name="Lion", family="other", groups=(Group(names=("w",), lr=0.1),))
    assert from_kernel(kernels, other, root) == Stability(
        reason="the step of Lion has no known bound of stability", samples=12
    )


def test_the_bias_is_that_of_leaving_samples_out() -> None:
    model, (x, y) = small(), samples(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = [stability(model, optimizer, (x, y), "cross_entropy", seed=seed, tolerance=1e-6) for seed in range(6)]
    m = dense(model, x, y, "cross_entropy", twins.sgd_steps(model, optimizer))
    wanted = twins.jackknife(m, 30) / found[0].sharpness
    assert float(np.mean([one.bias for one in found])) == pytest.approx(wanted, rel=0.35)
    kernel, root = empirical_ntk(model, x), cross_entropy().terms(model(x), y).root
    assert from_kernel([kernel], read(model, optimizer), root).bias == pytest.approx(wanted, rel=0.25)
    # Samples that are all alike: one more or less changes nothing.
    alike = stability(model, optimizer, (x[:1].repeat(9, 1), y[:1].repeat(9)), "cross_entropy")
    assert alike.bias < 1e-4


def test_a_warm_start_costs_fewer_passes() -> None:
    model, (x, y) = small(), samples(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cold = stability(model, optimizer, (x, y), "cross_entropy")
    assert cold.vector is not None
    warm = stability(model, optimizer, (x, y), "cross_entropy", start=cold.vector)
    assert warm.sharpness == pytest.approx(cold.sharpness, rel=2e-3)

    def passes(found: Stability) -> int:
        return int(found.how.split(" passes")[0].split()[-1])

    assert passes(warm) < passes(cold)
    # One that does not fit, or is not finite, is left out.
    for bad in (np.ones(7), np.full(120, np.nan)):
        assert stability(model, optimizer, (x, y), "cross_entropy", start=bad).sharpness == pytest.approx(
            cold.sharpness, rel=2e-3
        )
