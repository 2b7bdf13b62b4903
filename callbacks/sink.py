"""Where a Trainer's probes are written: scalars to every logger, the whole record to one event file."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from ntk_monitor import board
from ntk_monitor.callbacks.lightning_base import Trainer
from ntk_monitor.errors import InputError
from ntk_monitor.events import event
from ntk_monitor.metrics import NAMES
from ntk_monitor.recipe import Recipe
from ntk_monitor.recorder import Recorder
from ntk_monitor.say import say
from ntk_monitor.snapshot import Snapshot


class Sink:
    """Writes snapshots on rank 0, keeps the newest scalars where EarlyStopping and ModelCheckpoint look for them.

    The whole record goes into the TensorBoard logger's own event file, because TensorBoard follows one file per
    directory; without that logger into a file of our own in `recipe.log_dir` or the Trainer's log directory, and
    nowhere when the Trainer has no logger at all.
    """

    def __init__(self, trainer: Trainer, recipe: Recipe) -> None:
        self._prefix = recipe.log_prefix
        self._trainer = trainer
        # A broadcast inside: every rank has to ask.
        directory = recipe.log_dir or trainer.log_dir
        self._write: Callable[[Snapshot], None] | None = None
        self.recorder: Recorder | None = None
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        writer = None if recipe.log_dir else _tensorboard_writer(trainer)
        if writer is not None:
            self._write = lambda snapshot: self._into(writer, snapshot)
        elif directory is not None and (recipe.log_dir or trainer.loggers):
            try:
                self.recorder = Recorder(directory)
            except (OSError, InputError) as error:
                say(f"no record is written, loggers still get the scalars: {error}")
                return
            self._write = self._record

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Give every scalar a finite value among the Trainer's callback metrics.

        EarlyStopping and ModelCheckpoint stop the run on a missing key or NaN; 0 stands for "no value yet" there, and
        there only: loggers never see it.
        """
        known = self._trainer.callback_metrics
        for name in NAMES:
            key = f"{self._prefix}/{name}"
            if name in metrics:
                known[key] = torch.tensor(metrics[name])
            elif key not in known:
                known[key] = torch.tensor(0.0)

    def write(self, snapshot: Snapshot) -> None:
        """Log the scalars and store the record. A logger that fails loses its own copy, never the others'."""
        self.publish(snapshot.metrics)
        if not self._trainer.is_global_zero:
            return
        scalars = {f"{self._prefix}/{name}": value for name, value in snapshot.metrics.items()}
        writers = [partial(logger.log_metrics, scalars, snapshot.step) for logger in self._trainer.loggers if scalars]
        if self._write is not None:
            writers.append(partial(self._write, snapshot))
        for write in writers:
            try:
                write()
            except Exception as error:  # noqa: BLE001 - a full disk or a lost server must not stop the run
                say(f"probe at step {snapshot.step} could not be written: {type(error).__name__}: {error}")

    def flush(self) -> None:
        """Push what was written towards the disk."""
        with contextlib.suppress(Exception):
            writer = _tensorboard_writer(self._trainer)
            if writer is not None:
                writer.flush()

    def _into(self, writer: SummaryWriter, snapshot: Snapshot) -> None:
        record = event(snapshot, self._prefix, board.pictures(snapshot, self._prefix))
        writer._get_file_writer().add_event(record, step=snapshot.step, walltime=snapshot.wall_time)

    def _record(self, snapshot: Snapshot) -> None:
        assert self.recorder is not None
        self.recorder.write(snapshot, self._prefix)


def _tensorboard_writer(trainer: Trainer) -> SummaryWriter | None:
    for logger in trainer.loggers:
        experiment = getattr(logger, "experiment", None)
        if isinstance(experiment, SummaryWriter):
            return experiment
    return None
