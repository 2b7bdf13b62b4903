"""How far a kernel turned: against projectors written out, and against rotations whose angle is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from ntk_monitor.compare import centred, spectrum_distance, turn
from ntk_monitor.errors import InputError


def kernel(values: np.ndarray, seed: int) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(values.size, values.size)))[0]
    return np.asarray((basis * values) @ basis.T)


def projector(matrix: np.ndarray, d: int) -> np.ndarray:
    """The sum of v vᵀ over the d leading eigenvectors, one by one."""
    values, vectors = np.linalg.eigh(matrix)
    total = np.zeros_like(matrix)
    for i in np.argsort(values)[::-1][:d]:
        total += np.outer(vectors[:, i], vectors[:, i])
    return total


@given(st.integers(2, 12), st.integers(0, 2**16))
def test_overlap_angle_and_drift_are_those_of_the_projectors(n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a = kernel(np.sort(generator.gamma(0.5, size=n) + 0.01)[::-1], seed)
    b = kernel(np.sort(generator.gamma(0.5, size=n) + 0.01)[::-1], seed + 1)
    found = turn(a, b)
    d = found.dimension
    assert found.overlap == pytest.approx(np.trace(projector(a, d) @ projector(b, d)) / d, abs=1e-8)
    left, right = (np.linalg.eigh(one)[1][:, ::-1][:, :d] for one in (a, b))
    # arccos of a cosine near 1 resolves the angle to sqrt(eps).
    assert found.angle == pytest.approx(np.degrees(subspace_angles(left, right)[0]), abs=1e-5)
    assert found.drift == pytest.approx(1 - (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert found.chance == d / n
    assert 0 <= found.found <= found.looked


@pytest.mark.parametrize("degrees", [0.0, 7.0, 40.0, 90.0])
def test_a_known_rotation_out_of_the_space_is_measured(degrees: float) -> None:
    # Three modes hold 99 % of the trace; the third turns out of their space.
    a = np.diag([50.0, 30.0, 19.0, 0.5, 0.3, 0.2])
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.eye(6)
    rotation[np.ix_([2, 3], [2, 3])] = [[c, -s], [s, c]]
    found = turn(a, rotation @ a @ rotation.T)
    assert found.dimension == 3
    assert found.angle == pytest.approx(degrees, abs=1e-5)
    assert found.overlap == pytest.approx((2 + c**2) / 3)


def test_turning_inside_the_space_and_growth_are_no_rotation() -> None:
    a = np.diag([5.0, 5.0, 5.0, 0.1, 0.1, 0.1])
    rotation = np.eye(6)
    rotation[:3, :3] = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    found = turn(a, 7 * rotation @ a @ rotation.T)
    assert found.dimension == 3
    assert found.overlap == pytest.approx(1.0)
    assert found.drift == pytest.approx(0.0, abs=1e-12)


def test_the_cut_lies_behind_the_widest_gap_of_both() -> None:
    a = np.diag([60.0, 50.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert turn(a, a).dimension == 2
    # Eight times and six times: wide in one of them is not enough.
    b = np.diag([64.0, 8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert turn(b, b).dimension in (1, 3)
    assert turn(a, b).dimension == 1
    assert turn(np.diag([9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0]), b).dimension == 3


def test_centring_takes_out_what_all_samples_share() -> None:
    a, b = kernel(np.array([4.0, 2.0, 1.0, 0.1]), 0), kernel(np.array([3.0, 2.0, 1.0, 0.2]), 1)
    middle = np.eye(4) - np.full((4, 4), 0.25)
    np.testing.assert_allclose(centred(a), middle @ a @ middle, atol=1e-12)
    shared, alone = turn(centred(a + 1000), centred(b + 2000)), turn(centred(a), centred(b))
    assert shared.drift == pytest.approx(alone.drift, abs=1e-9)
    assert shared.overlap == pytest.approx(alone.overlap, abs=1e-9)
    # Not centred, the constant vector is all there is to see.
    assert turn(a + 1000, b + 2000).drift < 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_the_smallest_kernels(shape: tuple[int, int]) -> None:
    found = turn(np.eye(*shape) + 1, np.eye(*shape) + 1)
    assert found.dimension == 1
    assert found.overlap == pytest.approx(1.0)


@pytest.mark.parametrize(
    "pair",
    [
        (np.eye(3), np.eye(4)),
        (np.ones((2, 3)), np.ones((2, 3))),
        (np.zeros((3, 3)), np.eye(3)),
        (np.eye(3), np.full((3, 3), np.nan)),
    ],
)
def test_what_has_no_eigenspaces_is_refused(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(InputError):
        turn(*pair)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=8), st.floats(0.1, 10), st.integers(0, 999))
def test_distance_of_spectra_is_a_distance_blind_to_growth(values: list[float], factor: float, seed: int) -> None:
    p = np.array(values)
    q = np.random.default_rng(seed).gamma(1.0, size=p.size) + 0.01
    distance = spectrum_distance(p, q)
    assert distance == pytest.approx(spectrum_distance(q, p))
    assert distance == pytest.approx(spectrum_distance(factor * p, q))
    assert spectrum_distance(p, factor * p) == pytest.approx(0.0, abs=1e-12)
    assert 0 <= distance <= 1
    slow = 0.0
    for ours, theirs in zip(sorted(p / p.sum()), sorted(q / q.sum()), strict=True):
        slow += max(ours - theirs, 0.0)
    assert distance == pytest.approx(slow)


def test_spectra_of_different_length_and_of_nothing() -> None:
    with pytest.raises(InputError):
        spectrum_distance(np.ones(3), np.ones(4))
    assert np.isnan(spectrum_distance(np.zeros(3), np.ones(3)))
