"""Losses of several named terms: residuals, their Jacobians, and training on a weighted sum of their mean squares.

r_j (N_j,) residuals of term j, for instance those of a differential equation at some points; J_j (N_j, P) their
Jacobian by the weights, K_jj = J_j J_jᵀ. The loss is Σ_j w_j mean(r_j²).
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch, mapped, tensored
from ntk_monitor.errors import InputError
from ntk_monitor.rebuild import imported

Array = NDArray[np.float64]
Terms: TypeAlias = Callable[..., Any] | Mapping[str, Any] | str

_LOOKS, _TENTH = 60, 6

MOST_BYTES = 2**30
"""Of all Jacobians together, in float64."""


@dataclass(frozen=True, slots=True)
class Record:
    """One training: at `steps` (T,) the losses of the terms (T, J), unweighted, and errors (T,), NaN if unknown."""

    steps: list[int]
    losses: Array
    errors: Array

    @property
    def left(self) -> Array:
        """What is left of every term's loss at the end (median of the last tenth), relative to the start, (J,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.median(self.losses[-_TENTH:] / self.losses[0], axis=0))

    @property
    def error(self) -> float:
        """Error at the end, median of the last tenth: losses swing while they fall."""
        return float(np.median(self.errors[-_TENTH:]))


@dataclass(frozen=True, slots=True)
class Problem:
    """A copy of a network in evaluation mode, in the precision it is trained in, and its loss term by term."""

    model: nn.Module
    x: Batch
    y: Any
    terms: Terms
    solution: Callable[[Any], Tensor] | None = None

    @staticmethod
    def of(model: nn.Module, x: Batch, y: Any, terms: Terms | None, solution: Any = None) -> "Problem":
        """Return it, names like "pkg:function" imported, points on the network's device and asking for gradients.

        Raises:
            InputError: no terms, fewer than two, or one that is not made of finite residuals that depend on a weight.
        """
        if terms is None:
            raise InputError(
                "pinn_balance needs the terms of the loss by name, which a plain supervised model has not; pass "
                "terms=, or --set terms=pkg:function on the command line: a function(model, x) that returns "
                "{name: residuals}"
            )
        own = copy.deepcopy(model)
        for part in own.modules():
            part.training = False
        weights = [p for p in own.parameters() if p.requires_grad]
        if not weights:
            raise InputError(f"{type(model).__name__} has no trainable parameter; unfreeze some")
        place, dtype = weights[0].device, weights[0].dtype

        def ready(t: Tensor) -> Tensor:
            return t.detach().to(place, dtype).requires_grad_(True) if t.is_floating_point() else t.to(place)

        called = (
            {name: _function(one) for name, one in terms.items()} if isinstance(terms, Mapping) else _function(terms)
        )
        truth = imported(solution) if isinstance(solution, str) else solution
        made = Problem(own, mapped(tensored(x), ready), mapped(tensored(y), ready), called, truth)
        made.residuals(own, checked=True)
        return made

    def residuals(self, model: nn.Module, *, checked: bool = False) -> dict[str, Tensor]:
        """Return r by term, flat."""
        if isinstance(self.terms, Mapping):
            raw: Any = {name: self._called(one, model) for name, one in self.terms.items()}
        else:
            raw = self._called(self.terms, model)
        if checked:
            _check(raw)
        return {name: r.reshape(-1) for name, r in raw.items()}

    def _called(self, function: Any, model: nn.Module) -> Any:
        return function(model, self.x, self.y) if _takes_targets(function) else function(model, self.x)

    def jacobians(self, model: nn.Module | None = None) -> dict[str, Array]:
        """Return J by term, (N_j, P), float64.

        Cost: a backward pass for each residual.

        Raises:
            InputError: they would take more than a gibibyte.
        """
        model = model or self.model
        weights = [p for p in model.parameters() if p.requires_grad]
        found = self.residuals(model)
        rows, columns = sum(len(r) for r in found.values()), sum(p.numel() for p in weights)
        if 8 * rows * columns > MOST_BYTES:
            raise InputError(
                f"the Jacobians of {rows} residuals by {columns} parameters take {8 * rows * columns / 2**30:.1f} GiB, "
                f"more than {MOST_BYTES / 2**30:g}; pass at most {MOST_BYTES // (8 * columns)} residuals"
            )
        return {name: _rows(r, weights) for name, r in found.items()}

    def error(self, model: nn.Module) -> float:
        """Return |u - solution| / |solution| at the points; NaN without a solution."""
        if self.solution is None:
            return math.nan
        with torch.no_grad():
            truth = torch.as_tensor(self.solution(self.x))
            found = model(self.x)
            if found.shape != truth.shape:
                raise InputError(
                    f"the solution must have the shape of the outputs {tuple(found.shape)}, got {truth.shape}"
                )
            return float((found - truth).norm() / truth.norm())

    def trained(self, weight: Mapping[str, float], steps: int, lr: float) -> tuple[nn.Module, Record]:
        """Train a copy with Adam on Σ w_j mean(r_j²); about 60 looks on the way."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        looks = set(np.linspace(0, steps, _LOOKS + 1).round().astype(int).tolist())
        at, losses, errors = [], [], []
        for step in range(steps + 1):
            found = {name: r.square().mean() for name, r in self.residuals(model).items()}
            if step in looks:
                at.append(step)
                losses.append([float(one.detach()) for one in found.values()])
                errors.append(self.error(model))
            if step < steps:
                optimizer.zero_grad()
                torch.stack([weight[name] * one for name, one in found.items()]).sum().backward()
                optimizer.step()
        return model, Record(at, np.array(losses), np.array(errors))


def _rows(r: Tensor, weights: list[nn.Parameter]) -> Array:
    rows = []
    for one in r:
        found = torch.autograd.grad(one, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]).double().cpu().numpy())
    return np.stack(rows)


def _function(term: Any) -> Callable[..., Any]:
    found = imported(term) if isinstance(term, str) else term
    if not callable(found):
        raise InputError(f"a term must be a function(model, x) or its name pkg:function, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _takes_targets(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        return False
    return True


def _check(raw: Any) -> None:
    if not isinstance(raw, Mapping) or not all(isinstance(r, Tensor) for r in raw.values()):
        raise InputError(f"terms must return a tensor of residuals by name, got {type(raw).__name__}")
    if len(raw) < 2:
        raise InputError(f"wanted two terms or more, got {sorted(raw)}: one term has nothing to be balanced against")
    for name, r in raw.items():
        if not r.is_floating_point() or r.numel() == 0 or not bool(r.isfinite().all()):
            raise InputError(f"term {name!r} must give finite residuals, got {tuple(r.shape)} of {r.dtype}")
        if not r.requires_grad:
            raise InputError(f"term {name!r} does not depend on any weight; was it computed without gradients?")
