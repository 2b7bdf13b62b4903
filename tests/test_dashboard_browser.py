"""The NTK tab in a browser: what a reader sees and does, on a run of the digits demo's network.

All tests share one TensorBoard and one browser; after each of them nothing may stand in the browser's log.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard import recorded
from tests.histories import HEALTHY

browser = pytest.importorskip("tests.browser", reason="needs selenium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING),
]

PROBES = 6
STEP = re.compile(r"&step=(\d+)")
# Where the third point of a figure's first trace lies within its plot, in pixels.
POINT = """(function (plot) {
    const { xaxis, yaxis } = plot._fullLayout, { x, y } = plot._fullData[0];
    return [xaxis._offset + xaxis.d2p(x?.[2] ?? 2), yaxis._offset + yaxis.d2p(y?.[2] ?? 5)];
})(arguments[0])"""
HOSTILE_RUN = "<img src=x onerror=window.top.broken=1>"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the run, which a test may train further."""
    logdir = tmp_path_factory.mktemp("logdir")
    run = browser.Digits(logdir / "digits")
    run.train(PROBES)
    recorded(logdir / HOSTILE_RUN, HEALTHY)
    return run


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the browser saves files."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def opened(digits: Any, downloads: Path) -> Iterator[Any]:
    """Yield the tab; its address says that of the runs the digits alone is ticked."""
    with browser.tensorboard(digits.out.parent, runs=2) as address, browser.chromium(downloads) as driver:
        tab = browser.Tab(driver, address)
        tab.open("&p.ntk.runs=digits")
        yield tab


@pytest.fixture
def tab(opened: Any) -> Iterator[Any]:
    """Yield the tab as it is left by the test before, and refuse what the browser logged meanwhile."""
    yield opened
    assert opened.errors() == []


def box(tab: Any, run: str) -> Any:
    """Return the checkbox of a run."""
    return tab.until(lambda: [label for label in tab.all(".chips .run") if label.text == run])[0]


def ticked(tab: Any, run: str) -> bool:
    """Whether a run is ticked."""
    found = tab.until(lambda: (box(tab, run).find_element("css selector", "input").is_selected(),))
    return bool(found[0])


def drawn(tab: Any, panel: str) -> Any:
    """Return a panel once it is in view and drawn."""
    tab.show(f"#panel-{panel}")
    return tab.until(lambda: tab.all(f"#panel-{panel}[data-state=drawn]"))[0]


def asked(tab: Any) -> list[str]:
    """Return the panels whose figures were fetched since the last call."""
    urls = tab.read("performance.getEntriesByType('resource').map((entry) => entry.name)")
    tab.read("performance.clearResourceTimings()")
    return [found.group(1) for url in urls if (found := re.search(r"/figure\?panel=([\w-]+)", url))]


def catalogue(tab: Any) -> dict[str, Any]:
    """Return the panels by name."""
    return {panel["name"]: panel for panel in browser.asked(tab.address, "catalogue")["panels"]}


def at(tab: Any) -> int:
    """Return the step that the bar shows."""
    return int(tab.text(".walk .said b").removeprefix("step "))


def slide(tab: Any, by: str, times: int) -> None:
    """Move the step slider by keys."""
    tab.press("#step", by, times)
    tab.settle()


def test_the_address_says_what_is_ticked(tab: Any) -> None:
    assert tab.says(".subject b", "digits")
    assert ticked(tab, "digits")
    assert not ticked(tab, HOSTILE_RUN)


def test_a_hostile_name_of_a_run_is_text(tab: Any) -> None:
    box(tab, HOSTILE_RUN).click()
    tab.until(lambda: tab.one(".focus").is_displayed())
    assert {label.text for label in tab.all(".chips .run")} == {HOSTILE_RUN, "digits"}
    assert HOSTILE_RUN in [option.text for option in tab.all(".focus option")]
    tab.choose("#focus", HOSTILE_RUN)
    tab.settle()
    assert tab.says(".subject b", HOSTILE_RUN)
    for panel in ("learning-rate-interval", "spectrum", "alignment"):
        tab.show(f"#panel-{panel}")
    assert tab.until(lambda: HOSTILE_RUN in tab.text("#panel-alignment .legend"))
    assert not tab.all("img[src='x']")
    assert tab.read("window.top.broken === undefined")
    box(tab, HOSTILE_RUN).click()
    tab.until(lambda: not tab.one(".focus").is_displayed())
    tab.settle()
    assert tab.says(".subject b", "digits")


