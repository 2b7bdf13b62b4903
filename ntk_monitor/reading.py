"""Reading checkpoints: every kind into one record, without running anything that is in them unless they are trusted.

Pickles are read with `weights_only=True`; what needs more is refused by name.
"""

import contextlib
import importlib
import json
import math
import os
import pathlib
import re
import tempfile
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk_monitor.checkpoints import LIVE, Checkpoint, directory_kind, is_part
from ntk_monitor.errors import CheckpointError

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
_AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "swa_state_dict")
_STEPS = ("global_step", "step", "steps", "iteration", "iter")

_BARE = "no optimizer state is saved with it: no learning-rate bound, no forecast, no preconditioned shares"


def read(path: str | os.PathLike[str], *, trust: bool = False) -> Checkpoint:
    """Read one checkpoint to the CPU.

    Args:
        path: a file, or the directory of a Hugging Face or sharded checkpoint.
        trust: run what a pickle asks for. Only for files of your own.

    Raises:
        CheckpointError: empty, truncated, of an unknown kind, or in need of trust; the sentence says what to do.
    """
    place = Path(path)
    kind = directory_kind(place)
    if kind == "sharded":
        return _sharded(place, trust)
    if kind == "huggingface":
        return _huggingface(place, trust)
    if place.is_dir():
        raise CheckpointError(f"{place} is a directory without config.json and weights, or .metadata; pass its files")
    if not place.exists():
        raise CheckpointError(f"wanted a checkpoint, got {place}, which does not exist")
    if place.stat().st_size == 0:
        raise CheckpointError(f"{place} is empty; it may still be being written")
    if place.suffix == ".safetensors":
        state, about = _safetensors(place)
        step, notes = _step_of(about, place)
        return Checkpoint(place, "safetensors", step, _whole(about.get("epoch")), {LIVE: state}, notes=(*notes, _BARE))
    return _pickled(place, trust)


def _pickled(path: Path, trust: bool) -> Checkpoint:
    content = loaded(path, trust=trust)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, wanted a dict of weights or of a checkpoint")
    if "pytorch-lightning_version" in content and "state_dict" in content:
        return _lightning(path, content)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        step, notes = _step_of({}, path)
        return Checkpoint(path, "weights", step, None, {LIVE: dict(content)}, notes=(*notes, _BARE))
    key = next((k for k in _NESTED if _is_state(content.get(k))), None)
    if key is None:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(f"{path} holds no state dict: its keys are {keys}; pass --state-dict-key")
    step, notes = _step_of(content, path)
    states = {LIVE: content[key], **{str(k): value for k, value in content.items() if k != key and _is_state(value)}}
    if average := next((k for k in _AVERAGED if k in states), None):
        states["average"] = states[average]
    saved = content.get("optimizer_state_dict", content.get("optimizer"))
    optimizers = (saved,) if isinstance(saved, Mapping) and "param_groups" in saved else ()
    return Checkpoint(
        path,
        "weights",
        step,
        _whole(content.get("epoch")),
        states,
        optimizers,
        hyper_parameters=_mapping(content.get("hyper_parameters", content.get("config"))),
        notes=(*notes, f'weights are under "{key}"', *(() if optimizers else (_BARE,))),
    )


