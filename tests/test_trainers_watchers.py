"""Early stopping, checkpoints and schedulers that watch a scalar: none of them takes a placeholder for a value."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.callbacks.placeholders import placeholders
from tests.fitting import fit
from tests.modules import Classifier, digits, loader, mlp
from tests.training import seeded, trainer

LATE = "ntk/linearisation_error"
"""Takes two probes: with one at step 0 and one at step 20, the first epoch of ten steps ends without a value."""


def late(**options: Any) -> NTKMonitor:
    return NTKMonitor(probe=8, every_n_steps=20, loss="cross_entropy", reference=0, verify=False, **options)


class Plateau(Classifier):
    """Divides the learning rate by ten when a scalar stops falling."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        halve = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "monitor": LATE}}


class Epochs(L.Callback):
    """Notes what everybody watches, and the learning rate, at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.rates: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(trainer.callback_metrics[LATE]))
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def test_nobody_who_minimises_takes_a_placeholder_for_the_best(tmp_path: Path) -> None:
    stop = EarlyStopping(LATE, mode="min", patience=2, stopping_threshold=1e-6, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path / "kept", monitor=LATE, mode="min", save_top_k=1, save_on_train_epoch_end=True)
    monitor, epochs = late(), Epochs()
    run = fit(
        tmp_path,
        [monitor, stop, epochs, keep],
        lambda: Plateau(mlp()),
        max_epochs=3,
        enable_checkpointing=True,
    )
    first, second, third = epochs.seen
    assert first == torch.finfo(torch.float32).max
    assert 0 < second < 10
    assert run.current_epoch == 3  # the threshold was not crossed by what stood for a value
    assert keep.best_model_score == pytest.approx(min(second, third))
    assert float(stop.best_score) == pytest.approx(min(second, third))
    assert epochs.rates[:2] == [0.1, 0.1]  # the second epoch brought the first value, which is better than none


def watching(*callbacks: Any, schedulers: Any = ()) -> Any:
    return SimpleNamespace(callbacks=list(callbacks), lr_scheduler_configs=list(schedulers))


def test_the_worst_finite_number_stands_for_each_watched_scalar() -> None:
    large = torch.finfo(torch.float32).max
    parameter = torch.nn.Parameter(torch.zeros(1))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([parameter], lr=0.1), "max")
    found = placeholders(
        watching(
            ModelCheckpoint(monitor="ntk/trace", mode="min"),
            EarlyStopping("ntk/trace", mode="max"),  # alone can end the run, so that its direction counts
            EarlyStopping("ntk/sharpness", mode="min", divergence_threshold=50.0),
            ModelCheckpoint(monitor="val_loss"),
            EarlyStopping("ntk/tarce"),
            ModelCheckpoint(),
            schedulers=[SimpleNamespace(scheduler=plateau, reduce_on_plateau=True, monitor="ntk/alignment")],
        ),
        "ntk",
    )
    assert found == {"ntk/trace": -large, "ntk/sharpness": 50.0, "ntk/alignment": -large}
    assert placeholders(watching(EarlyStopping("ntk/trace")), "other") == {}


def test_a_divergence_threshold_is_not_crossed_by_a_placeholder(tmp_path: Path) -> None:
    stop = EarlyStopping(LATE, mode="min", patience=9, divergence_threshold=50.0, check_on_train_epoch_end=True)
    assert fit(tmp_path, [late(), stop], max_epochs=2).current_epoch == 2


def test_a_misspelt_scalar_is_still_missed(tmp_path: Path) -> None:
    stop = EarlyStopping("ntk/tarce", check_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="ntk/tarce"):
        fit(tmp_path, [late(), stop], max_epochs=2)


def test_a_resumed_run_starts_from_the_last_values(tmp_path: Path) -> None:
    monitor, first = late(), Epochs()
    run = fit(tmp_path, [monitor, first], max_epochs=2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert monitor.last is not None
    again = Epochs()
    stop = EarlyStopping(LATE, mode="min", patience=9, check_on_train_epoch_end=True)
    seeded()
    # The look at change starts anew, so that this run measures no such value of its own.
    resumed = trainer(tmp_path, [late(), stop, again], max_epochs=3, limit_train_batches=5)
    resumed.fit(Classifier(mlp()), loader(digits()), ckpt_path=tmp_path / "two.ckpt")
    assert again.seen == [pytest.approx(monitor.last.metrics["linearisation_error"])]
    assert first.seen[1] == again.seen[0]
