"""Weights of a checkpoint into a model: prefixes found and told, everything that does not fit listed."""

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ntk_monitor.checkpoints import LIVE, Checkpoint
from ntk_monitor.errors import CheckpointError

# What wrappers put in front of, or between, the names of a module: compile, DataParallel and DDP, AveragedModel, FSDP.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LISTED = 5


def chosen(checkpoint: Checkpoint, *, key: str | None = None, average: bool = False) -> Mapping[str, Tensor]:
    """Return the weights to measure.

    Args:
        checkpoint: read from disk.
        key: name of one of its state dicts; None: the live weights.
        average: take the average (EMA, SWA) instead of the live weights.

    Raises:
        CheckpointError: there are no such weights in it.
    """
    name = key or ("average" if average else LIVE)
    if name not in checkpoint.states:
        raise CheckpointError(f"{checkpoint.path} holds {', '.join(checkpoint.states)}, wanted {name}")
    return checkpoint.states[name]


def apply(model: nn.Module, weights: Mapping[str, Tensor], source: str = "the checkpoint") -> tuple[str, ...]:
    """Copy weights into a model in place, all of them or none.

    Args:
        model: whose parameters and buffers are overwritten.
        weights: state dict, possibly with the prefixes of wrappers, or of a module around or inside this one.
        source: name for errors.

    Returns:
        Sentences about what was done to names and dtypes.

    Raises:
        CheckpointError: names or shapes that do not fit, or integers where the model has fractions; they are listed.
    """
    own = model.state_dict()
    found, notes = matched(model, weights, source)
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return notes


def matched(
    model: nn.Module, weights: Mapping[str, Tensor], source: str = "the checkpoint"
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights under the names of the model, and what `apply` says of them; the data are not looked at.

    Raises:
        CheckpointError: see `apply`.
    """
    own = model.state_dict()
    found, notes = _renamed(_hub(model, weights, own), own)
    missing = sorted(set(own) - set(found) - _shared(model, set(found)))
    unexpected = sorted(set(found) - set(own))
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: {_list('missing', missing)}"
            f"{', and ' if missing and unexpected else ''}{_list('unexpected', unexpected)}"
        )
    shapes = [
        f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}"
        for name, value in found.items()
        if value.shape != own[name].shape
    ]
    if shapes:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {_list('shapes', shapes)}")
    kinds = [
        f"{name} {str(value.dtype).removeprefix('torch.')} for {str(own[name].dtype).removeprefix('torch.')}"
        for name, value in found.items()
        if _kind(value) != _kind(own[name])
    ]
    if kinds:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {_list('dtypes', kinds)}")
    cast = sorted(
        {f"{value.dtype} → {own[name].dtype}" for name, value in found.items() if value.dtype != own[name].dtype}
    )
    if tied := sorted(set(own) - set(found)):
        notes = (*notes, f"{_list('tied weights stored once', tied)}")
    if cast:
        notes = (*notes, f"weights are converted: {', '.join(cast).replace('torch.', '')}")
    return found, notes


def _hub(model: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights that transformers stored under the names of an older release under those of the model."""
    # Looked up, not imported: whoever holds one of its models has loaded it. Before its release 5 there is none.
    loading = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "save_pretrained") or set(weights) == set(own):
        return weights
    names = {id(value): name for name, value in own.items()}
    stored = {old: names[id(value)] for old, value in revert(model, dict(own)).items() if id(value) in names}
    return {stored.get(name, name): value for name, value in weights.items()}


def _renamed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights under the model's names, as far as prefixes can explain the difference."""
    if set(weights) == set(own):
        return dict(weights), ()
    best: tuple[dict[str, Tensor], tuple[str, ...]] = (dict(weights), ())
    fit = _fit(weights, own)
    for renamed, note in _candidates(weights, own):
        if _fit(renamed, own) > fit:
            best, fit = (renamed, (note,)), _fit(renamed, own)
    return best


def _fit(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[int, int]:
    return len(set(found) & set(own)), -len(set(found) - set(own))


def _candidates(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], str]]:
    bare = {_unwrapped(name): value for name, value in weights.items()}
    bare.pop("n_averaged", None)  # AveragedModel counts in a buffer of its own
    removed = sorted({part for name in weights for part in name.split(".") if part in _WRAPPERS})
    words = [f"{' and '.join(f'{part}.' for part in removed)} removed from the names"] if removed else []
    if words:
        yield bare, words[0]
    prefixes = {name[: end + 1] for name in bare for end in range(len(name)) if name[end] == "."}
    for prefix in sorted(prefixes, key=lambda p: (p.count("."), p)):
        inner = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
        left = len(bare) - len(inner)
        rest = f", {left} entries outside it left aside" if left else ""
        yield inner, "; ".join([*words, f"the prefix {prefix} removed from the names{rest}"])
    for prefix in sorted({name[: name.index(".") + 1] for name in own if "." in name}):
        outer = {prefix + name: value for name, value in bare.items()}
        yield outer, "; ".join([*words, f"the prefix {prefix} put in front of the names"])


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _shared(model: nn.Module, present: set[str]) -> set[str]:
    """Return names of tensors that another name, which is present, holds too: safetensors stores them once."""
    places: dict[int, list[str]] = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        places.setdefault(id(value), []).append(name)
    return {name for names in places.values() if present & set(names) for name in names}


def _kind(value: Tensor) -> str:
    return "complex" if value.is_complex() else "fractions" if value.is_floating_point() else "integers"


def _list(word: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{word} {', '.join(names[:_LISTED])}{more}"
