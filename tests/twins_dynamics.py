"""Slow, obvious counterparts of the dynamics: real training, and Adam with a second moment that stands still."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, tuple[Any, LossFunction]] = {
    "mse": ("mse", F.mse_loss),
    "cross_entropy": ("cross_entropy", F.cross_entropy),
    "bce": ("bce_with_logits", F.binary_cross_entropy_with_logits),
    "huber": (nn.HuberLoss(delta=0.3), lambda f, y: F.huber_loss(f, y, delta=0.3)),
    "callable": (lambda f, y: (f - y).abs().pow(1.5).sum() / 7, lambda f, y: (f - y).abs().pow(1.5).sum() / 7),
}


def targets(kind: str, samples: int, outputs: int) -> Tensor:
    if kind == "cross_entropy":
        return torch.arange(samples) % outputs
    drawn = torch.randn(samples, outputs, dtype=torch.float64)
    return (drawn > 0).double() if kind == "bce" else drawn


class Linear(nn.Module):
    """A model that is linear in its parameters, with two layers side by side."""

    def __init__(self, inputs: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, outputs).double()
        self.second = nn.Linear(2 * inputs, outputs, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.second(torch.cat([x.sin(), x.square()], 1))
        return out


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    function: LossFunction,
    rates: Tensor | None = None,
    clip: float | None = None,
) -> list[float]:
    """Take one real step for each batch, with these learning rates (steps, groups); return the losses before each."""
    losses = []
    for t, (x, y) in enumerate(batches):
        if rates is not None:
            for group, lr in zip(optimizer.param_groups, rates[t].tolist(), strict=True):
                group["lr"] = lr
        optimizer.zero_grad()
        loss = function(model(x), y)
        losses.append(float(loss.detach()))
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


def frozen_adam(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    function: LossFunction,
    rates: Tensor,
    freeze: str,
    clip: float | None = None,
) -> None:
    """Train by Adam's formulas, parameter by parameter, but leave v (or v/(1 - β₂ᵏ)) what it is at the start."""
    x, y = batch
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    for t, lrs in enumerate(rates.tolist()):
        model.zero_grad()
        function(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            b1, b2 = group["betas"]
            for p in group["params"]:
                state = optimizer.state[p]
                assert p.grad is not None
                start = int(state["step"])
                k = start + t + 1
                moments[p] = b1 * moments[p] + (1 - b1) * (-p.grad if group["maximize"] else p.grad)
                v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
                root = (v / (1 - b2 ** (start if freeze == "vhat" else k))).sqrt()
                with torch.no_grad():
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(lr / (1 - b1**k) * moments[p] / (root + group["eps"]))
