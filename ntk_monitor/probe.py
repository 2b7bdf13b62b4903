"""Probe: the fixed samples on which a network's kernel is measured, and where they come from.

Drawn once, owned (copied), hashed. Drawing touches no random state and no iterator of the training loader.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ntk_monitor.batch import Batch, digest, owned, size, take, tensored, tensors
from ntk_monitor.drawing import fetched, indexed, places, weighted
from ntk_monitor.errors import InputError
from ntk_monitor.labels import TARGET_KEYS, Labels, cheap_labels, class_labels, stratified
from ntk_monitor.streams import first, streaming


@dataclass(frozen=True, slots=True)
class Probe:
    """N samples, held on the CPU or wherever they came from.

    Attributes:
        inputs: what the model is called with; leading axis N.
        targets: leading axis N, or None (no modes, no alignment).
        source: where the samples come from, in words.
        indices: their places in the training set, when they were drawn from one.
    """

    inputs: Batch
    targets: Any = None
    source: str = "given"
    indices: tuple[int, ...] = ()
    hash: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        n = size(self.inputs)
        if any(t.is_meta for t in [*tensors(self.inputs), *tensors(self.targets)]):
            raise InputError("a probe must hold data, got a tensor on the meta device; pass a materialised tensor")
        if self.targets is not None and size(self.targets) != n:
            raise InputError(f"inputs and targets must hold the same samples, got {n} and {size(self.targets)}")
        if not self.hash:
            object.__setattr__(self, "hash", digest(self.inputs, self.targets))

    @property
    def samples(self) -> int:
        """N."""
        return size(self.inputs)

    @property
    def labels(self) -> Labels | None:
        """Class of each sample, or None when the targets are no class labels."""
        return class_labels(self.targets) if isinstance(self.targets, Tensor) else None

    @property
    def bytes(self) -> int:
        """What its samples take in memory."""
        return sum(t.numel() * t.element_size() for t in [*tensors(self.inputs), *tensors(self.targets)])

    def copied(self) -> "Probe":
        """Return the same probe in memory of its own."""
        return replace(self, inputs=owned(self.inputs), targets=owned(self.targets))

    @staticmethod
    def of(data: Any, samples: int, seed: int = 0) -> "Probe":
        """Return a probe from whatever a user has.

        Args:
            data: a Probe; (inputs, targets); a tensor, array or dict of inputs; a dataset or a DataLoader over one, of
                which `samples` are drawn. A dataset is torch's, or anything with a length and items; of an iterable one
                the first samples are read from a copy.
            samples: how many to draw; a set that holds fewer is taken whole.
            seed: of the draw.

        Raises:
            InputError: nothing usable, no samples, or inputs and targets that do not fit.
        """
        if isinstance(data, Probe):
            return data
        if dataset_of(data) is not None:
            return stream(data, samples, seed) if streaming(data) else draw(data, samples, seed)
        given = tensored(data)
        if isinstance(given, Tensor):
            return Probe(given).copied()
        if isinstance(given, (tuple, list)) and len(given) == 2:
            return Probe(given[0], given[1]).copied()
        if isinstance(given, Mapping):
            return Probe(*split(given)).copied()
        raise InputError(
            f"probe must be an int, (inputs, targets), a Dataset, a DataLoader or a Probe, got {type(data).__name__}"
        )


def indexable(loader: DataLoader[Any]) -> bool:
    """True when single samples can be taken from the loader's dataset and put together by its `collate_fn`."""
    return not streaming(loader)


