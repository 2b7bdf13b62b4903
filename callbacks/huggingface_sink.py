"""Where the probes of a Hugging Face Trainer are written: beside its own logs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from ntk_monitor import board
from ntk_monitor.callbacks.event_files import add, layout, local_file
from ntk_monitor.errors import said
from ntk_monitor.events import event
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import Manifest, save
from ntk_monitor.recipe import Recipe
from ntk_monitor.recorder import Recorder, append
from ntk_monitor.say import say, tell, watching
from ntk_monitor.snapshot import Snapshot


class HuggingFaceSink:
    """Writes snapshots where the Trainer logs.

    The whole record goes into the event file of the Trainer's TensorBoardCallback; without one, or with
    `recipe.log_dir`, into a file of our own, by default in `output_dir`/ntk. It is on disk when `write` returns. Every
    other integration of the Trainer (Weights & Biases, MLflow ...) gets the scalars the way it gets the Trainer's.

    Args:
        told: what the Trainer tells its callbacks: arguments, state, control.
        callbacks: the Trainer's.
        recipe: prefix and directory.
    """

    def __init__(self, told: tuple[Any, Any, Any], callbacks: list[Any], recipe: Recipe) -> None:
        self._told, self._prefix, self._reasons = told, recipe.log_prefix, set[str]()
        self._others = [c for c in callbacks if type(c).__module__.startswith("transformers.integrations")]
        self._others = [c for c in self._others if not hasattr(c, "tb_writer")]
        writers = [c.tb_writer for c in callbacks if isinstance(getattr(c, "tb_writer", None), SummaryWriter)]
        self._writer = writers[0] if writers and not recipe.log_dir else None
        # Asked now: at the end of training its callback closes the writer, and asking would open another file.
        self._file = None if self._writer is None else local_file(self._writer)
        self._directory = None if self._writer is not None else Path(recipe.log_dir or Path(told[0].output_dir) / "ntk")
        self._recorder: Recorder | None = None
        self._laid_out = False

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: this Trainer has no table of metrics for callbacks."""

    def write(self, snapshot: Snapshot) -> None:
        """Store the record and hand the scalars on. What fails loses its own copy, never the others'."""
        copies: list[tuple[str, Callable[[], Any]]] = [("the record", partial(self._store, snapshot))]
        scalars = {f"{self._prefix}/{name}": value for name, value in snapshot.metrics.items()}
        if scalars:
            copies += [
                (type(other).__name__, partial(other.on_log, *self._told, logs=dict(scalars))) for other in self._others
            ]
        for place, copy in copies:
            try:
                copy()
            except Exception as error:  # noqa: BLE001 - a full disk or a lost server must not stop the run
                self._lose(f"{place}: {said(error, kind=True)}", snapshot.step)

    def keep(self, probe: Probe, manifest: Manifest) -> None:
        """Store the probe in the directory of the record; nowhere when that is far away.

        Raises:
            OSError: it could not be written.
        """
        directory = self._directory if self._file is None else self._file.parent
        if directory is not None:
            save(probe, directory, self._prefix, manifest=manifest)
            tell(watching(directory, self._prefix))

    def flush(self) -> None:
        """Wait until the disk has everything."""
        if self._recorder is not None:
            self._recorder.flush()

    def _store(self, snapshot: Snapshot) -> None:
        if self._directory is not None:
            if self._recorder is None:
                self._recorder = Recorder(self._directory)
            self._recorder.write(snapshot, self._prefix)
            return
        shown = [*board.scalars(snapshot, self._prefix), *board.pictures(snapshot, self._prefix)]
        record = event(snapshot, self._prefix, [*([] if self._laid_out else layout(self._file, self._prefix)), *shown])
        if self._file is not None:
            append(self._file, record)
        elif self._writer is not None:
            add(self._writer, record)
        self._laid_out = True

    def _lose(self, reason: str, step: int) -> None:
        """Say once per reason what was lost: a disk stays full for many probes."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            say(f"the probe at step {step} could not be written to {reason}; every probe tries again")
