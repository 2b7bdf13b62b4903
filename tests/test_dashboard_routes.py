"""What the page asks and what it is answered, through TensorBoard's own routing but without a socket."""

import base64
import gzip
import json
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.context import RequestContext

from ntk_monitor.cards import cards
from ntk_monitor.dashboard import payload
from ntk_monitor.dashboard.answers import BLOBS
from ntk_monitor.dashboard.bulk import Asked
from ntk_monitor.dashboard.pictures import png
from ntk_monitor.dashboard.store import Store
from ntk_monitor.health import findings
from ntk_monitor.history import load_history
from ntk_monitor.mode_table import mode_table
from ntk_monitor.panels import CATALOGUE, GROUPS, View, draw
from ntk_monitor.snapshot import Snapshot
from tests.dashboard import Tab, recorded
from tests.histories import CLASSES, EVERY, HEALTHY, facts

NAMES = [entry.name for entry in CATALOGUE]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    logdir = tmp_path_factory.mktemp("logdir")
    recorded(logdir / "one", HEALTHY)
    recorded(logdir / "two", HEALTHY[:5])
    light = Snapshot(step=60, wall_time=1.8e9, status="light", metrics={"trace": 950.0}, previous_step=50)
    skipped = Snapshot(step=70, wall_time=1.8e9 + 1, status="skipped", reason="no memory")
    recorded(logdir / "mixed", [*HEALTHY[:3], light, skipped])
    return Tab(logdir)


def listed(tab: Tab) -> Any:
    return json.loads(tab.client.get("/data/plugins_listing").data)["ntk"]


def test_the_tab_is_offered_where_there_is_data(tab: Tab, tmp_path: Path) -> None:
    listing = listed(tab)
    assert (listing["enabled"], listing["tab_name"]) == (True, "NTK")
    assert listing["loading_mechanism"] == {"type": "IFRAME", "module_path": "/data/plugin/ntk/index.js"}
    assert not listed(Tab(tmp_path))["enabled"]


def test_a_logdir_without_probes_has_no_runs(tmp_path: Path) -> None:
    recorded(tmp_path / "empty", ())
    tab = Tab(tmp_path)
    assert tab.json("runs") == {"runs": []}
    assert "no run with probes" in tab.json("manifest", run="empty")["error"]


def test_runs_are_named(tab: Tab) -> None:
    assert tab.json("runs") == {"runs": ["mixed", "one", "two"]}


def test_the_catalogue_lists_every_panel_with_its_question(tab: Tab) -> None:
    catalogue = tab.json("catalogue")
    assert [panel["name"] for panel in catalogue["panels"]] == NAMES
    assert list(catalogue["groups"]) == list(GROUPS)
    assert {panel["group"] for panel in catalogue["panels"]} <= set(GROUPS)
    assert "unnormalised" in catalogue["about"]


def test_the_manifest_says_what_can_be_chosen(tab: Tab) -> None:
    found = tab.json("manifest", run="one")
    assert found["steps"] == [k * EVERY for k in range(12)]
    assert found["launches"] == found["steps"]
    assert found["launch"] == 9 * EVERY  # the last with a quarter of the 300 steps to go
    assert (found["samples"], found["outputs"], found["modes"], found["total_steps"]) == (64, 3, 10, 300)
    assert "K = J J^T" in found["kernel"]
    assert (found["error"], found["light_steps"]) == (None, [])
    # The monitor wrote the rate at every step; times are their sum up to each probe. Epochs were not recorded.
    rates = np.concatenate([s.lr_values[:, 0] for s in HEALTHY])
    assert found["times"] is None
    assert tab.json("manifest", run="one", unit="time")["times"] == pytest.approx(
        [rates[:step].sum() for step in found["steps"]], rel=1e-5
    )
    assert found["epochs"] == [None] * 12


