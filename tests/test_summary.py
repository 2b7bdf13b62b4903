"""The summary has a row for everything that was measured, none for what was not, and never judges."""

from dataclasses import replace

import numpy as np
import pytest

from ntk_monitor.snapshot import Snapshot
from ntk_monitor.summary import Row, rows, text
from tests.snapshots import broken, skipped, snapshot, training, without_modes
from tests.test_figures import HISTORIES


def _values(snapshots: list[Snapshot]) -> dict[str, str]:
    return {row.quantity: row.value for row in rows(snapshots)}


def _meanings(snapshots: list[Snapshot]) -> dict[str, str]:
    return {row.quantity: row.meaning for row in rows(snapshots)}


def complete(history: list[Snapshot]) -> list[Snapshot]:
    """The same run with what a look adds to each probe."""
    metrics = {"lr_headroom_low": 0.5, "lr_headroom_high": 3.0, "noise_scale": 40.0, "linearisation_error": 0.1}
    facts = {"loss_remaining": 0.25, "forecast_error": 0.15, "sharpness_bias": 0.01}
    texts = {"stability": "Lanczos", "forecast": "from 12 training samples and the kernel of this step, SGD"}
    return [
        replace(s, metrics=s.metrics | metrics, facts=s.facts | facts, texts=s.texts | texts)
        if s.status == "measured"
        else s
        for s in history
    ]


@pytest.mark.parametrize("looked", [False, True], ids=["bare", "looked at"])
@pytest.mark.parametrize("history", HISTORIES)
def test_rows_are_finished_sentences_without_alarm(history: str, looked: bool) -> None:
    snapshots = HISTORIES[history]()
    if looked:
        snapshots = [broken(s) for s in complete(snapshots)] if history == "broken" else complete(snapshots)
    found = rows(snapshots)
    assert found[0].quantity == "measured"
    assert len({row.quantity for row in found}) == len(found)
    for row in found:
        assert row.value
        assert row.meaning.endswith(".")
        words = f"{row.value} {row.meaning}".lower()
        assert not any(word in words for word in ("safe", "danger", "warning", "nan", "inf ", ".."))


def test_a_measured_run_has_every_row() -> None:
    assert list(_values(complete(training(12, 3)))) == [
        "measured",
        "learning rate",
        "loss forecast",
        "trust in forecasts",
        "residual in reach",
        "time to learn",
        "noise scale",
        "who moved the outputs",
        "alignment",
        "kernel change",
        "loss on the probe",
        "residual by speed",
        "kernel",
        "computed by",
        "trace",
        "largest eigenvalue",
        "condition number",
        "resolved rank",
        "effective rank",
        "monitor overhead",
    ]


def _with(taken: Snapshot, step: int = 0, **values: float) -> Snapshot:
    """The same probe with metrics and facts by name."""
    metrics = {k: v for k, v in values.items() if k in ("lr_headroom_low", "lr_headroom_high", "linearisation_error")}
    facts = {k: v for k, v in values.items() if k not in metrics}
    return replace(taken, step=step, metrics=metrics, facts=taken.facts | facts)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.2, 0.8, "Above the bound of SGD"), (0.5, 3.0, "Noise of batches of 12"), (2.0, 9.0, "somewhere between")],
)
def test_the_learning_rate_is_judged_where_it_was_tightest(low: float, high: float, words: str) -> None:
    taken = snapshot()
    history = [
        _with(taken, 0, lr_headroom_low=50.0, lr_headroom_high=90.0),
        _with(taken, 40, lr_headroom_low=low, lr_headroom_high=high, sharpness_bias=0.3),
        _with(taken, 80, lr_headroom_low=20.0, lr_headroom_high=30.0),
        _with(taken, 120),
    ]
    assert _values(history)["learning rate"] == f"could be multiplied by {low:g} to {high:g} at step 40"
    said = _meanings(history)["learning rate"]
    assert words in said
    assert "At step 80, with the learning rate of then: 20 to 30." in said
    assert "With 12 probe samples it reads about 30% too strict." in said


