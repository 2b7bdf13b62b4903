"""Start two processes of one program and read what they print."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **here}


def together(
    root: Path, *scenarios: str, program: str = "tests.ranks", seconds: float = 120.0
) -> dict[str, list[dict[str, Any]]]:
    """Return for each scenario what the processes that ended well saw, rank 0 first."""
    command, env = [sys.executable, "-m", program], environment()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([*command, str(rank), str(root / "rendezvous"), *scenarios], env=env, **pipes)
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
