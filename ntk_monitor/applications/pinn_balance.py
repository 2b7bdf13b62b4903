"""Which term of a physics-informed loss starves, which weights the kernel suggests, and whether they help.

Loss Σ_j w_j mean(r_j²), r_j the N_j residuals of term j (equation, boundary, data). A gradient step moves r_j by
-lr Σ_k (2 w_k / N_k) K_jk r_k: the rates of term j alone sum to 2 w_j tr K_jj / N_j. The weights
w_j = (Σ_k tr K_kk / N_k) / (tr K_jj / N_j) make these sums equal; Σ 1/w_j = 1. Wang, Yu and Perdikaris 2022 have
tr K / tr K_jj, for terms of equally many residuals; torch's means need the division by N_j, so that more points of the
same kind do not change a weight.

Equal sums of rates do not promise a better solution, and kernels change while such networks train: hence the check.

For your own loss, write a function like `poisson` below and name it, with a solution if there is one:
ntk-monitor app pinn_balance --model pkg.Net --data pkg:points --set terms=pkg:terms solution=pkg:truth
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntk_monitor.applications.loss_terms import Array, Problem, Record, Terms
from ntk_monitor.applications.pinn_words import Balance, told
from ntk_monitor.applications.report import Report
from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError

__all__ = [
    "EXAMPLE",
    "Problem",
    "Record",
    "Wave",
    "example",
    "largest_eigenvalue",
    "mean_traces",
    "poisson",
    "sine",
    "study",
    "suggested_weights",
]

EXAMPLE = "the equation u'' = -(2π)² sin 2πx with u(0) = u(1) = 0, by a network of 50 tanh units"

_TURNS = 2


def mean_traces(kernels: Mapping[str, Any]) -> dict[str, float]:
    """Return tr K_jj / N_j by term.

    Args:
        kernels: K_jj (N_j, N_j) by term, of its residuals.

    Raises:
        InputError: a kernel that is not square, not finite, or zero: a term without a rate cannot be weighted.
    """
    found = {}
    for name, kernel in kernels.items():
        k = np.asarray(kernel.detach().cpu() if isinstance(kernel, Tensor) else kernel, dtype=np.float64)
        if k.ndim != 2 or k.shape[0] != k.shape[1] or not k.size or not np.isfinite(k).all():
            raise InputError(f"wanted a finite square kernel of term {name!r}, got shape {k.shape}")
        found[name] = float(np.trace(k)) / len(k)
        if not found[name] > 0:
            raise InputError(f"the kernel of term {name!r} is zero: no weight can make it learn; check its residuals")
    return found


def suggested_weights(traces: Mapping[str, float]) -> dict[str, float]:
    """Return w_j = (Σ_k t_k) / t_j from t_j = tr K_jj / N_j, all of them above 1, Σ 1/w_j = 1.

    Raises:
        InputError: fewer than two terms, or a trace that is not positive.
    """
    if len(traces) < 2 or not all(0 < t < math.inf for t in traces.values()):
        raise InputError(f"wanted two positive traces or more, got {dict(traces)}")
    total = sum(traces.values())
    return {name: total / t for name, t in traces.items()}


def largest_eigenvalue(jacobians: Mapping[str, Array], weights: Mapping[str, float]) -> float:
    """Return the largest eigenvalue of Σ_j w_j (2/N_j) J_jᵀ J_j: descent on the loss is stable below 2 over it."""
    scaled = [math.sqrt(2 * weights[name] / len(j)) * j for name, j in jacobians.items()]
    return float(np.linalg.norm(np.concatenate(scaled), 2) ** 2)


def study(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    terms: Terms | None = None,
    solution: Any = None,
    steps: int = 1000,
    lr: float = 5e-3,
) -> Report:
    """Return which term of a loss starves, the weights that its kernels suggest, and what training with them gives.

    Args:
        model: the network u; a copy in evaluation mode and in the precision of its weights is used.
        x: points of the equation. They ask for gradients already: torch.autograd.grad(u, x, create_graph=True) works.
        y: whatever the terms need besides.
        terms: function(model, x) or (model, x, y) → {name: residuals, a tensor of any shape}; or {name: function that
            returns its residuals}; functions may be given as "pkg:function". Other points, as on a boundary, are made
            inside.
        solution: function(x) → the true outputs at x, or "pkg:function"; None: judged by the terms themselves.
        steps: of Adam, with and without the weights, from the same start.
        lr: its learning rate.

    Raises:
        InputError: no terms, fewer than two, residuals that cannot be used, or Jacobians larger than a gibibyte.

    Cost: a backward pass for each residual, three times over, and 2 · `steps` steps of training.
    """
    if steps < 1 or not lr > 0:
        raise InputError(f"wanted steps ≥ 1 and a positive learning rate, got {steps} and {lr}")
    problem = Problem.of(model, x, y, terms, solution)
    jacobians = problem.jacobians()
    traces = mean_traces({name: j @ j.T for name, j in jacobians.items()})
    weights = suggested_weights(traces)
    ones = dict.fromkeys(weights, 1.0)
    plain = problem.trained(ones, steps, lr)[1]
    after, weighted = problem.trained(weights, steps, lr)
    later: dict[str, float] | None = None
    if np.isfinite(weighted.losses[-1]).all():
        later = suggested_weights(mean_traces({name: j @ j.T for name, j in problem.jacobians(after).items()}))
    growth = largest_eigenvalue(jacobians, weights) / largest_eigenvalue(jacobians, ones)
    counts = {name: len(j) for name, j in jacobians.items()}
    return told(Balance(counts, traces, weights, later, growth, _cosines(problem, jacobians), plain, weighted, lr))


def _cosines(problem: Problem, jacobians: Mapping[str, Array]) -> Array:
    """Return the cosines between the gradients of the terms' losses, (J, J)."""
    found = problem.residuals(problem.model)
    slopes = [j.T @ found[name].detach().double().cpu().numpy() / len(j) for name, j in jacobians.items()]
    length = np.array([max(float(np.linalg.norm(g)), np.finfo(np.float64).tiny) for g in slopes])
    return np.asarray(np.stack(slopes) @ np.stack(slopes).T / np.outer(length, length))


class Wave(nn.Module):
    """u(x) = a·tanh(W x + b)/√h + c, all weights standard normal: the network of Wang, Yu and Perdikaris 2022."""

    def __init__(self, width: int = 50, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        shapes = ((width, 1), (width,), (1, width), (1,))
        self.w, self.b, self.a, self.c = (
            nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1) for x (N, 1)."""
        return torch.tanh(x @ self.w.T + self.b) @ self.a.T / math.sqrt(len(self.w)) + self.c


def poisson(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the residuals of u'' = -(2π)² sin 2πx at x (N, 1), and those of u(0) = u(1) = 0."""
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    ends = torch.tensor([[0.0], [1.0]], dtype=x.dtype, device=x.device)
    return {"equation": bend + (_TURNS * math.pi) ** 2 * sine(x), "boundary": model(ends)}


def sine(x: Tensor) -> Tensor:
    """Return sin 2πx, which solves `poisson`."""
    return torch.sin(_TURNS * math.pi * x)


def example(quick: bool = False) -> Report:
    """Return the study of a network that solves `poisson`; `quick`: fewer steps."""
    x = torch.linspace(0, 1, 34, dtype=torch.float64)[1:-1, None]
    return study(Wave(), x, terms=poisson, solution=sine, steps=150 if quick else 1500, lr=1e-2)