def test_a_bound_that_is_not_known_says_why() -> None:
    taken = replace(snapshot(), texts={"stability": "not available before about 10 steps of Adam"})
    assert _values([taken])["learning rate"] == "no bound known"
    assert _meanings([taken])["learning rate"] == "Not available before about 10 steps of Adam."
    assert "learning rate" not in _values([replace(snapshot(), texts={})])


def test_noise_is_a_number_or_a_bound_beside_the_batch() -> None:
    known = replace(snapshot(), metrics={"noise_scale": 40.0})
    assert _values([known])["noise scale"] == "40 samples"
    assert _meanings([known])["noise scale"].startswith("Your batch is 12.")
    drowned = replace(snapshot(), facts={"noise_scale_bound": 900.0})
    assert _values([drowned])["noise scale"] == "more than 900 samples"
    assert "Your batch" not in _meanings([drowned])["noise scale"]


def test_the_forecast_is_the_last_one_made_or_a_reason() -> None:
    taken = snapshot()
    made = [_with(taken, 0, loss_remaining=0.5), _with(taken, 40, loss_remaining=0.25), _with(taken, 80)]
    assert _values(made)["loss forecast"] == "0.25 at the end (step 40)"
    assert "from the kernel of step 40, with SGD" in _meanings(made)["loss forecast"]
    endless = replace(made[0], facts={"loss_remaining": 0.5}, forecast_steps=np.array([10, 1000]))
    assert _values([endless])["loss forecast"] == "0.5 at step 1000"
    for reason, said in (
        ("none: it takes a known loss and an optimizer", "It takes a known loss and an optimizer."),
        ("RMSprop has no function-space form", "RMSprop has no function-space form."),
        ("from 9 training samples and the kernel of this step, SGD", "No simulation from a kernel of this run"),
    ):
        without = replace(taken, texts={"forecast": reason})
        assert _values([without])["loss forecast"] == "none"
        assert _meanings([without])["loss forecast"].startswith(said)


@pytest.mark.parametrize(
    ("errors", "linear", "value", "words"),
    [
        ((0.1, 0.15, 9.0), 0.9, "good, 15% missed", "Median miss of 3 forecasts"),
        ((0.3,), 0.29, "fair, 30% missed", "The tangent alone missed 29%: mostly the kernel moves"),
        ((0.9, 0.8), 0.1, "poor, 90% missed", "mostly batch noise"),
    ],
)
def test_trust_is_the_median_miss_and_its_cause(
    errors: tuple[float, ...], linear: float, value: str, words: str
) -> None:
    history = [_with(snapshot(), i, forecast_error=e, linearisation_error=linear) for i, e in enumerate(errors)]
    assert _values(history)["trust in forecasts"] == value
    assert words in _meanings(history)["trust in forecasts"]
    assert ("tangent" in _meanings(history)["trust in forecasts"]) == (value[:4] != "good")


def test_the_residual_in_reach_is_that_of_the_simulation() -> None:
    taken = replace(
        snapshot(2, 2),
        facts={"total_steps": 100.0},
        rates=np.array([4.0, 3.0, 2.0, 1.0]),
        rates_floor=0.0,
        coordinates=np.sqrt([0.5, 0.2, 0.2, 0.1]),
        time_to_learn=np.array([5.0, 50.0, np.inf, np.inf]),
        directions=("cats", "dogs", "fish"),
        direction_eta=np.array([7.0, 70.0, np.inf]),
    )
    assert _values([taken])["residual in reach"] == "70% in reach of 100 steps"
    assert "(50% of it within a tenth of the steps left). 30% lies in modes" in _meanings([taken])["residual in reach"]
    assert _values([taken])["time to learn"] == "first and last: cats in 7 steps, dogs in 70 steps"
    assert _meanings([taken])["time to learn"].endswith("Not before the end: fish.")
    late = replace(taken, step=90)
    assert "residual in reach" not in _values([late])
    assert _values([taken, late])["residual in reach"] == "70% in reach of 100 steps"
    never = replace(taken, direction_eta=np.full(3, np.inf))
    assert _values([never])["time to learn"] == "none within the run"


