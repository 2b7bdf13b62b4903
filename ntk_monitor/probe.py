"""Probe: the fixed samples on which a network's kernel is measured, and where they come from.

Drawn once, owned (copied), hashed. Drawing touches no random state and no iterator of the training loader.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from ntk_monitor.batch import Batch, digest, owned, size, take, tensors
from ntk_monitor.errors import InputError
from ntk_monitor.guard import random_state, seeded

Labels = NDArray[np.int64]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


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

    def copied(self) -> "Probe":
        """Return the same probe in memory of its own."""
        return replace(self, inputs=owned(self.inputs), targets=owned(self.targets))

    @staticmethod
    def of(data: Any, samples: int, seed: int = 0) -> "Probe":
        """Return a probe from whatever a user has.

        Args:
            data: a Probe; (inputs, targets); a tensor or dict of inputs; a map-style Dataset or a DataLoader over one,
                of which `samples` are drawn.
            samples: how many to draw; a set that holds fewer is taken whole.
            seed: of the draw.

        Raises:
            InputError: nothing usable, no samples, or inputs and targets that do not fit.
        """
        if isinstance(data, Probe):
            return data
        if isinstance(data, DataLoader):
            if data.batch_sampler is None and not isinstance(data.dataset, IterableDataset):
                raise InputError(
                    "a probe is drawn sample by sample, got a DataLoader with batch_size=None, whose dataset yields "
                    "whole batches; pass probe=(inputs, targets)"
                )
            return draw(data.dataset, samples, seed, collate=data.collate_fn)
        if isinstance(data, Dataset):
            return draw(data, samples, seed)
        if isinstance(data, Tensor):
            return Probe(data).copied()
        if isinstance(data, (tuple, list)) and len(data) == 2:
            return Probe(data[0], data[1]).copied()
        if isinstance(data, Mapping):
            return from_batch(data, size(data), "given")
        raise InputError(
            f"probe must be an int, (inputs, targets), a Dataset, a DataLoader or a Probe, got {type(data).__name__}"
        )


def indexable(loader: DataLoader[Any]) -> bool:
    """True when single samples can be taken from the loader's dataset and put together by its `collate_fn`."""
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def default_samples(outputs: int) -> int:
    """Return how many samples a probe has by default: 1024 // C, at least 64, at most 512."""
    return max(64, min(512, 1024 // max(outputs, 1)))


def draw(dataset: Any, samples: int, seed: int = 0, *, collate: Callable[[list[Any]], Any] | None = None) -> Probe:
    """Draw samples from a map-style dataset, proportionally stratified where class labels can be read cheaply.

    The dataset's own random generators and all global ones are left as they were; augmentation is frozen at this draw.

    Raises:
        InputError: an iterable-style, empty or unsized dataset.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"a probe is drawn by index, got {type(dataset).__name__}; pass probe=(inputs, targets)")
    total = len(dataset)
    if total == 0 or samples < 1:
        raise InputError(f"wanted {samples} samples, the dataset has {total}; pass a non-empty one")
    labels = cheap_labels(dataset)
    chosen = stratified(labels, samples, seed) if labels is not None else _random(total, samples, seed)
    with random_state(dataset, collate):
        seeded(seed)
        items = (
            dataset.__getitems__(chosen) if hasattr(dataset, "__getitems__") else [dataset[index] for index in chosen]
        )
        batch = (collate or default_collate)(items)
    how = "stratified by class" if labels is not None else "at random"
    return from_batch(
        batch, len(chosen), f"{len(chosen)} of {total} training samples, drawn {how}, seed {seed}", tuple(chosen)
    )


def dataset_of(data: Any) -> Any:
    """Return the dataset behind a DataLoader or a Dataset, or None for other data."""
    return data.dataset if isinstance(data, DataLoader) else data if isinstance(data, Dataset) else None


def population_of(data: Any) -> int | None:
    """Return how many samples a training set has, in the forms of `Probe.of`; None for a draw, and without a length."""
    whole = data[0] if isinstance(data, (tuple, list)) and len(data) == 2 else dataset_of(data)
    if data is None or isinstance(data, Probe) or whole is None:
        return None
    if isinstance(whole, Dataset):
        return len(whole) if hasattr(whole, "__len__") else None
    return size(whole)


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
    """Return the first samples of a training batch as a probe."""
    inputs, targets = split(batch)
    rows = slice(0, min(samples, size(inputs)))
    return Probe(take(inputs, rows), take(targets, rows), source, tuple(indices)).copied()


def split(batch: Any) -> tuple[Batch, Any]:
    """Take a training batch apart into inputs and targets.

    A pair is (inputs, targets); a mapping gives up "labels", "label", "targets", "target" or "y"; a tensor, or a
    sequence of one, has no targets.

    Raises:
        InputError: a sequence of more than two elements, where guessing would be wrong silently.
    """
    if isinstance(batch, Mapping):
        key = next((k for k in _TARGET_KEYS if k in batch), None)
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


def class_labels(targets: Tensor) -> Labels | None:
    """Return integer class labels (N,), or None for counts, ages, token ids and anything that is no class.

    Integer targets are classes when at most half of their values are distinct; floating ones when all are 0 or 1, as
    binary cross-entropy wants them.
    """
    flat = targets.detach().cpu()
    if flat.is_complex() or flat.dim() == 0 or flat.numel() != flat.shape[0]:
        return None
    if flat.is_floating_point() and not bool(((flat == 0) | (flat == 1)).all()):
        return None
    values: Labels = flat.reshape(-1).numpy().astype(np.int64)
    return values if len(np.unique(values)) <= max(1, len(values) // 2) else None


def cheap_labels(dataset: Any) -> Labels | None:
    """Return the class of every sample without loading samples, or None when that is not possible."""
    if isinstance(dataset, Subset):
        whole = cheap_labels(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, TensorDataset):
        return class_labels(dataset.tensors[-1]) if len(dataset.tensors) == 2 else None
    for name in ("targets", "labels", "y"):
        values = getattr(dataset, name, None)
        if isinstance(values, (list, np.ndarray, Tensor)) and len(values) == len(dataset):
            try:
                return class_labels(torch.as_tensor(values))
            except (TypeError, ValueError, RuntimeError):
                return None
    return None


def stratified(labels: Labels, samples: int, seed: int) -> list[int]:
    """Return sorted indices, each class in proportion to its share (largest remainder)."""
    generator = np.random.default_rng(seed)
    samples = min(samples, len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * samples / len(labels)
    quota = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - quota), kind="stable")[: samples - quota.sum()]
    quota[largest] += 1
    chosen = [
        generator.choice(np.flatnonzero(labels == label), size=q, replace=False)
        for label, q in zip(classes, quota, strict=True)
    ]
    return sorted(int(i) for i in np.concatenate(chosen))


def _random(total: int, samples: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return sorted(int(i) for i in generator.choice(total, size=min(samples, total), replace=False))
