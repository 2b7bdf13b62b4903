"""The summary has a row for everything that was measured, none for what was not, and never judges."""

from dataclasses import replace

import numpy as np
import pytest

from ntk_monitor.snapshot import Snapshot
from ntk_monitor.summary import Row, rows, text
from tests.snapshots import skipped, snapshot, training, without_modes
from tests.test_figures import HISTORIES


def _values(snapshots: list[Snapshot]) -> dict[str, str]:
    return {row.quantity: row.value for row in rows(snapshots)}


def _meanings(snapshots: list[Snapshot]) -> dict[str, str]:
    return {row.quantity: row.meaning for row in rows(snapshots)}


@pytest.mark.parametrize("history", HISTORIES)
def test_rows_are_finished_sentences_without_alarm(history: str) -> None:
    found = rows(HISTORIES[history]())
    assert found[0].quantity == "measured"
    assert len({row.quantity for row in found}) == len(found)
    for row in found:
        assert row.value
        assert row.meaning.endswith(".")
        words = f"{row.value} {row.meaning}".lower()
        assert not any(word in words for word in ("safe", "danger", "warning", "nan", "inf ", ".."))


def test_a_measured_run_has_every_row() -> None:
    assert list(_values(training(12, 3))) == [
        "measured",
        "kernel",
        "computed by",
        "trace",
        "largest eigenvalue",
        "condition number",
        "resolved rank",
        "effective rank",
        "alignment",
        "kernel change",
        "loss on the probe",
        "residual by speed",
        "monitor overhead",
    ]


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
