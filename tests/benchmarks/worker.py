"""One method in its own process, so that peak memory is its own. `run.py` starts several and gives them turns.

Reads requests from stdin, one per line, and answers each with a line of JSON. A quantity ("trace") is computed and
timed; "check trace" asks for the kernel of the first samples of what was computed, "plan trace" for what was expected.
"""

import contextlib
import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ntk_monitor as ntk
from tests.benchmarks.methods import ENGINES, runs
from tests.benchmarks.workloads import problem

COLD = ("exact", "nngeometry")
"""Not warmed up: the twin is not timed, and nngeometry takes minutes for two samples of a large network."""


class Memory:
    """Peak memory above what the process held before: of the GPU when there is one, else resident memory (Linux)."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        # What the warm-up freed but the allocator kept would be used again and not be seen.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._baseline = torch.cuda.memory_allocated() if self._cuda else _status("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Return megabytes."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return max(0.0, (peak - self._baseline) / 2**20)


def _status(name: str) -> int:
    """Return a line of /proc/self/status in bytes, 0 where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _first(kernel: Tensor, samples: int) -> list[Any]:
    """Return the kernel of the first samples."""
    block = kernel[:samples, :, :samples] if kernel.ndim == 4 else kernel[:samples, :samples]
    found: list[Any] = block.detach().cpu().tolist()
    return found


def planned(method: str, workload: str, samples: int, outputs: str, device: str) -> dict[str, Any]:
    """Return the seconds and bytes that the planner expects of one of our engines, nothing for anything else."""
    planner: Any = getattr(ntk, "plan", None)
    if method not in ENGINES or planner is None:
        return {}
    engine, dtype = ENGINES[method]
    plan = planner(*problem(workload, samples, device), outputs=outputs, dtype=dtype)
    seconds, size = float(plan.seconds(engine)), float(plan.bytes(engine))
    return {"seconds": seconds, "bytes": size} if math.isfinite(seconds) else {}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(task: dict[str, Any]) -> None:
    """Warm up on two samples, then run what stdin asks for until it closes."""
    name, samples, method, device = task["workload"], task["samples"], task["method"], task["device"]
    torch.set_num_threads(task["threads"])
    # Convolutions on a GPU would otherwise round to ten bits, and only in the methods that do not forbid it.
    torch.backends.cudnn.allow_tf32 = False
    if method not in COLD:
        for run in runs(method, *problem(name, 2, device)).values():
            run()
    model, x = problem(name, samples, device)
    # An entry of the kernel depends on two samples only, so the twin needs the first ones and no others.
    work = runs(method, model, x[: task["checked"]] if method == "exact" else x)
    memory = Memory(device)
    blocks: dict[str, list[Any]] = {}
    _say({"ready": True})
    for line in sys.stdin:
        request, _, quantity = line.strip().rpartition(" ")
        if request == "check":
            _say({"kernel": blocks.get(quantity)})
        elif request == "plan":
            _say(planned(method, name, samples, quantity, device))
        else:
            memory.reset()
            start, cpu = _clock(device), time.process_time()
            found = work[quantity]()
            seconds = _clock(device) - start
            _say({"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_mb": memory.peak()})
            if found is not None:
                blocks[quantity] = _first(found, task["checked"])
            del found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
