"""The tab reads only, serves nothing but its own files, and takes names, numbers and files from nobody on trust."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntk_monitor.dashboard import files, payload
from ntk_monitor.dashboard.plugin import NTKPlugin
from ntk_monitor.errors import InputError
from ntk_monitor.panels import CATALOGUE
from tests.dashboard import Tab, recorded
from tests.histories import HEALTHY

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "a'b\"c",
    "</script><script>alert(1)",
    "ü\u202e\u2028 run",
    "%2e%2e",
    "a&run=b",
)
QUESTIONS = ("version", "manifest", "cards", "findings", "modes", "mode", "sample", "figure")
STATIC = Path(files.__file__).parent / "static"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    logdir = tmp_path_factory.mktemp("logdir")
    recorded(logdir / "run", HEALTHY[:3])
    for name in HOSTILE:
        # A slash parts folders, on disk as in the name of the run.
        recorded(logdir.joinpath(*name.split("/")), HEALTHY[:3])
    (logdir / "secret.js").write_text("secret")
    return Tab(logdir)


def test_hostile_names_travel_as_data(tab: Tab) -> None:
    response = tab.get("runs")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert set(tab.json("runs")["runs"]) == {"run", *HOSTILE}
    for name in HOSTILE:
        assert tab.json("manifest", run=name)["steps"] == [0, 25, 50]
        figure = tab.json("figure", panel="alignment" if _has("alignment") else "spectrum", run=[name], focus=name)
        assert figure["data"]


def _has(panel: str) -> bool:
    return any(entry.name == panel for entry in CATALOGUE)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_no_figure_carries_markup_of_a_run_s_name(tab: Tab, entry: Any) -> None:
    """plotly reads a few tags in titles and legends; a name may only arrive with its brackets escaped."""
    figure = tab.json("figure", panel=entry.name, run=["run", HOSTILE[0]], focus=HOSTILE[0])
    for trace in figure["data"]:
        trace.pop("legendgroup", None)  # which traces go together; never shown
    assert "<img" not in json.dumps(figure)


@pytest.mark.parametrize(
    "path",
    [
        "../plugin.py",
        "..%2fplugin.py",
        "%2e%2e/plugin.py",
        "/etc/passwd",
        "..\\plugin.py",
        "index.js/../../plugin.py",
        "index.js%00.js",
        ".",
        "nothing.js",
        "__init__.py",
        "../../../../../../etc/passwd",
    ],
)
def test_nothing_but_the_page_s_own_files_is_served(tab: Tab, path: str) -> None:
    response = tab.client.get(f"/data/plugin/ntk/static/{path}")
    assert response.status_code == 404
    assert "error" in json.loads(response.data)


@pytest.mark.parametrize("name", sorted(file.name for file in STATIC.iterdir()))
def test_the_page_s_files_are_served_as_what_they_are(tab: Tab, name: str) -> None:
    response = tab.get(f"static/{name}")
    assert response.status_code == 200
    assert response.data == (STATIC / name).read_bytes()
    assert response.mimetype == {".js": "text/javascript", ".css": "text/css"}[Path(name).suffix]


@pytest.mark.parametrize("run", ["../run", "run/../run", "/etc", "..", "", "secret.js", "x" * 10**5, "run\x00"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_runs_are_looked_up_never_opened(tab: Tab, question: str, run: str) -> None:
    response = tab.get(question, run=run, focus=run, panel="gram", mode=1, sample=0)
    answer = json.loads(response.data)
    assert answer["error"]
    assert len(response.data) < 10**4 or len(run) > 4096
    assert response.status_code == (200 if question == "manifest" and 0 < len(run) <= 4096 else 400)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("route", ["runs", "figure", "static/index.js", "plotly.js", "index.js"])
def test_the_tab_only_answers_get(tab: Tab, method: str, route: str) -> None:
    assert tab.get(route, method=method).status_code == 405


@pytest.mark.parametrize(
    "query",
    [
        {"step": "1e9"},
        {"step": "-1"},
        {"step": "9" * 5000},
        {"step": "٣"},
        {"mode": "0"},
        {"mode": "nan"},
        {"sample": "0x1"},
        {"unit": "hours"},
        {"log": "yes"},
        {"panel": "__class__"},
        {"run": [f"run{k}" for k in range(7)]},
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused_in_a_sentence(tab: Tab, query: dict[str, Any]) -> None:
    error = tab.json("figure", 400, **({"panel": "spectrum", "focus": "run"} | query))["error"]
    assert re.search(r"wanted|choose one", error)
    assert len(error) < 1000


def test_missing_arguments_are_named(tab: Tab) -> None:
    assert "?panel=" in tab.json("figure", 400, focus="run")["error"]
    assert "?run=" in tab.json("cards", 400)["error"]
    assert "?sample=" in tab.json("sample", 400, run="run")["error"]


def test_large_but_legal_numbers_are_answered(tab: Tab) -> None:
    for entry in CATALOGUE:
        tab.json("figure", panel=entry.name, focus="run", step=2**62, launch=2**62, mode=1000, sample=1000)


def test_answers_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "LARGEST", 100)
    assert payload.text({"a": "x" * 50})
    with pytest.raises(InputError, match="wanted an answer of at most 100 bytes, got 208"):
        payload.text({"a": "x" * 200})


def test_json_holds_no_nan() -> None:
    odd = {
        "a": [math.nan, math.inf, np.float64(-math.inf), np.int64(3)],
        4: (np.array([1.0, math.nan]), {1.0}, Path("p")),
    }
    assert json.loads(payload.text(odd), parse_constant=pytest.fail) == {
        "a": [None, None, None, 3],
        "4": [[1.0, None], [1.0], "p"],
    }


def test_runs_of_nan_are_answered_without_nan(tmp_path: Path) -> None:
    """Every number of every probe is NaN or infinite, which a diverged run comes close to."""

    def broken(array: Any, value: float) -> Any:
        return np.full(array.shape, value) if array.dtype.kind == "f" else array

    probes = [
        replace(
            s,
            loss_value=math.nan,
            noise_floor=math.inf,
            metrics=dict.fromkeys(s.metrics, math.nan),
            facts=dict.fromkeys(s.facts, math.inf),
            **{
                name: broken(getattr(s, name), value)
                for name in (
                    "eigenvalues",
                    "rates",
                    "coordinates",
                    "carried",
                    "gram",
                    "layer_update",
                    "sample_residual",
                )
            },
        )
        for s, value in zip(HEALTHY[:4], (math.nan, math.inf, -math.inf, math.nan), strict=True)
    ]
    recorded(tmp_path / "nan", probes)
    tab = Tab(tmp_path)
    for entry in CATALOGUE:
        tab.json("figure", panel=entry.name, focus="nan", run=["nan"], mode=1, sample=0)
    for question in QUESTIONS[:-1]:
        tab.json(question, run="nan", mode=1, sample=0)


def test_a_failure_is_a_sentence_and_the_rest_goes_on(
    tab: Tab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret words of another module")

    monkeypatch.setattr(tab.provider, "list_tensors", fails)
    answer = tab.get("manifest", run="run")
    assert answer.status_code == 500
    assert json.loads(answer.data) == {"error": "RuntimeError in the NTK tab; TensorBoard's terminal says where"}
    assert "secret words" in caplog.text
    monkeypatch.undo()
    assert tab.json("manifest", run="run")["steps"]


def test_a_page_without_plotly_is_told_what_to_install(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    files.plotly.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install plotly" in json.loads(tab.get("plotly.js").data)["error"]


def test_the_plugin_needs_nothing_at_the_start(tmp_path: Path) -> None:
    """What TensorBoard asks of every plugin before it serves: no data, no drawing, no file."""
    plugin = Tab(tmp_path).plugin
    assert isinstance(plugin, NTKPlugin)
    assert plugin.is_active() is False
    assert plugin._routes == {}
