"""Flow: the map along a vector field as a module, and the solvers that integrate and differentiate it."""

import copy
import dataclasses
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntk_monitor.errors import InputError
from ntk_monitor.network import only_tensor

Velocity = Callable[[Tensor, Tensor], Tensor]

FIXED = ("euler", "midpoint", "rk4")
"""Solvers of our own, of order 1, 2 and 4; any other name is one of torchdiffeq's."""


@dataclass(frozen=True, slots=True)
class Solver:
    """How a flow is integrated, and differentiated.

    Attributes:
        method: "euler", "midpoint" or "rk4" in equal steps, or a method of torchdiffeq ("dopri5", ...).
        steps: of equal size; adaptive methods choose their own.
        adjoint: gradients by the continuous adjoint of torchdiffeq, exact to its tolerance, instead of autograd through
            the steps, which is exact for the discrete flow.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.

    Raises:
        InputError: torchdiffeq is needed and not installed, an unknown method, or no steps.
    """

    method: str = "rk4"
    steps: int = 100
    adjoint: bool = False
    rtol: float = 1e-8
    atol: float = 1e-10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a solver takes at least one step, got {self.steps}")
        if not self.own:
            _torchdiffeq()
            known = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
            if self.method not in known:
                raise InputError(f"method must be one of {sorted({*FIXED, *known})}, got {self.method!r}")

    @property
    def own(self) -> bool:
        """True when torchdiffeq is not needed."""
        return self.method in FIXED and not self.adjoint

    def __str__(self) -> str:
        how = f"{self.steps} steps" if self.method in FIXED else f"tolerance {self.rtol:g}"
        return f"{self.method}, {how}, {'adjoint' if self.adjoint else 'autograd'}"

    def finer(self) -> "Solver":
        """Return the same solver with twice the steps, or with tolerances a hundred times smaller if it is adaptive."""
        if self.method in FIXED:
            return dataclasses.replace(self, steps=2 * self.steps)
        return dataclasses.replace(self, rtol=self.rtol / 100, atol=self.atol / 100)


RK4 = Solver()


class Flow(nn.Module):
    """The map from y(0) to y(T) along a vector field, a module like any other: it trains, and it has a kernel.

    Args:
        field: velocity(y) or velocity(t, y), from states (N, ...) to the same shape.
        time: T; negative runs backwards.
        solver: how.
    """

    def __init__(self, field: nn.Module, time: float = 1.0, solver: Solver = RK4) -> None:
        super().__init__()
        self.field, self.time, self.solver = field, time, solver
        self._timed = _takes_time(field)

    def forward(self, y: Tensor) -> Tensor:
        """Return the states at the end."""
        solver = self.solver
        if solver.own:
            h = self.time / solver.steps
            for k in range(solver.steps):
                y = y + h * _slope(self._velocity, solver.method, y.new_tensor(k * h), h, y)
            return y
        options = {"step_size": abs(self.time) / solver.steps} if solver.method in FIXED else None
        times = y.new_tensor([0.0, self.time])
        shared = {"rtol": solver.rtol, "atol": solver.atol, "method": solver.method, "options": options}
        torchdiffeq = _torchdiffeq()
        if not solver.adjoint:
            return torch.as_tensor(torchdiffeq.odeint(self._velocity, y, times, **shared)[-1])
        parameters = tuple(p for p in self.field.parameters() if p.requires_grad)
        path = torchdiffeq.odeint_adjoint(self._velocity, y, times, adjoint_params=parameters, **shared)
        return torch.as_tensor(path[-1])

    def _velocity(self, t: Tensor, y: Tensor) -> Tensor:
        return only_tensor(self.field(t, y) if self._timed else self.field(y))


def copied(field: nn.Module) -> nn.Module:
    """Return a copy in float64 and evaluation mode."""
    return copy.deepcopy(field).double().eval()


class Still(nn.Module):
    """T times the velocity at the start: the flow of a field along which nothing moves."""

    def __init__(self, field: nn.Module, time: float) -> None:
        super().__init__()
        self.flow = Flow(field, time)

    def forward(self, y: Tensor) -> Tensor:
        """Return the displacement."""
        return self.flow.time * self.flow._velocity(y.new_tensor(0.0), y)


def check_states(field: nn.Module, x: Any, time: float) -> None:
    """Raise an InputError unless these are states of this vector field, to be followed for this time."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"a neural ODE needs initial states (N, d), a floating tensor, got {got}")
    if not np.isfinite(time) or time == 0:
        raise InputError(f"time must be finite and not 0, got {time:g}")
    probe = copied(field)
    device = next((p.device for p in probe.parameters()), x.device)
    flow = Flow(probe, time, RK4)
    states = x[:1].to(device, torch.float64)
    with torch.no_grad():
        found = flow._velocity(states.new_tensor(0.0), states)
    if found.shape != states.shape:
        raise InputError(
            f"a neural ODE's vector field keeps the shape of its states, but {type(field).__name__} maps "
            f"{tuple(states.shape)} to {tuple(found.shape)}; neural_ode has nothing to say about other models"
        )


def _slope(velocity: Velocity, method: str, t: Tensor, h: float, y: Tensor) -> Tensor:
    """Return the mean velocity over one step."""
    first = velocity(t, y)
    if method == "euler":
        return first
    second = velocity(t + h / 2, y + h / 2 * first)
    if method == "midpoint":
        return second
    third = velocity(t + h / 2, y + h / 2 * second)
    return (first + 2 * second + 2 * third + velocity(t + h, y + h * third)) / 6


def _takes_time(field: nn.Module) -> bool:
    """True for velocity(t, y): two positional arguments without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(field.forward).parameters.values()
    return sum(p.kind in kinds and p.default is p.empty for p in given) >= 2


def _torchdiffeq() -> Any:
    try:
        return importlib.import_module("torchdiffeq")
    except ImportError as error:
        raise InputError(
            "adaptive solvers and the adjoint need torchdiffeq, which is not installed; run: "
            "pip install ntk-monitor[ode]"
        ) from error
