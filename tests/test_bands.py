"""Bands partition the modes, whatever the rates, and their energies sum to one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_monitor.bands import (
    NAMES,
    REACH,
    band_energy,
    bands,
    reach,
    reach_energy,
    readable,
    remaining_steps,
    residual_out_of_reach,
)
from tests import twins_modes
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


TIMES = st.lists(st.one_of(st.floats(0, 1e4), st.sampled_from([0.0, 10.0, 100.0, float("inf")])), max_size=20)


@given(TIMES, FLOORS, st.sampled_from([1.0, 100.0, 2e3]))
def test_bands_by_time_partition_the_modes(times: list[float], floor: float, remaining: float) -> None:
    rates = np.geomspace(1, 1e-14, len(times))
    masks = reach(rates, floor, np.array(times), remaining)
    assert tuple(masks) == REACH
    assert np.array_equal(np.sum(list(masks.values()), axis=0), np.ones(len(times)))


def test_known_times() -> None:
    rates = np.array([3.0, 2.0, 1.0, 0.5, 1e-9, float("nan")])
    times = np.array([10.0, 10.5, 100.0, 100.5, 1.0, 1.0])
    masks = reach(rates, 1e-6, times, 100)
    assert [name for i in range(6) for name in REACH if masks[name][i]] == [
        *(REACH[0], REACH[1], REACH[1], REACH[2]),
        *(REACH[3], REACH[3]),
    ]


def test_energy_by_time_sums_to_one_and_decades_stay() -> None:
    taken = training(5, 3, probes=2)[1]
    times = np.linspace(1, 400, taken.rates.size)
    forecast = replace(taken, time_to_learn=times, facts={"total_steps": 240.0})
    assert remaining_steps(forecast) == 200
    energy = reach_energy(forecast)
    assert tuple(energy) == REACH
    assert sum(energy.values()) == pytest.approx(1, abs=1e-12)
    late = forecast.residual_energy[(times > 200) & (taken.rates > taken.rates_floor)].sum()
    assert energy["out of reach"] == pytest.approx(late, abs=1e-15)
    assert band_energy(forecast) == band_energy(taken)


def test_without_a_forecast_there_is_no_band_by_time() -> None:
    taken = replace(training(5, 3, probes=2)[1], time_to_learn=np.empty(0), facts={})
    times = np.ones(taken.rates.size)
    assert reach_energy(taken) == {}
    assert reach_energy(replace(taken, time_to_learn=times)) == {}
    # The run is over, or longer than it was planned to be.
    assert reach_energy(replace(taken, time_to_learn=times, facts={"total_steps": 40.0})) == {}
    assert reach_energy(replace(taken, time_to_learn=times, facts={"total_steps": 30.0})) == {}
    assert np.isnan(remaining_steps(taken))
    whole = replace(taken, time_to_learn=np.where(np.arange(15) == 3, np.nan, times), facts={"total_steps": 99.0})
    assert reach_energy(whole) == {}
    assert reach_energy(skipped()) == reach_energy(without_modes(taken)) == reach_energy(broken(taken)) == {}


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 200)), min_size=1, max_size=20), st.floats(1, 200))
def test_the_residual_out_of_reach_is_its_late_share(modes: list[tuple[float, float]], remaining: float) -> None:
    energy, times = [value for value, _ in modes], [time for _, time in modes]
    found = residual_out_of_reach(np.array(energy), np.array(times), remaining)
    assert found == pytest.approx(twins_modes.out_of_reach(energy, times, remaining), abs=1e-12)
    assert 0 <= found <= 1


def test_what_no_step_moves_is_out_of_reach() -> None:
    assert residual_out_of_reach(np.array([3.0, 1.0]), np.array([5.0, np.inf]), 10) == 0.25


@pytest.mark.parametrize(
    ("energy", "times", "remaining"),
    [
        ([], [], 10.0),
        ([1.0], [], 10.0),
        ([1.0], [5.0], 0.0),
        ([1.0], [5.0], float("nan")),
        ([0.0], [5.0], 10.0),
        ([float("nan")], [5.0], 10.0),
        ([1.0], [float("nan")], 10.0),
    ],
)
def test_nothing_is_said_where_nothing_is_known(energy: list[float], times: list[float], remaining: float) -> None:
    assert np.isnan(residual_out_of_reach(np.array(energy), np.array(times), remaining))


def test_a_quarter_of_the_rows_is_readable() -> None:
    assert [readable(64), readable(64, 10), readable(3)] == [16, 160, 1]
