"""Taking samples out of other people's data sets: reproducibly, and without a trace in any random generator."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler, default_collate

from ntk_monitor.batch import Batch, digest
from ntk_monitor.errors import InputError, said
from ntk_monitor.guard import generators, random_state, seeded

Collate: TypeAlias = Callable[[list[Any]], Any]

# They have a length and items as well.
_NO_DATASETS = (IterableDataset, Tensor, np.ndarray, str, bytes, Mapping, list, tuple)


def indexed(data: Any) -> bool:
    """True when samples can be taken by index: torch's map-style datasets and whatever has a length and items."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, _NO_DATASETS)


def fetched(dataset: Any, indices: Sequence[int], seed: int, collate: Collate | None = None) -> tuple[Batch, bool]:
    """Return these samples as one batch, and True when loading them once more gives other ones (augmentation).

    The same seed gives the same batch: generators that the dataset or its collation hold are seeded as well as the
    global ones, and all of them are left as they were. Costs the samples, and up to four more.

    Raises:
        InputError: samples that torch's own collation cannot put together. What the dataset raises passes through.
    """
    with reproducible(seed, dataset, collate):
        batch = collated(_items(dataset, indices), collate)
    return batch, _varies(dataset, indices[:2], seed, collate)


@contextmanager
def reproducible(seed: int, *owners: object) -> Iterator[None]:
    """Seed the global generators and those that `owners` hold, and put all of them back on the way out."""
    with random_state(*owners):
        seeded(seed)
        for owner in owners:
            for generator in generators(owner):
                _seed(generator, seed)
        yield


def collated(items: list[Any], collate: Collate | None = None) -> Batch:
    """Return samples put together as one batch.

    Raises:
        InputError: samples that torch's own collation cannot put together.
    """
    if collate is not None and collate is not default_collate:
        return collate(items)
    try:
        return default_collate(items)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"samples must fit together in one batch, got {said(error, kind=True)}; "
            "pass a DataLoader with the collate_fn of your training"
        ) from error


def places(loader: DataLoader[Any]) -> NDArray[np.int64] | None:
    """Return which samples of its dataset a loader can ever yield, or None for all of them.

    SubsetRandomSampler leaves samples out (a validation part, usually), WeightedRandomSampler those of weight 0.
    """
    sampler = loader.sampler
    if loader.batch_sampler is not None:
        sampler = getattr(loader.batch_sampler, "sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return np.unique(np.asarray([int(index) for index in sampler.indices], dtype=np.int64))
    if isinstance(sampler, WeightedRandomSampler):
        return np.flatnonzero(sampler.weights.cpu().numpy() > 0).astype(np.int64)
    return None


def weighted(loader: DataLoader[Any]) -> bool:
    """True when training sees some samples more often than others, which a draw does not repeat."""
    return isinstance(getattr(loader.batch_sampler, "sampler", loader.sampler), WeightedRandomSampler)


def _items(dataset: Any, indices: Iterable[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(indices)))
    return [dataset[index] for index in indices]


def _varies(dataset: Any, indices: Sequence[int], seed: int, collate: Collate | None) -> bool:
    """Load some samples under two seeds. Two of them, because a collation may mix a sample with its neighbour."""

    def drawn(other: int) -> str:
        with reproducible(other, dataset, collate):
            return digest(collated(_items(dataset, indices), collate))

    try:
        return drawn(seed) != drawn(seed + 1)
    except Exception:  # noqa: BLE001 - the probe itself could be loaded; this is one word in its description
        return False


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
