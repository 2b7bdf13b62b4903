"""The first samples of a stream are read from a copy: training reads on as if nobody had looked."""

import itertools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from ntk_monitor import streams
from ntk_monitor.errors import InputError
from ntk_monitor.probe import Probe, beside, population_of
from ntk_monitor.streams import first, separate, streaming


class Counting(IterableDataset[Any]):
    """Yields i, i + 1, ... from where it stands, and remembers all that it did."""

    def __init__(self, length: int = 40) -> None:
        self.length = length
        self.place = 0
        self.epochs = 0
        self.log: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        while self.place < self.length:
            self.log.append(self.place)
            yield torch.full((2,), float(self.place)), self.place % 3
            self.place += 1


class Shuffled(IterableDataset[Any]):
    """Shuffles in place and draws from every kind of generator that it owns or finds."""

    def __init__(self) -> None:
        self.order = list(range(30))
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(2)
        self.python = random.Random(3)

    def __iter__(self) -> Iterator[Tensor]:
        self.python.shuffle(self.order)
        for i in self.order:
            noise = torch.rand(1, generator=self.torch) + torch.rand(1) + random.random() + float(np.random.rand())
            yield i + noise + float(self.numpy.random())


class Resetting(Counting):
    """Is its own iterator."""

    def __iter__(self) -> Iterator[Any]:
        self.place = 0
        return self

    def __next__(self) -> Any:
        self.place += 1
        return torch.full((2,), float(self.place - 1)), 0


class Holding(IterableDataset[Any]):
    def __init__(self, held: Any, read: Callable[[Any], Iterator[Any]] = iter) -> None:
        self.held = held
        self.read = read

    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor([float(item)]) for item in self.read(self.held))


def test_which_data_are_streams() -> None:
    table = TensorDataset(torch.ones(4, 1))
    assert [streaming(d) for d in (Counting(), DataLoader(Counting(), 2), DataLoader(table, batch_size=None))] == [
        True
    ] * 3
    assert not any(streaming(d) for d in (table, DataLoader(table, 2), torch.ones(2), None))


