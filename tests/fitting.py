"""One seeded fit on the digits with some callbacks, and the history it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import ntk_monitor as ntk
from tests.modules import Classifier, digits, loader, mlp
from tests.training import seeded, trainer

Module: TypeAlias = L.LightningModule | Callable[[], L.LightningModule] | None


def fit(root: Path, callbacks: Any, module: Module = None, **options: Any) -> L.Trainer:
    """Fit with one callback or a list of them; twelve steps of ten a pass, unless `max_epochs` or `max_steps` say so.

    Two runs that shall start from the same weights give a function that builds the module.
    """
    seeded()
    built = module if module is None or isinstance(module, L.LightningModule) else module()
    data, valid = options.pop("data", None), options.pop("valid", None)
    listed = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *options.pop("also", [])]
    steps = {} if "max_epochs" in options else {"max_steps": 12, "max_epochs": -1}
    run = trainer(root, listed, **{**steps, **options})
    run.fit(Classifier(mlp()) if built is None else built, loader(digits()) if data is None else data, valid)
    return run


def validation() -> DataLoader[Any]:
    return DataLoader(digits(64), 32)


def history(root: Path, **options: Any) -> ntk.History:
    return ntk.load_history(root / "lightning_logs" / "version_0", **options)


def tensorboard(root: Path) -> TensorBoardLogger:
    return TensorBoardLogger(root)
