"""Slow twins of what is said about updates: one Jacobian row after the other, in float64."""

import copy

import torch
from torch import Tensor, nn

from tests import reference


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """J by parameter, (N·C, p)."""
    return {name: rows.flatten(0, 1) for name, rows in reference.rows(model, model(x)).items()}


def parts(before: nn.Module, after: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """J_l Δθ_l by module, (N·C,), with J that of `before`."""
    found: dict[str, Tensor] = {}
    new = dict(after.named_parameters())
    old = dict(before.named_parameters())
    for name, rows in jacobian(before, x).items():
        moved = rows @ (new[name] - old[name]).detach().reshape(-1)
        owner = name.rpartition(".")[0]
        found[owner] = found.get(owner, torch.zeros_like(moved)) + moved
    return found


def with_buffers(model: nn.Module, source: nn.Module) -> nn.Module:
    """A copy of `model` that has the buffers of `source`."""
    found = copy.deepcopy(model)
    values = dict(source.named_buffers())
    for name, buffer in found.named_buffers():
        buffer.data.copy_(values[name])
    return found


def linearisation(before: nn.Module, after: nn.Module, x: Tensor) -> tuple[float, float]:
    """Error and motion under the buffers of `before`."""
    moved = (with_buffers(after, before)(x) - before(x)).detach().reshape(-1)
    linear = torch.stack(list(parts(before, after, x).values())).sum(0)
    return float((moved - linear).norm() / moved.norm()), float(moved.norm())
