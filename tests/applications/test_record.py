"""A report on disk: strict JSON there and back, beside a run, and in the page of the run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_monitor.applications import Number, Report, Table, Verdict
from ntk_monitor.applications.recorded import FROM_HISTORY, beside, of_history
from ntk_monitor.cli import main
from ntk_monitor.errors import InputError
from ntk_monitor.history import History
from ntk_monitor.report import page
from tests.histories import HEALTHY
from tests.snapshots import training
from tests.test_report import record, specs, words

pytestmark = pytest.mark.usefixtures("no_library")

FIGURE: dict[str, Any] = {"data": [{"y": [1.0, None]}], "layout": {"meta": {"tooltip": "tells"}}}


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five megabytes that nothing here looks at.
    monkeypatch.setattr("ntk_monitor.report.frame.plotly", lambda: "/* plotly */")


def made(name: str = "made", **more: Any) -> Report:
    return Report(**{"name": name, "title": f"What {name} found", "summary": "words", **more})


cells = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text()


@given(
    found=st.lists(st.builds(Number, st.text(), st.floats(), st.text(), st.none() | st.floats(), st.none())),
    verdicts=st.lists(st.builds(Verdict, st.text(), st.none() | st.booleans(), st.text())),
    rows=st.lists(st.tuples(cells, cells)),
)
def test_json_and_back_changes_nothing(
    found: list[Number], verdicts: list[Verdict], rows: list[tuple[Any, Any]]
) -> None:
    report = made(
        numbers=tuple(found),
        verdicts=tuple(verdicts),
        tables={"a <b>": Table(("x", "inf"), tuple(rows))},
        figures={"one": FIGURE},
        caveats=("c",),
    )
    text = report.json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    # repr compares nan with nan and tells 1 from 1.0 and True.
    assert repr(Report.from_json(text)) == repr(report)


def test_numbers_of_numpy_become_plain_ones() -> None:
    rows = ((np.int64(3), np.float64(0.5), np.float32(math.inf), np.bool_(True)),)
    back = Report.from_json(made(tables={"t": Table(("a", "b", "c", "d"), rows)}).json())
    assert [type(cell) for cell in back.tables["t"].rows[0]] == [int, float, float, bool]
    assert back.tables["t"].rows[0] == (3, 0.5, math.inf, True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "wanted the report"),
        ("[1]", "wanted the report"),
        ("{}", "schema"),
        ('{"schema": 2}', "update ntk-monitor"),
        (made().json().replace('"numbers": []', '"numbers": [{"name": "x"}]'), "value"),
        (made().json().replace('"verdicts"', '"verdict"'), "verdicts"),
    ],
)
def test_other_texts_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Report.from_json(text)


def put(run: Path, report: Report) -> Path:
    path = run / "ntk_apps" / report.name / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(report.json(), encoding="utf-8")
    return path


def test_reports_beside_a_run_are_found_and_damage_is_named(tmp_path: Path) -> None:
    put(tmp_path, made("two"))
    put(tmp_path, made("one"))
    put(tmp_path, made("three")).write_text("{", encoding="utf-8")
    found, notes = beside(tmp_path)
    assert [one.name for one in found] == ["one", "two"]
    assert len(notes) == 1
    assert "three" in notes[0]
    assert beside(tmp_path / "nowhere") == ([], [])


def test_a_history_answers_what_it_holds_the_inputs_of() -> None:
    full = History(tuple(training(20, 1, probes=4, loss="mse", every=10)))
    found, notes = of_history(full)
    assert {one.name for one in found} | {note.split()[0] for note in notes} == set(FROM_HISTORY)
    assert [one.name for one in found] == ["learning_speed", "lazy_or_rich"]
    assert "early_stopping cannot be answered" in notes[0]
    assert of_history(History(()))[0] == []


def test_page_has_a_section_for_each_and_figures_do_not_meet() -> None:
    several = {name: [made("same", figures={"f": FIGURE}), made("same", figures={"f": FIGURE})] for name in ("a", "b")}
    text = page({"a": History(HEALTHY), "b": History(HEALTHY[:3])}, applied=several)
    keys = [f"{k}-app-{n}" for k in (0, 1) for n in (0, 1)]
    for key in keys:
        assert f'<section class="run" id="{key}">' in text
        assert f'href="#{key}"' in text
        assert specs(text)[f"{key}-f"] == FIGURE
    assert words(text).count("What same found</h2>") == 4
    assert "Asked of this run" not in page({"a": History(HEALTHY)})


def test_app_on_a_history_is_in_the_report_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = record(tmp_path / "version_0", training(20, 1, probes=4, loss="mse", every=10))
    assert main(["app", "learning_speed", "--history", str(run)]) == 0
    assert (run / "ntk_apps" / "learning_speed" / "report.json").is_file()
    put(run, made("other")).write_text("not JSON", encoding="utf-8")
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert "is left out" in capsys.readouterr().out
    shown = words((run / "report.html").read_text(encoding="utf-8"))
    # From the record; the history says the same.
    assert shown.count("<h2>Learning speed of a run") == 1
    assert "<h2>Lazy or rich" in shown