def default_samples(outputs: int) -> int:
    """Return how many samples a probe has by default: 1024 // C, at least 64, at most 512."""
    return max(64, min(512, 1024 // max(outputs, 1)))


def draw(data: Any, samples: int, seed: int = 0) -> Probe:
    """Draw samples from a map-style dataset, proportionally stratified where class labels can be read cheaply.

    The dataset's own random generators and all global ones are left as they were; augmentation is frozen at this draw.

    Args:
        data: the dataset, or a DataLoader over one, whose `collate_fn` makes the batch; samples that its sampler leaves
            out (SubsetRandomSampler) are left out here.
        samples: how many; a set that holds fewer is taken whole.
        seed: of the choice, and of the augmentation.

    Raises:
        InputError: an iterable-style, empty or unsized dataset, or samples that do not fit together.
    """
    dataset = dataset_of(data)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"a probe is drawn by index, got {type(dataset).__name__}; pass probe=(inputs, targets)")
    allowed = places(data) if isinstance(data, DataLoader) else None
    total = len(dataset) if allowed is None else len(allowed)
    if total == 0 or samples < 1:
        raise InputError(f"wanted {samples} samples, the dataset has {total}; pass a non-empty one")
    labels = cheap_labels(dataset)
    if labels is not None and allowed is not None:
        labels = labels[allowed]
    chosen = stratified(labels, samples, seed) if labels is not None else _random(total, samples, seed)
    how = "stratified by class" if labels is not None else "at random"
    if isinstance(data, DataLoader) and weighted(data):
        how += " (the weights of the loader's sampler are not applied)"
    source = f"{len(chosen)} of {total} training samples, drawn {how}, seed {seed}"
    indices = chosen if allowed is None else [int(allowed[place]) for place in chosen]
    return redrawn(data, indices, seed, source)


def redrawn(data: Any, indices: Sequence[int], seed: int, source: str) -> Probe:
    """Take samples by their places in a map-style dataset; the same seed freezes the same augmentation.

    Args:
        data: the dataset, or a DataLoader over one, whose `collate_fn` makes the batch.
        indices: places of the samples.
        seed: of the augmentation.
        source: where the samples come from, in words.

    Raises:
        InputError: samples that torch's own collation cannot put together.
    """
    collate = data.collate_fn if isinstance(data, DataLoader) else None
    batch, varies = fetched(dataset_of(data), indices, seed, collate)
    frozen = ", augmentation frozen at this draw"
    if varies and not source.endswith(frozen):
        source += frozen
    return from_batch(batch, len(indices), source, indices)


def stream(data: Any, samples: int, seed: int = 0, skip: int = 0) -> Probe:
    """Take the first samples of an iterable dataset, or of a loader of whole batches, from a copy of it.

    Args:
        data: an IterableDataset, a DataLoader over one, or a DataLoader with batch_size=None.
        samples: how many; a shorter stream is taken whole.
        seed: of the random numbers that the stream draws on the way.
        skip: samples to leave out at the beginning.

    Raises:
        InputError: a data set that cannot be copied, or that yields nothing.
    """
    batch = first(data, samples, seed, skip)
    name = type(dataset_of(data)).__name__
    found = from_batch(batch, samples, "")
    return replace(
        found,
        source=f"the first {found.samples} samples of a copy of {name}, in its own order; shuffling and augmentation "
        f"frozen at this draw, seed {seed}{found.source}",
    )


def dataset_of(data: Any) -> Any:
    """Return the dataset behind a DataLoader, or data that is a dataset itself, or None for other data."""
    if isinstance(data, DataLoader):
        return data.dataset
    return data if isinstance(data, Dataset) or indexed(data) else None


def population_of(data: Any) -> int | None:
    """Return how many samples a training set has, in the forms of `Probe.of`; None for a draw, and without a length."""
    whole = data[0] if isinstance(data, (tuple, list)) and len(data) == 2 else data
    if whole is None or isinstance(whole, Probe):
        return None
    dataset = dataset_of(whole)
    if dataset is None:
        return size(tensored(whole))
    allowed = places(whole) if isinstance(whole, DataLoader) else None
    if allowed is not None:
        return len(allowed)
    return len(dataset) if hasattr(dataset, "__len__") else None


def beside(data: Any, probe: Probe, samples: int, seed: int) -> Probe | None:
    """Draw training samples that are not among the probe's, in random order, so that the first are a draw as well.

    Args:
        data: the training set, in the forms of `Probe.of`.
        probe: whose indices, if it has some, are places in this same set.
        samples: how many at most.
        seed: of the draw.

    Returns:
        The samples, or None where the set holds no others.
    """
    if streaming(data):
        pool = _rest(data, probe, samples, seed)
        if pool is None:
            return None
    else:
        pool = Probe.of(data, samples + len(probe.indices), seed)
    known = set(probe.indices)
    free = [row for row in range(pool.samples) if not pool.indices or pool.indices[row] not in known]
    order = np.random.default_rng(seed).permutation(len(free))[:samples]
    rows = [free[i] for i in order]
    if not rows:
        return None
    inputs, targets = (take(part, rows) for part in (pool.inputs, pool.targets))
    return Probe(inputs, targets, pool.source, tuple(pool.indices[row] for row in rows) if pool.indices else ())


def from_batch(batch: Any, samples: int, source: str, indices: Sequence[int] = ()) -> Probe:
    """Return the first samples of a training batch as a probe.

    Targets without one tensor row per sample (words, boxes) are left out, and `source` says so: the kernel needs none.
    """
    inputs, targets = split(batch)
    n = size(inputs)
    if targets is not None:
        try:
            fits = size(targets) == n
        except InputError:
            fits = False
        if not fits:
            targets, source = None, f"{source}; targets left out, as they are no tensors with one row per sample"
    rows = slice(0, min(samples, n))
    return Probe(take(inputs, rows), take(targets, rows), source, tuple(indices)).copied()


def split(batch: Any) -> tuple[Batch, Any]:
    """Take a training batch apart into inputs and targets.

    A pair is (inputs, targets); a mapping gives up "labels", "label", "targets", "target" or "y"; a tensor, or a
    sequence of one, has no targets.

    Raises:
        InputError: a sequence of more than two elements, where guessing would be wrong silently.
    """
    if isinstance(batch, Mapping):
        key = next((k for k in TARGET_KEYS if k in batch), None)
        rest = {k: v for k, v in batch.items() if k != key}
        return rest, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)):
        if len(batch) > 2:
            raise InputError(
                f"a batch of {len(batch)} elements has no obvious inputs and targets; pass probe=(inputs, targets) and "
                "forward=callable(module, inputs)"
            )
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None


def _random(total: int, samples: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return sorted(int(i) for i in generator.choice(total, size=min(samples, total), replace=False))


def _rest(data: Any, probe: Probe, samples: int, seed: int) -> Probe | None:
    """Return what a stream gives after as many samples as the probe has, or None when it ends there."""
    try:
        return stream(data, samples, seed, skip=probe.samples)
    except InputError:
        return None
