"""Cards say what a run is at a step, and their lights follow the bounds."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from ntk_monitor.cards import Card, cards
from ntk_monitor.health import findings
from ntk_monitor.history import History
from ntk_monitor.panels import GROUPS, View
from ntk_monitor.snapshot import Snapshot
from tests.histories import EVERY, HEALTHY, edit, facts, metrics, plateau, texts
from tests.snapshots import broken, skipped, training, without_modes


def _cards(history: Sequence[Snapshot], step: int | None = None) -> dict[str, Card]:
    return {card.name: card for card in cards(History(tuple(history)), View(step=step))}


def test_every_card_says_what_its_number_is_per() -> None:
    found = _cards(edit(metrics={"overhead": 0.02, "noise_scale": 88.0}, condition_number=1e5)(HEALTHY))
    assert found["learning rate"].value == "could be multiplied by 5.75 to 41"
    assert "batches of 32" in found["learning rate"].sentence
    assert "1 is the learning rate in use" in found["learning rate"].sentence
    assert found["kernel velocity"].value.endswith(f"in {EVERY} steps")
    assert found["effective rank"].value == "9 of 10 modes"
    assert "It was 20 at step 0" in found["effective rank"].sentence
    assert "noise floor of 1.0e-12 squared output units" in found["condition number"].sentence
    assert found["noise scale"].value == "88 samples"
    assert "Yours is 32" in found["noise scale"].sentence
    assert found["forecast error"].value == "20 % (no change: 100 %)"
    assert found["monitor overhead"].value == "2 % of wall time"
    for card in found.values():
        assert card.group in GROUPS
        assert card.sentence.endswith(".")
        assert "safe" not in card.sentence + card.value


@pytest.mark.parametrize(
    ("low", "high", "falls", "light"),
    [(1.6, 35, True, "green"), (0.6, 35, True, "amber"), (0.1, 0.5, True, "amber"), (0.1, 0.5, False, "red")],
)
def test_the_learning_rate_is_red_only_above_the_upper_bound_while_the_loss_does_not_fall(
    low: float, high: float, falls: bool, light: str
) -> None:
    losses = [one.loss_value for one in HEALTHY] if falls else plateau(1.1)
    run = edit(metrics={"lr_headroom_low": low, "lr_headroom_high": high}, loss=losses)(HEALTHY)
    card = _cards(run)["learning rate"]
    assert card.light == light
    assert (light == "red") == any(one.rule == "lr_too_high" and one.severity == "error" for one in findings(run))


def test_two_probes_above_the_bound_are_not_red() -> None:
    high = [10.0] * 10 + [0.5] * 2
    run = edit(metrics={"lr_headroom_low": [h / 2 for h in high], "lr_headroom_high": high}, loss=plateau(1.1))(HEALTHY)
    assert _cards(run)["learning rate"].light == "amber"


@pytest.mark.parametrize(("error", "light"), [(0.1, "green"), (0.5, "amber"), (1.2, "red")])
def test_a_forecast_is_judged_against_no_change(error: float, light: str) -> None:
    card = _cards(facts(forecast_error=error)(HEALTHY))["forecast error"]
    assert card.light == light
    assert ("Do not believe" in card.sentence) == (light == "red")


def test_the_last_five_forecasts_count() -> None:
    errors = [5.0] * 7 + [0.1, 0.1, 0.1, 0.9, 0.9]
    assert _cards(facts(forecast_error=errors)(HEALTHY))["forecast error"].value.startswith("10 %")


def test_a_step_shows_the_run_as_it_was() -> None:
    then, now = _cards(HEALTHY, step=100), _cards(HEALTHY[:5])
    assert then == now
    assert then["loss on the probe"] != _cards(HEALTHY)["loss on the probe"]
    assert _cards(HEALTHY, step=110) == then


def test_what_is_in_reach_is_told_of_the_last_simulation_with_a_quarter_of_the_run_to_go() -> None:
    card = _cards(HEALTHY)["in reach"]
    assert card.value.endswith(f"in {3 * EVERY} steps")
    assert f"at step {HEALTHY[-3].step}" in card.sentence
    assert _cards(HEALTHY[-1:])["in reach"].value.endswith(f"in {EVERY} steps")


def test_where_the_bounds_were_tighter_is_told() -> None:
    sentence = _cards(HEALTHY)["learning rate"].sentence
    assert "At its tightest, step 0, the factors were 3 and 8." in sentence
    assert "tightest" not in _cards(HEALTHY[:2])["learning rate"].sentence


def test_a_bound_of_an_earlier_probe_says_so() -> None:
    run = [*HEALTHY[:-1], replace(HEALTHY[-1], metrics={})]
    card = _cards(run)["learning rate"]
    assert f"Last measured at step {HEALTHY[-2].step}" in card.sentence


def test_without_a_bound_the_reason_is_told() -> None:
    run = texts(stability="not measured: the probe has no targets")(metrics(lr_headroom_low=float("nan"))(HEALTHY))
    card = _cards(run)["learning rate"]
    assert (card.value, card.light) == ("no bound known", "none")
    assert card.sentence == "Not measured: the probe has no targets."


@pytest.mark.parametrize(
    "history",
    [
        (),
        (skipped(0),),
        (Snapshot(step=3, wall_time=0.0),),
        tuple(broken(one) for one in HEALTHY),
        tuple(without_modes(one) for one in training(4, 2)),
        HEALTHY[:1],
    ],
)
def test_what_was_not_measured_has_no_card(history: Sequence[Snapshot]) -> None:
    for card in _cards(history).values():
        assert "nan" not in f"{card.value} {card.sentence}".lower().split()
    assert not _cards(history, step=-1)
