"""Probes are drawn in proportion, owned, stable, and at nobody's expense."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ntk_monitor.errors import InputError
from ntk_monitor.labels import cheap_labels, class_labels, stratified
from ntk_monitor.probe import Probe, default_samples, draw, from_batch, split


def data(n: int = 30) -> TensorDataset:
    return TensorDataset(torch.arange(2.0 * n).reshape(n, 2), torch.arange(n) % 3)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0),
    st.integers(1, 120),
    st.integers(0, 9),
)
def test_every_class_has_its_share_to_within_one(counts: list[int], samples: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 7 - 3, counts))
    chosen = stratified(labels, samples, seed)
    total = min(samples, len(labels))
    assert len(set(chosen)) == len(chosen) == total
    assert chosen == sorted(chosen)
    for position, count in enumerate(counts):
        got = int((labels[chosen] == position * 7 - 3).sum())
        exact = count * total / len(labels)
        assert got in {int(np.floor(exact + 1e-9)), int(np.ceil(exact - 1e-9))}


def test_largest_remainders_get_what_is_left() -> None:
    labels = np.repeat([0, 1, 2], [45, 35, 20])  # 10 of 100: 4.5, 3.5, 2.0; the tie goes to the first
    chosen = labels[stratified(labels, 10, 0)]
    assert [(chosen == c).sum() for c in range(3)] == [5, 3, 2]
    labels = np.repeat([0, 1, 2], [61, 30, 9])  # 6.1, 3.0, 0.9
    chosen = labels[stratified(labels, 10, 0)]
    assert [(chosen == c).sum() for c in range(3)] == [6, 3, 1]


def test_seeds_draw_other_samples() -> None:
    labels = np.arange(100) % 2
    assert stratified(labels, 10, 0) == stratified(labels, 10, 0)
    assert stratified(labels, 10, 0) != stratified(labels, 10, 1)


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (torch.tensor([0, 1, 0, 1]), True),
        (torch.tensor([[0], [1], [0], [1]]), True),
        (torch.tensor([True, False, False]), False),  # two of three distinct: too few to tell
        (torch.tensor([True, False, False, True]), True),
        (torch.tensor([5]), True),
        (torch.tensor([23, 41, 67, 35, 58, 29]), False),  # ages
        (torch.tensor([0, 3, 1, 7, 12, 5, 2, 2]), False),  # counts
        (torch.randint(50, (4, 9)), False),  # tokens
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), True),  # what binary cross-entropy wants
        (torch.tensor([0.0, 1.0, 0.5, 1.0]), False),
        (torch.tensor([0j, 1j, 0j, 1j]), False),
        (torch.tensor(3), False),
    ],
)
def test_classes_are_told_from_numbers(targets: Tensor, classes: bool) -> None:
    labels = class_labels(targets)
    assert (labels is not None) == classes
    if labels is not None:
        np.testing.assert_array_equal(labels, targets.reshape(-1).numpy())


class Images(Dataset[Any]):
    """As torchvision's: labels at hand, samples on demand, augmentation from every kind of generator."""

    def __init__(self, labels: Any, name: str = "targets") -> None:
        setattr(self, name, labels)
        self.labels_of = labels
        self.torch = torch.Generator().manual_seed(5)
        self.transform = [Jitter()]
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.labels_of)

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        x = torch.full((2,), float(index)) + torch.rand(2, generator=self.torch) / 10
        x = x + torch.rand(2) / 10 + random.random() / 10 + float(np.random.rand()) / 10
        return self.transform[0](x), int(self.labels_of[index])


class Jitter:
    def __init__(self) -> None:
        self.numpy = np.random.default_rng(6)

    def __call__(self, x: Tensor) -> Tensor:
        return x + float(self.numpy.random()) / 10


@pytest.mark.parametrize("name", ["targets", "labels", "y"])
@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_labels_are_read_without_loading_samples(name: str, kind: Any) -> None:
    labels = [0] * 20 + [1] * 10
    dataset = Images(kind(labels), name)
    np.testing.assert_array_equal(cheap_labels(dataset), labels)
    half = Subset(dataset, range(10, 30))
    np.testing.assert_array_equal(cheap_labels(half), labels[10:])
    np.testing.assert_array_equal(cheap_labels(Subset(half, [0, 19])), [0, 1])
    assert dataset.loaded == []
    probe = draw(half, 4)
    assert {index - 10 for index in dataset.loaded} == set(probe.indices)
    np.testing.assert_array_equal(probe.labels, [0, 0, 1, 1])
    assert "4 of 20 training samples, drawn stratified by class, seed 0" in probe.source


