"""Samples taken out of other people's data sets: reproducible, put together as in training, without a trace."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ntk_monitor.drawing import fetched, indexed, places, weighted
from ntk_monitor.errors import InputError
from ntk_monitor.labels import cheap_labels
from ntk_monitor.probe import Probe, dataset_of, draw, population_of, redrawn


class Augmented(Dataset[Any]):
    """Each kind of generator moves another column, or none does."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(2)
        self.legacy = np.random.RandomState(3)
        self.python = random.Random(4)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        moves = {
            "": lambda: 0.0,
            "own torch": lambda: float(torch.rand(1, generator=self.torch)),
            "own numpy": lambda: float(self.numpy.random()),
            "own legacy": lambda: float(self.legacy.rand()),
            "own python": self.python.random,
            "torch": lambda: float(torch.rand(1)),
            "numpy": lambda: float(np.random.rand()),
            "python": random.random,
        }
        return torch.tensor([index + moves[self.kind]()])

    def states(self) -> list[str]:
        legacy = self.legacy.get_state(legacy=False)
        own = (self.torch.get_state().tolist(), self.numpy.bit_generator.state, legacy, self.python.getstate())
        everybody = (torch.get_rng_state().tolist(), np.random.get_state(legacy=False), random.getstate())
        return [repr(state) for state in (*own, *everybody)]


KINDS = ["own torch", "own numpy", "own legacy", "own python", "torch", "numpy", "python"]


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_augmentation_is_frozen_named_and_repeated_whatever_happened_before(kind: str) -> None:
    dataset = Augmented(kind)
    before = dataset.states()
    batch, varies = fetched(dataset, [3, 7], 5)
    assert varies == bool(kind)
    assert dataset.states() == before
    for _ in range(3):  # training goes on, every generator with it
        dataset[0]
    torch.rand(1), np.random.rand(), random.random()
    assert torch.equal(fetched(dataset, [3, 7], 5)[0], batch)
    assert torch.equal(fetched(dataset, [3, 7], 6)[0], batch) == (not kind)
    probe = draw(dataset, 4)
    assert probe.source.endswith(", augmentation frozen at this draw") == bool(kind)
    again = redrawn(dataset, probe.indices, 0, probe.source)
    assert (again.hash, again.source) == (probe.hash, probe.source)


def test_random_collation_is_augmentation_too() -> None:
    data = TensorDataset(torch.arange(12.0)[:, None])

    def mixed(items: list[Any]) -> Tensor:
        x = torch.cat([x for (x,) in items])[:, None]
        share = torch.rand(1)
        return share * x + (1 - share) * x.roll(1, 0)

    probe = Probe.of(DataLoader(data, 2, collate_fn=mixed), 4)
    assert probe.source.endswith("frozen at this draw")
    assert "frozen" not in Probe.of(DataLoader(data, 2), 4).source


def test_samples_that_do_not_fit_together_ask_for_a_collate_fn() -> None:
    ragged = [torch.ones(i + 1) for i in range(4)]

    class Ragged(Dataset[Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return ragged[index]

    message = r"samples must fit together in one batch, got RuntimeError: .*; pass a DataLoader with the collate_fn"
    for data in (Ragged(), DataLoader(Ragged(), 2)):
        with pytest.raises(InputError, match=message):
            Probe.of(data, 4)
    padded = DataLoader(Ragged(), 2, collate_fn=lambda items: torch.nn.utils.rnn.pad_sequence(items, batch_first=True))
    assert Probe.of(padded, 4).inputs.shape == (4, 4)

    class Broken(Ragged):
        def __getitem__(self, index: int) -> Tensor:
            raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):  # the user's own words
        Probe.of(Broken(), 4)


def test_a_loader_may_leave_samples_out() -> None:
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 2)
    weights = [0.0] * 5 + [1.0] * 10 + [3.0] * 5

    def loader(sampler: Any) -> DataLoader[Any]:
        return DataLoader(data, 4, sampler=sampler)

    assert places(loader(RandomSampler(data))) is None
    np.testing.assert_array_equal(places(loader(SubsetRandomSampler([7, 3, 11]))), [3, 7, 11])
    uneven = loader(WeightedRandomSampler(weights, 20))
    np.testing.assert_array_equal(places(uneven), range(5, 20))
    batches = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(SubsetRandomSampler([1, 2]), 2, False))
    np.testing.assert_array_equal(places(batches), [1, 2])
    assert weighted(uneven)
    assert not weighted(loader(RandomSampler(data)))
    probe = Probe.of(uneven, 15)
    assert probe.indices == tuple(range(5, 20))
    assert probe.source == (
        "15 of 15 training samples, drawn stratified by class (the weights of the loader's sampler are not applied), "
        "seed 0"
    )
    assert torch.equal(probe.inputs, data.tensors[0][5:])
    assert population_of(uneven) == 15
    assert population_of(loader(SubsetRandomSampler([7, 3, 11]))) == 3
    assert population_of(data) == population_of(DataLoader(data, 4)) == 20