def test_every_panel_draws(tab: Any) -> None:
    names = [panel.get_attribute("data-panel") for panel in tab.all("main .panel")]
    behind = {"mode-samples", "sample-row", "sample-residual"}
    assert set(names) == (set(catalogue(tab)) - behind) | {"modes"}
    for name in names:
        panel = drawn(tab, name)
        assert panel.find_element("css selector", "figcaption").text
        assert "kernel" in panel.find_element("css selector", ".tip").get_attribute("textContent")
        if name != "modes":
            # Not one of them falls back on words for why it is empty.
            assert tab.read("arguments[0].querySelector('.plot').data.length > 0", panel), name
            assert panel.find_elements("css selector", ".main-svg .plot, .main-svg .imagelayer"), name


def test_numbers_and_findings_come_first(tab: Any) -> None:
    tab.show(".cards")
    cards = {card.get_attribute("data-card"): card for card in tab.all(".card")}
    assert len(cards) >= 6
    rate = cards["learning rate"]
    assert re.fullmatch(r"could be multiplied by [\d.]+ to [\d.]+", rate.find_element("css selector", "b").text)
    assert {"green", "amber", "red"} & set(str(rate.get_attribute("class")).split())
    assert "safe" not in tab.text(".cards").lower()
    assert tab.all(".findings .finding")


def test_the_slider_asks_only_what_depends_on_the_step(tab: Any) -> None:
    tab.show("#panel-spectrum")
    panels = catalogue(tab)
    title, before = tab.text("#panel-spectrum h3"), tab.text(".cards")
    asked(tab)
    last = at(tab)
    slide(tab, "ARROW_LEFT", 2)
    assert tab.until(lambda: at(tab) < last)
    assert tab.until(lambda: tab.text("#panel-spectrum h3") != title)
    assert tab.until(lambda: tab.text(".cards") != before)
    tab.settle()
    fetched = asked(tab)
    assert fetched
    assert all("step" in panels[name]["depends"] for name in fetched)
    slide(tab, "END", 1)
    assert tab.until(lambda: at(tab) == last)
    assert "latest" in tab.text(".walk .said")


def test_play_walks_to_the_end(tab: Any) -> None:
    tab.show("#panel-spectrum")
    last = at(tab)
    tab.read("performance.clearResourceTimings()")
    tab.click("#play")

    def walked() -> bool:
        # From the end it begins anew. One picture after the other, so that each step was drawn.
        urls = tab.read("performance.getEntriesByType('resource').map((entry) => entry.name)")
        steps = {found.group(1) for url in urls if "panel=spectrum&" in url and (found := STEP.search(url))}
        return len(steps) >= PROBES - 1

    tab.until(walked)
    assert tab.says("#play", "▶")
    assert tab.until(lambda: at(tab) == last)


def test_units_and_linear_axes(tab: Any) -> None:
    tab.show("#panel-learning-rate-interval")
    axis = "#panel-learning-rate-interval .xtitle"
    words = {}
    for unit in ("epoch", "time", "step"):
        tab.one(f".units [data-unit={unit}]").click()
        tab.settle()
        words[unit] = tab.text(axis)
    assert len(set(words.values())) == 3, words
    log = tab.one("#panel-spectrum [data-does=log]")
    tab.show("#panel-spectrum")
    kind = "document.querySelector('#panel-spectrum .plot')._fullLayout.yaxis.type"
    assert tab.until(lambda: tab.read(kind) == "log")
    log.click()
    assert tab.until(lambda: tab.read(kind) == "linear")
    tab.until(lambda: "linear=spectrum" in tab.read("parent.location.hash"))
    log.click()
    assert tab.until(lambda: tab.read(kind) == "log")


def test_a_mode_opens_its_samples_and_a_sample_its_row(tab: Any) -> None:
    tab.show("#panel-modes")
    order = "[...document.querySelectorAll('#panel-modes tbody tr')].map((row) => +row.dataset.mode)"
    by_rank = tab.read(order)
    assert by_rank == sorted(by_rank)
    tab.click("#panel-modes th:nth-child(3) button")
    assert tab.one("#panel-modes th:nth-child(3)").get_attribute("aria-sort") == "descending"
    assert tab.read(order) != by_rank
    tab.click("#panel-modes th:nth-child(1) button")
    tab.click("#panel-modes tr[data-mode='2']")
    assert tab.says(".drawer h2", "Mode 2")
    drawn(tab, "mode-samples")
    samples = tab.until(lambda: tab.all(".drawer .sample"))
    # The picture of a digit, as it came over the wire.
    assert tab.until(lambda: tab.read("arguments[0].querySelector('img').naturalWidth", samples[0])) >= 8
    index = samples[0].get_attribute("data-sample")
    samples[0].click()
    assert tab.says(".drawer h2", f"Sample {index}")
    for name in ("sample-row", "sample-residual"):
        drawn(tab, name)
        assert tab.read(f"document.querySelector('#panel-{name} .plot').data.length") > 0
    tab.press(".drawer", "ESCAPE")
    assert tab.until(lambda: not tab.one(".drawer").is_displayed())


