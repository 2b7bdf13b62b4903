"""First samples of a data set that can only be iterated, read from a copy of it, so that training misses none.

A second iterator over the same object is not safe: an epoch counter, a file, a queue or a shared iterator inside would
move on. A deep copy shares nothing of that, and what cannot be copied (open files, generators, sockets, queues, locks)
is refused. Not seen: state in globals and class attributes, and a server that hands out each sample only once.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ntk_monitor.batch import Batch, joined, size, take
from ntk_monitor.drawing import collated, reproducible
from ntk_monitor.errors import InputError, said
from ntk_monitor.guard import Generator

# What may be copied: more would cost start-up time and memory that nobody planned for.
_OBJECTS, _BYTES = 100_000, 256 * 2**20


def streaming(data: Any) -> bool:
    """True for an iterable data set, a loader over one, and a loader of whole batches (batch_size=None)."""
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset) or data.batch_sampler is None
    return isinstance(data, IterableDataset)


def first(data: Any, samples: int, seed: int, skip: int = 0) -> Batch:
    """Return the first samples of a stream as one batch, in the order in which the stream gives them.

    A stream of whole batches gives as many of them as are needed, up to the first one that does not fit (texts padded
    to another length); the last one may hold more samples than were asked for.

    Args:
        data: as `streaming` accepts it.
        samples: how many; a shorter stream is taken whole.
        seed: of the random numbers that the stream draws on the way.
        skip: samples to leave out at the beginning.

    Raises:
        InputError: a data set that cannot be copied, or one that yields nothing. What it raises passes through.
    """
    loader = data if isinstance(data, DataLoader) else None
    source, collate = (data, None) if loader is None else (loader.dataset, loader.collate_fn)
    stream = isinstance(source, IterableDataset)
    # Samples that are looked up leave the data set where it is; only the order in which they are looked up may move on.
    order = separate(source) if stream or loader is None else separate(loader.sampler, source)
    with reproducible(seed, order, source, collate):
        items = iter(order) if stream else (source[place] for place in order)
        try:
            if loader is not None and collate is not None and loader.batch_sampler is None:
                found = _joined(map(collate, items), samples, skip)
            else:
                taken = list(islice(items, skip, skip + samples))
                found = collated(taken, collate) if taken else None
        finally:
            if hasattr(items, "close"):
                items.close()
    if found is None:
        more = f" after the first {skip}" if skip else ""
        raise InputError(f"wanted samples from {type(source).__name__}, got none{more}; pass probe=(inputs, targets)")
    return found


def separate(value: Any, *shared: Any) -> Any:
    """Return a deep copy, whose iteration leaves the original where it is.

    Args:
        value: a data set or a sampler.
        shared: what the copy may share with the original.

    Raises:
        InputError: what cannot be copied, is too large to be, or reads from an iterator that a copy would share.
    """
    reason = _obstacle(value, shared)
    if not reason:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # copying iterators of itertools is deprecated since Python 3.12
                copied = copy.deepcopy(value, {id(item): item for item in shared})
            if copied is not value:
                return copied
            reason = "its copy is the object itself"
        except Exception as error:  # noqa: BLE001 - whatever a user's object says to being copied
            reason = said(error, kind=True)
    raise InputError(
        f"samples of {type(value).__name__} can only be read from a copy, since training reads on from the original, "
        f"and it cannot be copied: {reason}; pass probe=(inputs, targets)"
    )


def _obstacle(root: Any, known: tuple[Any, ...]) -> str:
    """Return why an object must not be copied, or "".

    Functions are shared by copies, and so is what they enclose: an iterator or a random generator in there would be
    used up, or move on.
    """
    seen = set(map(id, known))
    stack: list[tuple[Any, bool]] = [(root, False)]
    taken = 0
    while stack:
        value, shared = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if shared and isinstance(value, (Iterator, *get_args(Generator))):
            return f"a function in it reads from a {type(value).__name__} that the copy would share"
        taken += _bytes(value)
        if len(seen) > _OBJECTS or taken > _BYTES:
            return f"it holds more than {_OBJECTS:,} objects or {_BYTES / 2**20:.0f} MiB"
        stack += [(item, shared or isinstance(value, FunctionType)) for item in _parts(value)]
    return ""


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return int(value.nbytes) if isinstance(value, np.ndarray) else 0


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, int, float, type, Tensor, np.ndarray, ModuleType)):
        return []
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        return [*_enclosed(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is still empty
            yield cell.cell_contents


def _joined(batches: Iterator[Any], samples: int, skip: int) -> Batch | None:
    whole: Batch | None = None
    passed = 0
    for batch in batches:
        n = size(batch)
        rest = take(batch, slice(max(0, skip - passed), None))
        passed += n
        if passed <= skip:
            continue
        try:
            whole = joined(rest, None) if whole is None else joined(whole, rest)
        except InputError:
            break  # of another shape, as texts of another length are
        if size(whole) >= samples:
            break
    return whole
