"""The parent's side of a worker: start it, ask it, and end it when it takes too long or too much memory."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import JAX_PYTHON, ROOT

POLL = 0.05
"""Seconds between two looks at the memory of a process."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is for; it gets this as JSON."""

    workload: str
    samples: int
    method: str
    device: str
    threads: int
    checked: int
    weights: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take: seconds, and bytes of resident memory."""

    seconds: float
    memory: float


class Worker:
    """A process that runs one method when told to. `problem` says why it no longer does."""

    def __init__(self, task: Task, limits: Limits, problem: str = "") -> None:
        self.problem = problem
        self.seconds = 0.0
        """Of the run that was given up, when one was."""
        self.peak = 0.0
        """Resident bytes above those at the start of the run that was given up."""
        self._limits = limits
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would block the process
        self._process: subprocess.Popen[str] | None = None
        if not problem:
            self._process = subprocess.Popen(
                [*_program(task), json.dumps(asdict(task))],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=_environment(task.threads),
            )

    def started(self) -> None:
        """Wait until the process is ready; importing and compiling may take five minutes beyond the limit."""
        self._answer(self._limits.seconds + 300)

    def ask(self, request: str, *, unlimited: bool = False) -> dict[str, Any]:
        """Return the answer to one request; empty when it failed or took too long."""
        if self.problem or self._process is None:
            return {}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; the empty answer below finds out why
        return self._answer(self._limits.seconds + (300 if unlimited else 0))

    def _answer(self, seconds: float) -> dict[str, Any]:
        process = self._process
        if self.problem or process is None:
            return {}
        assert process.stdout is not None
        over = self._wait(process, seconds)
        answer = "" if over else process.stdout.readline()
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        process.kill()
        process.communicate()
        self._errors.seek(0)
        self.problem = over or _reason(self._errors.read(), process.returncode)
        return {}

    def _wait(self, process: "subprocess.Popen[str]", seconds: float) -> str:
        """Return "" when there is an answer, or which limit was crossed before."""
        start, before = time.monotonic(), resident(process.pid)
        with selectors.DefaultSelector() as selector:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(POLL):
                self.seconds, memory = time.monotonic() - start, resident(process.pid)
                self.peak = max(self.peak, memory - before)
                if memory > self._limits.memory:
                    return f"over {self._limits.memory / 2**30:.0f} GiB"
                if self.seconds > seconds:
                    return f"over {seconds:.0f} s"
        self.seconds = self.peak = 0.0
        return ""

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            if self._process.poll() is None and not self.problem:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.communicate(timeout=30)
            if self._process.poll() is None:
                self._process.kill()
                self._process.communicate()
        self._errors.close()


def _program(task: Task) -> list[str]:
    if task.method == "neural-tangents":
        return [str(JAX_PYTHON), str(Path(__file__).with_name("jax_peer.py"))]
    return [sys.executable, "-m", "tests.benchmarks.worker"]


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "JAX_PLATFORMS": "cpu"}


def _reason(errors: str, code: int) -> str:
    """Return the last line that a process said, which is its exception."""
    if code == -9:
        return "over the memory there is: killed by the system"
    lines = errors.strip().splitlines()
    last = lines[-1][:200] if lines else f"ended with {code}"
    return f"over the memory there is: {last}" if "OutOfMemory" in last else last


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children, 0 where there is no /proc."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        # A process may end between two reads.
        with contextlib.suppress(OSError):
            lines = (folder / "status").read_text().splitlines()
            total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
            for children in (folder / "task").glob("*/children"):
                waiting += [int(child) for child in children.read_text().split()]
    return total
