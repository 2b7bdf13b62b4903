"""What an optimizer is about to do, read from the live object: its rule, its groups, its state. Nothing is guessed."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

Family: TypeAlias = Literal["sgd", "adam", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One parameter group: which parameters, and the constants of their update."""

    names: tuple[str, ...]
    """Names of its trainable parameters in the measured module, shared ones once."""
    lr: float
    weight_decay: float = 0.0
    decoupled: bool = False
    """True: decay acts beside the preconditioner (AdamW); False: it is added to the gradient."""
    maximize: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    steps: int = 0
    """Updates taken so far (Adam's k). For SGD, 0 while there is no momentum buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """Rule and state of a run's optimizers over the parameters of one module."""

    name: str
    """Class of the optimizer, e.g. "AdamW"."""
    family: Family
    groups: tuple[Group, ...]
    first: dict[str, Tensor] = field(default_factory=dict)
    """Momentum buffer, or Adam's exp_avg, by parameter name; a missing one is zero."""
    second: dict[str, Tensor] = field(default_factory=dict)
    """Adam's exp_avg_sq (max_exp_avg_sq under amsgrad), not corrected for bias, by parameter name."""
    uncovered: tuple[str, ...] = ()
    """Trainable parameters that no optimizer updates."""
    reason: str = ""
    """Why steps of this optimizer have no function-space form; empty when they have one."""
