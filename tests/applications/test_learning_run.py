"""Learning speed of recorded runs: plain descent agrees, faster optimizers and unrelated decays do not."""

from dataclasses import replace

import numpy as np
import pytest

from ntk_monitor.applications.learning_run import intervals, study_run
from ntk_monitor.errors import InputError
from ntk_monitor.render import png
from ntk_monitor.snapshot import Snapshot
from tests.snapshots import skipped, training


def run() -> list[Snapshot]:
    return training(samples=16, probes=5, loss="mse", every=10)


def test_decays_are_logarithms_of_what_is_left() -> None:
    before, after = run()[:2]
    first = intervals([before, after])[0]
    lr, steps = before.facts["lr"], after.step - before.step
    pairs = [
        (-np.log(abs(1 - lr * rate)), -np.log(abs(end / start)) / steps)
        for rate, start, end in zip(before.rates, before.coordinates, after.carried, strict=True)
    ]
    assert set(zip(first.predicted.tolist(), first.measured.tolist(), strict=True)) <= set(pairs)
    assert len(first.predicted) > 3


def test_plain_gradient_descent_on_squared_error_agrees() -> None:
    report = study_run(run())
    assert [verdict.holds for verdict in report.verdicts] == [True, True]
    assert report.number("speed_ratio") == pytest.approx(1.0, abs=0.15)
    assert png(report.figures["learning_run"]).startswith(b"\x89PNG")


def test_an_optimizer_that_is_five_times_faster_does_not() -> None:
    slow = [replace(one, facts=one.facts | {"lr": one.facts["lr"] / 5}) for one in run()]
    report = study_run(slow)
    assert report.verdicts[1].holds is False
    assert "faster than" in report.summary


def test_decays_that_have_nothing_to_do_with_rates_are_called_so() -> None:
    generator = np.random.default_rng(0)
    mixed = [replace(one, carried=generator.permutation(one.carried)) for one in run()]
    assert study_run(mixed).verdicts[0].holds is False


def test_few_decays_decide_nothing() -> None:
    few = study_run(training(samples=3, outputs=1, probes=2, loss="mse", every=10))
    assert [verdict.holds for verdict in few.verdicts] == [None, None]


def test_runs_without_modes_are_refused() -> None:
    other = [replace(one, previous_step=None) for one in run()]
    for snapshots in ([], [skipped(0), skipped(5)], run()[:1], other):
        with pytest.raises(InputError, match="no two neighbouring probes"):
            study_run(snapshots)
