"""A Hugging Face run on two processes: rank 0 measures, and both end where they would without it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ntk_monitor as ntk

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, os, sys
from pathlib import Path
from ntk_monitor.callbacks import NTKMonitorCallback
from tests.huggingface_runs import gpt2, outcome

found = {}
for name in ("plain", "seen"):
    callbacks = [] if name == "plain" else [NTKMonitorCallback(probe=4, every_n_steps=2, strict=True)]
    found[name] = outcome(gpt2, Path(sys.argv[1]) / name, callbacks, ddp_backend="gloo")
found["measured"] = callbacks[0].last is not None
Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(json.dumps(found))
"""


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_two_processes_end_where_they_would(tmp_path: Path) -> None:
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    runs = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    try:
        errors = [run.communicate(timeout=500)[1].decode()[-2000:] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors
    first, second = (_told(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert first["seen"] == first["plain"]
    assert second["seen"] == second["plain"]
    assert first["seen"]["weights"] == second["seen"]["weights"]
    assert (first["measured"], second["measured"]) == (True, False)
    assert ntk.load_history(tmp_path / "seen" / "ntk").steps.tolist() == [0, 2, 4]


def _told(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
