"""The gauge on a residual network with BatchNorm that learns digits: what gradient descent feels (slow)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.dynamics.edge import edge
from ntk_monitor.dynamics.stability import stability
from tests import twins_stability as twins


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outer) for _ in range(3))
        self.short = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.norms[2](self.short(x)))


def residual(width: int = 8) -> nn.Module:
    return nn.Sequential(
        Block(1, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gauge_is_power_iteration_on_the_training_function_and_raises_no_alarm(name: str) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images / 16).float()[:, None]
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = residual()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps = 160
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    probe = torch.randperm(len(x))[:64]
    ratios, losses = [], []
    for step in range(1, steps + 1):
        batch = torch.randperm(len(x))[:128]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        if step in (20, 60, 120, 150):
            found = stability(model, optimizer, (x[probe], y[probe]), "cross_entropy", batch_size=128)
            make = twins.sgd_steps if name == "sgd" else twins.adam_steps
            weights = make(model, optimizer)
            wanted = twins.power_iteration(model, x[probe], lambda f: F.cross_entropy(f, y[probe]), weights, 60)
            assert found.sharpness == pytest.approx(wanted, rel=0.1)
            ratios.append(found.ratio)
            losses.append(float(loss.detach()))
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).double().mean())
    assert accuracy > 0.98
    assert max(ratios) < 1
    assert edge(ratios, losses).regime == "below"