def _lightning(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    states: dict[str, Mapping[str, Tensor]] = {
        LIVE: _tensors(content.get("current_model_state", content["state_dict"]))
    }
    if "current_model_state" in content:  # WeightAveraging puts the average where the weights usually are
        states["average"] = _tensors(content["state_dict"])
    callbacks = _mapping(content.get("callbacks"))
    for state in callbacks.values():
        average = state.get("average_model_state") if isinstance(state, Mapping) else None
        if average is not None and _is_state(average):
            states["average"] = average
    optimizers = tuple(content.get("optimizer_states", ()))
    return Checkpoint(
        path,
        "lightning",
        _whole(content.get("global_step")),
        _whole(content.get("epoch")),
        states,
        optimizers,
        tuple(content.get("lr_schedulers", ())),
        _mapping(content.get("hyper_parameters")),
        callbacks,
        notes=() if optimizers else (_BARE,),
    )


def _huggingface(path: Path, trust: bool) -> Checkpoint:
    state: dict[str, Tensor] = {}
    safe = sorted(path.glob("*.safetensors"))
    for part in safe or sorted(path.glob("pytorch_model*.bin")):
        if not is_part(part):
            state |= _safetensors(part)[0] if safe else loaded(part, trust=trust)
    trainer = _json(path / "trainer_state.json")
    step, notes = _step_of(trainer, path)
    optimizers: tuple[Mapping[str, Any], ...] = ()
    if (path / "optimizer.pt").is_file():
        optimizers = (loaded(path / "optimizer.pt", trust=trust),)
    schedulers: tuple[Mapping[str, Any], ...] = ()
    if (path / "scheduler.pt").is_file():
        schedulers = (loaded(path / "scheduler.pt", trust=trust),)
    epoch = trainer.get("epoch")
    return Checkpoint(
        path,
        "huggingface",
        step,
        int(epoch) if isinstance(epoch, (int, float)) else None,
        {LIVE: state},
        optimizers,
        schedulers,
        total_steps=_whole(trainer.get("max_steps")),
        notes=(*notes, *(() if optimizers else (_BARE,))),
    )


def _sharded(path: Path, trust: bool) -> Checkpoint:
    if not trust:
        raise CheckpointError(
            f"{path} is a sharded checkpoint, whose .metadata is a pickle that runs what it asks for; if it is your "
            "own, pass --trust-checkpoint"
        )
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a process group it says that it reads in one process, as is meant
        whole = Path(scratch) / "whole.pt"
        try:
            dcp_to_torch_save(path, whole)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be put together: {_first_line(error)}") from error
        content = loaded(whole, trust=True)
    if (path / "meta.pt").is_file():  # Lightning keeps everything else there
        content = {**loaded(path / "meta.pt", trust=True), **content}
    state = content
    key = next((k for k in ("state_dict", *_NESTED, "app") if isinstance(content.get(k), Mapping)), None)
    if key is not None:
        state = content[key]
    if not _is_state(state):
        state = _flattened(state)
    step, notes = _step_of(content, path)
    return Checkpoint(
        path,
        "sharded",
        step,
        _whole(content.get("epoch")),
        {LIVE: _tensors(state)},
        hyper_parameters=_mapping(content.get("hyper_parameters")),
        notes=(*notes, "the optimizer's shards are left aside: no learning-rate bound, no forecast"),
    )


def loaded(path: Path, *, trust: bool = False) -> Any:
    """Return what a file of torch.save holds.

    Raises:
        CheckpointError: not readable, or it holds classes that only a trusted pickle may build.
    """
    if not trust and (unsafe := _unsafe(path)):
        names = ", ".join(unsafe[:3]) + (f" and {len(unsafe) - 3} more" if len(unsafe) > 3 else "")
        raise CheckpointError(
            f"{path} needs {names} to be unpickled, which can run any code; if the file is your own, pass "
            "--trust-checkpoint"
        )
    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({_first_line(error)}): it is damaged, of another kind, or still being written"
        ) from error


def _unsafe(path: Path) -> list[str]:
    """Return the classes and functions that a pickle names and nobody has allowed; nothing is run for it."""
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_allowed()):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    return []  # not a zip file, or damaged: torch.load will say


def _allowed() -> list[Any]:
    """Return the classes that Lightning and its command line put into checkpoints; none of them runs anything."""
    allowed: list[Any] = [pathlib.PosixPath, pathlib.PurePosixPath, Namespace, defaultdict, dict, list, set, tuple]
    for module, name in (
        ("lightning.fabric.utilities.data", "AttributeDict"),
        ("lightning_fabric.utilities.data", "AttributeDict"),
        ("jsonargparse._namespace", "Namespace"),
    ):
        with contextlib.suppress(Exception):
            allowed.append(getattr(importlib.import_module(module), name))
    return allowed


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_first_line(error)}): it is damaged or still being written"
        ) from error


def _step_of(content: Mapping[str, Any], path: Path) -> tuple[int | None, tuple[str, ...]]:
    """Return the step that a checkpoint records, else the number in its name, with a note."""
    for key in _STEPS:
        if (step := _whole(content.get(key))) is not None:
            return step, ()
    name = path.stem if path.is_file() else path.name
    numbers = re.findall(r"(?:step|iter|checkpoint)[-_=]?(\d+)", name) or re.findall(r"(\d+)$", name)
    if numbers:
        return int(numbers[-1]), (f"the step, {int(numbers[-1])}, is taken from the name",)
    return None, ()


def _whole(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return int(value) if number and value == int(value) else None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict without what modules add to it that is no tensor."""
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _flattened(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in state.items():
        whole = f"{prefix}.{name}" if prefix else str(name)
        flat |= _flattened(value, whole) if isinstance(value, Mapping) else {whole: value}
    return flat


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return dict(vars(value)) if isinstance(value, Namespace) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
