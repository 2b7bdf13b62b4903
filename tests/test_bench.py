"""The benchmark's own arithmetic: ratios are paired, limits are results, goals say what they know, peers compute K."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import figure, report, run, scaling
from tests.benchmarks.cases import CASES, LARGE, SMALL, Case, Result, error, ratio
from tests.benchmarks.methods import exact, runs
from tests.benchmarks.peers import OPTIONAL, absent
from tests.benchmarks.process import Limits, Task, Worker, resident
from tests.benchmarks.report import Goal
from tests.benchmarks.workloads import NETWORKS, parsed, problem


def row(method: str, *seconds: float, workload: str = "mlp", peak: float = 10.0) -> Result:
    found = Result(workload, LARGE[workload], "trace", method, list(seconds), list(seconds), [peak] * len(seconds))
    found.missed = "" if seconds else "over 12 GiB"
    return found


def test_parsed_reads_options_behind_a_colon() -> None:
    assert parsed("gpt") == ("gpt", {})
    assert parsed("mlp:width=8,classes=3") == ("mlp", {"width": 8, "classes": 3})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mlp", 563_722), ("cnn", 56_970), ("resnet18", 11_173_962), ("vit", 2_693_578), ("gpt", 3_434_506)],
)
def test_networks_have_their_published_sizes(name: str, parameters: int) -> None:
    model, x = problem(name, 1, "cpu")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not model.training
    assert model(x).shape == (1, 10)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("method", ["jacrev", "tutorial", "loop", "rows"])
@pytest.mark.parametrize("name", ["mlp:width=8,depth=2,classes=3", "gpt:width=8,depth=1,heads=2,tokens=5,classes=3"])
def test_methods_compute_the_kernel(method: str, name: str) -> None:
    work = runs(method, *problem(name, 4, "cpu"))
    twin = exact(*problem(name, 4, "cpu"), "full")
    for quantity in ("trace", "full"):
        kernel = work[quantity]()
        assert kernel is not None
        assert error(kernel.detach().tolist(), twin.tolist()) < 1e-5


@pytest.mark.parametrize("method", ["backwards", "activations"])
@pytest.mark.parametrize("name", ["mlp:width=8,depth=2,classes=3", "gpt:width=8,depth=1,heads=2,tokens=5,classes=3"])
def test_yardsticks_run_and_return_nothing(method: str, name: str) -> None:
    assert runs(method, *problem(name, 2, "cpu"))["trace"]() is None


def test_ratio_pairs_turns() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0
    assert ratio([6.0], [2.0, 100.0]) == 3.0  # only the turn that both took
    assert ratio([], [1.0]) is None


def test_error_reduces_the_full_twin_to_the_trace() -> None:
    full = np.arange(16.0).reshape(2, 2, 2, 2)
    trace = np.einsum("ncmc->nm", full)
    assert error(full, full) == 0
    assert error(trace, full) == 0
    assert math.isclose(error(trace + 1, full), 1 / trace.max())


def test_exponent_is_the_slope_of_the_last_three_points() -> None:
    assert math.isclose(scaling.exponent([1, 2, 4, 8], [100.0, 8.0, 32.0, 128.0]) or 0, 2)
    assert scaling.exponent([1, 2, 4], [1.0, None, 2.0]) is None


def test_sweeps_change_one_size_only() -> None:
    for sweep in scaling.SWEEPS:
        for size, case in sweep.cases():
            base, options = parsed(case.workload)
            assert base in NETWORKS
            assert (case.samples if sweep.axis == "samples" else options[sweep.axis]) == size


def test_a_goal_is_met_missed_or_unknown() -> None:
    least = Goal("mlp", "jacrev", "structured", "seconds", 10, True)
    most = Goal("mlp", "structured", "backwards", "seconds", 1, False)
    assert report.verdict(least, 12, False).startswith("met")
    assert report.verdict(least, 8, False).startswith("MISSED")
    assert report.verdict(most, 0.9, False).startswith("met")
    assert report.verdict(most, None, False).startswith("?")
    assert report.verdict(least, 12, True).startswith("met")
    assert report.verdict(least, 8, True).startswith("?")  # it may have taken longer
    assert report.verdict(most, 0.9, True).startswith("?")


def test_a_run_that_a_limit_ended_gives_a_lower_bound() -> None:
    ended = row("jacrev")
    ended.floor_seconds, ended.floor_mb = 30.0, 12_000.0
    ours = row("structured", 2.0, 2.0, peak=100.0)
    assert report.quotient(Goal("mlp", "jacrev", "structured", "seconds", 1, True), ended, ours) == (15.0, True)
    assert report.quotient(Goal("mlp", "jacrev", "structured", "memory", 1, True), ended, ours) == (120.0, True)
    assert report.quotient(Goal("mlp", "jacrev", "structured", "seconds", 1, True), ours, ended) == (None, False)


def test_goals_speak_about_the_large_batches_only() -> None:
    assert report.goals([row("backwards", 1.0), row("structured", 0.5)])[0].startswith("met")
    assert report.goals([Result("mlp", 16, "trace", "backwards", [1.0], [1.0], [1.0])]) == []


def test_planner_is_silent_without_a_plan() -> None:
    planned = row("structured", 2.0)
    assert report.planner([planned]) == []
    planned.planned_seconds, planned.planned_mb = 1.0, 5.0
    assert len(report.planner([planned])) == 2


def test_a_miss_is_a_result_and_an_optional_peer_never_fails() -> None:
    broken, wrong, peer = row("jacrev"), row("structured", 1.0), row(OPTIONAL[0])
    broken.missed, wrong.error, peer.missed = "ValueError: no", 1e-3, "ImportError: no"
    assert run.failed([row("loop"), peer]) == []
    assert run.failed([broken, wrong]) == [wrong, broken]
    assert run.failed([row("structured", 1.0)]) == []


def test_chosen_keeps_the_yardstick() -> None:
    cases = run.chosen(CASES, ("cnn",), ("jacrev",), ("trace",))
    assert cases == [Case("cnn", 64, ("trace",), ("backwards", "jacrev"))]
    assert [case.workload for case in run.chosen(SMALL, (), (), ())] == [*LARGE, "demo"]


def test_absent_names_the_reason() -> None:
    assert absent("jacrev", "mlp", "cpu") == ""
    assert absent("neural-tangents", "vit", "cpu").startswith("skipped: ")
    assert absent("nngeometry", "gpt", "cpu").startswith("skipped: ")


def test_a_skipped_worker_starts_nothing() -> None:
    worker = Worker(Task("mlp", 1, "nngeometry", "cpu", 1, 1), Limits(1, 1), "skipped: not installed")
    worker.started()
    assert worker.ask("trace") == {}
    worker.close()
    assert worker.problem == "skipped: not installed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_resident_memory_is_read() -> None:
    assert resident(os.getpid()) > 2**20
    assert resident(2**30) == 0


def test_figure_is_drawn_with_bars_for_lower_bounds(tmp_path: Path) -> None:
    ended = row("jacrev")
    ended.floor_seconds, ended.floor_mb = 30.0, 12_000.0
    rows = [row("backwards", 1.0), row("structured", 0.5), ended, row("tutorial")]
    for result in rows:
        result.ratio = ratio(result.seconds, rows[0].seconds)
    figure.drawn(rows, "test", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
