"""A model and its data again, from what a run left on disk and what the user says: classes, arguments, files.

jsonargparse parses arguments, as LightningCLI does, so that its config.yaml works unchanged. Importing a class runs the
user's code; reading a configuration runs only what it names.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ntk_monitor.checkpoints import Checkpoint
from ntk_monitor.errors import InputError, NTKMonitorError, said
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import load
from ntk_monitor.reading import loaded

_INSIDE = ("hparams_name", "_instantiator", "_class_path")


@dataclass(frozen=True, slots=True)
class Wish:
    """What to build: a name ("pkg.Class", "pkg:function", a file), and words of the command line for its arguments."""

    name: str | None = None
    words: tuple[str, ...] = ()


def configuration(path: Path | None, near: Sequence[Path]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the configuration that LightningCLI saved, and a sentence about where it was found.

    Args:
        path: of the file; None: the nearest config.yaml at or above a checkpoint.
        near: checkpoints.

    Raises:
        InputError: a file that is no configuration.
    """
    found = path or next((p for place in near for p in _upwards(place, "config.yaml")), None)
    if found is None:
        return {}, ()
    import yaml

    try:
        content = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(
            f"--config must be a YAML file as LightningCLI saves it, got {found}: {said(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"--config must hold a mapping, got {type(content).__name__} in {found}")
    return content, (f"model and data as {found} says",)


def _upwards(place: Path, pattern: str, levels: int = 3) -> list[Path]:
    folder = place if place.is_dir() else place.parent
    found: list[Path] = []
    for _ in range(levels):
        found += sorted(folder.glob(pattern))
        folder = folder.parent
    return found


def model(
    wish: Wish, checkpoint: Checkpoint, config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model of a checkpoint, with fresh weights, and sentences about its arguments.

    The class comes from the wish, else from the configuration, else from the config.json of a Hugging Face checkpoint.
    Arguments: words of the wish, else the checkpoint's hyper-parameters, else the configuration's.

    Raises:
        InputError: nothing says which class, or it cannot be built from what is known.
    """
    section = (config or {}).get("model")
    section = section if isinstance(section, Mapping) else {}
    if wish.name is None and checkpoint.kind == "huggingface" and "class_path" not in section:
        return _huggingface(checkpoint.path)
    name = wish.name or section.get("class_path")
    if name is None:
        raise InputError(
            f"nothing says which class {checkpoint.path} belongs to; pass --model pkg.Class or pkg:function "
            "(arguments as --model.NAME VALUE), or --config config.yaml"
        )
    values = dict(section.get("init_args", section if "class_path" not in section else {}))
    if wish.name is not None and section.get("class_path") not in (None, wish.name):
        values = {}  # arguments of another class
    values |= {key: value for key, value in checkpoint.hyper_parameters.items() if key not in _INSIDE}
    made, notes = instance(imported(name), values, wish.words, "model")
    if not isinstance(made, nn.Module):
        raise InputError(f"--model must give a torch.nn.Module, got {type(made).__name__} from {name}")
    return made, notes


def _huggingface(path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Build what config.json names, from the library of that name, with no code of the checkpoint's own."""
    try:
        config = imported("transformers:AutoConfig").from_pretrained(path, trust_remote_code=False)
        names = list(getattr(config, "architectures", None) or [])
        architecture = imported(f"transformers:{names[0]}") if names else None
    except (InputError, OSError, ValueError) as error:
        raise InputError(f"config.json of {path} cannot be followed: {said(error)}; pass --model") from error
    if architecture is None:
        raise InputError(f"config.json of {path} names no architecture; pass --model")
    return architecture(config), (f"{names[0]} as config.json says",)


def imported(name: str) -> Any:
    """Return the class or function behind "pkg.Class" or "pkg:function".

    The current directory is searched too, as python -m does.

    Raises:
        InputError: it cannot be imported.
    """
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module or not attribute:
        raise InputError(f"wanted pkg.Class or pkg:function, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name!r} cannot be imported: {said(error, kind=False)}") from error
    return found


def instance(
    target: Callable[..., Any], values: Mapping[str, Any], words: Sequence[str], name: str
) -> tuple[Any, tuple[str, ...]]:
    """Return what a class or function makes of these arguments.

    Args:
        target: a class, or a function.
        values: known arguments; those that it does not take are left aside, with a sentence.
        words: command line, such as ("--model.width", "64"); they win.
        name: prefix of the words.

    Raises:
        InputError: a missing or unusable argument, or the target itself raises.
    """
    from jsonargparse import ArgumentParser

    known = inspect.signature(target).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    kept = {key: value for key, value in values.items() if key in known or free}
    left = sorted(set(values) - set(kept))
    notes = (f"{', '.join(left)} are no arguments of {target.__name__} and are left aside",) if left else ()
    parser = ArgumentParser(exit_on_error=False)
    try:
        if inspect.isclass(target):
            parser.add_class_arguments(target, name, fail_untyped=False)
        else:
            parser.add_function_arguments(target, name, fail_untyped=False)
        chosen = parser.parse_object({name: kept}, defaults=True) if kept else parser.get_defaults()
        chosen = parser.parse_args(list(words), chosen)
        made = parser.instantiate_classes(chosen).get(name)
        if inspect.isclass(target):
            return made, notes
        return target(**(vars(made) if made is not None else {})), notes
    except NTKMonitorError:
        raise
    except Exception as error:
        given = ", ".join(sorted(kept)) or "no arguments"
        raise InputError(f"{target.__name__} cannot be built from {given}: {said(error)}; add --{name}.NAME") from error


def data(
    wish: Wish, near: Sequence[Path], config: Mapping[str, Any] | None = None, *, trust: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """Return what a probe can be drawn from (`Probe.of`), and sentences about where it comes from.

    A probe saved beside the run comes first when nothing else is wished for: it is what the run itself measured.

    Raises:
        InputError: nothing says which data, or they cannot be read.
    """
    section = (config or {}).get("data")
    section = section if isinstance(section, Mapping) else {}
    if wish.name is None:
        saved = [p for place in near for p in _upwards(place, "*_probe.json")]
        if saved:
            return load(saved[0]), (f"the probe that the run itself measured, {saved[0]}",)
        if "class_path" not in section:
            raise InputError(
                "nothing says which data to measure on, and no probe is saved beside the run; pass --data "
                "pkg.DataModule, pkg:function, or a .pt, .npz or .npy file of (inputs, targets)"
            )
    elif (path := Path(wish.name)).suffix in (".pt", ".pth", ".npz", ".npy", ".json", ".safetensors") or path.is_file():
        return from_file(path, trust=trust), (f"samples of {path}",)
    name = wish.name or str(section["class_path"])
    values = dict(section.get("init_args") or {}) if section.get("class_path") in (None, name) else {}
    made, notes = instance(imported(name), values, wish.words, "data")
    return _drawn_from(made, name), notes


def _drawn_from(made: Any, name: str) -> Any:
    """Return the training data of a data module as it stands; other things are data themselves."""
    if not (hasattr(made, "train_dataloader") and hasattr(made, "setup")):
        return made
    try:
        made.prepare_data()
        made.setup("fit")
        return made.train_dataloader()
    except Exception as error:
        raise InputError(f"{name} gives no training data: {said(error)}") from error


def from_file(path: Path, *, trust: bool = False) -> Any:
    """Return (inputs, targets), or inputs alone, of a file; a saved probe as such.

    .npz: arrays x and y, or inputs and targets, or the only two. .npy: inputs.

    Raises:
        InputError: a file of another kind.
        CheckpointError: a pickle that needs trust, or a damaged file.
    """
    if not path.exists():
        raise InputError(f"--data must be an existing file, pkg.Class or pkg:function, got {path}")
    if path.suffix in (".json", ".safetensors"):
        return load(path)
    if path.suffix in (".npz", ".npy"):
        try:
            content = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as numpy arrays: {said(error)}") from error
        if isinstance(content, np.ndarray):
            return torch.from_numpy(content)
        arrays = {key: torch.from_numpy(content[key]) for key in content.files}
        return _pair(arrays, path)
    content = loaded(path, trust=trust)
    if isinstance(content, Mapping) and not {"inputs", "x"} & set(content):
        return content  # a batch for the model's keywords
    return _pair(content, path) if isinstance(content, Mapping) else content


def _pair(arrays: Mapping[str, Any], path: Path) -> Any:
    for inputs, targets in (("inputs", "targets"), ("x", "y"), ("X", "y")):
        if inputs in arrays:
            return (arrays[inputs], arrays[targets]) if targets in arrays else arrays[inputs]
    if len(arrays) == 2:
        return tuple(arrays.values())
    raise InputError(f"{path} must hold inputs and targets (or x and y), got {', '.join(arrays)}")


def saved_manifest(near: Sequence[Path]) -> Mapping[str, Any]:
    """Return how the run itself measured, from the file beside its probe; empty without one."""
    for path in (p for place in near for p in _upwards(place, "*_probe.json")):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")).get("manifest", {}))
        except (OSError, ValueError):
            continue
    return {}


def is_probe(data: Any) -> bool:
    """True for samples that are a probe already, and not a set to draw one from."""
    return isinstance(data, Probe)
