"""Where a Trainer's probes are written: scalars to every logger, the whole record to one event file."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.writer import SummaryWriter

from ntk_monitor import board
from ntk_monitor.callbacks.event_files import add, layout, local_file
from ntk_monitor.callbacks.lightning_base import Trainer
from ntk_monitor.errors import InputError, said
from ntk_monitor.events import event
from ntk_monitor.metrics import NAMES
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import Manifest, save
from ntk_monitor.recipe import Recipe
from ntk_monitor.recorder import Recorder
from ntk_monitor.say import say, tell, watching
from ntk_monitor.snapshot import Snapshot


class Sink:
    """Writes snapshots on rank 0, keeps the newest scalars where EarlyStopping and ModelCheckpoint look for them.

    The whole record goes into the TensorBoard logger's own event file, because TensorBoard follows one file per
    directory; without that logger into a file of our own in `recipe.log_dir` or the Trainer's log directory, and
    nowhere when the Trainer has no logger at all. It is on disk when `write` returns.
    """

    def __init__(self, trainer: Trainer, recipe: Recipe) -> None:
        self._prefix = recipe.log_prefix
        self._trainer = trainer
        self._lost = 0
        self._told: set[str] = set()
        self._laid_out = False
        # A broadcast inside: every rank has to ask.
        directory = recipe.log_dir or trainer.log_dir
        self.recorder: Recorder | None = None
        self._home: Any = None  # the logger in whose event file the record goes
        self._directory: str | None = None
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        if not recipe.log_dir:
            self._home = next((logger for logger in trainer.loggers if _writer(logger) is not None), None)
        if self._home is None and directory is not None and (recipe.log_dir or trainer.loggers):
            try:
                self.recorder = Recorder(directory)
                self._directory = str(directory)
            except InputError as error:
                say(f"no record is written, loggers still get the scalars: {error}")
            except OSError as error:
                self._directory = str(directory)
                say(f"no record is written yet, loggers still get the scalars: {said(error)}; every probe tries again")

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
        for place, write in self._copies(snapshot):
            try:
                write()
            except Exception as error:  # noqa: BLE001 - a full disk or a lost server must not stop the run
                self._lose(f"{place}: {said(error, kind=True)}", snapshot.step)

    def keep(self, probe: Probe, manifest: Manifest) -> None:
        """Store the probe in the directory of the record; nowhere without a record, or when that is far away.

        Raises:
            OSError: it could not be written.
        """
        writer = _writer(self._home)
        file = None if writer is None else local_file(writer)
        directory = self._directory if file is None else file.parent
        if directory is not None:
            save(probe, directory, self._prefix, manifest=manifest)
            tell(watching(directory, self._prefix))

    def flush(self) -> None:
        """Push what was written towards the disk, and say how much could not be written."""
        with contextlib.suppress(Exception):
            writer = _writer(self._home)
            if writer is not None:
                writer.flush()
            if self.recorder is not None:
                self.recorder.flush()
        if self._lost > 1:
            say(f"{self._lost} times a probe could not be written; the first reasons were given when it happened")
        self._lost = 0

    def _copies(self, snapshot: Snapshot) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield every place that gets something of a probe, and what writes it there."""
        scalars = {f"{self._prefix}/{name}": value for name, value in snapshot.metrics.items()}
        for logger in self._trainer.loggers:
            place, file = type(logger).__name__, _own_file(logger)
            values = _values(logger, scalars) if file else []
            if logger is self._home:
                yield f"the record in {place}", partial(self._into, logger, snapshot, values)
            elif values:
                yield place, partial(_log, logger, snapshot, values)
            if scalars and not file:
                yield place, partial(logger.log_metrics, scalars, snapshot.step)
        if self._directory is not None:
            yield "the record", partial(self._record, snapshot)

    def _into(self, logger: Any, snapshot: Snapshot, values: list[Summary.Value]) -> None:
        writer = _writer(logger)
        assert writer is not None
        shown = [*self._layout(local_file(writer)), *values, *self._pictures(snapshot)]
        add(writer, event(snapshot, self._prefix, shown))
        self._laid_out = True

    def _pictures(self, snapshot: Snapshot) -> list[Summary.Value]:
        try:
            return list(board.pictures(snapshot, self._prefix))
        except Exception as error:  # noqa: BLE001 - a drawing that fails must not cost the numbers
            self._lose(f"its pictures: {said(error, kind=True)}", snapshot.step)
            return []

    def _record(self, snapshot: Snapshot) -> None:
        assert self._directory is not None
        if self.recorder is None:
            self.recorder = Recorder(self._directory)
        scalars = board.scalars(snapshot, self._prefix)
        shown = [*self._layout(self.recorder.path), *scalars, *self._pictures(snapshot)]
        self.recorder.write(snapshot, self._prefix, shown, stock=False)
        self._laid_out = True

    def _layout(self, file: Path | None) -> list[Summary.Value]:
        return [] if self._laid_out else layout(file, self._prefix)

    def _lose(self, reason: str, step: int) -> None:
        """Say once per reason what was lost: a disk stays full for many probes."""
        self._lost += 1
        if reason not in self._told:
            self._told.add(reason)
            say(f"the probe at step {step} could not be written to {reason}; every probe tries again")


def _writer(logger: Any) -> SummaryWriter | None:
    """Return the TensorBoard writer of a logger, None when it has none, or none any more."""
    try:
        experiment = getattr(logger, "experiment", None)
    except Exception:  # noqa: BLE001 - a logger whose server does not answer
        return None
    return experiment if isinstance(experiment, SummaryWriter) else None


def _own_file(logger: Any) -> bool:
    """True when scalars can be appended to the event file of a logger, which does nothing else with them itself."""
    with contextlib.suppress(Exception):  # a writer that is broken shows it where it is written to
        writer = _writer(logger)
        stock = type(logger).log_metrics.__module__.startswith(("lightning.", "pytorch_lightning."))
        return stock and writer is not None and local_file(writer) is not None
    return False


def _log(logger: Any, snapshot: Snapshot, values: list[Summary.Value]) -> None:
    writer = _writer(logger)
    assert writer is not None
    add(writer, Event(step=snapshot.step, wall_time=snapshot.wall_time, summary=Summary(value=values)))


def _values(logger: Any, scalars: Mapping[str, float]) -> list[Summary.Value]:
    """Return scalars the way the logger itself would write them, its own prefix included."""
    prefix = getattr(logger, "_prefix", "")
    before = f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '-')}" if prefix else ""
    return [Summary.Value(tag=f"{before}{name}", simple_value=value) for name, value in scalars.items()]
