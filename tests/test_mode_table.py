"""The table of modes says what a loop over one mode at a time says."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ntk_monitor.history import History
from ntk_monitor.mode_table import MOST, mode_table
from ntk_monitor.snapshot import Snapshot
from tests.histories import HEALTHY
from tests.snapshots import broken, snapshot, training, without_modes


def _column(table: object, name: str) -> list[object]:
    names = [column.name for column in table.columns]  # type: ignore[attr-defined]
    return [row[names.index(name)] for row in table.rows]  # type: ignore[attr-defined]


def test_every_row_is_what_one_mode_says() -> None:
    run = training(6, 2, probes=3, every=10)
    before, shown = run[1], run[2]
    table = mode_table(shown, before, History(tuple(run)))
    assert _column(table, "mode") == list(range(1, 13))
    for i, row in enumerate(table.rows):
        found = dict(zip((column.name for column in table.columns), row, strict=True))
        assert found["rate"] == pytest.approx(shown.rates[i], rel=1e-5)
        assert found["energy"] == pytest.approx(shown.coordinates[i] ** 2 / (shown.coordinates**2).sum(), rel=1e-5)
        start, end = float(before.coordinates[i]), float(shown.carried[i])
        decay = -math.log(abs(end / start)) / 10 if start and end else None
        assert found["measured decay"] == (None if decay is None else pytest.approx(decay, rel=1e-4, abs=1e-6))
        steps = float(shown.time_to_learn[i])
        if math.isinf(steps):
            assert (found["time to learn"], found["half-life"], found["predicted decay"]) == ("inf", "inf", 0.0)
        else:
            # A residual that falls by this factor a step is a half after the half-life, its energy a tenth after all.
            factor = math.exp(-float(str(found["predicted decay"])))
            assert factor**steps == pytest.approx(0.1**0.5, rel=1e-4)
            assert factor ** float(str(found["half-life"])) == pytest.approx(0.5, rel=1e-4)


def test_a_probe_without_a_simulation_takes_the_last_one_of_the_same_samples() -> None:
    run = list(HEALTHY[:4])
    run[3] = replace(run[3], time_to_learn=np.empty(0))
    run[2] = replace(run[2], probe="another")
    table = mode_table(run[3], run[2], History(tuple(run)))
    assert _column(table, "time to learn") == pytest.approx(run[1].time_to_learn.tolist(), rel=1e-5)
    assert f"Simulated at step {run[1].step}" in table.note
    assert all("slower" in str(band) or "fastest" in str(band) for band in _column(table, "band"))
    alone = mode_table(run[3])
    assert set(_column(alone, "time to learn")) == {None}
    assert "half-lives are not known" in alone.note


def test_a_simulation_to_come_is_not_looked_at() -> None:
    run = [replace(HEALTHY[0], time_to_learn=np.empty(0)), *HEALTHY[1:3]]
    assert set(_column(mode_table(run[0], None, History(tuple(run))), "half-life")) == {None}


def test_decay_is_measured_only_in_the_basis_of_the_probe_before() -> None:
    first, second, third = training(4, 2, probes=3)
    assert set(_column(mode_table(third, first), "measured decay")) == {None}
    assert None not in _column(mode_table(third, second), "measured decay")


def test_bands_are_by_time_to_learn_where_it_was_simulated() -> None:
    bands = _column(mode_table(HEALTHY[0]), "band")
    assert bands[0] == "within a tenth of the remaining steps"
    assert bands[-1] == "within the remaining steps"


def test_without_modes_there_are_eigenvalues_and_the_reason() -> None:
    table = mode_table(without_modes(snapshot(3, 2), "no loss was given"))
    assert [column.name for column in table.columns] == ["mode", "eigenvalue", "share"]
    assert sum(float(str(share)) for share in _column(table, "share")) == pytest.approx(1, rel=1e-4)
    assert "no loss was given" in table.note


@pytest.mark.parametrize("probe", [Snapshot(step=3, wall_time=0.0), broken(snapshot(3, 2)), broken(HEALTHY[2])])
def test_a_probe_without_numbers_has_none(probe: Snapshot) -> None:
    table = mode_table(probe, probe, History((probe,)))
    assert not any(isinstance(cell, float) and not math.isfinite(cell) for row in table.rows for cell in row)


def test_the_table_is_bounded() -> None:
    rates = np.geomspace(1, 1e-3, 2 * MOST)
    many = replace(HEALTHY[0], rates=rates, coordinates=np.sqrt(rates), time_to_learn=1 / rates)
    table = mode_table(many)
    assert len(table.rows) == MOST
    assert f"{MOST} slower modes are not listed" in table.note
