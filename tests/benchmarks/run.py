"""Time the kernel engines side by side, next to the yardstick of C ordinary backward passes over the same batch.

Each method runs in its own process; the methods take turns, so that whatever else the machine does meets all of them.
A ratio is the median over turns of this method's time over the yardstick's time in the same turn.
"""

import argparse
import datetime as dt
import json
import os
import platform
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ntk_monitor

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
"""An exact engine in float32 stays well below this; above it a time means nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """Methods that are compared on one workload; the first is the yardstick."""

    workload: str
    samples: int
    quantities: tuple[str, ...]
    methods: tuple[str, ...]


# The large batches are those of published comparisons. rows costs N·C backward passes of N samples: it gets small ones.
KERNELS = ("trace", "full")
SMALL = (
    Case("mlp", 16, KERNELS, ("backwards", "reference", "rows")),
    Case("cnn", 8, KERNELS, ("backwards", "reference", "rows")),
    # The demo's probe, against one step of its training on a batch of 64.
    Case("demo", 102, ("monitor",), ("step", "probe")),
)
CASES = (
    Case("mlp", 256, KERNELS, ("backwards", "reference")),
    Case("cnn", 64, KERNELS, ("backwards", "reference")),
    *SMALL,
)


@dataclass(slots=True)
class Result:
    """Times of one method for one quantity; `missed` says why there are none, or no more of them."""

    workload: str
    samples: int
    quantity: str
    method: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    error: float | None = None
    ratio: float | None = None
    missed: str = ""


class Worker:
    """A process that runs one method when told to."""

    def __init__(self, case: Case, method: str, device: str) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.worker", case.workload, str(case.samples), method, device]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.problem = ""

    def ask(self, quantity: str, limit: float) -> dict[str, Any]:
        """Return the answer to one request ("" only waits for the start); empty when it failed or took too long."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if self.problem:
            return {}
        try:
            if quantity:
                process.stdin.write(quantity + "\n")
                process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(limit):
                    self.problem = f"over {limit:.0f} s"
            answer = "" if self.problem else process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        process.kill()
        lines = process.communicate()[1].strip().splitlines()
        self.problem = self.problem or (lines[-1] if lines else f"ended with {process.returncode}")
        return {}

    def close(self) -> None:
        """End the process."""
        if not self.problem:
            self._process.communicate()
        elif self._process.poll() is None:
            self._process.kill()


def measured(case: Case, device: str, repeats: int, limit: float) -> list[Result]:
    """Return the results of one case. A quantity ends after `repeats` turns, or earlier, after `limit` seconds."""
    workers = {method: Worker(case, method, device) for method in case.methods}
    for worker in workers.values():
        worker.ask("", limit + 60)
    results: list[Result] = []
    for quantity in case.quantities:
        rows = {method: Result(case.workload, case.samples, quantity, method) for method in case.methods}
        start = time.monotonic()
        for turn in range(repeats):
            if turn > 0 and time.monotonic() - start > limit:
                break
            for method, worker in workers.items():
                _add(rows[method], worker.ask(quantity, limit), worker)
        yardstick = rows[case.methods[0]].seconds
        for row in rows.values():
            pairs = list(zip(row.seconds, yardstick, strict=False))
            row.ratio = statistics.median(own / other for own, other in pairs) if pairs else None
        results += rows.values()
    # Last, because the float64 twin would be taken for memory of the method.
    for row in results:
        row.error = workers[row.method].ask(f"check {row.quantity}", limit).get("error")
    for worker in workers.values():
        worker.close()
    return results


def _add(row: Result, answer: dict[str, Any], worker: Worker) -> None:
    row.missed = worker.problem
    if answer:
        row.seconds.append(answer["seconds"])
        row.peak_mb = max(row.peak_mb, answer["peak_mb"])


def line(row: Result) -> str:
    """Return one line of the table."""
    name = f"{row.workload:<5} {row.samples:>4}  {row.quantity:<7}  {row.method:<9}"
    if not row.seconds:
        return f"{name}  {row.missed}"
    error = f"{row.error:.0e}" if row.error is not None else "-"
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
    numbers = (
        f"{statistics.median(row.seconds):9.4f}  {ratio:>9}  {row.peak_mb:8.0f}  {error:>7}  {len(row.seconds):>5}"
    )
    return f"{name}  {numbers}  {row.missed}".rstrip()


HEAD = "network  N  what     method       seconds  yardstick   peak MB    error  turns"


def environment(device: str) -> dict[str, Any]:
    """Return what the times depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "ntk_monitor": ntk_monitor.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print a table, write JSON. Returns 1 when an engine was wrong or a process failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when there is one"
    )
    parser.add_argument("--quick", action="store_true", help="the small batches only, twice")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every method")
    parser.add_argument("--limit", type=float, default=30, help="seconds for one run of a method; a miss is a result")
    parser.add_argument("--out", type=Path, default=ROOT / "bench", help="directory of the JSON file")
    options = parser.parse_args(argv)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(device)
    sys.stdout.write(f"torch {about['torch']}, {device}, {about['threads']} of {about['cores']} threads\n{HEAD}\n")
    results: list[Result] = []
    for case in SMALL if options.quick else CASES:
        for row in measured(case, device, 2 if options.quick else options.repeats, options.limit):
            results.append(row)
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{about['time'].replace(':', '')[:17]}-{device}.json"
    path.write_text(json.dumps({"environment": about, "results": [asdict(row) for row in results]}, indent=1) + "\n")
    sys.stdout.write(f"written to {path}\n")
    wrong = [row for row in results if row.error is not None and not row.error < TOLERANCE]
    broken = [row for row in results if not row.seconds and not row.missed.startswith("over ")]
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())
