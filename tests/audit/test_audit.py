"""The promise of the product: healthy runs raise no alarm, and what ails a sick one is named."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.audit import report
from tests.audit.cases import apart
from tests.audit.healthy import HEALTHY, pinn_decay
from tests.audit.runs import Case, Outcome, load, run, saved
from tests.audit.sick import SICK


@pytest.mark.slow
@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_run_raises_no_alarm(case: Case, tmp_path: Path) -> None:
    outcome = apart(case.name, tmp_path)
    assert outcome.as_intended, outcome.error or report.result(outcome)
    assert not outcome.skipped
    assert outcome.quiet, report.findings(outcome)


@pytest.mark.slow
def test_of_twelve_sick_runs_ten_are_named(tmp_path: Path) -> None:
    outcomes = [apart(case.name, tmp_path) for case in SICK]
    assert [o.name for o in outcomes if not o.as_intended] == []
    assert len(outcomes) == 12
    assert sum(o.named for o in outcomes) >= 10, report.table(outcomes)


def test_a_run_is_scored_recorded_and_read_back(tmp_path: Path) -> None:
    # A network whose forward differentiates: every pass of the monitor must let it.
    case = Case(
        "tiny", "a test of the audit itself", lambda: replace(pinn_decay(), steps=16, probes=4), "1 - error", -10.0
    )
    outcome = run(case, tmp_path / "tiny")
    assert not outcome.error
    assert outcome.as_intended
    assert (outcome.steps, outcome.probes) == (16, 5)
    assert outcome.loss_status == "mse(mean) matched"
    assert len(outcome.losses) == 16
    assert load(saved(outcome, tmp_path)).snapshots[-1]["step"] == 16


def _outcome(kind: str, *findings: tuple[str, str]) -> Outcome:
    return Outcome("x", kind, causes=("cause",), findings=[{"severity": s, "rule": r} for s, r in findings])


@pytest.mark.parametrize(
    ("kind", "score", "intended"),
    [("healthy", 0.9, True), ("healthy", 0.1, False), ("sick", 0.9, False), ("sick", float("nan"), True)],
)
def test_healthy_runs_reach_their_bound_and_sick_ones_do_not(kind: str, score: float, intended: bool) -> None:
    outcome = _outcome(kind)
    outcome.score, outcome.bound = score, 0.5
    assert outcome.as_intended == intended


def test_quiet_is_no_error_and_at_most_one_warning() -> None:
    assert _outcome("healthy", ("warning", "a"), ("info", "b"), ("info", "c")).quiet
    assert not _outcome("healthy", ("warning", "a"), ("warning", "b")).quiet
    assert not _outcome("healthy", ("error", "a")).quiet


def test_a_cause_is_named_by_a_warning_or_an_error() -> None:
    assert _outcome("sick", ("error", "other"), ("warning", "cause")).named
    assert not _outcome("sick", ("error", "other"), ("info", "cause")).named
    assert "0 of 1 named" in report.table([_outcome("sick", ("info", "cause"))])
