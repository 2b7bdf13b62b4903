"""A look ahead: the network at the weights that a forecast leads to. What differs there from the linear model?

f(θ₀ + Δθ) against the forecast's own outputs is its linearisation error. The kernel there, averaged with the one here,
makes a forecast of second order; by how much the two differ is an estimate of the error of the first.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ntk_monitor.batch import Batch, joined, size
from ntk_monitor.dynamics.model import Dynamics, Part
from ntk_monitor.dynamics.simulate import Freeze, Walk
from ntk_monitor.engines.products import environment
from ntk_monitor.network import Forward, Mode, Network, Selection
from ntk_monitor.optimizers import OptimizerState
from ntk_monitor.shadow import Shadow, unwrapped


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one group has gone, as a combination: Δθ_g = -(D_g J_gᵀ a + b D_g buf + c θ_g)."""

    a: Tensor
    """(D,)"""
    b: float
    c: float


def drifts(
    dynamics: Dynamics, rates: Tensor, *, clip: float | None = None, freeze: Freeze = "vhat"
) -> tuple[Drift, ...]:
    """Return where the forecast of these steps leads each parameter group; arguments of `simulate`.

    The recursion of the outputs, carried out on coefficients: D gradients, the buffer and the weights at the start.
    """
    rows = dynamics.parts[0].kernel.shape[1]
    basis = torch.eye(rows + 2, dtype=torch.float64)
    parts = tuple(
        Part(part.group, basis[:, :rows].contiguous(), basis[rows].clone(), basis[rows + 1].clone())
        for part in dynamics.parts
    )
    real, symbolic = Walk(dynamics, clip=clip, freeze=freeze), Walk(replace(dynamics, parts=parts), freeze=freeze)
    total = [torch.zeros(rows + 2, dtype=torch.float64) for _ in parts]
    for row in rates.tolist():
        total = [s + m for s, m in zip(total, symbolic.motions(real.driving_gradient(), row), strict=True)]
        real.step(row)
    return tuple(Drift(sums[:rows], float(sums[rows]), float(sums[rows + 1])) for sums in total)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is looked at, and how: a module, its driving and riding samples, and a mode."""

    module: nn.Module
    driving: tuple[Batch, Any]
    riding: Batch | None
    params: Selection | None
    forward: Forward | None
    mode: Mode
    seed: int

    def displacement(
        self, state: OptimizerState, drift: tuple[Drift, ...], scale: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return Δθ by parameter name. One backward pass over the driving samples for each group."""
        x = self.driving[0]
        with environment(self.seed):
            network = Network.careful(self.module, x, params=list(state.names), forward=self.forward, mode=self.mode)
            outputs = network.outputs(network.prepared(joined(x, None)))
            found = {}
            for group, d in zip(state.groups, drift, strict=True):
                own = {name: network.parameters[name] for name in group.names if name in network.parameters}
                if not own:
                    continue
                w = d.a.reshape(outputs.shape).to(outputs)
                gradients = torch.autograd.grad(
                    outputs, list(own.values()), w, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for (name, p), g in zip(own.items(), gradients, strict=True):
                    buffer = state.first.get(name, torch.zeros_like(p, device="cpu")).double()
                    step = g.to_dense().cpu().double() + d.b * buffer
                    step = step * scale[name] if scale is not None else step
                    found[name] = -(step + d.c * p.detach().cpu().double())
        return found

    def moved(self, change: dict[str, Tensor]) -> nn.Module:
        """Return a copy of the module whose parameters have changed by this much."""
        live = unwrapped(self.module)
        shadow = Shadow(live, detached=True)
        with torch.no_grad():
            for name, p in live.named_parameters():
                if name in change:
                    shadow.of(p).add_(change[name].to(p))
        return shadow.module

    def outputs(self, module: nn.Module) -> Tensor:
        """Return the outputs (S, C...) of driving and riding samples by this module, in float64 on the CPU."""
        with environment(self.seed):  # with gradients: a forward may take some itself
            batch = joined(self.driving[0], self.riding)
            network = Network.careful(module, batch, forward=self.forward, mode=self.mode)
            return network.raw(network.prepared(batch)).detach().cpu().double()

    @property
    def driven(self) -> int:
        """How many samples drive."""
        return size(self.driving[0])
