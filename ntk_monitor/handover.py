"""What one probe hands to the next, as tensors and numbers only: on disk it continues a series in another process.

A file of it is read with `weights_only=True`; no pickle of ours ever runs anything.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntk_monitor.atomic import whole
from ntk_monitor.dynamics.kept import Kept
from ntk_monitor.errors import CheckpointError, said
from ntk_monitor.losses import Terms
from ntk_monitor.modes import Modes
from ntk_monitor.noise import NoiseScale
from ntk_monitor.walk import Path as Walk

_RECORDS: dict[str, type] = {kind.__name__: kind for kind in (Kept, Modes, NoiseScale, Terms, Walk)}
_KIND, _ARRAY, _TUPLE = "record", "array", "tuple"


def packed(value: Any) -> Any:
    """Return a nest of records, arrays and plain values as dicts, lists, tensors and plain values.

    Raises:
        TypeError: something that has no such form.
    """
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, np.generic):
        return packed(value.item())
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.array(value))}
    if isinstance(value, tuple):
        return {_TUPLE: [packed(one) for one in value]}
    if isinstance(value, list):
        return [packed(one) for one in value]
    if isinstance(value, Mapping):
        return {"dict": [[packed(key), packed(one)] for key, one in value.items()]}
    if type(value).__name__ in _RECORDS:
        fields = {f.name: packed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_KIND: type(value).__name__, "fields": fields}
    raise TypeError(f"{type(value).__name__} cannot be handed on")


def unpacked(value: Any) -> Any:
    """Return what `packed` was given."""
    if isinstance(value, list):
        return [unpacked(one) for one in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return value[_ARRAY].numpy()
    if _TUPLE in value:
        return tuple(unpacked(one) for one in value[_TUPLE])
    if _KIND in value:
        fields = {name: unpacked(one) for name, one in value["fields"].items()}
        return _RECORDS[value[_KIND]](**fields)
    return {unpacked(key): unpacked(one) for key, one in value["dict"]}


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """Write it; the file appears whole or not at all."""
    with whole(Path(path)) as part:
        torch.save(packed(state), part)


def load(path: str | os.PathLike[str]) -> Any:
    """Read it back.

    Raises:
        CheckpointError: not such a file.
    """
    try:
        return unpacked(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(f"{path} holds no handed-over state: {said(error)}") from error
