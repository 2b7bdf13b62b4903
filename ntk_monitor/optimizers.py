"""What an optimizer is about to do, read from the live object: its rule, its groups, its state. Nothing is guessed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ntk_monitor.errors import InputError
from ntk_monitor.shadow import unwrapped

Family: TypeAlias = Literal["sgd", "adam", "other"]

WARM = 10
"""Updates before Adam's second moment is worth reading: the first steps are lr · sign(gradient), whatever K is."""

# The rules that are known, by the class that defines their step.
_FAMILIES: dict[type[Optimizer], Family] = {SGD: "sgd", Adam: "adam", AdamW: "adam"}


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
    ages: dict[str, int] = field(default_factory=dict)
    """Updates of each parameter, which may be fewer than its group's: layers unfrozen late, experts rarely used."""
    uncovered: tuple[str, ...] = ()
    """Trainable parameters that no optimizer updates."""
    reason: str = ""
    """Why steps of this optimizer have no function-space form; empty when they have one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that the optimizers update."""
        return tuple(name for group in self.groups for name in group.names)

    def preconditioner(self, parameters: Mapping[str, Tensor], *, floor: float = 0.0) -> dict[str, Tensor] | None:
        """Return Adam's D = 1/(√v̂ + ε) for each of these parameters, v̂ = v/(1 - β₂ᵏ); None for other families.

        Zero for parameters that the optimizer has not updated yet, or does not hold. Without a floor, an entry whose
        gradient has always been zero (a dead unit, a token not seen) has D = 1/ε.

        Args:
            parameters: by name; only their shapes are read.
            floor: smallest √v̂ relative to the largest of its tensor. For forecasts, which would take the first
                gradient of a waking unit for a step of 1/ε; a bound on the learning rate must not have one.
        """
        if self.family != "adam":
            return None
        groups = {name: group for group in self.groups for name in group.names}
        found = {}
        for name, parameter in parameters.items():
            v = self.second.get(name)
            if v is None or name not in groups or not self.ages.get(name):
                found[name] = torch.zeros_like(parameter, dtype=torch.float64, device="cpu")
                continue
            root = (v.double() / (1 - groups[name].betas[1] ** self.ages[name])).sqrt()
            largest = float(root.max()) if root.numel() else 0.0
            if floor and not largest:  # never a gradient: it has not moved, and one step's forecast would be 1/ε
                found[name] = torch.zeros_like(root)
                continue
            found[name] = 1 / (root.clamp_min(floor * largest) + groups[name].eps)
        return found


def picked(optimizers: Sequence[Optimizer], wanted: int | str | None) -> list[Optimizer]:
    """Return the optimizer that was asked for, in a list of its own, or all of them.

    Args:
        optimizers: of one run.
        wanted: a place in the sequence, as a number or in digits; the name of a class that only one of them has; None:
            all.

    Raises:
        InputError: no such optimizer, or several of that class.
    """
    if wanted is None:
        return list(optimizers)
    present = ", ".join(f"{place} ({type(o).__name__})" for place, o in enumerate(optimizers)) or "none"
    if isinstance(wanted, int) or wanted.isdecimal():
        found = [o for place, o in enumerate(optimizers) if place == int(wanted)]
    else:
        found = [o for o in optimizers if type(o).__name__ == wanted]
    if len(found) != 1:
        raise InputError(f"optimizer must name one optimizer of the run, got {wanted!r}; there are: {present}")
    return found


def read(module: nn.Module, optimizers: Any, *, others: Sequence[Optimizer] = ()) -> OptimizerState:
    """Return rule and state of a live optimizer, or of several, over the parameters of a module.

    `torch.optim.SGD`, `Adam` and `AdamW` are known, in their foreach, fused, capturable and differentiable variants
    and with amsgrad and maximize; so are subclasses that keep the step. Everything else is family "other", with a
    reason that names it. State is copied to the CPU; the optimizer is only read.

    Args:
        module: the measured module.
        optimizers: a `torch.optim.Optimizer`, or a sequence of them. Wrappers with an `.optimizer` (Lightning's,
            accelerate's) are looked through.
        others: further optimizers of the run, whose parameters are not uncovered.

    Raises:
        InputError: something that is no optimizer.
    """
    found = [_bare(o) for o in (optimizers if isinstance(optimizers, Sequence) else [optimizers])]
    if not found:
        raise InputError("wanted a torch.optim.Optimizer, got an empty sequence; pass the run's optimizer")
    live = unwrapped(module).named_parameters()
    names = {id(p): name for name, p in live if p.requires_grad}
    families = {_family(o) for o in found}
    family: Family = families.pop() if len(families) == 1 else "other"
    groups: list[Group] = []
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    ages: dict[str, int] = {}
    for optimizer in found:
        for raw in optimizer.param_groups:
            held = {names[id(p)]: optimizer.state.get(p, {}) for p in raw["params"] if id(p) in names}
            clocks = {name: _steps(state, family) for name, state in held.items()}
            groups.append(_group(raw, tuple(held), max(clocks.values(), default=0), optimizer))
            ages |= clocks
            for name, state in held.items():
                _keep(first, name, state.get("momentum_buffer" if family == "sgd" else "exp_avg"))
                _keep(second, name, state.get("max_exp_avg_sq" if raw.get("amsgrad") else "exp_avg_sq"))
    elsewhere = {names.get(id(p)) for o in others for raw in _bare(o).param_groups for p in raw["params"]}
    covered = {name for group in groups for name in group.names} | elsewhere
    return OptimizerState(
        name=" + ".join(dict.fromkeys(type(o).__name__ for o in found)),
        family=family,
        groups=tuple(groups),
        first=first if family != "other" else {},
        second=second if family == "adam" else {},
        ages=ages,
        uncovered=tuple(name for name in names.values() if name not in covered),
        reason=_reason(found, family, groups),
    )


