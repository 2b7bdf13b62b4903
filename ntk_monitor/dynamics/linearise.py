"""From a live module and its optimizer to the linear model of its next steps: kernels, J buf and J θ.

One kernel and one product with J for each parameter group with momentum, one more for each with weight decay.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntk_monitor.batch import Batch, joined, size
from ntk_monitor.dynamics.model import Dynamics, Part, loss_gradient
from ntk_monitor.engines.products import Products, environment, real, routes
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.kernel import Engine, measured
from ntk_monitor.network import Forward, Mode, Network, Selection
from ntk_monitor.optimizers import Group, OptimizerState, read
from ntk_monitor.shadow import unwrapped

FLOOR = 1e-3
"""Smallest √v̂ in a forecast, relative to the largest of its tensor (see `OptimizerState.preconditioner`)."""


def linearise(  # noqa: PLR0913 - one door to the dynamics
    module: nn.Module,
    optimizers: Any,
    driving: tuple[Batch, Any],
    loss: Any,
    *,
    riding: Batch | None = None,
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode | None = None,
    engine: Engine = "auto",
    clipping: bool = False,
    floor: float = FLOOR,
    memory_limit: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Dynamics:
    """Return the linear model of a run's next steps, at the weights and the optimizer state of this moment.

    Args:
        module: the live module, only read.
        optimizers: its optimizer or optimizers, or what `optimizers.read` made of them.
        driving: (inputs, targets) of the batch that the loss averages over: all of the training data, or a sample of
            it, whose mean gradient stands for that of the run.
        loss: name, torch loss or callable (outputs, targets) → scalar.
        riding: inputs of further samples, whose outputs are forecast but drive nothing (a probe, held-out data).
        params: which of the parameters that the optimizer updates take part; None: all of them.
        forward: see `empirical_ntk`.
        mode: "eval" or "train"; None: "train" where BatchNorm couples the samples of a training batch.
        engine: of the kernel, see `empirical_ntk`.
        memory_limit: bytes, see `empirical_ntk`.
        dtype: that products of the kernel are computed in, see `empirical_ntk`.
        clipping: also measure the plain kernel that gradient norms need under Adam, at the price of a second kernel.
        floor: of Adam's √v̂, relative to its tensor's largest; 0 for none.
        seed: of random numbers that a forward pass may draw.

    Raises:
        InputError: an optimizer without a function-space form (the message is `OptimizerState.reason`), riding samples
            of a network whose samples are coupled, or batches that do not fit.
        NetworkError: see `empirical_ntk`.
    """
    state = optimizers if isinstance(optimizers, OptimizerState) else read(module, optimizers)
    if state.reason:
        raise InputError(state.reason)
    chosen = mode or natural_mode(module)
    if riding is not None and chosen == "train" and coupled(module):
        raise InputError(
            "BatchNorm couples the samples of a training batch, so that no others can ride along; "
            'leave riding out, or pass mode="eval" for the motion with frozen statistics'
        )
    x, y = driving
    view = _View(module, joined(x, riding), _moving(module, state, params), forward, chosen, seed)
    plan = _Plan(state, x if riding is not None else None, engine, memory_limit, dtype)
    scale = state.preconditioner(dict(unwrapped(module).named_parameters()), floor=floor)
    kernels = plan.kernels(view, scale, state.groups)
    outputs, pushed = _pushed(view, state, scale)
    rows = next(iter(kernels.values())).shape
    parts = tuple(
        Part(
            group=group,
            kernel=kernels[i] if i in kernels else outputs.new_zeros(rows),
            momentum=pushed.get(("momentum", i), outputs.new_zeros(rows[0])),
            weights=pushed.get(("weights", i), outputs.new_zeros(rows[0])),
        )
        for i, group in enumerate(state.groups)
    )
    plain = None
    if clipping and scale is not None:
        plain = torch.stack(list(plan.kernels(view, None, state.groups).values())).sum(0)[: rows[1]]
    return Dynamics(parts, outputs, size(x), loss_gradient(loss, y), state.family, plain)


def coupled(module: nn.Module) -> bool:
    """True when BatchNorm makes each output depend on the whole batch while this module trains."""
    live = unwrapped(module)
    norms = [m for m in live.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # As in training mode: flags as they are if the module is training, else all of them on.
    return any(m.training or not live.training or not m.track_running_stats for m in norms)


def natural_mode(module: nn.Module) -> Mode:
    """Return the mode whose function gradient descent moves: "train" for coupled samples, else "eval"."""
    return "train" if coupled(module) else "eval"


@dataclass(frozen=True, slots=True)
class _View:
    """A module as it is looked at: which samples, parameters and mode."""

    module: nn.Module
    batch: Batch
    names: list[str]
    forward: Forward | None
    mode: Mode
    seed: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """How kernels are computed."""

    state: OptimizerState
    columns: Batch | None
    engine: Engine
    memory_limit: int | None
    dtype: torch.dtype

    def kernels(self, view: _View, scale: Mapping[str, Tensor] | None, groups: tuple[Group, ...]) -> dict[int, Tensor]:
        """Return the kernel (R, D) of each group that has moving parameters, by its place."""
        owner = {name: str(i) for i, group in enumerate(groups) for name in group.names}
        found = measured(
            view.module,
            view.batch,
            self.columns,
            params=view.names,
            forward=view.forward,
            mode=view.mode,
            engine=self.engine,
            preconditioner=scale,
            memory_limit=self.memory_limit,
            work=torch.float32 if self.dtype == torch.float32 else torch.float64,
            seed=view.seed,
            group=owner.__getitem__,
        )
        flat = {int(i): kernel.flatten(2).flatten(0, 1) for i, kernel in found.layers.items()}
        return {i: kernel.cpu().double() for i, kernel in flat.items()}


def _moving(module: nn.Module, state: OptimizerState, params: Selection | None) -> list[str]:
    """Return the names of the parameters that both the optimizer and the caller mean."""
    chosen = Network(module, params=params).parameters
    names = [name for name in state.names if name in chosen]
    if not names:
        raise InputError(f"{state.name} updates none of the parameters that params= selects; widen params")
    return names


def _pushed(
    view: _View, state: OptimizerState, scale: Mapping[str, Tensor] | None
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Return the outputs (S, C...), and J times momentum and weights of the groups that have them."""
    with environment(view.seed):
        network = Network.careful(view.module, view.batch, params=view.names, forward=view.forward, mode=view.mode)
        batch = network.prepared(view.batch)
        directions = dict(_directions(network.parameters, state, scale))
        if not directions:
            return network.raw(batch).detach().cpu().double(), {}
        outputs, push = pusher(network, batch, view.module, view.seed)
        return outputs, {key: push(u) for key, u in directions.items()}


