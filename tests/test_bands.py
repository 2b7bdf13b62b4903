"""Bands partition the modes, whatever the rates, and their energies sum to one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_monitor.bands import NAMES, band_energy, bands
from tests.snapshots import broken, skipped, snapshot, training, without_modes

RATES = st.lists(
    st.one_of(
        st.floats(-1e-3, 1e12, allow_subnormal=False),
        st.sampled_from([0.0, 1.0, 10.0, 1e-6, float("nan"), float("inf")]),
    ),
    max_size=30,
)
FLOORS = st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e15, -1.0, float("nan")])


@given(RATES, FLOORS)
def test_masks_partition_the_modes(rates: list[float], floor: float) -> None:
    split = bands(np.array(rates), floor)
    assert tuple(band.name for band in split) == NAMES
    assert np.array_equal(np.sum([band.mask for band in split], axis=0), np.ones(len(rates)))


@given(RATES, FLOORS)
def test_members_lie_within_the_limits_of_their_band(rates: list[float], floor: float) -> None:
    values = np.array(rates)
    for band in bands(values, floor)[:-1]:
        assert np.all(values[band.mask] <= band.fastest)
        assert np.all(values[band.mask] > band.slowest)


@given(RATES, FLOORS, st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**30]))
def test_a_common_factor_changes_nothing(rates: list[float], floor: float, factor: float) -> None:
    # Powers of two scale without rounding, so equality is exact.
    before, after = bands(np.array(rates), floor), bands(factor * np.array(rates), factor * floor)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.mask, other.mask)


def test_known_decades() -> None:
    rates = np.array([100.0, 50.0, 10.0, 5.0, 0.5, 1e-5, 1e-9, 0.0, -1e-9])
    found = [next(band.name for band in bands(rates, 1e-8) if band.mask[i]) for i in range(rates.size)]
    fastest, ten, hundred = NAMES[:3]
    assert found == [fastest, fastest, ten, ten, hundred, NAMES[6], NAMES[7], NAMES[7], NAMES[7]]


def test_everything_under_the_floor_is_unresolved() -> None:
    split = bands(np.array([1e-9, 0.0, -1e-9]), 1e-6)
    assert split[-1].mask.all()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 3), (1, 4)])
def test_energy_sums_to_one(size: tuple[int, int], loss: str) -> None:
    for taken in training(*size, probes=3, loss=loss):
        energy = band_energy(taken)
        assert tuple(energy) == NAMES
        assert sum(energy.values()) == pytest.approx(1, abs=1e-12)


def test_null_directions_of_cross_entropy_hold_no_energy() -> None:
    taken = snapshot(samples=10, outputs=4)
    unresolved = bands(taken.rates, taken.rates_floor)[-1]
    # Shifting all logits of a sample together does not move softmax: one null direction per sample.
    assert unresolved.mask.sum() >= 10
    assert band_energy(taken)[unresolved.name] < 1e-12


def test_a_residual_of_exactly_zero_has_no_energy_anywhere() -> None:
    taken = snapshot(2, 1)
    assert set(band_energy(replace(taken, coordinates=np.zeros(2))).values()) == {0.0}


def test_no_modes_no_energy() -> None:
    assert band_energy(without_modes(snapshot())) == {}
    assert band_energy(skipped()) == {}
    assert band_energy(broken(snapshot())) == {}