def _bare(optimizer: Any) -> Optimizer:
    inner = getattr(optimizer, "optimizer", None)
    # A user's optimizer that holds another one (Lookahead) is a rule of its own.
    if isinstance(inner, Optimizer) and (not isinstance(optimizer, Optimizer) or _wrapper(optimizer)):
        return _bare(inner)
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"wanted a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the run's optimizer")
    return optimizer


def _wrapper(optimizer: Optimizer) -> bool:
    """True for the wrappers of trainers, which step as what they hold does."""
    return type(optimizer).__module__.partition(".")[0] in ("lightning", "pytorch_lightning", "accelerate")


def _family(optimizer: Optimizer) -> Family:
    kind = type(optimizer)
    replaced = vars(optimizer).get("step")
    # Schedulers wrap the step of the object they drive, and mark it; any other replacement is a rule we cannot see.
    if replaced is not None and not getattr(replaced, "_wrapped_by_lr_sched", hasattr(replaced, "__wrapped__")):
        return "other"
    for known, family in _FAMILIES.items():
        same = all(getattr(kind, name) is getattr(known, name) for name in ("step", "_init_group"))
        if issubclass(kind, known) and same:
            return family
    return "other"


def _group(raw: Mapping[str, Any], names: tuple[str, ...], steps: int, optimizer: Optimizer) -> Group:
    betas = raw.get("betas") or (0.9, 0.999)
    return Group(
        names=names,
        lr=float(raw.get("lr") or 0.0),
        weight_decay=float(raw.get("weight_decay") or 0.0),
        decoupled=bool(raw.get("decoupled_weight_decay", isinstance(optimizer, AdamW))),
        maximize=bool(raw.get("maximize", False)),
        momentum=_number(raw.get("momentum", 0.0)),
        dampening=_number(raw.get("dampening", 0.0)),
        nesterov=bool(raw.get("nesterov", False)),
        betas=(_number(betas[0], 0.9), _number(betas[1] if len(betas) > 1 else 0.999, 0.999)),
        eps=_number(raw.get("eps", 1e-8), 1e-8),
        amsgrad=bool(raw.get("amsgrad", False)),
        steps=steps,
    )


def _number(value: Any, otherwise: float = 0.0) -> float:
    """Return a number that may be a tensor; families we do not know may keep anything under these names."""
    return float(value) if isinstance(value, get_args(int | float | Tensor)) else otherwise


def _steps(state: Mapping[str, Any], family: Family) -> int:
    if family == "sgd":
        return int(state.get("momentum_buffer") is not None)
    return int(_number(state.get("step", 0)))


def _keep(into: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        into[name] = value.detach().to_dense().cpu().clone() if value.is_sparse else value.detach().cpu().clone()


def _reason(optimizers: Sequence[Optimizer], family: Family, groups: Sequence[Group]) -> str:
    """Return why no function-space form exists, or an empty string."""
    used = [group for group in groups if group.names]
    kinds = " + ".join(dict.fromkeys(type(o).__name__ for o in optimizers))
    if not used:
        return f"{kinds} holds none of the module's trainable parameters"
    if family == "other":
        if len({_family(o) for o in optimizers}) > 1:
            return f"several rules at once ({kinds}) have no common function-space form"
        return f"{kinds} has no function-space form; only SGD, Adam and AdamW have one"
    if family == "adam":
        if any(group.weight_decay and not group.decoupled for group in used):
            return f"{kinds} with coupled weight decay has no function-space form; AdamW's decoupled decay has one"
        # A group that never had a gradient, such as a head not in use, does not move and needs no second moment.
        youngest = min((group.steps for group in used if group.steps), default=0)
        if youngest < WARM:
            return f"not available before about {WARM} steps of Adam, whose first steps are signs ({youngest} taken)"
    return ""
