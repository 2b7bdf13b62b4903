"""What is read from live optimizers: every known variant, and nothing guessed about the others."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ntk_monitor.errors import InputError
from ntk_monitor.optimizers import OptimizerState, read
from tests.twins_dynamics import Linear, targets, train

S = torch.optim


def trained(make: Any, steps: int = 12) -> tuple[Linear, Any]:
    torch.manual_seed(0)
    model = Linear()
    optimizer = make(model.parameters())
    train(model, optimizer, [(torch.randn(6, 4).double(), targets("mse", 6, 3)) for _ in range(steps)], F.mse_loss)
    return model, optimizer


@pytest.mark.parametrize("variant", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [S.Adam, S.AdamW])
def test_the_preconditioner_is_the_last_step_divided_by_the_first_moment(
    kind: Any, amsgrad: bool, variant: dict[str, Any]
) -> None:
    """lr D m/(1 - β₁ᵏ) is the step that the real optimizer has just taken, whichever of its variants ran."""
    model, optimizer = trained(lambda p: kind(p, lr=0.01, weight_decay=0.0, amsgrad=amsgrad, **variant))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    F.mse_loss(model(torch.randn(6, 4).double()), targets("mse", 6, 3)).backward()
    optimizer.step()
    state = read(model, optimizer)
    assert (state.family, state.reason, state.groups[0].steps) == ("adam", "", 13)
    d = state.preconditioner(before)
    assert d is not None
    for name, p in model.named_parameters():
        step = 0.01 * d[name] * state.first[name] / (1 - 0.9**13)
        assert torch.allclose(before[name] - p.detach(), step, rtol=1e-9, atol=1e-15)


def test_groups_rates_and_flags_are_read() -> None:
    torch.manual_seed(0)
    model = Linear()
    optimizer = S.SGD(
        [
            {"params": model.first.parameters(), "lr": torch.tensor(0.5), "momentum": 0.9, "nesterov": True},
            {"params": model.second.parameters(), "weight_decay": 0.1, "momentum": 0.8, "dampening": 0.2},
        ],
        lr=0.25,
        maximize=True,
    )
    first, second = read(model, optimizer).groups
    assert (first.names, first.lr, first.momentum, first.nesterov) == (("first.weight", "first.bias"), 0.5, 0.9, True)
    assert (second.lr, second.weight_decay, second.momentum, second.dampening) == (0.25, 0.1, 0.8, 0.2)
    assert first.maximize
    assert second.maximize
    assert not second.decoupled
    assert (first.steps, second.steps) == (0, 0)
    train(model, optimizer, [(torch.randn(6, 4).double(), targets("mse", 6, 3))], F.mse_loss)
    after = read(model, optimizer)
    assert [group.steps for group in after.groups] == [1, 1]
    assert set(after.first) == set(after.names)
    assert after.preconditioner({}) is None


def test_decay_is_decoupled_in_adamw_only() -> None:
    model = Linear()
    assert read(model, S.AdamW(model.parameters())).groups[0].decoupled
    assert not read(model, S.Adam(model.parameters())).groups[0].decoupled
    assert read(model, S.Adam(model.parameters(), decoupled_weight_decay=True)).groups[0].decoupled


def test_frozen_shared_and_forgotten_parameters() -> None:
    model = Linear()
    model.first.bias.requires_grad_(False)
    model.second.weight = nn.Parameter(model.second.weight.detach())
    state = read(model, S.SGD([model.first.weight, nn.Parameter(torch.zeros(3))], lr=0.1))
    assert state.names == ("first.weight",)
    assert state.uncovered == ("second.weight",)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert read(tied, S.SGD(tied.parameters(), lr=0.1)).names == ("0.weight", "0.bias", "1.bias")


class OwnSGD(S.SGD):
    """A user's rule."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.sign(), alpha=group["lr"])


