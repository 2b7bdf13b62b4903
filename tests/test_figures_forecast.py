"""Forecasts in figures: from which probe they start, what is measured in their own terms, where they are doubted."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ntk_monitor import figures
from ntk_monitor.bands import REACH, reach, remaining_steps
from ntk_monitor.figures.abscissa import abscissa, recorded_rates, steps_per_epoch
from ntk_monitor.figures.launch import doubtful, launched
from ntk_monitor.snapshot import Snapshot
from tests.histories import EVERY, HEALTHY
from tests.snapshots import training


def _named(figure: figures.Figure, name: str) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if trace["name"].startswith(name)]


def _at(step: int, headroom: float = 10.0) -> Snapshot:
    return Snapshot(step=step, wall_time=0.0, metrics={"lr_headroom_high": headroom})


LAUNCH = replace(_at(0), forecast_steps=np.array([1, 100]))


@pytest.mark.parametrize(
    ("found", "said", "expected"),
    [
        ([0.5, 0.25, 0.12], [1.0, 0.1], []),
        # It says that nothing happens, which is what forecasting no change says.
        ([0.5, 0.25, 0.12], [1.0, 1.0], [(0, 60)]),
        # It says much more than happens: 0.01 beside 0.5 is a larger ratio than 1 beside 0.5.
        ([0.9, 0.8, 0.7], [0.01, 0.01], [(0, 60)]),
        # Wrong at the second probe alone: from the one before.
        ([0.6, 1.5, 0.3], [1.0, 0.1], [(20, 40)]),
        # Hardly anything changed: nothing to judge by.
        ([1.001, 0.999, 1.0], [1.0, 0.9], []),
    ],
)
def test_a_forecast_is_doubted_where_no_change_says_as_much(
    found: list[float], said: list[float], expected: list[tuple[int, int]]
) -> None:
    after = [_at(20), _at(40), _at(60)]
    assert doubtful(after, np.array(found), LAUNCH, np.array(said), 1.0) == expected


def test_above_the_bound_a_forecast_is_doubted_whatever_it_says() -> None:
    after = [_at(20), _at(40, headroom=0.9), _at(60)]
    assert doubtful(after, np.array([0.5, 0.4, 0.3]), LAUNCH, np.array([1.0, 0.1]), 1.0) == [(20, 40)]


def test_behind_the_end_of_a_forecast_there_is_nothing_to_doubt() -> None:
    assert doubtful([_at(200)], np.array([5.0]), LAUNCH, np.array([1.0, 0.1]), 1.0) == []
    assert doubtful([], np.array([]), LAUNCH, np.array([1.0, 0.1]), 1.0) == []


def test_the_launch_is_the_last_one_that_can_be_judged() -> None:
    bare = {"forecast_steps": np.empty(0)}
    run = [replace(one, **({} if k in (0, 4, 11) else bare)) for k, one in enumerate(HEALTHY)]  # type: ignore[arg-type]
    assert launched(run) is run[4]
    assert launched(run[:1]) is run[0]
    assert launched(run, 10**6) is run[11]
    assert launched(run, 3 * EVERY) is run[4]
    assert launched(run[1:4]) is None


@pytest.mark.parametrize("figure", [figures.loss_forecast, figures.residual_reach, figures.named_residuals])
def test_a_launched_figure_marks_its_launch_and_lists_the_others(figure: Any) -> None:
    drawn = figure(HEALTHY, 100)
    marks = [shape for shape in drawn["layout"]["shapes"] if shape.get("name") == "launch"]
    assert [shape["x0"] for shape in marks] == [100]
    assert drawn["layout"]["meta"]["launches"] == [[one.step, one.step] for one in HEALTHY]


def test_the_loss_forecast_starts_at_its_launch() -> None:
    drawn = figures.loss_forecast(HEALTHY, 100)
    (bold,) = _named(drawn, "forecast from step 100")
    at = next(one for one in HEALTHY if one.step == 100)
    assert bold["x"] == at.forecast_steps.tolist()
    assert bold["y"] == pytest.approx(at.forecast_loss, rel=1e-5)
    assert len(_named(drawn, "other forecasts")) == 8
    assert _named(drawn, "no change")[0]["y"] == pytest.approx([at.loss_value] * 2, rel=1e-5)


def test_bands_are_measured_in_the_modes_of_the_launch() -> None:
    """Full dots up to the next forecast, in its own modes; pale ones elsewhere, by rank."""
    start = HEALTHY[4]
    drawn = figures.residual_reach(HEALTHY, start.step)
    masks = reach(start.rates, start.rates_floor, start.time_to_learn, remaining_steps(start))
    for k, name in enumerate(REACH):
        traces = _named(drawn, name)
        if not traces:
            assert not start.forecast_bands[:, k].any()
            continue
        line, pale, full = traces
        assert line["y"] == pytest.approx(start.forecast_bands[:, k], rel=1e-5)
        assert full["x"] == [start.step, HEALTHY[5].step]
        assert full["y"] == pytest.approx([start.forecast_bands[0, k], HEALTHY[5].launched_bands[k]], rel=1e-5)
        others = [one for one in HEALTHY if one.step not in full["x"]]
        assert pale["x"] == [one.step for one in others]
        slow = [sum(c**2 for c, held in zip(one.coordinates, masks[name], strict=True) if held) for one in others]
        assert pale["y"] == pytest.approx(slow, rel=1e-5)


def test_without_simulated_bands_shares_are_drawn() -> None:
    drawn = figures.residual_reach(training(6, 2))
    assert {trace["type"] for trace in drawn["data"]} == {"bar"}
    assert np.sum([trace["y"] for trace in drawn["data"]], axis=0) == pytest.approx(1, abs=1e-5)


def test_directions_are_forecast_from_the_launch() -> None:
    drawn = figures.named_residuals(HEALTHY, 50)
    start = HEALTHY[2]
    for k in range(3):
        measured, ahead = _named(drawn, f"class {k}")
        assert measured["y"] == pytest.approx([abs(one.direction_residual[k]) for one in HEALTHY], rel=1e-5)
        assert ahead["y"] == pytest.approx(np.abs(start.forecast_directions[:, k]), rel=1e-5)
    assert _named(drawn, "class 0")[0]["name"] == "class 0, 40 steps"
    assert _named(drawn, "class 2")[0]["name"] == "class 2, beyond"


def _scheduled(every: int, count: int, rates: Sequence[float]) -> list[Snapshot]:
    """Probes every so many steps; each writes down the rates of its own interval, as the monitor does."""
    return [
        Snapshot(
            step=k * every,
            wall_time=0.0,
            epoch=(k * every) // 7,
            lr_steps=np.arange(max(k - 1, 0) * every, max(k * every, 1)),
            lr_values=np.array([[r, 0.5 * r] for r in rates[max(k - 1, 0) * every : max(k * every, 1)]]),
        )
        for k in range(count)
    ]


def test_time_is_the_sum_of_the_learning_rates_of_the_steps_before() -> None:
    rates = (0.1 + np.random.default_rng(0).random(40)).tolist()
    at = abscissa(_scheduled(10, 5, rates), "time")
    assert at([0, 1, 17, 39]) == pytest.approx([sum(rates[:k]) for k in (0, 1, 17, 39)], rel=1e-6)
    assert at([50])[0] == pytest.approx(sum(rates) + 10 * rates[-1], rel=1e-6)


def test_rates_are_written_where_they_change() -> None:
    steps, rates = recorded_rates(_scheduled(4, 4, [0.1] * 5 + [0.2] * 7))
    assert steps.tolist() == [0, 5]
    assert rates.tolist() == [[0.1, 0.05], [0.2, 0.1]]


@pytest.mark.parametrize("every", [3, 10, 25])
def test_epochs_agree_with_every_probe(every: int) -> None:
    run = _scheduled(every, 20, [0.1] * 600)
    per = steps_per_epoch(run)
    assert [int(one.step / per + 1e-9) for one in run] == [one.epoch for one in run]
    assert abscissa(run, "epoch")([7 * 30])[0] == pytest.approx(30, rel=0.02)


def test_unknown_units_fall_back_to_steps_and_say_so() -> None:
    run = [Snapshot(step=4, wall_time=0.0, epoch=0)]
    for unit in ("epoch", "time"):
        at = abscissa(run, unit)
        assert at([4.0]) == [4]
        assert "optimizer steps (" in at.title