def test_the_layers_that_moved_most_come_first() -> None:
    taken = replace(snapshot(), layers=("a", "b", "c", "d"), layer_update=np.array([0.1, 0.6, 0.05, 0.25]))
    assert _values([taken])["who moved the outputs"] == "b 60%, d 25%, a 10%"
    assert "since the probe before" in _meanings([taken])["who moved the outputs"]
    assert "since step 40" in _meanings([replace(taken, previous_step=40)])["who moved the outputs"]


def test_kernel_row_names_layout_and_size() -> None:
    assert _values([snapshot(12, 3)])["kernel"] == "full, 12 samples x 3 outputs"
    assert "36 x 36, in evaluation mode" in _meanings([snapshot(12, 3)])["kernel"]
    assert "in training mode" in _meanings([replace(snapshot(), mode="train")])["kernel"]


def test_condition_number_says_at_least_when_it_is_a_lower_bound() -> None:
    exact = replace(snapshot(), condition_number=1234.0, condition_is_lower_bound=False)
    assert _values([exact])["condition number"] == "1,230"
    assert _values([replace(exact, condition_is_lower_bound=True)])["condition number"] == "at least 1,230"


def test_trace_is_compared_with_the_first_probe_of_the_same_samples() -> None:
    traces = (5.0, 10.0, 30.0)
    history = [replace(taken, metrics={"trace": trace}) for taken, trace in zip(training(4, 2), traces, strict=False)]
    assert "6 times as fast as at step 0" in _meanings(history)["trace"]
    history[0] = replace(history[0], probe="other samples")
    assert "3 times as fast as at step 40" in _meanings(history)["trace"]


def test_negative_eigenvalues_appear_only_when_there_are_any() -> None:
    assert "negative eigenvalues" not in _values([snapshot()])
    assert _values([replace(snapshot(), negative=2)])["negative eigenvalues"] == "2 of 36"


def test_unresolved_directions_are_counted() -> None:
    taken = replace(snapshot(4, 2), rank=5)
    assert _values([taken])["resolved rank"] == "5 of 8 modes"
    assert _meanings([taken])["resolved rank"].startswith("3 directions cannot")


def test_skipped_probes_are_counted_with_each_reason_once() -> None:
    history = [skipped(0, "too little memory"), *training(3, 2, probes=1), skipped(9, "too little memory")]
    assert _values(history)["skipped"] == "2 probes"
    assert _meanings(history)["skipped"] == "Not taken: too little memory."


def test_missing_modes_give_their_reason() -> None:
    history = [without_modes(snapshot(), "not verified: the loss differs")]
    assert _values(history)["residual by speed"] == "off"
    assert "the loss differs" in _meanings(history)["residual by speed"]
    assert _values(history)["loss on the probe"] == "not known"


@pytest.mark.parametrize(
    ("rates", "share"), [((1.0, 0.5), "100% in fast"), ((1.0, 1e-3), "50% in fast"), ((1e-3, 1.0), "50% in fast")]
)
def test_residual_counts_the_modes_within_a_hundredfold(rates: tuple[float, float], share: str) -> None:
    taken = replace(snapshot(1, 2), rates=np.array(rates), rates_floor=0.0, coordinates=np.array([1.0, -1.0]))
    assert _values([taken])["residual by speed"].startswith(share)


@pytest.mark.parametrize(
    ("name", "low", "high", "row"),
    [("alignment", -0.5, 0.9, "alignment"), ("kernel_change", 0.0, 0.5, "kernel change")],
)
def test_meanings_follow_the_value(name: str, low: float, high: float, row: str) -> None:
    below, above = (_meanings([replace(snapshot(), metrics={name: value})])[row] for value in (low, high))
    assert below != above


@pytest.mark.parametrize("width", [60, 100, 160])
def test_text_is_a_table_no_wider_than_asked(width: int) -> None:
    found = rows([*training(12, 3), skipped(999)])
    table = text(found, width=width)
    assert max(len(line) for line in table.splitlines()) <= width
    for row in found:
        assert row.quantity in table
    assert set(" ".join(row.meaning for row in found).split()) <= set(table.split())


def test_text_of_no_rows_is_empty() -> None:
    assert text(()) == ""
    assert text((Row("a", "b", "c."),)) == "a  b  c."