@pytest.mark.parametrize(
    "labels", [["cat"] * 4, [1, 2], [0.5] * 4, [[1, 2], [3, 4], [5, 6], [7, 8]], [[1], [2, 3], [4], [5]]]
)
def test_labels_of_another_kind_are_left_alone(labels: Any) -> None:
    dataset = Images([0] * 4)
    dataset.__dict__["targets"] = labels
    assert cheap_labels(dataset) is None


def test_sets_without_cheap_labels_are_drawn_at_random() -> None:
    plain = TensorDataset(torch.arange(30.0)[:, None])
    probe = draw(plain, 8, seed=3)
    assert probe.samples == 8
    assert probe.source == "8 of 30 training samples, drawn at random, seed 3"
    assert draw(plain, 8, seed=4).indices != probe.indices
    assert cheap_labels(ConcatDataset([data(), plain])) is None


def test_concatenated_sets_are_stratified_over_all_of_their_parts() -> None:
    parts = [data(30), Subset(data(60), range(30, 42))]
    both: ConcatDataset[Any] = ConcatDataset(parts)
    np.testing.assert_array_equal(cheap_labels(both), [int(both[i][1]) for i in range(42)])
    probe = draw(both, 14)
    assert probe.labels is not None
    np.testing.assert_array_equal(np.bincount(probe.labels), [5, 5, 4])  # 42 = 14 + 14 + 14: 14 / 3 each
    assert torch.equal(probe.inputs, torch.stack([both[i][0] for i in probe.indices]))


def test_drawing_leaves_every_generator_where_it_was() -> None:
    dataset = Images([0, 1] * 20)
    before = (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())
    own = dataset.torch.get_state(), dataset.transform[0].numpy.bit_generator.state
    for source in (dataset, Subset(dataset, range(20)), DataLoader(dataset, 4), DataLoader(dataset, 4, shuffle=True)):
        Probe.of(source, 6)
        assert random.getstate() == before[0]
        np.testing.assert_equal(np.random.get_state(legacy=False), before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        assert torch.equal(dataset.torch.get_state(), own[0])
        assert dataset.transform[0].numpy.bit_generator.state == own[1]


def test_the_same_seed_draws_the_same_probe_whatever_was_drawn_before() -> None:
    first = draw(Images([0, 1] * 20), 6)
    random.random(), np.random.rand(), torch.rand(1)
    again = draw(Images([0, 1] * 20), 6)
    assert again.hash == first.hash
    assert again.indices == first.indices
    assert draw(Images([0, 1] * 20), 6, seed=1).hash != first.hash


def test_a_set_that_is_too_small_is_taken_whole() -> None:
    assert draw(data(5), 64).indices == (0, 1, 2, 3, 4)


def test_samples_come_from_where_the_indices_say() -> None:
    probe = draw(data(), 9)
    x, y = data().tensors
    assert torch.equal(probe.inputs, x[list(probe.indices)])
    assert torch.equal(probe.targets, y[list(probe.indices)])
    assert probe.labels is not None
    np.testing.assert_array_equal(np.bincount(probe.labels), [3, 3, 3])


def test_a_loader_gives_its_collation_though_not_its_order() -> None:
    def collate(items: list[Any]) -> Any:
        return {"pixels": torch.stack([x for x, _ in items]), "label": torch.tensor([int(y) for _, y in items])}

    batches = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data()), 4, False)
    for loader in (
        DataLoader(data(), 4, collate_fn=collate),
        DataLoader(data(), batch_sampler=batches, collate_fn=collate),
    ):
        probe = Probe.of(loader, 6)
        assert list(probe.inputs) == ["pixels"]
        assert probe.samples == 6
        assert torch.equal(probe.inputs["pixels"], data().tensors[0][list(probe.indices)])


