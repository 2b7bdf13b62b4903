"""The report: one file, no network, words before figures, nothing in it that a name could inject."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntk_monitor import figures
from ntk_monitor.cards import cards
from ntk_monitor.cli import main
from ntk_monitor.errors import InputError
from ntk_monitor.health import findings
from ntk_monitor.history import History
from ntk_monitor.panels import CATALOGUE, View, draw
from ntk_monitor.recorder import Recorder
from ntk_monitor.report import GROUPS, page, panels, write
from ntk_monitor.report.panels import choices
from ntk_monitor.snapshot import Snapshot
from tests.histories import HEALTHY, edit
from tests.snapshots import skipped, training, without_modes

HISTORIES = {
    "healthy": History(HEALTHY),
    "classification": History(tuple(training(12, 3))),
    "nothing": History(()),
    "skipped": History((skipped(0), skipped(10))),
    "without modes": History(tuple(without_modes(one) for one in training(5, 2))),
    "bare": History((Snapshot(step=3, wall_time=0.0),)),
}


def specs(text: str, name: str = "figures") -> dict[str, Any]:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    parsed: dict[str, Any] = json.loads(found.group(1))
    return parsed


def words(text: str) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    # Five megabytes that only one test looks at.
    if "whole" not in request.keywords:
        monkeypatch.setattr("ntk_monitor.report.frame.plotly", lambda: "/* plotly */")


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_gives_a_page_with_every_panel(name: str) -> None:
    text = page({name: HISTORIES[name]})
    drawn = specs(text)
    places = re.findall(r'<div class="plot" id="([^"]+)"', text)
    assert set(places) == set(drawn)
    assert len(places) == len(set(places))
    for panel in panels(HISTORIES[name]):
        assert panel.group in GROUPS
        assert panel.tells
        assert drawn[f"0-{panel.name}"] == json.loads(json.dumps(panel.figure))
    assert "what it means" in text


def test_a_panel_shows_the_numbers_of_the_history() -> None:
    drawn = specs(page({"run": HISTORIES["healthy"]}))
    interval = {trace["name"]: trace for trace in drawn["0-learning-rate-interval"]["data"]}
    assert interval["bound of full batches"]["y"] == [one.metrics["lr_headroom_high"] for one in HEALTHY]
    layers = drawn["0-layer-updates"]["data"]
    assert [trace["name"] for trace in layers] == [*HEALTHY[0].layers, f"step {HEALTHY[-1].step}"]
    assert [trace["y"][0] for trace in layers[:-1]] == pytest.approx(HEALTHY[0].layer_update)
    loss = drawn["0-loss-forecast"]["data"][-1]
    assert loss["y"] == pytest.approx([one.loss_value for one in HEALTHY], rel=1e-5)


def test_findings_stand_on_top_and_lead_to_their_panels() -> None:
    sick = edit(metrics={"lr_headroom_high": 0.2, "lr_headroom_low": 0.1}, loss=[1.1 + k for k in range(12)])(HEALTHY)
    found = [one for one in findings(sick) if one.severity == "error"]
    assert found
    text = words(page({"sick": History(tuple(sick))}))
    assert text.index(f"error: {found[0].rule.replace('_', ' ')}") < text.index("<table")
    assert f'href="#run-0-{found[0].panel.replace(" ", "-")}"' in text
    assert "No error and no warning" in words(page({"well": HISTORIES["healthy"]}))


def test_names_and_texts_cannot_become_markup() -> None:
    evil = "<img src=x onerror=alert(1)></script>"
    snapshots = tuple(replace(one, layers=(evil, *one.layers[1:]), loss_status=evil) for one in HEALTHY)
    text = page({evil: History(snapshots, notes=(evil,)), "other": HISTORIES["healthy"]})
    assert "<img" not in words(text)
    assert text.count("</script>") == 4  # ours: the figures, the choices, plotly, the page's own
    # A figure holds it as plotly shows every letter of it.
    assert specs(text)["0-layer-share"]["data"][0]["name"].startswith("…")
    assert "&lt;" in specs(text)["all-alignment"]["data"][0]["name"]


def test_several_runs_stand_side_by_side() -> None:
    text = page({"one": HISTORIES["healthy"], "two": HISTORIES["classification"]})
    both = specs(text)["all-runs"]
    assert {trace["name"] for trace in both["data"]} == {"one", "two"}
    losses = [trace for trace in both["data"] if trace.get("xaxis") == "x"]
    assert losses[0]["x"] == [one.step for one in HEALTHY]
    assert '<section class="run" id="run-1">' in text
    for name in ("learning-rate-interval", "spectrum", "alignment", "kernel-drift"):
        drawn = json.dumps(specs(text)[f"all-{name}"])
        assert '"one' in drawn
        assert '"two' in drawn


def test_a_reader_can_choose_a_step_a_forecast_a_mode_and_a_sample() -> None:
    text = page({"run": HISTORIES["healthy"]})
    turned = specs(text, "others")
    for choice in choices(HISTORIES["healthy"]):
        places = re.findall(rf'id="(0-[^"]+)" data-axis="{choice.axis}"', text)
        assert places
        for key in places:
            assert len(turned[key]) == len(choice.stops)
            view: dict[str, Any] = {choice.axis: choice.stops[0]}
            expected = draw(key.removeprefix("0-"), {"": HISTORIES["healthy"]}, View(**view))
            expected["layout"]["meta"].pop("launches", None)
            assert turned[key][0] == json.loads(json.dumps(expected))
        assert f'data-axis="{choice.axis}"' in text.split('class="controls"')[1].split("</div>")[0]
    assert {choice.axis for choice in choices(HISTORIES["healthy"])} == {"step", "launch", "mode", "sample"}


def test_nothing_can_be_chosen_of_a_run_without_probes() -> None:
    assert choices(HISTORIES["nothing"]) == ()
    assert 'class="controls"' not in page({"run": HISTORIES["nothing"]})


def test_gram_matrices_of_many_samples_do_not_fill_the_file() -> None:
    large = tuple(replace(one, gram=np.eye(256), samples=256) for one in HEALTHY)
    step = next(choice for choice in choices(History(large)) if choice.axis == "step")
    assert step.stops == (0, HEALTHY[-1].step)


def test_cards_and_modes_stand_beside_the_figures() -> None:
    text = words(page({"run": HISTORIES["healthy"]}))
    for card in cards(HISTORIES["healthy"]):
        assert html.escape(card.value) in text
        assert f'class="card {card.light}"' in text
    assert "10 fastest modes" in text
    assert text.count("which kernel?") == len(CATALOGUE)


@pytest.mark.whole
def test_a_thousand_probes_fit_in_eight_megabytes_and_need_no_network(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    long = tuple(
        replace(
            HEALTHY[k % len(HEALTHY)],
            step=k * 20,
            eigenvalues=np.sort(generator.lognormal(size=640))[::-1],
            rates=np.sort(generator.lognormal(size=640))[::-1],
            coordinates=generator.normal(size=640),
            carried=generator.normal(size=640),
            previous_step=k * 20 - 20,
            time_to_learn=np.sort(generator.lognormal(size=640)),
            metrics={name: float(generator.lognormal()) for name in HEALTHY[0].metrics},
        )
        for k in range(1000)
    )
    several = write({f"run {k}": History(long) for k in range(2)}, tmp_path / "several.html")
    assert several.stat().st_size < 8e6
    path = write({"long": History(long)}, tmp_path / "made" / "report.html")
    assert path.stat().st_size < 8e6
    text = path.read_text()
    assert "Plotly" in text
    # Addresses inside plotly.js are words of its own; nothing of ours is loaded from anywhere.
    ours = text[: text.index('<script type="application/json"')]
    assert not re.search(r"(src|href)=\"?(https?:)?//", ours)
    assert not list(path.parent.glob("*.part"))


def test_without_plotly_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install plotly"):
        page({"run": HISTORIES["bare"]})


def test_no_run_is_refused() -> None:
    with pytest.raises(InputError, match="at least one run"):
        page({})


def record(directory: Path, snapshots: Any) -> Path:
    with Recorder(directory) as recorder:
        for one in snapshots:
            recorder.write(one, stock=False)
    return directory


def test_the_command_writes_the_file_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = record(tmp_path / "a" / "version_0", HEALTHY)
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    said = capsys.readouterr().out
    assert "effective rank" in said
    assert "report.html" in said
    other = record(tmp_path / "b" / "version_0", HEALTHY[:4])
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert "<h2>a/version_0</h2>" in (tmp_path / "both.html").read_text()


def test_strict_turns_errors_into_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sick = edit(metrics={"lr_headroom_high": 0.2, "lr_headroom_low": 0.1}, loss=[1.1 + k for k in range(12)])(HEALTHY)
    run = record(tmp_path, sick)
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), "--strict"]) == 1
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "figure",
    [
        figures.learning_rate_interval,
        figures.loss_forecast,
        figures.forecast_error,
        figures.residual_reach,
        figures.layer_updates,
        figures.named_residuals,
    ],
)
def test_missing_numbers_leave_their_reason(figure: Any) -> None:
    one = Snapshot(
        step=1,
        wall_time=0.0,
        loss_status="not verified",
        texts=dict.fromkeys(("stability", "ahead", "updates", "directions"), "not measured: rain"),
    )
    empty = figure([one])
    assert not empty["data"]
    assert empty["layout"]["annotations"][0]["text"]
    assert not figure([])["data"]


def test_learning_rates_are_steps_that_reach_the_end() -> None:
    drawn = figures.learning_rates([0, 3], [[0.1, 0.2], [0.05, float("nan")]], 9)
    assert [trace["x"] for trace in drawn["data"]] == [[0, 3, 9]] * 2
    assert drawn["data"][0]["y"] == [0.1, 0.05, 0.05]
    assert drawn["data"][1]["y"] == [0.2, None, None]
