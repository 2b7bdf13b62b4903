"""Optimizers of a checkpoint again: their kind, groups, learning rates and state, on the parameters of the model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ntk_monitor.checkpoints import Checkpoint
from ntk_monitor.errors import said

Parameters = list[nn.Parameter]

# Which optimizer keeps which state. AdamW and Adam differ by a flag of their groups (torch >= 2.9) or not at all.
_NORMS = ("norm", "ln_", ".ln", "layernorm", "rmsnorm", "batchnorm", "groupnorm")


def optimizers(model: nn.Module, checkpoint: Checkpoint) -> tuple[list[Optimizer], tuple[str, ...]]:
    """Return the optimizers as they were when the checkpoint was saved, and sentences about what is uncertain.

    A LightningModule is asked (`configure_optimizers`); else the saved state tells kind and order of parameters, and is
    believed only where every shape fits. Empty when there is no state, or nothing fits.

    Args:
        model: with the checkpoint's weights.
        checkpoint: with or without optimizer states.
    """
    states = checkpoint.optimizers
    if not states:
        return [], ()
    made, notes = _configured(model)
    if len(made) != len(states):
        made, more = [], notes
        for state in states:
            one = _guessed(model, state)
            if one is None:
                sentence = "the optimizer's state does not fit the model's parameters: no learning-rate bound"
                return [], (*more, sentence)
            made.append(one)
        notes = (*more, f"{type(made[0]).__name__} and the order of its parameters are read from its state")
    for one, state in zip(made, states, strict=True):
        try:
            one.load_state_dict(dict(state))
        except Exception as error:  # noqa: BLE001 - users' optimizers; without state there is still a kernel
            return [], (*notes, f"the state of {type(one).__name__} cannot be loaded: {said(error)}")
    return made, notes


def _configured(model: nn.Module) -> tuple[list[Optimizer], tuple[str, ...]]:
    configure = getattr(model, "configure_optimizers", None)
    if configure is None:
        return [], ()
    try:
        return list(_listed(configure())), ()
    except Exception as error:  # noqa: BLE001 - it may ask a Trainer that is not there
        return [], (f"configure_optimizers() needs more than the model ({said(error)})",)


def _listed(answer: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in whatever `configure_optimizers` may return."""
    if isinstance(answer, Optimizer):
        yield answer
    elif isinstance(answer, Mapping):
        yield from _listed(answer["optimizer"])
    elif isinstance(answer, (tuple, list)):
        # ([optimizers], [schedulers]) has lists inside; a list of optimizers or dicts has none.
        inside = answer[0] if answer and isinstance(answer[0], (tuple, list)) else answer
        for one in inside:
            if isinstance(one, (Optimizer, Mapping)):
                yield from _listed(one)


def _guessed(model: nn.Module, state: Mapping[str, Any]) -> Optimizer | None:
    groups, slots = state.get("param_groups", []), state.get("state", {})
    sizes = [len(group["params"]) for group in groups]
    for order in _orders(model):
        if sum(sizes) == len(order) and _fits(order, groups, slots):
            return _built(order, groups, slots)
    return None


def _orders(model: nn.Module) -> Iterator[Parameters]:
    """Yield orders in which trainers hand parameters to optimizers."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    yield [p for _, p in named]
    # With and without weight decay, as Hugging Face's Trainer and most recipes split them.
    bare = {id(p) for name, p in named if name.endswith("bias") or any(norm in name.lower() for norm in _NORMS)}
    yield [p for _, p in named if id(p) not in bare] + [p for _, p in named if id(p) in bare]
    flat = {id(p) for _, p in named if p.dim() < 2}
    yield [p for _, p in named if id(p) not in flat] + [p for _, p in named if id(p) in flat]
    yield list(model.parameters())


def _fits(order: Parameters, groups: Sequence[Mapping[str, Any]], slots: Mapping[Any, Mapping[str, Any]]) -> bool:
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, order, strict=True):
        for value in slots.get(number, {}).values():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                return False
    return True


def _built(order: Parameters, groups: Sequence[Mapping[str, Any]], slots: Mapping[Any, Mapping[str, Any]]) -> Optimizer:
    keys = {key for slot in slots.values() for key in slot}
    kinds = {key for group in groups for key in group}
    made, start = [], 0
    for group in groups:
        stop = start + len(group["params"])
        made.append({"params": order[start:stop], "lr": float(group.get("lr", 0.0))})
        start = stop
    if "exp_avg_sq" in keys or "betas" in kinds:
        decoupled = any(group.get("decoupled_weight_decay", True) for group in groups)
        return torch.optim.AdamW(made) if decoupled else torch.optim.Adam(made)
    if "square_avg" in keys:
        return torch.optim.RMSprop(made)
    return torch.optim.SGD(made)