def test_batched_fetching_is_used_where_the_set_offers_it() -> None:
    class Batched(TensorDataset):
        asked: list[list[int]]

        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.asked.append(list(indices))
            return [self[i] for i in indices]

    dataset = Batched(*data().tensors)
    dataset.asked = []
    probe = draw(dataset, 4)
    assert probe.indices == tuple(dataset.asked[0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.ones(2), 0)])


def test_what_cannot_be_drawn_from_is_refused() -> None:
    for source in (Stream(), DataLoader(Stream(), 2)):
        with pytest.raises(InputError, match=r"drawn by index, got Stream; pass probe=\(inputs, targets\)"):
            draw(source, 4)
    with pytest.raises(InputError, match=r"wanted 4 samples, the dataset has 0; pass a non-empty one"):
        draw(TensorDataset(torch.ones(0, 2)), 4)
    with pytest.raises(InputError, match=r"wanted 0 samples, the dataset has 30"):
        draw(data(), 0)
    for odd in ("text", 3, (torch.ones(1), torch.ones(1), torch.ones(1))):
        with pytest.raises(InputError, match=r"probe must be an int, \(inputs, targets\), a Dataset, .* got"):
            Probe.of(odd, 4)


def test_what_users_have_becomes_a_probe() -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    given_probe = Probe(x, y)
    assert Probe.of(given_probe, 2) is given_probe
    for pair in ((x, y), [x, y]):
        assert Probe.of(pair, 1).hash == given_probe.hash
    assert Probe.of(x, 1).targets is None
    named = Probe.of({"x": x, "labels": y}, 1)
    assert list(named.inputs) == ["x"]
    assert torch.equal(named.targets, y)
    assert named.samples == 4
    assert Probe.of(({"a": x, "b": x}, y), 1).samples == 4


def test_probes_own_their_samples() -> None:
    x, y = torch.ones(2, 2), torch.zeros(2)
    probes = [Probe.of((x, y), 2), Probe.of(x, 2), from_batch((x, y), 2, "a batch"), Probe.of({"x": x, "y": y}, 2)]
    x.zero_()
    for probe in probes:
        inputs = probe.inputs["x"] if isinstance(probe.inputs, dict) else probe.inputs
        assert float(inputs.sum()) == 4


def test_inputs_and_targets_must_hold_the_same_samples() -> None:
    with pytest.raises(InputError, match=r"same samples, got 2 and 3"):
        Probe(torch.ones(2, 1), torch.ones(3))
    with pytest.raises(InputError, match=r"at least one sample, got 0"):
        Probe.of((torch.ones(0, 1), torch.ones(0)), 1)


def test_the_first_samples_of_a_batch() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    probe = from_batch((x, y), 3, "the first batch")
    assert torch.equal(probe.inputs, x[:3])
    assert torch.equal(probe.targets, y[:3])
    assert probe.source == "the first batch"
    assert from_batch([x], 30, "").samples == 10


def test_batches_are_taken_apart_only_where_it_is_obvious() -> None:
    x, y = torch.ones(2, 1), torch.zeros(2)
    assert split((x, y)) == (x, y)
    assert split([x]) == (x, None)
    assert split(x) == (x, None)
    for key in ("labels", "label", "targets", "target", "y"):
        assert split({"x": x, key: y}) == ({"x": x}, y)
    assert split({"x": x}) == ({"x": x}, None)
    with pytest.raises(
        InputError, match=r"batch of 3 elements has no obvious inputs and targets; pass probe=.* forward="
    ):
        split((x, y, y))


def test_the_default_size_falls_with_the_number_of_outputs() -> None:
    assert [default_samples(c) for c in (0, 1, 2, 10, 16, 1000)] == [512, 512, 512, 102, 64, 64]


def test_the_hash_is_that_of_the_contents() -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    assert Probe(x, y).hash == Probe(x.clone(), y.clone(), source="elsewhere").hash
    assert Probe(x, y).hash != Probe(x.flip(0), y).hash
    assert Probe(x, y).hash != Probe(x, 1 - y).hash
    assert Probe(x).hash != Probe(x, y).hash
    # A stored probe of an older version must still be recognised.
    assert Probe(torch.arange(4.0)[:, None], torch.tensor([0, 1, 0, 1])).hash == "5918776ab71e5173"
