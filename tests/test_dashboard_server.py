"""The tab in the real TensorBoard: its process, its fast data server and its slow one, and a path in front of all."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ntk_monitor.events import event
from ntk_monitor.history import load_history
from ntk_monitor.recorder import append
from tests.dashboard import recorded
from tests.histories import HEALTHY

PATIENCE = 60.0
"""Seconds that a process may take to say where it serves, on a machine that does other things too."""

FLAGS = {"fast": ["--load_fast=true"], "slow": ["--load_fast=false"], "prefixed": ["--path_prefix=/some/where"]}


class Server:
    """TensorBoard on a folder, at a port that it chose itself."""

    def __init__(self, logdir: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", *flags]
        self.log = logdir.parent / "tensorboard.log"
        with self.log.open("wb") as log:
            # Not from the checkout, where what an old build left behind would hide the installed entry point.
            self.process = subprocess.Popen(
                [*command, "--reload_interval", "1"],
                stdout=log,
                stderr=log,
                cwd=logdir.parent,
                start_new_session=True,
            )
        self.address = eventually(self._address)

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r"at (http://\S+)", self.log.read_text())
        return found[1] if found else None

    def ask(self, route: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self.address}data/{route}", timeout=PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def close(self) -> None:
        # The fast data server is a process of its own; it ends with the group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(PATIENCE)


def eventually(asked: Callable[[], Any]) -> Any:
    """Ask until there is an answer."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if answer := asked():
            return answer
        time.sleep(0.1)
    raise TimeoutError(f"nothing within {PATIENCE} s")


@pytest.fixture(params=FLAGS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    logdir = tmp_path / "logs"
    # More probes than either data server keeps of a tag that it does not know: the loader asks for all of them.
    probes = [replace(HEALTHY[k % 12], step=k, wall_time=1.7e9 + k, previous_step=k - 1) for k in range(130)]
    recorded(logdir / "long", probes)
    path = recorded(logdir / "<img src=x onerror=alert(1)>", HEALTHY)
    recorded(logdir / "cut", HEALTHY)
    cut = next((logdir / "cut").iterdir())
    cut.write_bytes(cut.read_bytes()[: path.stat().st_size * 2 // 3])
    recorded(logdir / "resumed", HEALTHY[:8])
    again = [replace(probe, wall_time=probe.wall_time + 1e6) for probe in HEALTHY[4:6]]
    recorded(logdir / "resumed", again, name="1700000900.test.0")
    (logdir / "junk").mkdir()
    (logdir / "junk" / "events.out.tfevents.1700000000.junk").write_bytes(os.urandom(1000))
    started = Server(logdir, *FLAGS[request.param])
    yield started
    started.close()


def test_the_tab_in_tensorboard(server: Server, tmp_path: Path) -> None:
    hostile = urllib.request.quote("<img src=x onerror=alert(1)>")  # type: ignore[attr-defined]
    runs = {"long", "cut", "resumed", "<img src=x onerror=alert(1)>"}
    assert eventually(lambda: set(server.ask("plugin/ntk/runs")["runs"]) == runs)
    assert eventually(lambda: len(server.ask("plugin/ntk/manifest?run=long")["steps"]) == 130)
    listing = server.ask("plugins_listing")["ntk"]
    assert listing["enabled"]
    assert listing["loading_mechanism"]["module_path"].endswith("/data/plugin/ntk/index.js")
    assert "spectrum" in str(server.ask(f"plugin/ntk/figure?panel=spectrum&run={hostile}&focus={hostile}")).lower()
    assert server.ask("plugin/ntk/mode?run=long&mode=1&step=30")["step"] == 30
    assert server.ask("plugin/ntk/manifest?run=junk")["error"]
    # A file that ends in the middle of a probe: every probe before it is there.
    whole = load_history(tmp_path / "logs" / "cut").steps.tolist()
    assert 0 < len(whole) < len(HEALTHY)
    assert server.ask("plugin/ntk/manifest?run=cut")["steps"] == whole
    assert server.ask("plugin/ntk/manifest?run=resumed")["steps"] == [k * 25 for k in range(6)]

    before = server.ask("plugin/ntk/manifest?run=long")["version"]
    path = next((tmp_path / "logs" / "long").iterdir())
    append(path, event(replace(HEALTHY[3], step=1000, wall_time=1.8e9)))
    assert eventually(lambda: server.ask("plugin/ntk/manifest?run=long")["version"] != before)
    assert server.ask("plugin/ntk/manifest?run=long")["steps"][-1] == 1000
    # The rest of TensorBoard is there.
    assert server.ask("runs")
    assert "Traceback" not in server.log.read_text()