@pytest.mark.parametrize(("panel", "opens"), [("spectrum", "Mode 3"), ("kernel-map", "Sample"), ("gram", "Sample")])
def test_a_click_on_a_point_opens_what_is_behind(tab: Any, panel: str, opens: str) -> None:
    plot = tab.show(f"#panel-{panel} .plot")
    tab.click_at(plot, *tab.read(POINT, plot))
    assert tab.until(lambda: tab.text(".drawer h2").startswith(opens))
    tab.settle()
    tab.click("#close")


def test_the_launch_of_a_forecast_is_dragged(tab: Any) -> None:
    tab.show("#panel-loss-forecast")
    panels = catalogue(tab)
    handle = tab.one("#panel-loss-forecast .launch")
    before, place = handle.text, handle.location["x"]
    asked(tab)
    # The run made two forecasts, early and late; the early one is drawn, as later probes can judge it.
    tab.drag(handle, 330)
    tab.settle()
    assert tab.until(lambda: handle.text != before)
    assert tab.until(lambda: handle.location["x"] > place + 100)
    tab.settle()
    fetched = set(asked(tab))
    assert "loss-forecast" in fetched
    assert all("launch" in panels[name]["depends"] for name in fetched)
    assert tab.says(".launches output", handle.text.removeprefix("from "))
    tab.until(lambda: f"launch={handle.text.removeprefix('from ')}" in tab.read("parent.location.hash"))


def test_the_page_follows_tensorboard_into_the_dark(tab: Any) -> None:
    ink = "getComputedStyle(document.querySelector('#panel-spectrum .xtick text')).fill"
    tab.show("#panel-spectrum")
    light = tab.read(ink)
    assert tab.read("document.documentElement.dataset.theme") == "light"
    tab.driver.switch_to.default_content()
    tab.one("app-header-dark-mode-toggle button").click()
    dark = next(item for item in tab.until(lambda: tab.all(".mat-mdc-menu-item")) if "Dark" in item.text)
    dark.click()
    tab.driver.switch_to.frame(tab.one("iframe"))
    tab.until(lambda: tab.read("document.documentElement.dataset.theme") == "dark")
    assert tab.until(lambda: tab.read(ink) != light)
    tab.one("#theme").click()
    assert tab.until(lambda: tab.read("document.documentElement.dataset.theme") == "light")


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("csv", b"series,")])
def test_a_panel_can_be_saved(tab: Any, downloads: Path, kind: str, begins: bytes) -> None:
    tab.show("#panel-spectrum").find_element("css selector", f"[data-does={kind}]").click()
    file = downloads / f"ntk-spectrum.{kind}"
    tab.until(lambda: file.exists() and file.stat().st_size)
    assert file.read_bytes().startswith(begins)
    if kind == "csv":
        rows = file.read_text().splitlines()
        assert "eigenvalue" in rows[0]
        assert len(rows) > 100


def test_a_narrow_page_does_not_scroll_sideways(tab: Any) -> None:
    tab.driver.set_window_size(900, 800)
    tab.settle()
    assert tab.until(lambda: tab.read("innerWidth") < 1000)
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert tab.until(lambda: tab.read(wide))
    plots = "[...document.querySelectorAll('main .plot .main-svg')].every((p) => p.clientWidth < innerWidth)"
    assert tab.until(lambda: tab.read(plots))
    tab.driver.set_window_size(1440, 1000)


def test_probes_appear_while_training_goes_on_and_a_run_that_is_gone_goes(tab: Any, digits: Any) -> None:
    tab.show("#panel-learning-rate-interval")
    count = "document.querySelector('#step').max"
    drawn = "Math.max(...document.querySelector('#panel-learning-rate-interval .plot').data[0].x)"
    assert int(tab.read(count)) + 1 == PROBES
    tab.read("window.stayed = true")
    last = tab.read(drawn)
    # Nobody touches anything: the page looks by itself.
    shutil.rmtree(digits.out.parent / HOSTILE_RUN)
    now = digits.train(2)
    tab.until(lambda: int(tab.read(count)) + 1 == now)
    tab.until(lambda: tab.read(drawn) > last)
    tab.until(lambda: [label.text for label in tab.all(".chips .run")] == ["digits"])
    assert "latest" in tab.text(".walk .said")
    # And after TensorBoard's own reload, where the page does not look by itself any more.
    tab.read("Array.from({ length: 10000 }, (_, i) => clearInterval(i)).length")
    now = digits.train(1)
    # Its server has to see the file's end first.
    tab.until(lambda: len(browser.asked(tab.address, "manifest?run=digits")["steps"]) == now)
    tab.driver.switch_to.default_content()
    tab.one(".reload-button, [aria-label*='eload']").click()
    tab.driver.switch_to.frame(tab.one("iframe"))
    tab.until(lambda: int(tab.read(count)) + 1 == now)
    assert tab.read("window.stayed")
