"""The real optimizer on the linear model: f = f₀ + J (θ - θ₀) with gradients Jᵀ dL/df, step by step in parameters.

A second opinion on Adam, whose second moment moves on here; the only forecast for rules without a function-space form
(Lion, Muon, Adafactor, RMSprop, LBFGS, a user's own). The optimizer is a copy of the live one, state and all, on
copies of the parameters in double precision on the CPU; the live one is never called.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.batch import Batch, joined, size
from ntk_monitor.dynamics.ahead import Scene
from ntk_monitor.dynamics.linearise import natural_mode, pusher
from ntk_monitor.dynamics.objective import loss_gradient
from ntk_monitor.engines.products import environment
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.errors import InputError
from ntk_monitor.network import Forward, Mode, Network
from ntk_monitor.shadow import unwrapped

DENSE = 2**27
"""Numbers of a Jacobian that is kept (1 GiB), where it has fewer rows than the products of all steps would cost passes.
"""


def frozen(  # noqa: PLR0913 - the doors of dynamics take the same things
    module: nn.Module,
    optimizer: Optimizer,
    driving: tuple[Batch, Any],
    loss: Any,
    rates: Float64[Tensor, "t g"],
    *,
    riding: Batch | None = None,
    clip: float | None = None,
    forward: Forward | None = None,
    mode: Mode | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the outputs before and after each of T steps of the real rule on the linear model, (T + 1, S, C...).

    Args:
        module: the live module, only read.
        optimizer: its optimizer, of any kind; copied.
        driving: (inputs, targets) of the batch that the loss averages over.
        loss: see `linearise`.
        rates: learning rates of each step and parameter group.
        riding: inputs of further samples, which drive nothing.
        clip: norm that gradients are clipped to.
        forward: see `empirical_ntk`.
        mode: see `linearise`.
        seed: see `linearise`.

    Raises:
        InputError: rates that do not fit, or an optimizer that cannot be copied or run on the copy.

    Cost: two passes over the batch for each step; or, where that is cheaper and J has at most `DENSE` numbers, R
    backward passes for J, once, and 2 R·P multiply-adds for each step. Memory: J, three copies of the parameters and
    the state.
    """
    view = Scene(module, driving, riding, None, forward, mode or natural_mode(module), seed)
    return frozen_path(view, optimizer, loss, rates, clip=clip)[0]


