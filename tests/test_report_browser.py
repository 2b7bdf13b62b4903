"""The report in a browser: opened from disk without a network, every figure drawn, choices and colours at work."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from ntk_monitor.history import History
from ntk_monitor.panels import CATALOGUE
from ntk_monitor.report import write
from tests import browser
from tests.histories import HEALTHY

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a browser without a network that has opened a report of two runs."""
    folder = tmp_path_factory.mktemp("report")
    other = tuple(replace(one, step=2 * one.step) for one in HEALTHY)
    path = write({"one": History(HEALTHY), "two": History(other)}, folder / "report.html")
    with browser.chromium(folder) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
        )
        driver.get(path.as_uri())
        yield driver


def _title(page: Any, key: str) -> str:
    return str(page.execute_script("return document.getElementById(arguments[0]).layout.title.text", key))


def _shown(page: Any, key: str) -> Any:
    place = page.find_element(By.ID, key)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    browser.until(lambda: place.get_attribute("data-drawn"))
    return place


def test_every_figure_is_drawn_without_a_network(page: Any) -> None:
    keys = [place.get_attribute("id") for place in page.find_elements(By.CSS_SELECTOR, ".plot")]
    assert len(keys) == 2 * len(CATALOGUE) + 1 + sum(one.several for one in CATALOGUE)
    for key in keys:
        place = _shown(page, key)
        assert browser.until(partial(place.find_elements, By.CSS_SELECTOR, ".main-svg"))
        assert page.execute_script("return arguments[0].data.length", place) > 0
    assert not [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_the_slider_turns_what_belongs_to_its_run_alone(page: Any) -> None:
    for run in "01":
        _shown(page, f"{run}-spectrum")
    before = _title(page, "0-spectrum"), _title(page, "1-spectrum")
    slider = page.find_element(By.CSS_SELECTOR, "#run-0 .controls input")
    slider.send_keys(Keys.HOME)
    browser.until(lambda: _title(page, "0-spectrum") == "Spectrum, step 0")
    assert before[0] == f"Spectrum, step {HEALTHY[-1].step}"
    assert _title(page, "1-spectrum") == before[1]
    slider.send_keys(Keys.END)
    browser.until(lambda: _title(page, "0-spectrum") == before[0])


def test_a_mode_is_chosen_from_the_list(page: Any) -> None:
    _shown(page, "0-mode-samples")
    Select(page.find_element(By.CSS_SELECTOR, '#run-0 select[data-axis="mode"]')).select_by_visible_text("2")
    browser.until(lambda: _title(page, "0-mode-samples").startswith("Samples of mode 2"))


def test_dark_and_light_redraw_the_figures(page: Any) -> None:
    place = _shown(page, "0-alignment")
    ink = "return arguments[0].layout.font.color"
    before = page.execute_script(ink, place)
    page.execute_script("window.scrollTo(0, 0)")
    page.find_element(By.ID, "theme").click()
    # What is out of view waits until it is looked at.
    _shown(page, "0-alignment")
    browser.until(lambda: page.execute_script(ink, place) != before)


def test_a_figure_can_be_saved_as_numbers(page: Any) -> None:
    place = _shown(page, "0-alignment")
    text = page.execute_script("return csv(arguments[0].data)", place)
    lines = text.splitlines()
    assert lines[0] == '"trace","x","y","z"'
    assert lines[1:] == [f'"alignment","{one.step}","{one.metrics["alignment"]:.6g}",""' for one in HEALTHY]