class Feature:
    def __init__(self, dtype: str = "", names: list[str] | None = None) -> None:
        self.dtype = dtype
        if names is not None:
            self.names = names


class Table:
    """What Hugging Face's `datasets` looks like from outside: rows by index, columns by name, no torch Dataset."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns
        self.column_names = list(columns)
        self.features = {name: Feature("int64") for name in columns}
        self.read: list[str] = []

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            self.read.append(key)
            return self._columns[key]
        return {name: column[key] for name, column in self._columns.items()}


def table(n: int = 12) -> Table:
    made = Table(x=[[float(i), 0.0] for i in range(n)], label=[i % 3 for i in range(n)])
    made.features = {"x": Feature("list"), "label": Feature(names=["a", "b", "c"])}
    return made


def test_tables_are_drawn_from_and_stratified_by_their_label_column() -> None:
    data = table()
    assert indexed(data)
    np.testing.assert_array_equal(cheap_labels(data), [i % 3 for i in range(12)])
    assert data.read == ["label"]

    def stacked(rows: list[Any]) -> Any:
        return {"x": torch.tensor([row["x"] for row in rows]), "labels": torch.tensor([row["label"] for row in rows])}

    assert Probe.of(data, 6).labels is not None
    probe = Probe.of(DataLoader(data, 4, collate_fn=stacked), 6)  # type: ignore[arg-type]
    assert probe.labels is not None
    np.testing.assert_array_equal(np.bincount(probe.labels), [2, 2, 2])
    assert "stratified by class" in probe.source
    assert probe.inputs["x"][:, 0].tolist() == [float(i) for i in probe.indices]
    assert dataset_of(data) is data
    assert population_of(data) == 12


def test_columns_that_are_no_classes_are_not_read() -> None:
    tokens = Table(input_ids=[[1, 2]] * 6, labels=[[1, 2]] * 6)
    tokens.features = {"input_ids": Feature(), "labels": Feature("list")}
    assert cheap_labels(tokens) is None
    assert tokens.read == []
    ages = Table(x=[[0.0]] * 6, label=[23, 41, 67, 35, 58, 29])
    assert cheap_labels(ages) is None
    assert ages.read == ["label"]


def test_what_is_no_data_set() -> None:
    class Sized(IterableDataset[Any]):
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Any]:
            return iter([1, 2, 3])

    for other in (torch.ones(3), np.ones(3), "abc", b"abc", {"a": 1}, [1, 2], (1, 2), Sized(), 3, None, object()):
        assert not indexed(other)


def test_a_list_of_samples_in_a_loader() -> None:
    samples = [(torch.full((2,), float(i)), i % 2) for i in range(8)]
    probe = Probe.of(DataLoader(samples, 2), 4)  # type: ignore[arg-type]
    assert probe.inputs[:, 0].tolist() == [float(i) for i in probe.indices]


def test_arrays_are_taken_as_tensors() -> None:
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 0])
    assert Probe.of((x, y), 1).hash == Probe(torch.from_numpy(x), torch.from_numpy(y)).hash
    assert Probe.of(x, 1).samples == 3
    assert Probe.of({"x": x, "labels": y}, 1).targets.tolist() == [0, 1, 0]
    assert population_of((x, y)) == 3


def test_texts_are_padded_by_the_collation_of_the_loader() -> None:
    """As transformers' DataCollatorWithPadding does it, here with a tokenizer made of ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    named: Any = PreTrainedTokenizerFast
    tokenizer = named(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    texts = ["a b c", "d", "e f", "g h a b c", "d e", "f"]
    rows = [{**tokenizer(text), "label": i % 2} for i, text in enumerate(texts)]
    loader: DataLoader[Any] = DataLoader(rows, 2, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
    probe = Probe.of(loader, 6)
    assert set(probe.inputs) >= {"input_ids", "attention_mask"}
    assert probe.inputs["input_ids"].shape == (6, 5)
    assert probe.inputs["attention_mask"].sum(1).tolist() == [3, 1, 2, 5, 2, 1]
    assert probe.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert "frozen" not in probe.source
    assert all("label" in row for row in rows)
