"""Class labels of a dataset, read without loading samples, and draws in proportion to them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

Labels = NDArray[np.int64]

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Names under which batches and tables keep their targets."""

# Attributes under which datasets keep all their labels; the last one is torchvision's own (Food101, Flowers102, ...).
_ATTRIBUTES = ("targets", "labels", "y", "_labels")


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
    """Return the class of every sample without loading samples, or None when that is not possible.

    Looks behind Subset and ConcatDataset, at the tensors of a TensorDataset, at the attributes `targets`, `labels`,
    `y`, and at the label column of a table as Hugging Face's `datasets` makes them.
    """
    if isinstance(dataset, Subset):
        whole = cheap_labels(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [cheap_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return class_labels(dataset.tensors[-1]) if len(dataset.tensors) == 2 else None
    try:
        values = _kept(dataset)
        return None if values is None else class_labels(torch.as_tensor(values))
    except Exception:  # noqa: BLE001 - a user's property that fails, or labels that are no numbers: no classes then
        return None


def _kept(dataset: Any) -> Any:
    """Return the labels that a dataset keeps in one place, one for each sample."""
    for name in _ATTRIBUTES:
        values = getattr(dataset, name, None)
        if isinstance(values, (list, np.ndarray, Tensor)) and len(values) == len(dataset):
            return values
    features = getattr(dataset, "features", None) or {}
    for key in TARGET_KEYS:
        if key in getattr(dataset, "column_names", ()) and _categorical(features.get(key)):
            return np.asarray(dataset[key])
    return None


def _categorical(feature: Any) -> bool:
    """True for a column of class labels or integers: reading any other one (token ids, say) would not be cheap."""
    return hasattr(feature, "names") or str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool"))


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
