"""A run seen from its outputs: what an optimizer's steps do to f when the Jacobian J stays what it is now.

S samples with C outputs each, R = S·C rows, flattened sample-major. The first `driving` of the samples are the batch
that the loss averages over; their D rows drive all R: Δf = -Σ_g lr_g K_g dL/df with K_g = J_g D_g J_gᵀ, (R, D).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_monitor.dynamics.objective import Objective, loss_gradient
from ntk_monitor.errors import InputError
from ntk_monitor.optimizers import Family, Group

__all__ = ["Dynamics", "Objective", "Part", "loss_gradient"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one parameter group contributes."""

    group: Group
    kernel: Float64[Tensor, "r d"]
    """J_g D_g J_gᵀ between all rows and the driving ones; D_g = 1 but for Adam."""
    momentum: Float64[Tensor, " r"]
    """J_g times the momentum buffer (Adam: J_g D_g times exp_avg)."""
    weights: Float64[Tensor, " r"]
    """J_g θ_g, on which weight decay acts."""


@dataclass(frozen=True, slots=True)
class Dynamics:
    """The linear model of the next steps. Everything in float64 on the CPU."""

    parts: tuple[Part, ...]
    """One for each parameter group of the optimizer, in its order."""
    outputs: Tensor
    """f at the start, (S, C...), in the shape the loss takes."""
    driving: int
    """How many samples drive; the rest ride along."""
    gradient: Callable[[Tensor], Tensor]
    """Outputs of the driving samples → dL/df in their shape; usually an `Objective`."""
    family: Family
    plain: Float64[Tensor, "d d"] | None = None
    """J Jᵀ of the driving rows, from which a gradient's norm follows. None: the sum of the parts' kernels is it (SGD),
    or is not known (Adam), and then gradients cannot be clipped."""

    def average(self, other: "Dynamics") -> "Dynamics":
        """Return these dynamics with the mean of both kernels: explains an interval from both of its ends.

        Start, momentum and weights stay this one's. The error that remains is of second order in the change of J.

        Raises:
            InputError: other samples, or other groups.
        """
        same = len(self.parts) == len(other.parts) and all(
            a.kernel.shape == b.kernel.shape for a, b in zip(self.parts, other.parts, strict=True)
        )
        if not same:
            raise InputError("the mean of two kernels needs the same samples and the same parameter groups")
        parts = tuple(
            replace(a, kernel=(a.kernel + b.kernel) / 2) for a, b in zip(self.parts, other.parts, strict=True)
        )
        plain = None if self.plain is None or other.plain is None else (self.plain + other.plain) / 2
        return replace(self, parts=parts, plain=plain)

    def speed(self, rates: Float64[Tensor, " g"] | None = None) -> Float64[Tensor, "r d"]:
        """Return Σ_g lr_g K_g, at these learning rates, one for each group, or at the current ones."""
        lrs = [part.group.lr for part in self.parts] if rates is None else rates.tolist()
        total = torch.zeros_like(self.parts[0].kernel)
        for part, lr in zip(self.parts, lrs, strict=True):
            total.add_(part.kernel, alpha=lr)
        return total

    def gram(self) -> Float64[Tensor, "d d"] | None:
        """Return J Jᵀ of the driving rows, or None where it is not known."""
        if self.plain is not None or self.family != "sgd":
            return self.plain
        rows = self.parts[0].kernel.shape[1]
        return torch.stack([part.kernel[:rows] for part in self.parts]).sum(0)
