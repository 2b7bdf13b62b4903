"""Which methods meet on which workload, and what their runs say.

The methods of a case take turns. A ratio is the median over turns of this method's time over the yardstick's time in
the same turn, so that whatever else the machine does meets both.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.peers import absent, exported
from tests.benchmarks.process import Limits, Task, Worker
from tests.benchmarks.workloads import checked, problem

KERNELS = ("trace", "full")
METHODS = (
    "backwards",
    "activations",
    "structured",
    "structured64",
    "jacrev",
    "tutorial",
    "loop",
    "reference",
    "nngeometry",
    "neural-tangents",
)
SLOW = ("rows", "operator")
"""They cost N·C passes over the batch, so they get small batches."""


@dataclass(frozen=True, slots=True)
class Case:
    """Methods that are compared on one workload; the first is the yardstick."""

    workload: str
    samples: int
    quantities: tuple[str, ...]
    methods: tuple[str, ...]


# The batches of published comparisons, and of the goals in report.py.
LARGE = {"mlp": 256, "cnn": 64, "resnet18": 32, "vit": 32, "gpt": 16}

OURS = ("backwards", "structured", "reference", *SLOW)
# The demo's probe, against one step of its training on a batch of 64.
DEMO = Case("demo", 102, ("monitor",), ("step", "probe"))
CASES = (
    *(Case(name, samples, KERNELS, METHODS) for name, samples in LARGE.items()),
    Case("mlp", 16, KERNELS, OURS),
    Case("cnn", 8, KERNELS, OURS),
    DEMO,
)

# Every method at least once, in a minute or two.
QUICK = {"mlp": 16, "cnn": 8, "resnet18": 2, "vit": 2, "gpt": 2}
SMALL = (*(Case(name, samples, KERNELS, (*METHODS, *SLOW)) for name, samples in QUICK.items()), DEMO)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all cases of one benchmark."""

    device: str
    threads: int
    repeats: int
    limits: Limits
    check: bool = True
    """Whether kernels are compared with their float64 twin."""


@dataclass(slots=True)
class Result:
    """What one method took for one quantity, a number for each turn; `missed` says why there are none, or no more.

    `floor_seconds` and `floor_mb` are what it had taken when a limit ended it: it needs at least that.
    """

    workload: str
    samples: int
    quantity: str
    method: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peaks_mb: list[float] = field(default_factory=list)
    ratio: float | None = None
    error: float | None = None
    missed: str = ""
    floor_seconds: float = 0.0
    floor_mb: float = 0.0
    planned_seconds: float | None = None
    planned_mb: float | None = None

    @property
    def peak_mb(self) -> float:
        """Largest peak of any turn."""
        return max(self.peaks_mb, default=0.0)

    def add(self, answer: dict[str, Any], worker: Worker) -> None:
        """Take the answer of one turn."""
        if answer:
            self.seconds.append(answer["seconds"])
            self.cpu_seconds.append(answer["cpu_seconds"])
            self.peaks_mb.append(answer["peak_mb"])
        elif not self.missed:
            self.missed = worker.problem
            self.floor_seconds, self.floor_mb = worker.seconds, worker.peak / 2**20

    def spent(self, seconds: float) -> bool:
        """Return whether this method has no more turns: it failed, or all its turns took this long."""
        return bool(self.missed) or sum(self.seconds) > seconds


def measured(case: Case, setting: Setting) -> list[Result]:
    """Return the results of one case. A method ends after `repeats` turns, or earlier, after `limits.seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        workers = _started(case, setting, Path(folder))
        try:
            results: list[Result] = []
            blocks: list[tuple[Result, Any]] = []
            for quantity in case.quantities:
                rows = _turns(case, quantity, workers, setting)
                # Now, since a limit may end the worker in the next quantity.
                blocks += [(row, workers[row.method].ask(f"check {quantity}").get("kernel")) for row in rows]
                results += rows
            for row in results:
                _planned(row, workers[row.method].ask(f"plan {row.quantity}"))
            if setting.check:
                _errors(case, blocks, setting)
        finally:
            for worker in workers.values():
                worker.close()
    return results


def ratio(own: list[float], other: list[float]) -> float | None:
    """Return the median of the paired ratios; turns that only one of the two took do not count."""
    pairs = [a / b for a, b in zip(own, other, strict=False)]
    return statistics.median(pairs) if pairs else None


def error(kernel: Any, exact: Any) -> float:
    """Return max|K - K₆₄| / max|K₆₄| for the kernel of the first samples, trace or full; K₆₄ is full."""
    found, true = np.asarray(kernel, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if found.ndim == 2:
        true = np.einsum("ncmc->nm", true)
    return float(np.abs(found - true).max() / np.abs(true).max())


def _started(case: Case, setting: Setting, folder: Path) -> dict[str, Worker]:
    weights = folder / "weights.npz"
    workers: dict[str, Worker] = {}
    for method in case.methods:
        reason = absent(method, case.workload, setting.device)
        if method == "neural-tangents" and not reason:
            exported(*problem(case.workload, case.samples, "cpu"), weights)
        workers[method] = Worker(_task(case, method, setting, str(weights)), setting.limits, reason)
        # One after the other, so that no warm-up is pressed by another.
        workers[method].started()
    return workers


def _task(case: Case, method: str, setting: Setting, weights: str = "") -> Task:
    samples = min(checked(case.workload), case.samples)
    return Task(case.workload, case.samples, method, setting.device, setting.threads, samples, weights)


def _turns(case: Case, quantity: str, workers: dict[str, Worker], setting: Setting) -> list[Result]:
    rows = {method: Result(case.workload, case.samples, quantity, method) for method in case.methods}
    for _ in range(setting.repeats):
        for method, row in rows.items():
            if not row.spent(setting.limits.seconds):
                row.add(workers[method].ask(quantity), workers[method])
    yardstick = rows[case.methods[0]].seconds
    for row in rows.values():
        row.ratio = ratio(row.seconds, yardstick)
    return list(rows.values())


def _planned(row: Result, answer: dict[str, Any]) -> None:
    if answer:
        row.planned_seconds, row.planned_mb = answer["seconds"], answer["bytes"] / 2**20


def _errors(case: Case, blocks: list[tuple[Result, Any]], setting: Setting) -> None:
    """Compare with the float64 twin, computed once in a process of its own."""
    if all(block is None for _, block in blocks):
        return
    task = asdict(_task(case, "exact", setting))
    twin = Worker(Task(**{**task, "device": "cpu"}), Limits(setting.limits.seconds + 300, float("inf")))
    try:
        twin.started()
        if twin.ask("full"):
            exact = twin.ask("check full")["kernel"]
            for row, block in blocks:
                row.error = None if block is None else error(block, exact)
    finally:
        twin.close()