class Lookahead(S.Optimizer):
    """A rule around another, whose steps are not those of what it holds."""

    def __init__(self, inner: S.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.optimizer = inner


class SameSGD(S.SGD):
    """A subclass that keeps the rule."""


OTHERS: dict[str, Any] = {
    "RMSprop": S.RMSprop,
    "NAdam": S.NAdam,
    "LBFGS": S.LBFGS,
    "Adafactor": S.Adafactor,
    "OwnSGD": lambda p: OwnSGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_rules_are_named(name: str) -> None:
    model = Linear()
    state = read(model, OTHERS[name](model.parameters()))
    assert state.family == "other"
    assert state.reason.startswith(f"{name} has no function-space form")
    assert not state.first
    assert state.preconditioner(dict(model.named_parameters())) is None


def test_subclasses_and_schedulers_that_keep_the_step_are_known() -> None:
    model = Linear()
    kept = SameSGD(model.parameters(), lr=0.1)
    assert read(model, kept).family == "sgd"
    S.lr_scheduler.StepLR(kept, 1)
    assert read(model, kept).family == "sgd"
    kept.step = lambda closure=None: None  # type: ignore[method-assign]
    assert read(model, kept).family == "other"


@pytest.mark.parametrize(
    ("make", "steps", "reason"),
    [
        (lambda p: S.Adam(p, weight_decay=0.1), 12, "coupled weight decay"),
        (lambda p: S.AdamW(p, weight_decay=0.1), 12, ""),
        (S.Adam, 9, "not available before about 10 steps"),
        (S.Adam, 0, "not available before about 10 steps"),
        (S.Adam, 10, ""),
    ],
)
def test_adam_is_refused_where_it_has_no_function_space_form(make: Any, steps: int, reason: str) -> None:
    state = read(*trained(make, steps))
    assert state.family == "adam"
    assert reason in state.reason
    assert bool(state.reason) == bool(reason)


def test_several_optimizers_and_wrappers() -> None:
    model = Linear()
    pair = [S.SGD(model.first.parameters(), lr=0.1), S.SGD(model.second.parameters(), lr=0.2)]
    state = read(model, pair)
    assert [group.lr for group in state.groups] == [0.1, 0.2]
    assert not state.reason
    assert not state.uncovered
    mixed = read(model, [pair[0], S.AdamW(model.second.parameters())])
    assert (mixed.family, mixed.name) == ("other", "SGD + AdamW")
    assert "several rules at once" in mixed.reason
    assert read(model, SimpleNamespace(optimizer=pair[0])).name == "SGD"
    assert read(model, Lookahead(pair[0])).family == "other"
    assert "none of the module's trainable parameters" in read(nn.Linear(2, 2), pair).reason
    wrong: Any
    for wrong in ("SGD", []):
        with pytest.raises(InputError, match="wanted a torch"):
            read(model, wrong)


def test_floor_is_relative_to_each_tensor_and_what_never_moved_has_no_preconditioner() -> None:
    model, optimizer = trained(S.Adam)
    optimizer.state[model.first.weight]["exp_avg_sq"][0] = 0
    optimizer.state[model.second.weight]["exp_avg_sq"].mul_(1e-12)
    del optimizer.state[model.first.bias]
    state = read(model, optimizer)
    parameters = dict(model.named_parameters())
    free, floored = state.preconditioner(parameters), state.preconditioner(parameters, floor=1e-3)
    assert free is not None
    assert floored is not None
    assert float(free["first.weight"][0, 0]) == pytest.approx(1e8)
    smallest, largest = floored["first.weight"].min(), floored["first.weight"].max()
    assert float(largest / smallest) == pytest.approx(1e3, rel=1e-3)
    assert not bool(floored["first.bias"].any())
    # The other tensor's roots are a million times smaller, and keep their own scale.
    assert float(free["second.weight"].median() / floored["second.weight"].median()) == pytest.approx(1, rel=1e-6)


def test_reading_changes_nothing() -> None:
    model, optimizer = trained(lambda p: S.AdamW(p, amsgrad=True))
    before: Any = copy.deepcopy(optimizer.state_dict())
    state: OptimizerState = read(model, optimizer)
    for value in [*state.first.values(), *state.second.values()]:
        value.zero_()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entries in before["state"].items():
        assert all(torch.equal(entries[key], after["state"][i][key]) for key in entries)
