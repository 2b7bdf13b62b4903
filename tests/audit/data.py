"""Data of the audit: what scikit-learn ships, split into training and held-out halves, prepared as people do."""

import importlib.resources
import inspect
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import sklearn.linear_model
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_friedman1
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


@dataclass(frozen=True)
class Split:
    """Training and held-out samples: inputs and targets."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    def loader(self, batch: int) -> DataLoader[Any]:
        return shuffled(TensorDataset(self.x, self.y), batch)


def shuffled(data: Dataset[Any], batch: int) -> DataLoader[Any]:
    return DataLoader(data, batch, shuffle=True, generator=torch.Generator().manual_seed(0))


def digits(classes: Sequence[int] = tuple(range(10)), *, standard: bool = False) -> Split:
    """Scanned digits (1, 8, 8), 1,437 for training and 360 held out when all classes are wanted.

    Pixels lie in [0, 1], or have mean 0 and variance 1 where `standard`.
    """
    data = load_digits()
    wanted = np.isin(data.target, classes)
    images = torch.tensor(data.images[wanted], dtype=torch.float32)[:, None] / 16
    images = (images - images.mean()) / images.std() if standard else images
    labels = torch.tensor(np.searchsorted(classes, data.target[wanted]))
    train, held = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels.numpy(), random_state=0)
    return Split(images[train], labels[train], images[held], labels[held])


def cancer(*, scaled: bool = True) -> Split:
    """30 measurements of a tumour, benign (1) or not (0), as floats for binary cross-entropy."""
    data = load_breast_cancer()
    return _table(data.data, data.target, scaled=scaled, scaled_target=False)


def diabetes(*, scaled_target: bool = True) -> Split:
    """10 features of 442 patients and the progression of their disease a year later, 25 to 346 where not scaled."""
    data = load_diabetes()
    return _table(data.data, data.target, scaled=True, scaled_target=scaled_target)


def friedman(samples: int = 1250) -> Split:
    """Friedman's first regression problem, 10 features of which 5 matter, noise 1."""
    x, y = make_friedman1(samples, noise=1.0, random_state=0)
    return _table(x, y, scaled=True, scaled_target=True)


def _table(x: Any, y: Any, *, scaled: bool, scaled_target: bool) -> Split:
    y = y[:, None]
    train, held = train_test_split(np.arange(len(x)), test_size=0.2, random_state=0)
    if scaled:
        x = (x - x[train].mean(0)) / x[train].std(0)
    if scaled_target:
        y = (y - y[train].mean()) / y[train].std()
    parts = [torch.tensor(part, dtype=torch.float32) for part in (x[train], y[train], x[held], y[held])]
    return Split(*parts)


ALPHABET = "".join(c for c in string.printable if not c.isupper())


def _known(text: str) -> str:
    return "".join(c for c in text.lower() if c in ALPHABET)


@cache
def prose() -> tuple[str, str]:
    """English: the descriptions of scikit-learn's data sets, for training and, held out, the end of each."""
    folder = importlib.resources.files("sklearn.datasets.descr")
    texts = [_known(item.read_text("utf-8")) for item in sorted(folder.iterdir(), key=str) if item.name.endswith("rst")]
    cuts = [len(text) * 9 // 10 for text in texts]
    parts = list(zip(texts, cuts, strict=True))
    return "\n".join(text[:cut] for text, cut in parts), "\n".join(text[cut:] for text, cut in parts)


@cache
def program() -> tuple[str, str]:
    """Python: the source of scikit-learn's ridge regression, for training and, held out, the end of it."""
    text = _known(inspect.getsource(sklearn.linear_model._ridge))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


class Windows(Dataset[Any]):
    """All windows of a text: (characters, the characters that follow), or a dict as the transformers library has it."""

    def __init__(self, text: str, length: int, *, as_dict: bool = False, stride: int = 1) -> None:
        self.ids = torch.tensor([ALPHABET.index(c) for c in text])
        self.length, self.as_dict, self.stride = length, as_dict, stride

    def __len__(self) -> int:
        return (len(self.ids) - self.length - 1) // self.stride

    def __getitem__(self, index: int) -> Any:
        start = index * self.stride
        window = self.ids[start : start + self.length + 1]
        if self.as_dict:
            return {"input_ids": window[:-1], "labels": window[:-1]}
        return window[:-1], window[1:]


def points(inside: Tensor, border: Tensor, targets: Tensor) -> TensorDataset:
    """Collocation points, the last column telling those inside (0) from those on the border (1), and their targets."""
    marked = [torch.cat([part, torch.full((len(part), 1), flag)], 1) for part, flag in ((inside, 0.0), (border, 1.0))]
    return TensorDataset(torch.cat(marked), targets)
