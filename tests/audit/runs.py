"""One run of the audit: train a network with NTKMonitor in a Trainer, score it, keep what the monitor recorded."""

import dataclasses
import json
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import ntk_monitor as ntk
from ntk_monitor import health
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.say import NTKWarning
from ntk_monitor.snapshot import ARRAYS, Snapshot
from tests.audit.training import Task
from tests.training import seeded, trainer

Kind: TypeAlias = Literal["healthy", "sick"]

_SHOWN = 64
"""Arrays of at most so many numbers go into the JSON record; longer ones stay in the event file beside it."""


@dataclass(frozen=True)
class Job:
    """What one run trains, for how long, and how its result is scored."""

    module: Task
    data: DataLoader[Any]
    steps: int
    score: Callable[[nn.Module], float]
    """Of the trained network in evaluation mode, larger is better."""
    probes: int = 14
    options: dict[str, Any] = field(default_factory=dict)
    """Of the Trainer."""


@dataclass(frozen=True)
class Case:
    """One run of the audit."""

    name: str
    about: str
    make: Callable[[], Job]
    metric: str
    bound: float
    """A healthy run reaches this metric, a sick one does not."""
    causes: tuple[str, ...] = ()
    """Rules of which any one names what is wrong with a sick run."""

    @property
    def kind(self) -> Kind:
        return "sick" if self.causes else "healthy"


@dataclass
class Outcome:
    """What became of one run."""

    name: str
    kind: str
    about: str = ""
    metric: str = ""
    score: float = float("nan")
    bound: float = float("nan")
    steps: int = 0
    seconds: float = float("nan")
    """Of one core, probes included."""
    probe_seconds: float = float("nan")
    probes: int = 0
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What the monitor said while it ran."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    causes: tuple[str, ...] = ()
    loss_status: str = ""
    losses: list[float] = field(default_factory=list)
    """Mean training loss of 20 stretches of the run."""
    error: str = ""
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    def found(self, *severities: str) -> list[str]:
        """Rules that spoke with one of these severities."""
        return [f["rule"] for f in self.findings if f["severity"] in severities]

    @property
    def as_intended(self) -> bool:
        """True when a healthy run ends well, or a sick one badly."""
        return not self.error and (self.score >= self.bound) == (self.kind == "healthy")

    @property
    def named(self) -> bool:
        """True when a warning or an error names what is wrong with a sick run."""
        return any(rule in self.causes for rule in self.found("error", "warning"))

    @property
    def quiet(self) -> bool:
        """True when there is no error and at most one warning."""
        return not self.found("error") and len(self.found("warning")) <= 1


def run(case: Case, folder: Path, seed: int = 0) -> Outcome:
    """Train the case from this seed with its record in `folder`, and judge it.

    A training run that raises is part of the answer: `Outcome.error` holds the traceback.
    """
    outcome = Outcome(case.name, case.kind, case.about, case.metric, bound=case.bound, causes=case.causes)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    start = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _train(case, folder, outcome, seed)
        outcome.warnings = [str(w.message) for w in caught if issubclass(w.category, NTKWarning)]
    except Exception:  # noqa: BLE001 - a run that broke is shown among the others
        outcome.error = traceback.format_exc()
    outcome.seconds = time.process_time() - start
    read(outcome, folder)
    return outcome


def _train(case: Case, folder: Path, outcome: Outcome, seed: int) -> None:
    seeded(seed)
    job = case.make()
    outcome.steps = job.steps
    monitor = NTKMonitor(every_n_steps=max(1, job.steps // job.probes), log_dir=str(folder))
    loop: L.Trainer = trainer(folder, [monitor], **{"max_steps": job.steps, "max_epochs": -1, **job.options})
    loop.fit(job.module, job.data)
    outcome.losses = [float(part.mean()) for part in np.array_split(np.array(job.module.losses), 20) if len(part)]
    outcome.score = job.score(job.module.eval())


def read(outcome: Outcome, folder: Path) -> None:
    """Fill in what the record in `folder` says, and what today's rules make of it."""
    try:
        history = ntk.load_history(folder)
    except ntk.errors.HistoryError as error:
        outcome.error = outcome.error or str(error)
        return
    measured = history.measured
    outcome.probes = len(measured)
    outcome.probe_seconds = sum(sum(snapshot.seconds.values()) for snapshot in measured)
    outcome.skipped = [f"step {s.step}: {s.reason}" for s in history if s.status == "skipped"]
    outcome.loss_status = f"{measured[-1].loss or 'no loss'} {measured[-1].loss_status}" if measured else ""
    outcome.snapshots = [_plain(snapshot) for snapshot in history]
    outcome.findings = [asdict(finding) for finding in health.findings(history.snapshots)]


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as JSON: every number and text, and the short arrays."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(Snapshot):
        value = getattr(snapshot, item.name)
        if item.name not in ARRAYS:
            found[item.name] = value
        elif 0 < value.size <= _SHOWN:
            found[item.name] = value.tolist()
    return found


def saved(outcome: Outcome, folder: Path) -> Path:
    path = folder / f"{outcome.name}.json"
    path.write_text(json.dumps(asdict(outcome), indent=1, default=str), "utf-8")
    return path


def load(path: Path) -> Outcome:
    """Return a saved outcome."""
    raw = json.loads(path.read_text("utf-8"))
    raw["causes"] = tuple(raw["causes"])
    return Outcome(**raw)


def accuracy(x: torch.Tensor, y: torch.Tensor) -> Callable[[nn.Module], float]:
    """Share of samples whose largest output is their class; of one output: on the right side of 0."""

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            f = module(x)
        guess = f.argmax(1) if f.shape[1] > 1 else (f > 0).float()
        return float((guess == y).float().mean())

    return score


def determination(x: torch.Tensor, y: torch.Tensor) -> Callable[[nn.Module], float]:
    """R², the share of the targets' variance that is explained, averaged over outputs."""

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            f = module(x)
        return float((1 - (f - y).square().mean(0) / y.var(0, correction=0)).mean())

    return score
