"""Two runs and two probes side by side: only what is comparable, numbers those of the record, words that hold."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ntk_monitor.cli import main
from ntk_monitor.compare import Comparison, Difference, mismatch, probes, runs
from ntk_monitor.compare.training import half_life
from ntk_monitor.errors import InputError
from ntk_monitor.history import History
from ntk_monitor.recorder import Recorder
from ntk_monitor.report import page
from ntk_monitor.similarity import kernel_change
from ntk_monitor.snapshot import Snapshot
from tests.histories import HEALTHY, edit
from tests.snapshots import skipped, training, without_modes

RUN = tuple(training(12, 3))
KERNEL = {
    "trace of K",
    "spectrum",
    "effective rank",
    "condition number",
    "alignment",
    "kernel drift",
    "centred drift",
    "top eigenspace",
}


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntk_monitor.report.frame.plotly", lambda: "/* plotly */")


def row(found: Comparison, quantity: str) -> Difference:
    return next(one for one in found.rows if one.quantity == quantity)


def quantities(found: Comparison) -> set[str]:
    return {one.quantity for one in found.rows}


def record(directory: Path, snapshots: Sequence[Snapshot]) -> Path:
    recorder = Recorder(directory)
    for one in snapshots:
        recorder.write(one)
    recorder.close()
    return directory


def test_two_probes_are_compared_by_the_numbers_of_the_record() -> None:
    found = probes(History(RUN), (0, 200))
    first, last = RUN[0], RUN[-1]
    assert found.names == ("step 0", "step 200")
    assert quantities(found) >= KERNEL
    drift = kernel_change(np.asarray(first.gram), np.asarray(last.gram))
    assert row(found, "kernel drift").right == f"{drift:.3g} (step 200)"
    assert row(found, "loss on the probe").left == f"{first.loss_value:.3g} (step 0)"
    growth = last.eigenvalues.sum() / first.eigenvalues.sum()
    assert f"{growth:.3g} times faster" in row(found, "trace of K").meaning
    assert row(found, "alignment").matters
    assert not row(found, "share per layer").matters
    assert set(found.figures) == {"spectra-compared", "layers-compared", "eigenspaces-compared"}
    drawn = found.figures["spectra-compared"]["data"]
    assert drawn[0]["y"] == pytest.approx(first.eigenvalues, rel=1e-5)
    assert "step 200" in drawn[1]["name"]
    assert drawn[1]["y"] == pytest.approx(last.eigenvalues, rel=1e-5)


def test_a_run_does_not_differ_from_itself() -> None:
    found = runs(History(RUN), History(RUN), ("a", "b"))
    assert not [one.quantity for one in found.rows if one.matters]
    assert found.verdict == "Nothing differs by more than it must."
    assert quantities(found) >= KERNEL


def test_kernels_of_other_samples_are_not_compared_and_it_is_said() -> None:
    other = [replace(one, probe="other") for one in training(12, 3, seed=1)]
    found = runs(History(RUN), History(tuple(other)), ("a", "b"))
    assert not quantities(found) & KERNEL
    assert "spectra-compared" not in found.figures
    assert any("not comparable" in note and "different samples" in note for note in found.notes)
    assert "Each on its own samples" in row(found, "loss on the probe").meaning


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"probe": "other"}, "different samples"),
        ({"probe": ""}, "does not say"),
        ({"kernel": "trace"}, "kernel layout differs (full and trace)"),
        ({"mode": "train"}, "mode differs (eval and train)"),
        ({"outputs": 4}, "outputs differ (3 and 4)"),
        ({"eigenvalues": np.empty(0)}, "no spectrum"),
    ],
)
def test_what_makes_kernels_incomparable(change: dict[str, object], reason: str) -> None:
    assert reason in mismatch(RUN[0], replace(RUN[1], **change))  # type: ignore[arg-type]
    assert mismatch(RUN[0], RUN[1]) == ""


def test_runs_meet_at_the_last_common_step_or_near_the_end_of_the_shorter() -> None:
    short = History(RUN[:3])
    assert any("step 80;" in note for note in runs(History(RUN), short, ("a", "b")).notes)
    shifted = History(tuple(replace(one, step=one.step + 5) for one in RUN[:3]))
    assert any("steps 80 and 85;" in note for note in runs(History(RUN), shifted, ("a", "b")).notes)
    chosen = runs(History(RUN), short, ("a", "b"), (200, 40))
    assert any("steps 200 and 40;" in note for note in chosen.notes)
    assert row(chosen, "kernel drift").left == "0 (step 200)"


def test_who_comes_first_to_a_common_loss() -> None:
    slow = edit(loss=[1.1, 1.1, 1.1, 1.1, *(one.loss_value for one in HEALTHY[:8])])(HEALTHY)
    found = row(runs(History(HEALTHY), History(tuple(slow)), ("fast", "slow")), "steps to a common loss")
    # The slow one repeats the fast one's loss four probes of 25 steps later.
    assert (found.left, found.right, found.matters) == ("step 175", "step 275", True)


def test_learning_rates_are_compared_where_they_were_tightest() -> None:
    tight = edit(metrics={"lr_headroom_low": 0.2, "lr_headroom_high": [5.0, 0.5] + [5.0] * 10})(HEALTHY)
    found = row(runs(History(HEALTHY), History(tuple(tight)), ("a", "b")), "learning rate")
    assert found.left == "3 to 8 times (step 0)"
    assert found.right == "0.2 to 0.5 times (step 25)"
    assert found.matters
    assert "full-batch steps: right" in found.meaning


def test_layers_are_matched_by_name() -> None:
    moved = edit(layer_update=np.array([0.6, 0.1, 0.1, 0.2]))(HEALTHY)
    found = row(runs(History(HEALTHY), History(tuple(moved)), ("a", "b")), "who moved the outputs")
    assert found.left.startswith("body.0 10%")
    assert found.right.startswith("body.0 60%")
    assert "+50 percentage points" in found.meaning
    strangers = edit(layers=("p", "q", "r", "s"))(HEALTHY)
    assert "who moved the outputs" not in quantities(runs(History(HEALTHY), History(tuple(strangers)), ("a", "b")))


def test_what_was_given_differently_is_listed() -> None:
    other = [replace(one, texts=one.texts | {"optimizer": "Lion"}, loss="mse(mean)") for one in RUN]
    found = runs(History(RUN), History(tuple(other)), ("a", "b"))
    assert row(found, "set-up").right == "optimizer Lion; loss mse(mean)"
    assert "not comparable" in row(found, "loss on the probe").meaning
    assert "steps to a common loss" not in quantities(found)


def test_half_life_is_the_energy_weighted_median() -> None:
    one = replace(RUN[0], coordinates=np.array([1.0, 2.0, 1.0]), time_to_learn=np.array([5.0, 9.0, np.inf]))
    # Energies 1, 4, 1: half of 6 is reached inside the second mode.
    assert half_life(one) == 9
    assert np.isinf(half_life(replace(one, time_to_learn=np.array([5.0, np.inf, 9.0]))))
    assert np.isnan(half_life(replace(one, time_to_learn=np.empty(0))))


def test_a_probe_without_gram_says_where_there_is_one() -> None:
    some = tuple(one if one.step in (0, 80) else replace(one, gram=np.empty(0)) for one in RUN)
    found = probes(History(some), (0, 200))
    assert "kernel drift" not in quantities(found)
    assert any("steps 0, 80" in note for note in found.notes)
    # Two runs meet where both have one.
    both = runs(History(some), History(RUN), ("a", "b"))
    assert row(both, "kernel drift").left == "0 (step 80)"


@pytest.mark.parametrize(
    "history",
    [
        (*RUN[:2], skipped(500)),
        tuple(without_modes(one) for one in training(5, 2, 2)),
        tuple(training(1, 1, 2)),
        tuple(replace(one, metrics={}, facts={}, texts={}, seconds={}) for one in RUN[:2]),
    ],
    ids=["skipped", "without modes", "one row", "bare"],
)
def test_poor_records_still_compare(history: tuple[Snapshot, ...]) -> None:
    found = probes(History(history), (0, 40))
    assert "spectrum" in quantities(found)
    for one in found.rows:
        assert "nan" not in f"{one.left} {one.right} {one.meaning}".replace("(nan", "nan")
    json.dumps(dict(found.figures), allow_nan=False)


def test_steps_that_were_not_measured_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest are 0, 40, 80, 120"):
        probes(History(RUN), (0, 50))
    with pytest.raises(InputError, match="twice"):
        probes(History(RUN), (40, 40))
    with pytest.raises(InputError, match="b has none"):
        runs(History(RUN), History((skipped(0),)), ("a", "b"))


def test_the_page_holds_table_and_figures_and_nothing_is_injected() -> None:
    evil = "</td><script>alert(1)</script>"
    found = runs(History(RUN), History(RUN[:4]), (evil, "b"))
    text = page({evil: History(RUN), "b": History(RUN[:4])}, found)
    # Inside the figures' JSON a name is a string; everywhere else it must be escaped.
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "alert(1)" in outside
    assert "<script" not in outside
    assert "</td><script" not in text
    places = re.findall(r'<div class="plot" id="([^"]+)"', text)
    assert set(places) >= {"spectra-compared", "layers-compared", "eigenspaces-compared", "all-runs"}
    assert len(places) == len(set(places))
    assert text.count("<tr") >= len(found.rows)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = record(tmp_path / "a", RUN), record(tmp_path / "b", training(12, 3, 4, loss="mse"))
    assert main(["compare", str(a), "--steps", "0", "200"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Differ: loss on the probe" in said
    assert "kernel drift" in said
    assert (a / "compare.html").is_file()
    out = tmp_path / "both.html"
    assert main(["compare", str(a), str(b), "--out", str(out)]) == 0
    assert "set-up" in capsys.readouterr().out
    assert 'id="compared"' in out.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{a}"], "--steps 0 400"),
        (["{a}", "{a}"], "two different runs"),
        (["{a}", "{b}", "{c}"], "two different runs"),
        (["{a}", "--steps", "0", "7"], "no probe was measured at step 7"),
        (["{a}", "--steps", "0"], "--steps"),
        (["last.ckpt", "--steps", "0", "1"], "ntk-monitor analyze"),
        (["{a}", "{nowhere}"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "a", RUN[:2])
    places = {name: str(tmp_path / name) for name in ("a", "b", "c", "nowhere")}
    assert main(["compare", *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