def test_the_version_is_told_before_a_run_is_read(tab: Tab) -> None:
    fresh = Tab(tab.logdir)
    asked: list[Any] = []
    read = fresh.provider.read_tensors

    def counted(*given: Any, **options: Any) -> Any:
        asked.append(options)
        return read(*given, **options)

    fresh.provider.read_tensors = counted
    version = fresh.json("version", run="one")["version"]
    assert not asked
    assert version == fresh.json("manifest", run="one")["version"]
    assert asked
    assert version != fresh.json("version", run="two")["version"]


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE if "launch" in entry.depends])
def test_figures_and_controls_agree_on_the_launch_that_nobody_chose(tmp_path: Path, name: str) -> None:
    # Losses that are not known any more hide probes from one figure alone.
    recorded(tmp_path / "run", [replace(s, loss_value=np.nan) if k > 5 else s for k, s in enumerate(HEALTHY)])
    tab = Tab(tmp_path)
    launch = tab.json("manifest", run="run")["launch"]
    assert tab.json("figure", panel=name, run="run") == tab.json("figure", panel=name, run="run", launch=launch)


def test_light_and_skipped_probes_are_no_steps_of_the_slider(tab: Tab) -> None:
    found = tab.json("manifest", run="mixed")
    assert (found["steps"], found["light_steps"]) == ([0, 25, 50], [60])


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_is_answered_for_every_kind_of_run(tab: Tab, name: str) -> None:
    for focus in ("one", "two", "mixed"):
        figure = tab.json("figure", panel=name, run=["one", "two"], focus=focus, step=60, mode=2, sample=3)
        assert {"data", "layout"} <= figure.keys()
        assert figure["layout"]["meta"]["tooltip"]
        assert "kernel" in figure["layout"]["meta"]


@pytest.mark.parametrize("name", NAMES)
def test_only_panels_of_blobs_need_blobs(tab: Tab, name: str) -> None:
    reading = Store(tab.provider).reading(Asked(RequestContext(), ""), "one")
    view = View(step=150, mode=2, sample=3)
    closed, opened = (draw(name, {"one": history}, view) for history in (reading.history, reading.opened(150)))
    assert (payload.text(closed) != payload.text(opened)) == (name in BLOBS)


def test_a_figure_follows_the_step_and_the_focus(tab: Tab) -> None:
    def spectrum(**query: Any) -> Any:
        return tab.json("figure", panel="spectrum", run=["one"], **query)

    assert spectrum(step=50) == spectrum(step=50)
    assert spectrum(step=50) != spectrum(step=275)
    assert spectrum() == spectrum(step=275)


def test_findings_are_those_of_health(tmp_path: Path) -> None:
    sick = facts(frozen=5000, coverage=0.0)([replace(s, loss_value=float(9**k)) for k, s in enumerate(HEALTHY)])
    recorded(tmp_path / "sick", sick)
    found = Tab(tmp_path).json("findings", run="sick")["findings"]
    assert found
    expected = findings(load_history(tmp_path / "sick").snapshots)
    assert [(one["rule"], one["severity"], tuple(one["steps"])) for one in found] == [
        (one.rule, one.severity, one.steps) for one in expected
    ]


def test_cards_are_those_of_the_step(tab: Tab) -> None:
    for step in (None, 100):
        found = tab.json("cards", run="one", **({} if step is None else {"step": step}))["cards"]
        expected = cards(load_history(tab.logdir / "one"), View(step=step))
        assert [(one["name"], one["value"], one["light"]) for one in found] == [
            (one.name, one.value, one.light) for one in expected
        ]
        assert found


def test_the_table_of_modes_is_that_of_the_nearest_probe(tab: Tab) -> None:
    found = tab.json("modes", run="one", step=110)
    history = load_history(tab.logdir / "one")
    expected = mode_table(history[4], history[3], history)
    assert found["step"] == 100
    assert [column["name"] for column in found["columns"]] == [column.name for column in expected.columns]
    assert [tuple(row) for row in found["rows"]] == list(expected.rows)
    assert tab.json("modes", run="one")["step"] == 275
    assert tab.json("modes", run="one", step=0)["rows"]


