"""Batches: a tensor, or tuples, lists, dicts and dataclasses of tensors whose leading axis counts samples (N)."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ntk_monitor.errors import InputError

Batch: TypeAlias = Any
"""A tensor or a nest of them. Leaves that are no tensors, and 0-dimensional tensors, belong to every sample alike."""


def mapped(batch: Batch, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Return the same nest with `change` applied to every leaf of a kind, tensors by default.

    Mappings become plain dicts.
    """
    if isinstance(batch, kind):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change, kind) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change, kind) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(value, change, kind) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changes = {f.name: mapped(getattr(batch, f.name), change, kind) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **changes)
    return batch


def tensored(batch: Batch) -> Batch:
    """Return the same nest with every numpy array of numbers as a tensor of the same dtype."""
    return mapped(batch, lambda a: torch.from_numpy(a.copy()) if a.dtype.kind in "biufc" else a, np.ndarray)


def tensors(batch: Batch) -> list[Tensor]:
    """Return every tensor of the nest, in order."""
    found: list[Tensor] = []
    mapped(batch, found.append)
    return found


def size(batch: Batch) -> int:
    """Return N, the length of the leading axis that all tensors share.

    Raises:
        InputError: no tensor with a leading axis, an empty batch, or tensors that disagree.
    """
    lengths = [int(t.shape[0]) for t in tensors(batch) if t.dim() > 0]
    if not lengths:
        raise InputError(
            f"a batch must hold at least one tensor with a leading sample axis, got {type(batch).__name__}"
        )
    if len(set(lengths)) > 1:
        raise InputError(f"all tensors of a batch must share their leading (sample) axis, got lengths {lengths}")
    if lengths[0] == 0:
        raise InputError("a batch must hold at least one sample, got 0; pass a non-empty probe")
    return lengths[0]


def take(batch: Batch, rows: slice | Tensor | Sequence[int]) -> Batch:
    """Return the chosen samples; a slice gives views, an index tensor or list gives copies."""
    return mapped(batch, lambda t: t[rows] if t.dim() > 0 else t)


def joined(first: Batch, second: Batch | None) -> Batch:
    """Return one batch of the samples of both; what belongs to every sample alike is taken from the first.

    Without a second it is a copy of the first.

    Raises:
        InputError: batches of different structure, or of samples of different shapes.
    """
    if second is None:
        return owned(first)
    one, two = Flat.of(first), Flat.of(second)
    shapes = [[tuple(t.shape[1:]) for t in flat.leaves] for flat in (one, two)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"samples must be alike to form one batch: tensors of shapes {shapes[0]} behind the sample axis, got "
            f"{shapes[1]}; pad both to the same length"
        )
    return one.rebuild([torch.cat([a, b.to(a)]) for a, b in zip(one.leaves, two.leaves, strict=True)])


def moved(batch: Batch, device: torch.device, promote: torch.dtype | None = None) -> Batch:
    """Return the batch on `device`, floating tensors narrower than `promote` cast up to it.

    Raises:
        InputError: a tensor on the meta device, which holds no data to move.
    """

    def move(t: Tensor) -> Tensor:
        if t.is_meta and device.type != "meta":
            raise InputError("a probe must hold data, got a tensor on the meta device; pass a materialised tensor")
        narrow = promote is not None and t.is_floating_point() and torch.promote_types(t.dtype, promote) != t.dtype
        return t.to(device, promote) if narrow else t.to(device)

    return mapped(batch, move)


def owned(batch: Batch) -> Batch:
    """Return a detached copy that shares no memory with the batch and is no inference-mode tensor."""
    with torch.inference_mode(False):
        return mapped(batch, lambda t: t.detach().clone())


def digest(*batches: Batch) -> str:
    """Return a short hash of the contents, dtypes and shapes of every tensor; equal batches hash alike."""
    state = hashlib.sha256()
    for batch in batches:
        for t in tensors(batch):
            state.update(f"{t.dtype}{tuple(t.shape)}".encode())
            state.update(raw_bytes(t).numpy().tobytes())
    return state.hexdigest()[:16]


def raw_bytes(t: Tensor) -> Tensor:
    """Return the values of a dense tensor as bytes on the CPU, row-major, in the machine's byte order."""
    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # A single element counts as contiguous whatever its stride, and then cannot be viewed as bytes.
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


@dataclasses.dataclass(frozen=True, slots=True)
class Flat:
    """A batch taken apart: the tensors that carry samples, and how to put a nest of the same shape together again."""

    leaves: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor]], Batch]

    @staticmethod
    def of(batch: Batch) -> "Flat":
        """Take a batch apart."""
        leaves = tuple(t for t in tensors(batch) if t.dim() > 0)

        def rebuild(values: Sequence[Tensor]) -> Batch:
            remaining = iter(values)
            return mapped(batch, lambda t: next(remaining) if t.dim() > 0 else t)

        return Flat(leaves, rebuild)
