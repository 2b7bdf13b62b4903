"""How long the NTK tab lets a reader wait, by the browser's own clock, and what it adds to TensorBoard's start.

`python -m tests.benchmarks.dashboard [--turns K] [--keep FOLDER]`

Three runs of 1000 probes with N·C = 640 modes: from the load of the tab's frame until its first words are painted and
until everything in view is drawn, and from a move of the slider until everything in view is drawn again, at the top of
the page and at its other groups. A run of 10 000 probes: the same from the load. A logdir of 400 runs: the start of
TensorBoard with the tab over without it. Needs Chromium and its driver.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import browser
from tests.benchmarks import long_runs

GOALS = {
    "first paint of 3 runs x 1000 probes": 1.5,
    "slider move on 3 runs x 1000 probes": 0.4,
    "everything in view of a run of 10 000 probes": 3.0,
    "start on 400 runs, with the tab / without": 1.1,
}
"""Seconds, or a ratio, that the median should stay below on a quiet machine of two cores."""

LONG, MANY, RUNS = 1000, 10_000, 400

START = """
import sys
from importlib.metadata import entry_points
from tensorboard import default, program
found = [one for one in entry_points(group="tensorboard_plugins") if one.name != "ntk" or sys.argv[1] == "with"]
board = program.TensorBoard(plugins=default.get_static_plugins() + [one.load() for one in found])
board.configure(argv=["", "--logdir", sys.argv[2], "--port", "0"])
print(board.launch(), flush=True)
sys.stdin.read()
"""


class Watched:
    """The tab in a browser, timed by the marks that the page leaves in the browser's timeline."""

    def __init__(self, tab: browser.Tab) -> None:
        self.tab = tab

    def opened(self) -> float:
        """Load the page and return the seconds from the load of the tab's frame until everything in view was drawn."""
        self.tab.open()
        self.tab.settle()
        return self._last() / 1000

    def painted(self) -> float:
        """Return the seconds from the load of the tab's frame until its first words were on the screen."""
        return float(self.tab.read("performance.getEntriesByName('first-contentful-paint')[0].startTime")) / 1000

    def moved(self, places: int) -> list[float]:
        """Move the slider to as many places and return the seconds until everything in view was drawn again."""
        found = []
        for k in range(places):
            self.tab.read("performance.clearMeasures()")
            # As input by hand does: the value changes, then the event says so. A timeout leaves the driver's script.
            self.tab.read(
                "setTimeout((slider, at) => { slider.value = Math.round(at * slider.max);"
                " slider.dispatchEvent(new Event('input')); }, 0, document.querySelector('#step'), arguments[0])",
                (k + 0.5) / places,
            )
            self.tab.until(lambda: self.tab.read("performance.getEntriesByName('ntk-redraw').length"))
            self.tab.settle()
            found.append(self._duration() / 1000)
        return found

    def _last(self) -> float:
        return float(
            self.tab.read("Math.max(...performance.getEntriesByName('ntk-redraw').map(e => e.startTime + e.duration))")
        )

    def _duration(self) -> float:
        return float(
            self.tab.read("performance.getEntriesByName('ntk-redraw').reduce((all, e) => all + e.duration, 0)")
        )


@contextlib.contextmanager
def watched(logdir: Path, runs: int) -> Iterator[Watched]:
    """Yield the tab on a logdir, in a browser of its own."""
    with (
        tempfile.TemporaryDirectory() as downloads,
        browser.tensorboard(logdir, runs) as address,
        browser.chromium(Path(downloads)) as driver,
    ):
        yield Watched(browser.Tab(driver, address))


def three_runs(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return the waits on three long runs."""
    for seed in range(3):
        _written(folder / f"run_{seed}", LONG, seed=seed)
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        with watched(folder, 3) as page:
            found.setdefault("everything in view of 3 runs x 1000 probes", []).append(page.opened())
            found.setdefault("first paint of 3 runs x 1000 probes", []).append(page.painted())
            found.setdefault("slider move on 3 runs x 1000 probes", []).extend(page.moved(12))
            for group in page.tab.all("section.group"):
                name = group.get_attribute("id")
                page.tab.show(f"#{name}")
                found.setdefault(f"slider move with {name} in view", []).extend(page.moved(6))
    return found


def many_probes(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return the waits on a run of ten thousand probes."""
    _written(folder / "run", MANY, modes=64)
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        with watched(folder, 1) as page:
            found.setdefault("everything in view of a run of 10 000 probes", []).append(page.opened())
            found.setdefault("first paint of a run of 10 000 probes", []).append(page.painted())
            found.setdefault("everything in view again, with all of it read", []).append(page.opened())
            found.setdefault("slider move on 10 000 probes", []).extend(page.moved(6))
    return found


def many_runs(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return TensorBoard's own start with the tab over that without it, turn by turn, and seconds of both."""
    for k in range(RUNS):
        _written(folder / f"version_{k}", 3, modes=64)
    found: dict[str, list[float]] = {}
    _started(folder, "with")  # what is compiled or cached at the first start is there for both
    for turn in range(turns):
        order = ("with", "without") if turn % 2 else ("without", "with")
        seconds = {kind: _started(folder, kind) for kind in order}
        found.setdefault("start on 400 runs, with the tab / without", []).append(seconds["with"] / seconds["without"])
        for kind, value in seconds.items():
            found.setdefault(f"start on 400 runs, {kind} the tab", []).append(value)
    with watched(folder, RUNS) as page:
        found["everything in view of one run of 400"] = [page.opened()]
    return found


def _started(logdir: Path, kind: str) -> float:
    """Return the seconds until TensorBoard serves."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", START, kind, str(logdir)],
        cwd=logdir,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert re.match(r"http", process.stdout.readline())
    seconds = time.perf_counter() - start
    process.communicate()
    return seconds


def _written(folder: Path, count: int, modes: int = long_runs.SAMPLES * long_runs.OUTPUTS, seed: int = 0) -> None:
    if not folder.exists():
        long_runs.write(folder, count, modes, seed)


def line(name: str, values: Sequence[float]) -> str:
    """Return one line of the table."""
    median, goal = statistics.median(values), GOALS.get(name)
    verdict = "" if goal is None else f"<= {goal:g}  {'met' if median <= goal else 'MISSED'}"
    return f"{name:<50} {median:7.3f}  {min(values):7.3f} to {max(values):7.3f}  {len(values):>3}  {verdict}".rstrip()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table: seconds (or ratio), median and range."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dashboard", description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="loads of each page, and starts of each kind")
    parser.add_argument(
        "--keep", type=Path, help="folder where runs are written once and stay; default: a temporary one"
    )
    given = parser.parse_args(argv)
    if browser.MISSING:
        _say(f"nothing measured: {browser.MISSING}")
        return 0
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        load = os.getloadavg()[0]
        _say(f"{os.cpu_count()} cores, load {load:.1f} before; seconds or ratio: median, range, times\n")
        for measure in (three_runs, many_probes, many_runs):
            for name, values in measure(folder / measure.__name__, given.turns).items():
                _say(line(name, values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
