"""Start two processes of `tests.ranks` and read what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def together(root: Path, *scenarios: str, seconds: float = 120.0) -> dict[str, list[dict[str, Any]]]:
    """Return for each scenario what the processes that ended well saw, rank 0 first."""
    command = [sys.executable, "-m", "tests.ranks"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([*command, str(rank), str(root / "rendezvous"), *scenarios], env=environment(), **pipes)
        for rank in (0, 1)
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in scenarios}
    try:
        said = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    for out, _ in said:
        for line in out.splitlines():
            if line.startswith("{"):
                seen = json.loads(line)
                found[seen["scenario"]].append(seen)
    assert any(found.values()), said[0][1][-3000:] + said[1][1][-3000:]
    return found
