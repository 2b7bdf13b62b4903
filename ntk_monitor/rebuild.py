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
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

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
    except Exception as error:  # importing runs the user's code
        raise InputError(f"{name!r} cannot be imported: {said(error)}") from error
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
        build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before jsonargparse 4.49
        made = build(chosen).get(name)
        if inspect.isclass(target):
            return made, notes
        return target(**(vars(made) if made is not None else {})), notes
    except NTKMonitorError:
        raise
    except Exception as error:
        given = ", ".join(sorted(kept)) or "no arguments"
        raise InputError(f"{target.__name__} cannot be built from {given}: {said(error)}; add --{name}.NAME") from error


@dataclass(frozen=True, slots=True)
class Samples:
    """What to measure on, in the forms of `Probe.of`."""

    probe: Any
    training: Any = None
    """The training set, beside the probe; None: there is none, and no forecast."""


def data(
    wish: Wish,
    near: Sequence[Path],
    config: Mapping[str, Any] | None = None,
    *,
    drawn: bool = False,
    trust: bool = False,
) -> tuple[Samples, tuple[str, ...]]:
    """Return what a probe can be drawn from, and sentences about where it comes from.

    A probe saved beside the run is what the run itself measured: it comes first, unless a file of samples is named, and
    the data that are found then are the training set beside it.

    Args:
        wish: name of a class, function or file; or nothing, then the configuration's.
        near: checkpoints, beside which a probe may lie.
        config: of LightningCLI.
        drawn: leave a saved probe aside.
        trust: see `reading.read`.

    Raises:
        InputError: nothing says which data, or they cannot be read.
    """
    path = Path(wish.name or "")
    if wish.name is not None and (path.suffix in _FILES or path.is_file()):
        found = from_file(path, trust=trust)
        return Samples(found, None if isinstance(found, Probe) else found), (f"samples of {path}",)
    saved = None if drawn else next((p for place in near for p in _upwards(place, "*_probe.json")), None)
    section = (config or {}).get("data")
    section = section if isinstance(section, Mapping) else {}
    name = wish.name or section.get("class_path")
    if saved is None and name is None:
        raise InputError(
            "nothing says which data to measure on, and no probe is saved beside the run; pass --data "
            "pkg.DataModule, pkg:function, or a .pt, .npz or .npy file of (inputs, targets)"
        )
    made: Any = None
    notes: tuple[str, ...] = ()
    if name is not None:
        values = dict(section.get("init_args", section)) if section.get("class_path") in (None, name) else {}
        try:
            made, notes = instance(imported(name), values, wish.words, "data")
            made = listed(_drawn_from(made, name))
        except InputError as error:
            if saved is None or wish.name is not None:
                raise
            notes = (f"no forecasts, since the training data are not there: {error}",)
    if saved is None:
        return Samples(made, None if isinstance(made, Probe) else made), notes
    return Samples(load(saved), made), (*notes, f"the probe that the run itself measured, {saved}")


_FILES = (".pt", ".pth", ".npz", ".npy", ".json", ".safetensors")


def listed(made: Any) -> Any:
    """Return samples in a few big tensors, or in a list, as a data set of single ones; others as they are."""
    if isinstance(made, (torch.Tensor, np.ndarray)):
        return TensorDataset(torch.as_tensor(made))
    if (
        isinstance(made, (tuple, list))
        and len(made) == 2
        and all(isinstance(o, (torch.Tensor, np.ndarray)) for o in made)
    ):
        return TensorDataset(*map(torch.as_tensor, made))
    if isinstance(made, Mapping) and made and all(isinstance(one, torch.Tensor) for one in made.values()):
        rows = min(len(one) for one in made.values())
        return _Listed([{key: value[i] for key, value in made.items()} for i in range(rows)])
    return _Listed(made) if isinstance(made, list) else made


class _Listed(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[index]


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
    """Return the samples of a file as a set to draw from; a saved probe as such.

    .pt: (inputs, targets), inputs, or a mapping of both (x and y); another mapping is a batch for the model's keywords.
    .npz: arrays x and y, or inputs and targets, or the only two. .npy: inputs.

    Raises:
        InputError: a file of another kind, or inputs and targets of different numbers of samples.
        CheckpointError: a pickle that needs trust, or a damaged file.
    """
    if not path.exists():
        raise InputError(f"--data must be an existing file, pkg.Class or pkg:function, got {path}")
    if path.suffix in (".json", ".safetensors"):
        return load(path)
    try:
        if path.suffix not in (".npz", ".npy"):
            content = loaded(path, trust=trust)
            return listed(_pair(content, path) if isinstance(content, Mapping) else content)
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                return listed(arrays)
            return listed(_pair({key: arrays[key] for key in arrays.files}, path, only=True))
    except (OSError, ValueError, TypeError, AssertionError, BadZipFile) as error:
        if isinstance(error, NTKMonitorError):
            raise
        raise InputError(f"{path} cannot be read as samples: {said(error, kind=False)}") from error


def _pair(arrays: Mapping[str, Any], path: Path, *, only: bool = False) -> Any:
    """Return (inputs, targets) or inputs out of a mapping; with `only` there can be nothing else in it."""
    for inputs, targets in (("inputs", "targets"), ("x", "y"), ("X", "y")):
        if inputs in arrays:
            return (arrays[inputs], arrays[targets]) if targets in arrays else arrays[inputs]
    if not only:
        return arrays
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
