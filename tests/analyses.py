"""A tiny run whose checkpoints are analysed: module, data module, functions to name on the command line."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.cli import _parser
from ntk_monitor.history import History
from ntk_monitor.snapshot import ARRAYS, Snapshot
from tests.training import seeded, trainer

FEATURES, CLASSES, STEPS = 6, 3, 4
"""Inputs, outputs, and optimizer steps of an epoch."""

MODEL, DATA = "tests.analyses.Net", "tests.analyses:data"


class Net(L.LightningModule):
    """A classifier of two layers."""

    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Data(L.LightningDataModule):
    """Its training data."""

    def __init__(self, batch: int = 8) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), self.batch, shuffle=True)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8 * STEPS, FEATURES, generator=generator)
    return TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1))


def network(width: int = 8) -> nn.Module:
    return Net(width).net


def fitted(root: Path, epochs: int, *, live: bool = False, **options: Any) -> Path:
    """Train, with a checkpoint after each epoch, and with the monitor at the same steps; return the run's directory."""
    seeded()
    logger = TensorBoardLogger(root)
    callbacks: list[L.Callback] = [ModelCheckpoint(filename="{step}", save_top_k=-1)]
    if live:
        callbacks.insert(0, NTKMonitor(probe=8, every_n_steps=STEPS, reference=16))
    run = trainer(root, callbacks, max_epochs=epochs, logger=logger, enable_checkpointing=True, **options)
    run.fit(Net(), Data().train_dataloader())
    return Path(logger.log_dir)


def series(root: Path, count: int, *, optimizer: bool = True) -> list[Path]:
    """Write checkpoints of the same training by hand, which takes no Trainer; return their files."""
    seeded()
    root.mkdir(parents=True, exist_ok=True)
    net = network()
    moved = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = data().tensors
    paths = []
    for i in range(count):
        content = {"model": net.state_dict(), "step": i, **({"optimizer": moved.state_dict()} if optimizer else {})}
        paths.append(root / f"c{i:03d}.pt")
        torch.save(content, paths[-1])
        moved.zero_grad()
        F.cross_entropy(net(x), y).backward()
        moved.step()
    return paths


FIELDS = tuple(
    field.name for field in fields(Snapshot) if field.name not in (*ARRAYS, "metrics", "facts", "seconds", "wall_time")
)


def differences(one: History, other: History) -> list[str]:
    """Return what differs between two histories to the last bit, wall time and cost aside."""
    found = []
    if [s.step for s in one] != [s.step for s in other]:
        return [f"steps {[s.step for s in one]} and {[s.step for s in other]}"]
    for a, b in zip(one, other, strict=True):
        found += [
            f"{name} of step {a.step}: {getattr(a, name)} and {getattr(b, name)}"
            for name in FIELDS
            if repr(getattr(a, name)) != repr(getattr(b, name))
        ]
        for kind in ("metrics", "facts"):
            x, y = getattr(a, kind), getattr(b, kind)
            found += [f"{n} of step {a.step}: {x.get(n)} and {y.get(n)}" for n in x | y if x.get(n) != y.get(n)]
        found += [f"{name} of step {a.step}" for name in ARRAYS if bits(a)[name] != bits(b)[name]]
    return found


def bits(snapshot: Snapshot) -> dict[str, bytes]:
    """Return the arrays of a record as bytes."""
    return {name: np.asarray(getattr(snapshot, name)).tobytes() for name in ARRAYS}


def options(*words: str) -> dict[str, Any]:
    """Return what the command line makes of the words after `analyze`."""
    parsed: dict[str, Any] = vars(_parser().parse_args(["analyze", *words]).analyze)
    return parsed