def _directions(
    parameters: Mapping[str, Tensor], state: OptimizerState, scale: Mapping[str, Tensor] | None
) -> list[tuple[tuple[str, int], list[Tensor]]]:
    found = []
    for i, group in enumerate(state.groups):
        own = set(group.names)
        if (group.momentum or state.family == "adam") and own & set(state.first):
            buffers = {name: state.first[name].double() for name in own & set(state.first)}
            if scale is not None:
                buffers = {name: buffer * scale[name] for name, buffer in buffers.items()}
            found.append((("momentum", i), _spread(parameters, buffers)))
        if group.weight_decay:
            weights = {name: p.detach() for name, p in parameters.items() if name in own}
            found.append((("weights", i), _spread(parameters, weights)))
    return found


def _spread(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[Tensor]:
    """Return one tensor for each parameter: its value, or zeros."""
    return [values[name].to(p.detach()) if name in values else torch.zeros_like(p) for name, p in parameters.items()]


def pusher(
    network: Network, batch: Batch, module: nn.Module, seed: int
) -> tuple[Tensor, Callable[[list[Tensor]], Tensor]]:
    """Return the outputs (S, C...) and u → J u (R,), in float64 on the CPU; inside `environment`.

    Two passes over the batch for each product, or, where no second derivative exists, one for each row.
    """
    with contextlib.suppress(NetworkError):
        products = Products(network, batch, routes(module), seed)
        return products.raw.cpu().double(), lambda u: real(products.push(u)).cpu()
    jacobian, names = RowsJacobian(network, batch), list(network.parameters)
    outputs = network.raw(batch).detach().cpu().double()

    def push(u: list[Tensor]) -> Tensor:
        flat = {name: real(value) for name, value in zip(names, u, strict=True)}
        rows = [(n, c) for n in range(jacobian.samples) for c in range(jacobian.outputs)]
        products = [sum(float(real(g) @ flat[name]) for name, g in jacobian.row(n, c).items()) for n, c in rows]
        return torch.tensor(products, dtype=torch.float64)

    return outputs, push
