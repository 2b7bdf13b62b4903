"""One method in its own process, so that peak memory is its own. `run.py` starts several and gives them turns.

Reads the quantity to compute from stdin, one per line, and answers each with a line of JSON; "check trace" asks for the
error of what was computed as trace.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tests import reference
from tests.benchmarks.workloads import Method, problem, runs

CHECKED = 6
"""The float64 twin is computed for this many samples; an entry of the kernel depends on two samples only."""


class Memory:
    """Peak memory above what the process held before: of the GPU when there is one, else resident memory (Linux)."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
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


def _error(kernel: Tensor, name: str, samples: int, device: str) -> float:
    """Return max|K - K₆₄| / max|K₆₄| for the kernel of the first samples, full or trace."""
    model, x = problem(name, samples, device)
    model = model.double().cpu()
    exact = reference.ntk(reference.rows(model, model(x[:CHECKED].double().cpu())))
    if kernel.ndim == 2:
        exact = torch.einsum("ncmc->nm", exact)
    return float((kernel - exact).abs().max() / exact.abs().max())


def _first(kernel: Tensor) -> Tensor:
    """Return the kernel of the first samples."""
    block = kernel[:CHECKED, :, :CHECKED] if kernel.ndim == 4 else kernel[:CHECKED, :CHECKED]
    return block.cpu().clone()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(name: str, samples: str, method: Method, device: str) -> None:
    """Warm up on two samples, then run what stdin asks for until it closes."""
    for run in runs(method, *problem(name, 2, device)).values():
        run()
    model, x = problem(name, int(samples), device)
    work = runs(method, model, x)
    memory = Memory(device)
    kernels: dict[str, Tensor] = {}
    _say({"ready": True})
    for line in sys.stdin:
        quantity = line.strip()
        if quantity.startswith("check "):
            kernel = kernels.get(quantity.removeprefix("check "))
            _say({"error": None if kernel is None else _error(kernel, name, int(samples), device)})
            continue
        memory.reset()
        start = _clock(device)
        found = work[quantity]()
        _say({"seconds": _clock(device) - start, "peak_mb": memory.peak()})
        if found is not None:
            kernels[quantity] = _first(found)
        del found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], cast("Method", sys.argv[3]), sys.argv[4])