@pytest.mark.parametrize("kind", [Counting, Resetting])
def test_the_first_samples_and_not_a_trace(kind: type[Counting]) -> None:
    dataset = kind()
    for data in (dataset, DataLoader(dataset, 4), DataLoader(dataset, 4, num_workers=2)):
        x, y = first(data, 5, 0)
        assert x[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert y.shape == (5,)
        assert (dataset.place, dataset.epochs, dataset.log) == (0, 0, [])
    assert first(dataset, 3, 0, skip=4)[0][:, 0].tolist() == [4, 5, 6]


def test_a_stream_in_mid_course_is_copied_where_it_stands() -> None:
    dataset = Counting()
    running = iter(dataset)
    assert [int(next(running)[0][0]) for _ in range(3)] == [0, 1, 2]
    first(dataset, 5, 0)
    assert [int(next(running)[0][0]) for _ in range(3)] == [3, 4, 5]


def test_a_short_stream_is_taken_whole_and_an_empty_one_refused() -> None:
    assert len(first(Counting(3), 10, 0)[0]) == 3
    for data in (Counting(0), DataLoader(Counting(0), 2), DataLoader(Counting(0), batch_size=None)):
        with pytest.raises(InputError, match=r"wanted samples from Counting, got none; pass probe="):
            first(data, 4, 0)
    with pytest.raises(InputError, match=r"got none after the first 3; pass probe="):
        first(Counting(3), 4, 0, skip=3)


def test_generators_stay_where_they_were_and_the_seed_decides() -> None:
    dataset = Shuffled()
    plain = list(Shuffled().order)
    before = (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())
    got = first(dataset, 6, 0)
    assert dataset.order == plain
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    fresh = Shuffled()
    assert torch.equal(dataset.torch.get_state(), fresh.torch.get_state())
    assert dataset.numpy.bit_generator.state == fresh.numpy.bit_generator.state
    assert dataset.python.getstate() == fresh.python.getstate()
    random.random(), np.random.rand(), torch.rand(1)
    torch.rand(1, generator=dataset.torch)
    assert torch.equal(first(dataset, 6, 0), got)
    assert not torch.equal(first(dataset, 6, 1), got)


@pytest.mark.parametrize("make", [lambda: iter([1.0, 2.0, 3.0]), lambda: itertools.count(1), lambda: iter(range(1, 9))])
def test_iterators_that_can_be_copied_are_not_used_up(make: Callable[[], Iterator[Any]]) -> None:
    dataset = Holding(make())
    assert first(dataset, 2, 0).tolist() == [[1.0], [2.0]]
    assert next(dataset.held) == 1


def _numbers() -> Iterator[int]:
    yield from range(9)


def _reading(source: Any) -> Callable[[Any], Iterator[Any]]:
    return lambda _: source


def test_what_cannot_be_copied_is_refused_by_name(tmp_path: Path) -> None:
    shared = iter([1, 2, 3])
    (tmp_path / "data").write_text("1\n2\n")
    with (tmp_path / "data").open() as file:
        cases: list[tuple[Any, str]] = [
            (Holding(_numbers()), "TypeError: cannot pickle 'generator' object"),
            (Holding(file), "cannot pickle"),
            (Holding(threading.Lock()), "TypeError: cannot pickle '_thread.lock' object"),
            (Holding(queue.Queue()), "cannot pickle"),
            (Holding(None, _reading(shared)), "a function in it reads from a list_iterator that the copy would share"),
            (Holding(None, _reading(np.random.default_rng(0))), r"reads from a Generator that the copy would share"),
        ]
        for dataset, reason in cases:
            with pytest.raises(InputError, match=rf"samples of Holding can only be read from a copy.*{reason}.*; pass"):
                first(dataset, 2, 0)
        assert file.read() == "1\n2\n"
    assert list(shared) == [1, 2, 3]


def test_what_a_partial_holds_is_copied_with_it() -> None:
    shared = iter([1, 2, 3])
    dataset = Holding(None, partial(lambda source, _: source, shared))
    assert first(dataset, 2, 0).tolist() == [[1.0], [2.0]]
    assert next(shared) == 1


def test_a_set_that_claims_to_be_its_own_copy_is_refused() -> None:
    class Single(Counting):
        def __deepcopy__(self, memo: Any) -> "Single":
            return self

    with pytest.raises(InputError, match=r"its copy is the object itself"):
        first(Single(), 2, 0)


def test_large_sets_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BYTES", 1000)
    with pytest.raises(InputError, match=r"holds more than 100,000 objects or 0 MiB"):
        separate(Holding({"a": [torch.ones(200)], "b": (np.ones(60),)}))
    separate(Holding(torch.ones(200)))
    monkeypatch.setattr(streams, "_OBJECTS", 50)
    with pytest.raises(InputError, match=r"holds more than 50 objects"):
        separate(Holding([str(i) for i in range(60)]))


def test_whole_batches_are_joined_until_there_are_enough() -> None:
    class Batches(IterableDataset[Any]):
        def __init__(self, lengths: list[int]) -> None:
            self.lengths = lengths

        def __iter__(self) -> Iterator[Any]:
            for i, length in enumerate(self.lengths):
                yield {"ids": np.full((3, length), i), "labels": torch.arange(3)}

    got = first(DataLoader(Batches([2] * 9), batch_size=None), 7, 0)
    assert got["ids"][:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert got["labels"].tolist() == [0, 1, 2] * 3
    # The third batch is padded to another length.
    assert first(DataLoader(Batches([2, 2, 5]), batch_size=None), 9, 0)["ids"].shape == (6, 2)
    rest = first(DataLoader(Batches([2] * 9), batch_size=None), 4, 0, skip=4)
    assert rest["ids"][:, 0].tolist() == [1, 1, 2, 2, 2]
    assert rest["labels"].tolist()[:2] == [1, 2]


def test_a_loader_that_looks_up_whole_batches_keeps_its_order() -> None:
    table = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))
    generator = torch.Generator().manual_seed(0)
    sampler = BatchSampler(RandomSampler(table, generator=generator), 4, drop_last=False)
    loader = DataLoader(table, batch_size=None, sampler=sampler)
    state = generator.get_state()
    x, y = first(loader, 10, 0)
    assert x.shape == (12, 1)
    assert len(set(y.tolist())) == 12
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(x[:, 0], y.float())


def test_probes_of_streams_say_where_they_come_from() -> None:
    probe = Probe.of(DataLoader(Counting(), 2), 5)
    assert probe.samples == 5
    assert probe.indices == ()
    assert probe.source == (
        "the first 5 samples of a copy of Counting, in its own order; shuffling and augmentation frozen at this draw, "
        "seed 0"
    )
    assert Probe.of(Counting(), 5).hash == probe.hash
    # Words are no targets for a kernel; the samples are still worth having.
    words = Probe.of(DataLoader(Counting(), 2, collate_fn=lambda items: (torch.stack([x for x, _ in items]), "ab")), 4)
    assert words.targets is None
    assert words.source.endswith("seed 0; targets left out, as they are no tensors with one row per sample")


def test_what_drives_forecasts_follows_the_probe_in_the_stream() -> None:
    data = DataLoader(Counting(), 2)
    probe = Probe.of(data, 5)
    others = beside(data, probe, 10, 1)
    assert others is not None
    assert sorted(others.inputs[:, 0].tolist()) == list(range(5, 15))
    assert beside(DataLoader(Counting(5), 2), probe, 10, 1) is None
    assert population_of(data) is None
