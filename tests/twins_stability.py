"""Slow, obvious float64 twins of the stability gauge: power iteration in the parameters, and optimizers tried out."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def training_copy(model: nn.Module) -> nn.Module:
    """The function that training sees, in float64: batch statistics, no dropout, no running averages."""
    twin = copy.deepcopy(model).double().train()
    for child in twin.modules():
        if isinstance(child, nn.Dropout):
            child.eval()
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.track_running_stats = False
            child.running_mean = child.running_var = child.num_batches_tracked = None
    return twin


def gauss_newton_product(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], u: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Jᵀ H J u: J u by the derivative of w → Jᵀ w, H by two derivatives of the loss in the outputs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = model(x)
    w = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, parameters, w, create_graph=True)
    (tangent,) = torch.autograd.grad(pulled, w, list(u.values()), retain_graph=True)
    f = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(f), f, create_graph=True)
    (product,) = torch.autograd.grad(slope, f, tangent)
    return dict(zip(u, torch.autograd.grad(outputs, parameters, product), strict=True))


def power_iteration(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], steps: dict[str, Tensor], iterations: int = 200
) -> float:
    """Largest eigenvalue of √steps Jᵀ H J √steps, steps = lr·D by parameter."""
    twin, x = training_copy(model), x.double() if x.is_floating_point() else x
    root = {name: steps[name].double().sqrt() for name, p in twin.named_parameters() if p.requires_grad}
    u = {name: torch.randn_like(r) for name, r in root.items()}
    size = 0.0
    for _ in range(iterations):
        norm = sum(float(v.square().sum()) for v in u.values()) ** 0.5
        u = {name: v / norm for name, v in u.items()}
        image = gauss_newton_product(twin, x, loss, {name: root[name] * v for name, v in u.items()})
        image = {name: root[name] * v for name, v in image.items()}
        before, size = size, sum(float((u[name] * v).sum()) for name, v in image.items())
        u = image
        if abs(size - before) < 1e-7 * abs(size):
            break
    return size


def adam_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """lr/(√v̂ + ε) from the live state, v as the last step left it."""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            found[names[p]] = group["lr"] / (v.sqrt() + group["eps"])
    return found


def sgd_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The learning rate of each parameter."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: torch.full_like(p, g["lr"]).double() for g in optimizer.param_groups for p in g["params"]}


def diverges(make: Callable[[list[Tensor]], Any], curvature: float, steps: int = 1500) -> bool:
    """Does torch's own optimizer leave the minimum of ½ curvature x² from x = 1?"""
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    for _ in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
        if not 1e-3 < abs(x.item()) < 1e3:
            break
    return abs(x.item()) > 1


def threshold(unstable: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest unstable value, by bisection."""
    for _ in range(9):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return high


def frozen_adam_diverges(a: float, beta: float, decay: float = 0.0, steps: int = 6000) -> bool:
    """Adam with its preconditioner frozen, bias correction over: x ← (1 - decay) x - a EMA(x), x = 1 at the start."""
    x, m = 1.0, 0.0
    sizes = []
    for _ in range(steps):
        m = beta * m + (1 - beta) * x
        x = (1 - decay) * x - a * m
        sizes.append(abs(x))
        if sizes[-1] > 1e12:
            return True
    return max(sizes[-100:]) > max(sizes[steps // 2 : steps // 2 + 100])


def jackknife(m: np.ndarray[Any, Any], samples: int) -> float:
    """Bias of the largest eigenvalue, leaving out one sample after the other; M carries 1/N, which is made 1/(N-1)."""
    c = len(m) // samples
    full = float(np.linalg.eigvalsh(m)[-1])
    left = []
    for n in range(samples):
        kept = [i for i in range(len(m)) if i // c != n]
        left.append(float(np.linalg.eigvalsh(m[np.ix_(kept, kept)])[-1]) * samples / (samples - 1))
    return (samples - 1) * (float(np.mean(left)) - full)
