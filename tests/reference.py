"""Slow, obvious float64 twins: double loops that anybody can check by reading."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def rows(model: nn.Module, outputs: Tensor) -> dict[str, Tensor]:
    """Gradients of every output of every sample, one `autograd.grad` each: name → (N, C, p)."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[list[Tensor]]] = {name: [] for name in parameters}
    for sample in outputs:
        for earlier in found.values():
            earlier.append([])
        for value in sample.reshape(-1):
            grads: Any = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
            for (name, p), g in zip(parameters.items(), grads, strict=True):
                found[name][-1].append((torch.zeros_like(p) if g is None else g.to_dense()).reshape(-1))
    return {name: torch.stack([torch.stack(r) for r in value]) for name, value in found.items()}


def ntk(left: dict[str, Tensor], right: dict[str, Tensor] | None = None) -> Tensor:
    """The full kernel (N, C, M, C), entry by entry, in float64."""
    right = right or left
    a = torch.cat([v.double() for v in left.values()], dim=2)
    b = torch.cat([v.double() for v in right.values()], dim=2)
    (n, c, _), m = a.shape, b.shape[0]
    k = torch.empty(n, c, m, b.shape[1], dtype=torch.float64)
    for i in range(n):
        for j in range(c):
            for u in range(m):
                for v in range(b.shape[1]):
                    k[i, j, u, v] = a[i, j] @ b[u, v]
    return k


def effective_rank(eigenvalues: np.ndarray[Any, Any]) -> float:
    """Exponential of the entropy, term by term."""
    total = sum(eigenvalues)
    entropy = 0.0
    for value in eigenvalues:
        if value > 0:
            entropy -= value / total * np.log(value / total)
    return float(np.exp(entropy))


def hsic(k: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """Unbiased HSIC as the average over all ordered quadruples of distinct samples (Song et al. 2012, equation 4)."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (y[i, j] + y[q, r] - 2 * y[i, q])
                        count += 1
    return total / count
