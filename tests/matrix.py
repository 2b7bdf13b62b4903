"""The matrix of identity: networks × settings of training, each trained with and without the monitor.

`python -m tests.matrix` runs it whole and prints the table; tests/test_matrix.py asserts it.
"""

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ntk_monitor.callbacks import NTKMonitor
from tests.backbones import COMPILED, NETWORKS
from tests.modules import Classifier, Noisy, digits
from tests.training import outcome, seeded, trainer

# What a job changes beside its network. A cell with none of them is a plain float32 job.
SETTINGS = (
    "accumulate 4",
    "bf16-mixed",
    "compiled",
    "schedule per step",
    "resume",
    "2 workers",
    "own generator",
    "manual, 2 optimizers",
)
COLUMNS = ("plain", *SETTINGS, "compiled whole")  # the last one is too slow to be part of the quick cells
STEPS = 6  # optimizer steps of one run
MIDDLE = 3  # where "resume" stops it


@dataclass(frozen=True)
class Cell:
    """One job: a network and what is special about its training."""

    network: str
    settings: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return " | ".join([self.network, *sorted(self.settings)])


def every_pair() -> list[Cell]:
    """Return the full matrix: each network in a plain job and under each setting alone."""
    return [Cell(n, frozenset({s} - {"plain"})) for n in NETWORKS for s in COLUMNS]


def covering(width: int = 12) -> list[Cell]:
    """Return few cells with several settings each, in which every pair of choices occurs.

    Pairs: (network, setting on or off) and (setting on or off, another one on or off). Greedy: the next cell is the one
    with most pairs still open, among `2 · width` fixed selections of settings for each network. No smaller set exists:
    each network needs two cells.
    """
    open_pairs = {p for n in NETWORKS for cell in _corners(n, width) for p in _pairs(cell)}
    cells: list[Cell] = []
    while open_pairs:
        tries = [cell for n in NETWORKS for cell in _corners(n, width)]
        best = max(tries, key=lambda cell: len(open_pairs & _pairs(cell)))
        cells.append(best)
        open_pairs -= _pairs(best)
    return cells


def _corners(network: str, width: int) -> list[Cell]:
    """Return the same pseudo-random selections of settings for every network, and their complements."""
    state, found = 1, []
    for _ in range(width):
        state = (1103515245 * state + 12345) % 2**31  # the C standard's example generator: the table never moves
        chosen = frozenset(s for i, s in enumerate(SETTINGS) if state >> (i + 12) & 1)
        found += [Cell(network, chosen), Cell(network, frozenset(SETTINGS) - chosen)]
    return found


def _pairs(cell: Cell) -> set[tuple[Any, Any]]:
    choices = [(s, s in cell.settings) for s in SETTINGS]
    pairs = {(a, b) for i, a in enumerate(choices) for b in choices[i + 1 :]}
    return pairs | {(cell.network, choice) for choice in choices}