def frozen_path(
    scene: Scene,
    optimizer: Optimizer,
    loss: Any,
    rates: Float64[Tensor, "t g"],
    *,
    clip: float | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `frozen` returns, and θ - θ₀ at the end by parameter name; ends early once `enough` says so."""
    groups = len(optimizer.param_groups)
    if rates.dim() != 2 or rates.shape[1] != groups:
        raise InputError(f"wanted rates (steps, {groups} groups), got {tuple(rates.shape)}")
    module, riding = scene.module, scene.riding
    x, y = scene.driving
    objective, driven = loss_gradient(loss, y), size(x)
    with environment(scene.seed):
        batch = joined(x, riding)
        network = Network.careful(module, batch, params=scene.params, forward=scene.forward, mode=scene.mode)
        line = _Line(network, network.prepared(batch), module, scene.seed, len(rates))
        twin = _Twin(module, optimizer, list(network.parameters), clip)
        start = line.outputs
        path = start.new_empty(len(rates) + 1, *start.shape)
        path[0] = start

        def gradients(here: Callable[[], Tensor]) -> list[Tensor]:
            outputs = here()
            g = torch.zeros_like(outputs)
            g[:driven] = objective(outputs[:driven])
            return line.pull(g)

        def value(here: Callable[[], Tensor]) -> float:
            return objective.value(here()[:driven])

        def now() -> Tensor:
            return start + line.push(twin.moved()).reshape(start.shape)

        for t, lrs in enumerate(rates.tolist()):
            here = now if twin.searches else partial(path.__getitem__, t)
            twin.step(lrs, partial(gradients, here), partial(value, here))
            path[t + 1] = now()
            if enough():
                path = path[: t + 2]
                break
    return path, dict(zip(network.parameters, twin.moved(), strict=True))


class _Line:
    """J of all samples, dense where it is small; inside `environment`."""

    def __init__(self, network: Network, batch: Batch, module: nn.Module, seed: int, steps: int) -> None:
        self._parameters = list(network.parameters.values())
        self._graph = network.outputs(batch)
        self._dense: Tensor | None = None
        rows = self._graph.numel()
        if rows <= 2 * steps and rows * network.parameter_count <= DENSE:
            jacobian = RowsJacobian(network, batch)
            block = jacobian.block(slice(0, jacobian.samples))
            self._dense = torch.cat([b.flatten(0, 1).cpu().double() for b in block.values()], 1)
            self.outputs = network.raw(batch).detach().cpu().double()
        else:
            self.outputs, self._push = pusher(network, batch, module, seed)

    def push(self, u: list[Tensor]) -> Tensor:
        """Return J u (R,)."""
        if self._dense is not None:
            return self._dense @ torch.cat([v.reshape(-1) for v in u])
        return self._push([v.to(p.detach()) for v, p in zip(u, self._parameters, strict=True)])

    def pull(self, w: Tensor) -> list[Tensor]:
        """Return Jᵀ w for w (S, C...), one tensor for each parameter."""
        if self._dense is not None:
            flat = w.reshape(-1) @ self._dense
            parts = flat.split([p.numel() for p in self._parameters])
            return [part.reshape(p.shape) for part, p in zip(parts, self._parameters, strict=True)]
        found = torch.autograd.grad(
            self._graph,
            self._parameters,
            w.reshape(self._graph.shape).to(self._graph),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return [g.to_dense().cpu().double() for g in found]


class _Twin:
    """A copy of an optimizer on copies of its parameters.

    Attributes:
        searches: its step asks for a closure, and evaluates it at several points.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, names: list[str], clip: float | None) -> None:
        live = dict(unwrapped(module).named_parameters())
        memo: dict[int, Any] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                copied = p.detach().cpu().double() if p.is_floating_point() else p.detach().cpu()
                memo[id(p)] = nn.Parameter(copied.clone(), requires_grad=p.requires_grad)
        held = [memo.get(id(live[name])) for name in names]
        self._moving = [(i, p) for i, p in enumerate(held) if p is not None]
        self._shapes = [live[name].shape for name in names]
        self._start = [p.detach().clone() for _, p in self._moving]
        self._clip = clip
        try:
            self._optimizer = _copied(optimizer, memo)
        except Exception as error:
            raise InputError(f"{type(optimizer).__name__} cannot be copied: {error}; no forecast is made") from error
        required = inspect.signature(type(optimizer).step).parameters.get("closure")
        self.searches = required is not None and required.default is inspect.Parameter.empty

    def moved(self) -> list[Tensor]:
        """Return θ - θ₀ for every parameter of the network; zero for those the optimizer does not hold."""
        found = [torch.zeros(shape, dtype=torch.float64) for shape in self._shapes]
        for (i, p), start in zip(self._moving, self._start, strict=True):
            found[i] = p.detach() - start
        return found

    def step(self, rates: list[float], gradients: Callable[[], list[Tensor]], value: Callable[[], float]) -> None:
        """Take one step with these learning rates.

        Args:
            rates: one for each group.
            gradients: returns them at the parameters of the moment.
            value: returns the loss there, for rules that look for it.
        """
        for group, lr in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr

        def closure() -> float:
            fresh = gradients()
            for i, p in self._moving:
                p.grad = fresh[i].clone()
            if self._clip is not None:
                nn.utils.clip_grad_norm_([p for _, p in self._moving], self._clip)
            return value() if self.searches else 0.0

        try:
            if self.searches:
                self._optimizer.step(closure)
            else:
                closure()
                self._optimizer.step()
        except Exception as error:
            name = type(self._optimizer).__name__
            raise InputError(f"{name} cannot be run on a copy: {error}; no forecast is made") from error


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Any:
    """Return an optimizer with all its state, on other parameters, in plain double precision."""
    new = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name == "step":  # a scheduler's wrapper around the live step
            continue
        hooks = isinstance(value, OrderedDict) and name.endswith("hooks")
        new.__dict__[name] = OrderedDict() if hooks else copy.deepcopy(value, memo)
    for group in new.param_groups:
        # Variants of one rule; the plain one runs on any copy.
        for flag in ("fused", "foreach", "capturable", "differentiable"):
            group.update({flag: False} if flag in group else {})
    for state in new.state.values():
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor):
                wide = value.is_floating_point() and key != "step"
                state[key] = value.cpu().double() if wide else value.cpu()
    return new