def test_a_mode_shows_the_samples_on_either_side(tab: Tab) -> None:
    found = tab.json("mode", run="one", step=100, mode=2)
    loadings = HEALTHY[4].mode_samples[1]
    assert found["step"] == 100
    assert [one["sample"] for one in found["positive"]] == np.argsort(-loadings)[:8].tolist()
    assert [one["sample"] for one in found["negative"]] == np.argsort(loadings)[:8].tolist()
    assert found["outputs"] == pytest.approx(HEALTHY[4].mode_outputs[1].tolist(), abs=1e-6)
    first = found["positive"][0]
    assert first["loading"] == pytest.approx(loadings.max(), abs=1e-6)
    assert first["label"] == CLASSES[first["sample"]]
    assert first["text"] == f"sample {first['sample']} of class {first['label']}"
    assert first["thumbnail"].startswith("data:image/png;base64,")


def test_a_sample_has_its_picture(tab: Tab) -> None:
    found = tab.json("sample", run="one", sample=7)
    assert (found["sample"], found["label"]) == (7, 1)
    written = base64.b64decode(found["thumbnail"].partition(",")[2])
    np.testing.assert_array_equal(decoded(written), HEALTHY[0].thumbnails[7])


def test_a_run_without_pictures_says_so_with_null(tmp_path: Path) -> None:
    bare = [
        replace(s, thumbnails=np.empty(0), sample_texts=(), labels=np.empty(0), mode_samples=np.empty(0))
        for s in HEALTHY[:2]
    ]
    recorded(tmp_path / "bare", bare)
    tab = Tab(tmp_path)
    assert tab.json("sample", run="bare", sample=0) == {"sample": 0, "label": None, "text": None, "thumbnail": None}
    assert "was not stored" in tab.json("mode", 400, run="bare", mode=1)["error"]


def test_modes_and_samples_end_somewhere(tab: Tab) -> None:
    assert "first 10 modes" in tab.json("mode", 400, run="one", mode=11)["error"]
    assert "samples 0 to 63" in tab.json("sample", 400, run="one", sample=64)["error"]


def test_the_page_is_there_and_what_it_will_ask_for_gets_ready(tmp_path: Path) -> None:
    tab = Tab(tmp_path)
    assert b"render" in tab.get("index.js").data
    until = time.monotonic() + 30
    while not tab.plugin._routes and time.monotonic() < until:
        time.sleep(0.01)
    assert "figure" in tab.plugin._routes


def test_a_run_that_measured_nothing_yet_has_an_empty_table(tmp_path: Path) -> None:
    recorded(tmp_path / "run", [Snapshot(step=0, wall_time=1.7e9, status="skipped", reason="no memory")])
    tab = Tab(tmp_path)
    assert tab.json("modes", run="run")["rows"] == []
    assert tab.json("manifest", run="run")["steps"] == []
    for entry in CATALOGUE:
        tab.json("figure", panel=entry.name, focus="run", run=["run"])


def decoded(written: bytes) -> np.ndarray[Any, Any]:
    """A PNG read by the letter of its format: chunks with sound checksums, unfiltered rows."""
    assert written[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(written):
        (length,) = struct.unpack(">I", written[place : place + 4])
        kind, content = written[place + 4 : place + 8], written[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", written[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(kind + content)
        chunks[kind] = content
        place += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3}[colour])


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 1), (4, 7, 3)])
def test_pictures_survive_png(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(decoded(png(pixels)), pixels)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (0, 4, 1)])
def test_other_shapes_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"wanted pixels of \(height, width, 1 or 3\)"):
        png(np.zeros(shape, np.uint8))


@pytest.mark.whole
def test_plotly_comes_from_the_installed_package(tab: Tab) -> None:
    response = tab.client.get("/data/plugin/ntk/plotly.js", headers={"Accept-Encoding": "gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert "max-age=86400" in response.headers["Cache-Control"]
    assert b"plotly.js v" in gzip.decompress(response.data)[:2000]
    assert b"plotly.js v" in tab.get("plotly.js").data[:2000]
