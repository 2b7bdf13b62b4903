"""Optimizers come back from checkpoints as they were: kind, order of parameters, rates, state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ntk_monitor.checkpoints import LIVE, Checkpoint
from ntk_monitor.restored import optimizers
from tests import analyses


def checkpoint(model: nn.Module, *saved: Optimizer) -> Checkpoint:
    states = tuple(optimizer.state_dict() for optimizer in saved)
    return Checkpoint(Path("a.pt"), "weights", 3, None, {LIVE: model.state_dict()}, states)


def stepped(model: nn.Module, *moved: Optimizer) -> None:
    x, y = analyses.data().tensors
    for _ in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for optimizer in moved:
            optimizer.step()


def same_state(one: Optimizer, other: Optimizer, parameters: dict[Any, nn.Parameter]) -> None:
    """Compare state parameter by parameter, in whatever order the groups list them."""
    assert len(one.state) == len(other.state) > 0
    for parameter, slots in one.state.items():
        for key, value in slots.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other.state[parameters[parameter]][key]), key


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_tells_kind_and_order(kind: str) -> None:
    net, fresh = analyses.network(), analyses.network()
    saved = KINDS[kind](net.parameters())
    stepped(net, saved)
    (made,), notes = optimizers(fresh, checkpoint(net, saved))
    assert type(made) is type(saved)
    # The whole state dict again: rates, momenta, options of the groups.
    for ours, theirs in zip(made.param_groups, saved.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    same_state(saved, made, dict(zip(net.parameters(), fresh.parameters(), strict=True)))
    assert notes == (f"{type(saved).__name__} and the order of its parameters are read from its state",)


class Normed(nn.Module):
    """A network whose weight decay leaves biases and norms out, as most recipes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(analyses.FEATURES, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, analyses.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.norm(self.first(x)))
        return y


def test_groups_with_and_without_decay_are_recognised() -> None:
    net, fresh = Normed(), Normed()
    decayed = [p for name, p in net.named_parameters() if p.dim() > 1]
    rest = [p for name, p in net.named_parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    saved = torch.optim.AdamW(groups, lr=0.01)
    stepped(net, saved)
    (made,), _ = optimizers(fresh, checkpoint(net, saved))
    assert [len(group["params"]) for group in made.param_groups] == [2, 4]
    assert made.param_groups[1]["weight_decay"] == 0
    same_state(saved, made, dict(zip(net.parameters(), fresh.parameters(), strict=True)))


class Odd(analyses.Net):
    """A module whose `configure_optimizers` returns what it is told to."""

    def __init__(self, answer: Callable[["Odd"], Any]) -> None:
        L.LightningModule.__init__(self)
        self.net = nn.Sequential(nn.Linear(analyses.FEATURES, 4), nn.Tanh(), nn.Linear(4, analyses.CLASSES))
        self.answer = answer

    def configure_optimizers(self) -> Any:
        return self.answer(self)


def _reversed(module: nn.Module) -> Optimizer:
    return torch.optim.Adam(list(module.parameters())[::-1], lr=0.05)


def _scheduled(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def _lists(module: nn.Module) -> Any:
    optimizer = _reversed(module)
    return [optimizer], [_scheduled(optimizer)]


def _mapping(module: nn.Module) -> Any:
    optimizer = _reversed(module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": _scheduled(optimizer), "interval": "step"}}


ANSWERS: dict[str, Callable[[Any], Any]] = {
    "one": _reversed,
    "list": lambda module: [_reversed(module)],
    "lists": _lists,
    "mapping": _mapping,
    "tuple of mappings": lambda module: (_mapping(module),),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_lightning_module_is_asked(name: str) -> None:
    """The order of its parameters could not be guessed: two of them have the same shape elsewhere."""
    module, fresh = Odd(ANSWERS[name]), Odd(ANSWERS[name])
    saved = _reversed(module)
    stepped(module, saved)
    (made,), notes = optimizers(fresh, checkpoint(module, saved))
    assert notes == ()
    same_state(saved, made, dict(zip(module.parameters(), fresh.parameters(), strict=True)))


def test_several_optimizers_come_back_in_their_order() -> None:
    def two(module: Any) -> Any:
        return [
            torch.optim.SGD(module.net[0].parameters(), 0.1, 0.9),
            torch.optim.Adam(module.net[2].parameters(), 0.2),
        ]

    module, fresh = Odd(two), Odd(two)
    saved = two(module)
    stepped(module, *saved)
    made, _ = optimizers(fresh, checkpoint(module, *saved))
    assert [(type(one).__name__, one.param_groups[0]["lr"]) for one in made] == [("SGD", 0.1), ("Adam", 0.2)]


def test_what_needs_a_trainer_is_guessed_and_told() -> None:
    def asking(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=module.trainer.max_steps)

    net, fresh = Odd(asking), Odd(asking)
    saved = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    stepped(net, saved)
    (made,), notes = optimizers(fresh, checkpoint(net, saved))
    assert made.param_groups[0]["lr"] == 0.1
    assert "configure_optimizers() needs more than the model" in notes[0]


def test_state_that_fits_nothing_is_left_aside_and_told() -> None:
    wide, net = analyses.network(9), analyses.network()
    saved = torch.optim.Adam(wide.parameters(), 0.1)
    stepped(wide, saved)
    made, notes = optimizers(net, checkpoint(wide, saved))
    assert made == []
    assert "does not fit the model's parameters" in notes[0]
    assert optimizers(net, checkpoint(net)) == ([], ())