class Trained(Classifier):
    """Cross-entropy on digits, with the settings of a cell."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(NETWORKS[cell.network]())
        for setting, part in (("compiled", COMPILED[cell.network]), ("compiled whole", "")):
            if setting in cell.settings:
                name = f"net.{part}".rstrip(".")
                compiled: Any = torch.compile(self.get_submodule(name), backend="aot_eager")
                self.set_submodule(name, compiled)
        self.settings = cell.settings
        self.automatic_optimization = "manual, 2 optimizers" not in cell.settings

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.automatic_optimization:
            optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(trainable, lr=0.05, momentum=0.9)]
        else:
            half = len(trainable) // 2
            optimizers = [
                torch.optim.SGD(trainable[:half], lr=0.05, momentum=0.9),
                torch.optim.AdamW(trainable[half:], lr=0.003),
            ]
        if "schedule per step" not in self.settings:
            return optimizers
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
        return optimizers, [{"scheduler": s, "interval": "step"} for s in schedules]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        every = 4 if "accumulate 4" in self.settings else 1
        self.manual_backward(loss / every)
        if (batch_idx + 1) % every == 0:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
            for schedule in self.lr_schedulers() or []:  # type: ignore[union-attr]
                schedule.step()
        return None


def ended(cell: Cell, callbacks: Callable[[], Sequence[L.Callback]], root: Path) -> dict[str, Any]:
    """Train a cell and return everything that must not depend on the callbacks."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    seeded()
    generator = torch.Generator().manual_seed(7) if "own generator" in cell.settings else None
    # Two epochs of either kind, so that a loader's generator is used twice.
    data, workers = Noisy(digits(320 if "accumulate 4" in cell.settings else 64)), 2 * ("2 workers" in cell.settings)
    loading = DataLoader(data, 16, shuffle=True, num_workers=workers, generator=generator)
    per_step = 1 if "manual, 2 optimizers" not in cell.settings else 2  # Lightning counts the steps of each optimizer
    options: dict[str, Any] = {"precision": "bf16-mixed" if "bf16-mixed" in cell.settings else "32-true"}
    if per_step == 1 and "accumulate 4" in cell.settings:
        options["accumulate_grad_batches"] = 4
    checkpoint, losses, module = None, [], Trained(cell)
    fitted = trainer(root, [])
    for steps in (MIDDLE, STEPS) if "resume" in cell.settings else (STEPS,):
        module = module if checkpoint is None else Trained(cell)
        fitted = trainer(root, list(callbacks()), max_steps=steps * per_step, max_epochs=-1, **options)
        fitted.fit(module, loading, ckpt_path=checkpoint)
        assert fitted.global_step == steps * per_step
        losses += module.losses
        checkpoint = root / "middle.ckpt"
        if steps < STEPS:
            fitted.save_checkpoint(checkpoint)
    found: dict[str, Any] = outcome(module, fitted)
    found["losses"] = losses
    found["schedules"] = [c.scheduler.state_dict()["_last_lr"] for c in fitted.lr_scheduler_configs]
    found["loader"] = None if generator is None else int(generator.get_state().sum())
    found["compiled graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def watched(**options: Any) -> NTKMonitor:
    """Return a monitor that probes three times in a run and raises what it would otherwise survive."""
    return NTKMonitor(**{"probe": 8, "reference": 16, "every_n_steps": 4, "strict": True, **options})


def changes(cell: Cell, root: Path) -> list[str]:
    """Return what the monitor changes in this cell: nothing, if it keeps its promise.

    Raises:
        AssertionError: the monitor did not measure, so that nothing was tested.
    """
    monitors: list[NTKMonitor] = []

    def with_monitor() -> list[L.Callback]:
        monitors.append(watched())
        return [monitors[-1]]

    with warnings.catch_warnings():
        # Lightning's advice on resuming in mid-epoch, and schedules that manual optimisation steps by hand.
        warnings.simplefilter("ignore")
        plain, seen = ended(cell, list, root), ended(cell, with_monitor, root)
    last = monitors[-1].last
    assert last is not None, f"{cell}: no probe was made"
    automatic = "manual, 2 optimizers" not in cell.settings
    assert (last.status, last.step) == ("measured", STEPS if automatic else 2 * STEPS)
    assert last.loss_status == ("matched" if automatic else "not verified: training_step returned no loss; pass loss=")
    return [name for name, value in plain.items() if seen[name] != value]


def table(results: Iterable[tuple[Cell, Sequence[str]]]) -> str:
    """Return networks × settings as text: how many cells were the same, or what changed in one of them."""
    same: Counter[tuple[str, str]] = Counter()
    changed: dict[tuple[str, str], Sequence[str]] = {}
    for cell, names in results:
        for setting in cell.settings or ("plain",):
            same[cell.network, setting] += not names
            if names:
                changed[cell.network, setting] = names
    lines = [["network", *COLUMNS]]
    for network in NETWORKS:
        places = [(network, column) for column in COLUMNS]
        marks = ["CHANGED " + ", ".join(changed[p]) if p in changed else f"same x{same[p]}" for p in places]
        lines.append([network, *(mark.replace("same x0", ".").replace("same x1", "same") for mark in marks)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)) for line in lines)


def main(names: Sequence[str]) -> int:
    """Run the full matrix, or with the argument `covering` the cells of the quick run, and print the table."""
    results: list[tuple[Cell, list[str]]] = []
    for cell in covering() if "covering" in names else every_pair():
        with tempfile.TemporaryDirectory() as root:
            results.append((cell, changes(cell, Path(root))))
        print(cell, results[-1][1] or "same", flush=True)  # noqa: T201 - a program of its own
    print(table(results))  # noqa: T201
    return sum(bool(names) for _, names in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
