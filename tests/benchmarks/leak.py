"""Does a long run leak? Memory and open files at each probe of a real Trainer, with all that a probe does.

`python -m tests.benchmarks.leak [--steps 20000] [--probes 500]` trains a small CNN on digits under TensorBoard and
prints a line for every tenth of the probes. Exit code 1: over the last fifth of the probes the process's own resident
memory rose by more than 1 %, or the number of open files changed. Pages of libraries count in the first column only:
a system that is short of memory takes them away and gives them back.
"""

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger

from ntk_monitor.callbacks import NTKMonitor
from tests.benchmarks.process import resident
from tests.modules import Classifier, cnn, digits, loader
from tests.training import seeded, trainer

FLAT = 0.01
"""Largest relative rise of memory that counts as flat."""


class Short(Classifier):
    """A classifier that keeps no list of its losses, which would grow."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.clear()
        return loss


@dataclass
class Watch(L.Callback):
    """Looks at the process after each probe; listed behind the monitor."""

    monitor: NTKMonitor
    every: int
    steps: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Resident bytes of its own (anonymous), at each probe."""
    resident: list[int] = field(default_factory=list)
    """Resident bytes, pages of files included."""
    files: list[int] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        self.steps.append(trainer.global_step)
        self.memory.append(anonymous())
        self.resident.append(resident(os.getpid()))
        self.files.append(len(list(Path("/proc/self/fd").iterdir())))

    def rise(self, last: int) -> float:
        """Return how far memory rose within the last so many probes: its peak over the median of their first half.

        Not the range: for a probe or two in ten the allocator gives some megabytes back, and takes them again.
        """
        seen = self.memory[-last:]
        return max(seen) / statistics.median(seen[: max(1, last // 2)]) - 1

    def spread(self, last: int) -> float:
        """Return the range of memory over the last so many probes, relative to their mean."""
        seen = self.memory[-last:]
        return (max(seen) - min(seen)) / statistics.fmean(seen)

    def flat(self, last: int, most: float = FLAT) -> bool:
        """True when the last so many probes took neither memory nor files."""
        return self.rise(last) <= most and len(set(self.files[-last:])) == 1


def anonymous() -> int:
    """Return the resident bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def watched(root: Path, steps: int, probes: int, **options: Any) -> Watch:
    """Train for so many steps with so many probes, and return what was seen."""
    seeded()
    every = max(1, steps // probes)
    monitor = NTKMonitor(**{"probe": 32, "every_n_steps": every, "reference": 64, **options})
    seen = Watch(monitor, every)
    run = trainer(root, [monitor, seen], max_steps=steps, max_epochs=-1, logger=TensorBoardLogger(root))
    run.fit(Short(cnn(), lr=0.01), loader(digits()))
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a long run takes, and return 1 when it leaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--probes", type=int, default=500)
    wanted = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        seen = watched(Path(root), wanted.steps, wanted.probes)
    last = max(1, len(seen.memory) // 5)
    lines = ["probe    step  resident MiB  its own MiB  open files"]
    lines += [
        f"{index:5d}  {seen.steps[index]:6d}  {seen.resident[index] / 2**20:12.1f}  "
        f"{seen.memory[index] / 2**20:11.1f}  {seen.files[index]:10d}"
        for index in range(0, len(seen.memory), max(1, len(seen.memory) // 10))
    ]
    files = sorted(set(seen.files[-last:]))
    rise, spread = 100 * seen.rise(last), 100 * seen.spread(last)
    lines.append(f"last {last} probes: memory rose by {rise:.2f} % (range {spread:.2f} %), open files {files}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if seen.flat(last) else 1


if __name__ == "__main__":
    sys.exit(main())
