"""Kept: the weights and buffers of an earlier moment, and what has become of the outputs since.

θ₁, b₁ the parameters and buffers that were kept, θ₂, b₂ those of now; Δθ = θ₂ - θ₁. f(θ, b) the outputs (N, C) of one
batch. Running statistics move f without any gradient step, so weights are compared under the buffers of one moment:
f(θ₂, b₁) - f(θ₁, b₁) is the change by the weights, f(θ₂, b₂) - f(θ₂, b₁) the change by buffers alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk_monitor.batch import Batch, owned
from ntk_monitor.engines.products import Products, environment, routes
from ntk_monitor.errors import InputError
from ntk_monitor.guard import seeded
from ntk_monitor.network import Forward, Mode, Network, Selection
from ntk_monitor.shadow import unwrapped


@dataclass(frozen=True, slots=True)
class Kept:
    """Selected parameters and all buffers of one moment, copied to the CPU; by name in the unwrapped module."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(module: nn.Module, params: Selection | None = None) -> "Kept":
        """Copy what `module` holds now.

        Args:
            module: the live module, only read.
            params: which trainable parameters, as for `empirical_ntk`; None: all with requires_grad.

        Raises:
            NetworkError: nothing trainable is selected.

        Cost: one copy of the selected parameters and the buffers (`nbytes`); no pass.
        """
        live = unwrapped(module)
        named = dict(live.named_parameters())
        chosen = Network(module, params=params, mode="live").parameters
        with torch.no_grad():
            return Kept(
                {name: _copied(named[name]) for name in chosen},
                {name: _copied(buffer) for name, buffer in live.named_buffers()},
            )

    @staticmethod
    def needed(module: nn.Module, params: Selection | None = None) -> int:
        """Return the `nbytes` that a copy of what `module` holds now would have."""
        chosen = Network(module, params=params, mode="live").parameters
        named = dict(unwrapped(module).named_parameters())
        buffers = unwrapped(module).buffers()
        return sum(t.numel() * t.element_size() for t in (*(named[name] for name in chosen), *buffers))

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters.values(), *self.buffers.values()))

    def now(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the values that the kept parameters have in `module` now (θ₂), detached views, by name.

        Raises:
            InputError: a parameter is gone or has another shape.
        """
        named = dict(unwrapped(module).named_parameters())
        for name, p in self.parameters.items():
            if name not in named or named[name].shape != p.shape:
                got = tuple(named[name].shape) if name in named else "no such parameter"
                raise InputError(
                    f"{name} was kept with shape {tuple(p.shape)}, got {got} now; keep the weights again "
                    "after changing the module"
                )
        return {name: named[name].detach() for name in self.parameters}

    def network(self, module: nn.Module, **options: Any) -> Network:
        """Return a Network of its own copy of `module`, at the kept weights and buffers; options as for `Network`."""
        self.now(module)
        network = Network(module, params=list(self.parameters), detached=True, **options)
        with torch.no_grad():
            for name, p in network.parameters.items():
                p.copy_(self.parameters[name])
            _place(network._module, self.buffers)  # the shadow's, never the live module's
        return network

    def changed(self, module: nn.Module) -> bool:
        """True when a buffer of `module` differs from what was kept."""
        return not all(
            name in self.buffers and _equal(self.buffers[name], buffer)
            for name, buffer in unwrapped(module).named_buffers()
        )


@dataclass(frozen=True, slots=True)
class Change:
    """The outputs of a batch at an earlier moment and now, and the parts of the linear change between.

    Attributes:
        before: f(θ₁, b₁), (N, C).
        after: f(θ₂, b₁), (N, C): new weights, old buffers.
        now: f(θ₂, b₂), (N, C), as the module computes it now.
        parts: J_l Δθ_l by group of parameters, (N, C) each; they sum to J Δθ.
        passes: passes over the batch.
    """

    before: Float[Tensor, "n c"]
    after: Float[Tensor, "n c"]
    now: Float[Tensor, "n c"]
    parts: dict[str, Tensor]
    passes: int


def change(  # noqa: PLR0913 - options of a Network, by keyword
    module: nn.Module,
    kept: Kept,
    inputs: Batch,
    *,
    group: Callable[[str], str] = lambda _: "",
    at: float = 0.0,
    forward: Forward | None = None,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Change:
    """Return what has become of the outputs since, and J_l Δθ_l for each group of parameters.

    Args:
        module: the live module, only read.
        kept: its weights and buffers of the earlier moment. Parameters that were not kept have their present values at
            both ends.
        inputs: N samples.
        group: function of a parameter's name; each of its values costs a pass.
        at: where J is taken, at θ₁ + at·Δθ, under the buffers b₁; 0: at the start.
        forward: as for `empirical_ntk`.
        mode: as for `empirical_ntk`.
        device: where to measure; None: where the parameters are.
        seed: of random numbers that a forward pass may draw.

    Raises:
        InputError: the module's parameters are no longer those that were kept.
        NetworkError: the network's products with J are not exact by any route.

    Cost: about six passes and one for each group; one copy of the parameters for the time of the call.
    """
    latest = kept.now(module)
    with environment(seed):
        batch = owned(inputs)
        network = kept.network(module, forward=forward, mode=mode, device=device)
        prepared = network.prepared(batch)
        start = {name: p.detach().clone() for name, p in network.parameters.items()}
        # Copies: a forward pass may write to what it is given.
        end = {name: latest[name].to(p, copy=True) for name, p in start.items()}
        delta = {name: end[name] - start[name] for name in start}
        before, after = (_outputs(network, values, prepared, seed) for values in (start, end))
        with torch.no_grad():
            for name, p in network.parameters.items():
                p.copy_(start[name] + at * delta[name])
        products = Products(network, prepared, routes(module), seed)
        parts = {name: _pushed(products, delta, members) for name, members in _groups(delta, group).items()}
        latest_buffers = after
        if kept.changed(module):
            live = Network.careful(module, batch, params=list(start), forward=forward, mode=mode, device=device)
            latest_buffers = _outputs(live, dict(live.parameters), live.prepared(batch), seed)
    return Change(before, after, latest_buffers, parts, products.passes + 3)


@torch.no_grad()
def _outputs(network: Network, values: Mapping[str, Tensor], inputs: Batch, seed: int) -> Tensor:
    seeded(seed)
    with torch.enable_grad():  # a forward may take gradients itself
        return network.function(values, inputs).detach()


def _groups(names: Mapping[str, Tensor], group: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(group(name), []).append(name)
    return found


def _pushed(products: Products, delta: Mapping[str, Tensor], members: Sequence[str]) -> Tensor:
    """Return J u for the u that is Δθ in `members` and zero elsewhere; no pass where nothing has moved."""
    if not any(bool(delta[name].any()) for name in members):
        return torch.zeros_like(products.raw).reshape(len(products.raw), -1)
    moved = set(members)
    pushed = products.push([d if name in moved else torch.zeros_like(d) for name, d in delta.items()])
    return pushed.detach().reshape(len(products.raw), -1)


def _place(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, old in list(module.named_buffers()):
        value = buffers.get(name)
        if value is None:  # registered since
            continue
        if value.shape == old.shape:
            old.copy_(value)
        else:  # a cache that has grown
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = value.to(old.device, copy=True)


def _copied(t: Tensor) -> Tensor:
    return t.detach().to("cpu", copy=True)


def _equal(kept: Tensor, now: Tensor) -> bool:
    return kept.shape == now.shape and torch.equal(kept, now.detach().to("cpu", kept.dtype))
