"""A TensorBoard and a headless Chromium to look at it with, and a run of the digits network for both."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium.common.exceptions import (
    ElementNotInteractableException,
    StaleElementReferenceException,
    WebDriverException,
)
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import ntk_monitor as ntk

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs chromium and chromedriver on the PATH (Debian: chromium-driver)"

PATIENCE = 120.0
"""Seconds until what a test waits for counts as missing, many times what a slow and busy machine needs."""
_LOOKS = 0.05
_EVERY, _SAMPLES, _REFERENCE, _BATCH = 8, 40, 128, 32


class Digits:
    """The network of the digits demo, trained and watched a few probes at a time."""

    def __init__(self, out: Path, total_steps: int = 120) -> None:
        torch.manual_seed(0)
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.classes = torch.tensor(digits.target)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.loss = nn.CrossEntropyLoss()
        probe = (self.images[:_SAMPLES], self.classes[:_SAMPLES])
        options: Any = {"every_n_steps": _EVERY, "total_steps": total_steps, "batch_size": _BATCH}
        reference = TensorDataset(self.images[:_REFERENCE], self.classes[:_REFERENCE])
        self.monitor = ntk.Monitor(self.model, self.optimizer, probe, self.loss, reference=reference, **options)
        self.out, self.probes = out, 0
        self.recorder = ntk.Recorder(out)

    def train(self, probes: int) -> int:
        """Append so many probes to the record and return how many it holds then."""
        until = self.probes + probes
        while self.probes < until:
            rows = torch.randint(0, len(self.images), (_BATCH,))
            loss = self.loss(self.model(self.images[rows]), self.classes[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.monitor.observe()
            if self.monitor.due():
                self.recorder.write(self.monitor.snapshot(), stock=False)
                self.probes += 1
        return self.probes


def until(true: Callable[[], Any]) -> Any:
    """Return what `true` returns, once that is something; what is replaced or covered meanwhile is looked for again."""
    end = time.monotonic() + PATIENCE
    last: Exception | None = None
    while time.monotonic() < end:
        try:
            if found := true():
                return found
        except (LookupError, AssertionError, OSError) as error:
            last = error
        except (StaleElementReferenceException, ElementNotInteractableException) as error:
            last = error
        time.sleep(_LOOKS)
    raise AssertionError(f"not seen in {PATIENCE} s; {last or ''}")


@contextlib.contextmanager
def tensorboard(logdir: Path, runs: int) -> Iterator[str]:
    """Start TensorBoard as users do and yield its address, once it has found so many runs.

    TensorBoard shows a tab only if it holds data when the page is loaded.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            # Not from here: a checkout may hold metadata of an old build, which -m would find first.
            [*command, "--reload_interval", "1"],
            cwd=logdir,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )

        def served() -> str | None:
            said.seek(0)
            words = said.read()
            if process.poll() is not None:
                raise RuntimeError(f"TensorBoard ended: {words}")
            found = re.search(r"at (http://\S+?)/? ", words)
            return found[1] if found else None

        try:
            address = str(until(served))
            until(lambda: len(asked(address, "runs")["runs"]) >= runs)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def asked(address: str, question: str) -> dict[str, Any]:
    """Return what the plugin answers, without a browser."""
    with urllib.request.urlopen(f"{address}/data/plugin/ntk/{question}", timeout=PATIENCE) as answer:
        return dict(json.load(answer))


@contextlib.contextmanager
def chromium(downloads: Path) -> Iterator[Chrome]:
    """Start a headless browser that saves files to a directory; at a second attempt, where the first fails.

    Skips the test that asks, with the reason, where none can be started: in a container that forbids it, say.
    """
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1440,1000"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = _started(options) or _started(options)
    if driver is None:
        pytest.skip(f"Chromium does not start here: {_failures[-1]}")
    driver.set_script_timeout(PATIENCE)
    try:
        yield driver
    finally:
        with contextlib.suppress(WebDriverException):
            driver.quit()


_failures: list[str] = []


def _started(options: ChromeOptions) -> Chrome | None:
    try:
        return Chrome(options=options, service=ChromeService(DRIVER))
    except (WebDriverException, OSError) as error:
        _failures.append(str(error).strip().partition("; For doc")[0].partition("\n")[0] or repr(error))
        return None


class Tab:
    """The NTK tab in a browser. It reads the page by scripts but acts as a user does, by mouse and keys.

    Code that a script runs may call eval even where the content security policy forbids it, so what a page does after
    a click is told apart from what it does for us.
    """

    def __init__(self, driver: Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, state: str = "") -> None:
        """Load TensorBoard at the tab, in a state that the address carries, and wait for the first figures."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/#ntk{state}")
        self.driver.switch_to.frame(self.one("iframe"))
        self.until(lambda: self.all(".panel[data-state=drawn]"))

    def until(self, true: Callable[[], Any]) -> Any:
        """Return what `true` returns, once that is something."""
        return until(true)

    def all(self, selector: str) -> list[WebElement]:
        """Return the elements that match."""
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> WebElement:
        """Return the element that matches, as soon as there is one."""
        found: WebElement = self.until(lambda: self.all(selector))[0]
        return found

    def text(self, selector: str) -> str:
        """Return the visible words of an element."""
        return str(self.until(lambda: (self.one(selector).text,))[0])

    def says(self, selector: str, words: str) -> bool:
        """Wait until the visible words of an element are these."""
        return bool(self.until(lambda: self.text(selector) == words))

    def click(self, selector: str) -> None:
        """Click an element, which may just be drawn anew."""

        def clicked() -> bool:
            self.one(selector).click()
            return True

        self.until(clicked)

    def click_at(self, element: WebElement, x: float, y: float) -> None:
        """Click into an element, so many pixels from its upper left corner."""
        width, height = element.size["width"], element.size["height"]
        mouse = ActionChains(self.driver)
        mouse.move_to_element_with_offset(element, round(x - width / 2), round(y - height / 2)).click().perform()

    def drag(self, element: WebElement, right: int) -> None:
        """Drag an element so many pixels to the right."""
        ActionChains(self.driver).drag_and_drop_by_offset(element, right, 0).perform()

    def press(self, selector: str, key: str, times: int = 1) -> None:
        """Press a key, by selenium's name of it, on an element."""
        self.one(selector).send_keys(getattr(Keys, key) * times)

    def choose(self, selector: str, words: str) -> None:
        """Choose an option of a list."""
        Select(self.one(selector)).select_by_visible_text(words)

    def read(self, script: str, *arguments: Any) -> Any:
        """Return the value of an expression of the page."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def show(self, selector: str) -> WebElement:
        """Scroll to an element and wait until all figures in view are drawn."""
        self.read("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", self.one(selector))
        self.settle()
        return self.one(selector)

    def settle(self) -> None:
        """Wait until nothing in view is loading."""
        # What comes into view asks after the next picture: two of them are awaited first, a second where none comes.
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)));"
            "setTimeout(done, 1000)"
        )
        self.until(lambda: not self.all(".waiting, [data-state=loading]"))

    def errors(self) -> list[str]:
        """Return errors and refusals of the content security policy since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]
