"""Modes are found again, as blocks where they are degenerate, and said to be lost where they are not."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ntk_monitor.clusters import SPREAD, matched, rotation
from ntk_monitor.errors import InputError
from tests import twins_modes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Eigen:
    rates: Array
    vectors: Array
    floor: float


def solved(matrix: Array) -> Eigen:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return Eigen(values[::-1].copy(), vectors[:, ::-1].copy(), len(matrix) * 2.2e-16 * float(np.abs(values).max()))


def orthogonal(n: int, generator: np.random.Generator) -> Array:
    return np.asarray(np.linalg.qr(generator.normal(size=(n, n)))[0])


def noise(n: int, generator: np.random.Generator) -> Array:
    """Symmetric, of norm 1."""
    e = generator.normal(size=(n, n))
    return np.asarray((e + e.T) / np.linalg.norm(e + e.T, 2))


def made(values: NDArray[np.floating[Any]], seed: int = 0) -> Array:
    q = orthogonal(len(values), np.random.default_rng(seed))
    return np.asarray((q * values) @ q.T)


def test_a_multiple_eigenvalue_is_one_block_whatever_rounding_does() -> None:
    # One eigenvalue of five, between two single ones; a perturbation of 1e-13 turns its vectors anywhere.
    matrix = made(np.array([9.0, 4, 4, 4, 4, 4, 1, 0.5, 0.1, 0.05]))
    before = solved(matrix)
    after = solved(matrix + 1e-13 * noise(10, np.random.default_rng(1)))
    singles = np.square(before.vectors[:, 1:6].T @ after.vectors[:, 1:6]).max(axis=1)
    assert singles.min() < 0.9
    found = matched(before, after, count=8)
    assert [block.before.tolist() for block in found.blocks] == [[0], [1, 2, 3, 4, 5], [6], [7]]
    assert found.lost.size == 0
    assert min(block.overlap for block in found.blocks) == pytest.approx(1, abs=1e-12)
    assert max(block.bound for block in found.blocks) < 1e-11


def test_equal_kernels_do_not_make_degenerate_modes_individuals() -> None:
    # The same matrix gives the same vectors, but which ones is an accident of rounding.
    before = solved(made(np.array([4.0, 4, 4, 1, 0.1])))
    found = matched(before, before, count=5)
    assert [block.before.size for block in found.blocks] == [3, 1, 1]


@given(st.integers(4, 12), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_growth_alone_turns_nothing(n: int, factor: float, seed: int) -> None:
    matrix = made(0.7 ** np.arange(n), seed)
    found = matched(solved(matrix), solved(factor * matrix), count=n)
    assert [block.before.tolist() for block in found.blocks] == [[i] for i in range(n)]
    assert max(block.bound for block in found.blocks) < 1e-9


def test_crossing_eigenvalues_keep_their_modes() -> None:
    vectors = orthogonal(6, np.random.default_rng(0))
    before = solved((vectors * np.array([6.0, 5, 3, 2, 1, 0.5])) @ vectors.T)
    after = solved((vectors * np.array([2.5, 5, 3, 4, 1, 0.5])) @ vectors.T)
    found = matched(before, after, count=6)
    assert [block.after.tolist() for block in found.blocks] == [[3], [0], [2], [1], [4], [5]]


def test_no_chain_of_close_neighbours_is_merged() -> None:
    # Neighbours 4 % apart: any rule that links those closer than 5 % makes one block of forty.
    matrix = made(0.96 ** np.arange(40))
    found = matched(solved(matrix), solved(matrix + 2e-3 * noise(40, np.random.default_rng(1))), count=20)
    assert max(block.before.size for block in found.blocks) <= 3
    assert found.lost.size <= 2


def test_unrelated_kernels_share_no_modes() -> None:
    lost = [
        matched(solved(made(0.9 ** np.arange(40), 2 * i)), solved(made(0.9 ** np.arange(40), 2 * i + 1)), count=20)
        for i in range(5)
    ]
    assert all(not found.blocks and found.lost.tolist() == list(range(20)) for found in lost)


@settings(max_examples=60)
@given(st.integers(3, 7), st.sampled_from([1e-4, 0.03, 0.1, 0.3]), st.integers(0, 999))
def test_the_best_cut_is_found(n: int, size: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Rounded, so that equal eigenvalues are common.
    matrix = made(np.sort(np.round(generator.uniform(0.5, 3, n), 1))[::-1], seed)
    before, after = solved(matrix), solved(matrix + size * noise(n, generator))
    found = matched(before, after, count=n)
    modes, blocks, total = twins_modes.best_cut(before, after, n, 0.9, SPREAD)
    assert sum(block.before.size for block in found.blocks) == modes
    assert len(found.blocks) == blocks
    assert sum(block.overlap for block in found.blocks) == pytest.approx(total, abs=1e-9)
    for block in found.blocks:
        v0, v1 = before.vectors[:, block.before], after.vectors[:, block.after]
        assert block.overlap == pytest.approx(twins_modes.overlap(v0, v1), abs=1e-12)
        np.testing.assert_allclose(block.turn @ block.turn.T, np.eye(len(block.turn)), atol=1e-12)
    every = [*found.lost, *(i for block in found.blocks for i in block.before)]
    assert sorted(every) == list(range(n))
    taken = [i for block in found.blocks for i in block.after]
    assert len(set(taken)) == len(taken)


@settings(max_examples=60)
@given(st.integers(3, 10), st.sampled_from([1e-6, 1e-3, 0.02, 0.1]), st.integers(0, 999))
def test_the_angle_obeys_the_bound(n: int, size: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = made(np.sort(generator.uniform(0.1, 3, n))[::-1], seed)
    before, after = solved(matrix), solved(matrix + size * noise(n, generator))
    for block in matched(before, after, count=n).blocks:
        measured = twins_modes.sine(before.vectors[:, block.before], after.vectors[:, block.after])
        assert measured <= block.bound + 1e-9


def test_the_bound_is_no_worse_than_a_factor_of_two_on_a_small_turn() -> None:
    matrix = np.diag([3.0, 2.0, 1.0])
    turned = matrix + 1e-3 * np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0.0]])
    block = matched(solved(matrix), solved(turned), count=3).blocks[0]
    measured = twins_modes.sine(solved(matrix).vectors[:, :1], solved(turned).vectors[:, :1])
    assert measured <= block.bound < 1.1 * measured


def test_modes_below_the_floor_are_not_looked_at() -> None:
    matrix = made(np.array([3.0, 1, 0, 0, 0, 0]))
    found = matched(solved(matrix), solved(matrix), count=6)
    assert found.count == 2
    assert len(found.blocks) == 2


def test_a_quarter_of_the_modes_by_default_and_probes_of_one_size() -> None:
    basis = solved(made(0.9 ** np.arange(20)))
    assert matched(basis, basis).count == 5
    with pytest.raises(InputError, match="same rows, got 20 and 6"):
        matched(basis, solved(made(np.arange(6.0) + 1)))


@settings(max_examples=40)
@given(st.integers(3, 12), st.sampled_from([0.0, 1e-3, 0.1, 1.0]), st.integers(0, 999))
def test_energies_sum_to_the_squared_residual_in_every_basis(n: int, size: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = made(np.round(np.sort(generator.uniform(0.5, 3, n))[::-1], 1), seed)
    before, after = solved(matrix), solved(matrix + size * noise(n, generator))
    u = generator.normal(size=n)
    carried, own = before.vectors.T @ u, after.vectors.T @ u
    found = matched(before, after, count=n)
    lost = np.square(carried[found.lost]).sum()
    assert found.energies(carried).sum() + lost == pytest.approx(u @ u, rel=1e-12)
    turn = rotation(found, own, carried)
    assert turn.kept + turn.unmatched == pytest.approx(1, abs=1e-12)
    assert 0 <= turn.turned <= 4 * turn.kept + 1e-12


def test_turning_within_a_block_is_no_rotation() -> None:
    matrix = made(np.array([9.0, 4, 4, 4, 1]))
    before, after = solved(matrix), solved(matrix + 1e-13 * noise(5, np.random.default_rng(1)))
    u = np.random.default_rng(2).normal(size=5)
    own, carried = after.vectors.T @ u, before.vectors.T @ u
    turn = rotation(matched(before, after, count=5), own, carried)
    assert turn.turned < 1e-20
    assert turn.kept == pytest.approx(1)
    # Mode by mode, the same residual seems to move.
    assert np.square(np.abs(own) - np.abs(carried)).sum() > 1e-3


@pytest.mark.parametrize("angle", [0.05, 0.2])
def test_a_planted_turn_is_measured(angle: float) -> None:
    cos, sin = np.cos(angle), np.sin(angle)
    q = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])
    values = np.array([3.0, 1.0, 0.2])
    before, after = solved(np.diag(values)), solved((q * values) @ q.T)
    u = np.array([1.0, 0, 0])
    turn = rotation(matched(before, after, count=3), after.vectors.T @ u, before.vectors.T @ u)
    assert turn.turned == pytest.approx((1 - cos) ** 2 + sin**2, rel=1e-9)


def test_no_residual_no_rotation() -> None:
    basis = solved(made(np.array([3.0, 1.0])))
    assert np.isnan(rotation(matched(basis, basis, count=2), np.zeros(2), np.zeros(2)).turned)


def linked(rates: Array, change: float, count: int) -> int:
    """Clusters among the leading modes by the rule that does not work: link neighbours closer than 5 % or 2 |dM|."""
    gaps = (rates[: count - 1] - rates[1:count]) / rates[: count - 1]
    return 1 + int((gaps >= np.maximum(0.05, 2 * change / rates[: count - 1])).sum())


@pytest.mark.slow
@pytest.mark.parametrize("squares", [True, False], ids=["squares", "cross-entropy"])
def test_ordinary_training_does_not_melt_the_modes_into_one(squares: bool) -> None:
    torch = pytest.importorskip("torch")
    from sklearn.datasets import load_digits

    from ntk_monitor.kernel import empirical_ntk
    from ntk_monitor.losses import cross_entropy, mse
    from ntk_monitor.modes import Modes

    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images, loss = (images / 16).double(), mse() if squares else cross_entropy()
    targets = torch.nn.functional.one_hot(labels, 10).double() if squares else labels
    sizes: list[list[int]] = []
    chains: list[int] = []
    for activation in (torch.nn.ReLU, torch.nn.Tanh):
        for adam in (False, True):
            torch.manual_seed(0)
            layers = [torch.nn.Linear(64, 64), activation(), torch.nn.Linear(64, 64), activation()]
            model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 10)).double()
            parameters = model.parameters()
            optimizer = torch.optim.AdamW(parameters, 1e-3) if adam else torch.optim.SGD(parameters, 0.1, 0.9)
            before = None
            for step in range(241):
                if step % 40 == 0:
                    kernel = empirical_ntk(model, images[:40]).numpy()
                    terms = loss.terms(model(images[:40]).detach(), targets[:40])
                    if before is not None:
                        after = Modes.of(kernel, before.terms)
                        found = matched(before, after, count=16)
                        sizes.append([block.before.size for block in found.blocks])
                        m0, m1 = ((one.vectors * one.rates) @ one.vectors.T for one in (before, after))
                        chains.append(linked(before.rates, float(np.linalg.norm(m1 - m0, 2)), 16))
                    before = Modes.of(kernel, terms)
                batch = torch.randint(100, len(images), (64,))
                optimizer.zero_grad()
                loss.function(model(images[batch]), targets[batch]).backward()
                optimizer.step()
    assert len(sizes) == 24
    # Ten outputs: at initialisation the leading mode is ten nearly equal ones. Nothing larger is ever needed.
    assert max(size for probe in sizes for size in probe) <= 10
    assert sum(len(probe) >= 3 for probe in sizes) >= 12
    assert sum(count <= 2 for count in chains) >= 20
