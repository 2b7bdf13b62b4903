"""The next steps of SGD, Adam or AdamW in function space. Exact for models that are linear in their parameters.

Of each parameter group three vectors of R numbers are carried: its part of the outputs' motion, b = J buf, q = J θ.

| rule | gradient | buffer | motion |
|---|---|---|---|
| SGD | u = c K g + wd q | b = β b + (1 - damp) u, at first b = u | lr (b, or u + β b under Nesterov, or u) |
| Adam | u = c K_D g | b = β₁ b + (1 - β₁) u | lr b/(1 - β₁ᵏ), AdamW: + lr wd q |

with c = min(1, clip/(|∇L| + 10⁻⁶)) and |∇L|² = gᵀ J Jᵀ g over the batch: clipping by the global norm, as torch does it.
The norm of a minibatch's gradient is larger than that of the mean gradient, so that clipping is exact for full batches.
"""

import math
from typing import Literal, TypeAlias

from jaxtyping import Float64
from torch import Tensor

from ntk_monitor.dynamics.model import Dynamics, Part
from ntk_monitor.errors import InputError
from ntk_monitor.optimizers import Group

Freeze: TypeAlias = Literal["vhat", "v"]

# torch.nn.utils.clip_grad_norm_ adds this to the norm it divides by.
_CLIP_EPS = 1e-6


def simulate(
    dynamics: Dynamics,
    rates: Float64[Tensor, "t g"],
    *,
    clip: float | None = None,
    freeze: Freeze = "vhat",
) -> Tensor:
    """Return the outputs before and after each of T steps, (T + 1, S, C...), in float64.

    Args:
        dynamics: the model and where it starts.
        rates: learning rates, real ones, of each step and group.
        clip: norm that gradients are clipped to (that of all groups together), before weight decay.
        freeze: what of Adam's second moment stays: "vhat" = v/(1 - β₂ᵏ), right for the noisy gradients of minibatches
            and for the first steps; "v", right for full-batch gradients that decay.

    Raises:
        InputError: rates of another shape, clipping under Adam without `plain`, or an optimizer without such a form.

    Cost: R·D multiply-adds for each group and step, and one gradient of the loss.

    Valid while J stays: look at the linearisation error, or at `Forecast.trust`.
    """
    if rates.dim() != 2 or rates.shape[1] != len(dynamics.parts):
        raise InputError(f"wanted rates (steps, {len(dynamics.parts)} groups), got {tuple(rates.shape)}")
    walk = Walk(dynamics, clip=clip, freeze=freeze)
    path = dynamics.outputs.new_empty(len(rates) + 1, *dynamics.outputs.shape)
    path[0] = walk.outputs
    for t, row in enumerate(rates.double().tolist()):
        walk.step(row)
        path[t + 1] = walk.outputs
    return path


class Walk:
    """The state of a simulation, moved step by step; see `simulate` for arguments and errors.

    Attributes:
        taken: steps so far.
    """

    def __init__(self, dynamics: Dynamics, *, clip: float | None = None, freeze: Freeze = "vhat") -> None:
        if dynamics.family == "other":
            raise InputError("this optimizer has no function-space form; use the frozen-Jacobian simulation")
        if freeze not in ("vhat", "v"):
            raise InputError(f'freeze must be "vhat" or "v", got {freeze!r}')
        self._dynamics, self._clip, self._freeze = dynamics, clip, freeze
        self._gram = None if clip is None else dynamics.gram()
        if clip is not None and self._gram is None:
            raise InputError(
                "clipping under Adam needs the kernel without preconditioner; linearise with clipping=True"
            )
        self._flat = dynamics.outputs.double().reshape(-1).clone()
        self._states = [_State(part, adam=dynamics.family == "adam", freeze=freeze) for part in dynamics.parts]
        self.taken = 0

    @property
    def outputs(self) -> Tensor:
        """The outputs now, (S, C...)."""
        return self._flat.reshape(self._dynamics.outputs.shape)

    @property
    def weights(self) -> list[Tensor]:
        """J_g θ_g now, (R,) for each group."""
        return [state.q for state in self._states]

    def step(self, rates: list[float]) -> None:
        """Take one step with these learning rates, one for each group."""
        for moved in self.motions(self.driving_gradient(), rates):
            self._flat -= moved
        self.taken += 1

    def driving_gradient(self) -> Tensor:
        """Return dL/df of the driving samples now, (D,), after clipping."""
        g = self._dynamics.gradient(self.outputs[: self._dynamics.driving]).reshape(-1)
        if self._clip is None or self._gram is None:
            return g
        norm = math.sqrt(max(float(g @ self._gram @ g), 0.0))
        return g * min(1.0, self._clip / (norm + _CLIP_EPS))

    def motions(self, g: Tensor, rates: list[float]) -> list[Tensor]:
        """Return what the outputs lose by each group's step under this gradient, and move the groups' state."""
        return [state.motion(g, lr) for state, lr in zip(self._states, rates, strict=True)]


class _State:
    """One parameter group on its way."""

    def __init__(self, part: Part, *, adam: bool, freeze: Freeze) -> None:
        self._kernel, self._group, self._freeze = part.kernel, part.group, freeze
        self._rule = self._adam if adam else self._sgd
        self._b, self.q = part.momentum, part.weights
        self._steps = part.group.steps

    def motion(self, g: Tensor, lr: float) -> Tensor:
        """Take one step and return what the outputs lose by it."""
        moved = self._rule(self._kernel @ (-g if self._group.maximize else g), lr, self._group)
        self.q = self.q - moved
        self._steps += 1
        return moved

    def _sgd(self, u: Tensor, lr: float, group: Group) -> Tensor:
        u = u + group.weight_decay * self.q if group.weight_decay else u
        if not group.momentum:
            return lr * u
        self._b = u if self._steps == 0 else group.momentum * self._b + (1 - group.dampening) * u
        return lr * (u + group.momentum * self._b if group.nesterov else self._b)

    def _adam(self, u: Tensor, lr: float, group: Group) -> Tensor:
        first, second = group.betas
        self._b = first * self._b + (1 - first) * u
        k, start = self._steps + 1, group.steps
        size = lr / (1 - first**k)
        if self._freeze == "v" and start:
            size *= math.sqrt((1 - second**k) / (1 - second**start))
        moved = size * self._b
        return moved + lr * group.weight_decay * self.q if group.weight_decay else moved
