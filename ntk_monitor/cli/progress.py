"""One line of progress instead of Lightning's many: how far training is, its loss, how many probes were taken."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ntk_monitor.callbacks import NTKMonitor


class Line(pl.Callback):
    """A progress bar over optimizer steps. On something that is no terminal only its last state is printed."""

    def __init__(self, monitor: NTKMonitor, console: Console) -> None:
        self._monitor = monitor
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps  {task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", state="starting")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self._bar.update(self._task, total=int(trainer.estimated_stepping_batches))
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance it."""
        probes = self._monitor.monitor.probes if self._monitor.monitor is not None else 0
        state = f"loss {float(outputs['loss']):.3f}  {probes} probes"
        self._bar.update(self._task, completed=trainer.global_step, state=state)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._bar.stop()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence tips, device lines and advice; whatever anybody else says, warnings of ours included, is still heard."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "ntk_monitor")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
