"""Recorder writes probes to an event file, for plain loops and for Trainers without a TensorBoard logger.

Each record is appended by the calling thread with the file opened and closed again: nothing is queued that a crash
could lose, an error such as a full disk reaches the caller, and a file deleted in mid-run is begun again.
"""

import contextlib
import io
import itertools
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ntk_monitor import board
from ntk_monitor.errors import InputError, said
from ntk_monitor.events import event
from ntk_monitor.say import say, tell, watching
from ntk_monitor.snapshot import Snapshot

_numbers = itertools.count()


class Recorder:
    """Appends to one new event file in a directory, which TensorBoard and `load_history` read.

    Steps must increase: TensorBoard takes a smaller step for a resumed run and hides everything from that step on.
    Give a run its own directory: by default TensorBoard follows only the newest event file of a directory.
    Costs about 3 ms per probe of 12 kB, nearly all of it tensorboard's checksum.

    Args:
        log_dir: a local directory, made if need be.
        strict: raise what goes wrong in `write`, a full disk for one; False: say so and go on, so that a training loop
            does not end because of it.

    Raises:
        InputError: `log_dir` is an address such as s3://… (object stores cannot append), or an existing file.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, strict: bool = True) -> None:
        if "://" in str(log_dir):
            raise InputError(
                f"log_dir must be a local directory, got {log_dir}; record locally and copy the directory afterwards"
            )
        self.log_dir = Path(log_dir)
        if self.log_dir.exists() and not self.log_dir.is_dir():
            raise InputError(f"log_dir must be a directory, got the file {log_dir}; pass another path")
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # The name that TensorBoard expects; the counter tells recorders of one process in one second apart.
        origin = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = self.log_dir / f"events.out.tfevents.{origin}.ntk"
        self._closed, self._strict, self._laid_out = False, strict, False
        append(self.path)

    def write(
        self, snapshot: Snapshot, prefix: str = "ntk", extra: Iterable[Summary.Value] = (), *, stock: bool = True
    ) -> None:
        """Append one probe as one Event.

        Args:
            snapshot: the probe; steps must increase.
            prefix: of every tag.
            extra: further values for the same Event (see `ntk_monitor.stock`).
            stock: also write the scalars and pictures that TensorBoard's own dashboards show. Drawing a stored Gram
                matrix costs about 0.3 s.
        """
        try:
            shown = [*board.scalars(snapshot, prefix), *board.pictures(snapshot, prefix)] if stock else []
            # One layout per file: a second one would take its place.
            layout = [board.layout(prefix)] if stock and not self._laid_out else []
            self._append(event(snapshot, prefix, [*layout, *shown, *extra]))
            if layout:
                self._laid_out = True
                tell(watching(self.log_dir, prefix))
        except Exception as error:
            if self._strict:
                raise
            say(f"the probe at step {snapshot.step} could not be written: {said(error, kind=True)}")

    def flush(self) -> None:
        """Wait until the disk has everything, which survives a power failure; a crash of the process needs no flush."""
        # Opened to read: a file that somebody deleted is not created again, empty, just to be flushed.
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and refuse further writes. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            try:
                self.flush()
            except OSError as error:
                if self._strict:
                    raise
                say(f"the record may not survive a power failure: {said(error)}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, event: Event) -> None:
        if self._closed:
            raise InputError(f"the recorder of {self.path} is closed; open a new Recorder on the same directory")
        append(self.path, event)


def append(path: Path, *events: Event) -> None:
    """Append records to an event file, all of them or nothing, and begin the file where there is none.

    A file that others append to in this way at the same time, TensorBoard's own writer included, stays whole.

    Raises:
        OSError: the disk is full, the limit on the size of files is reached, or the directory cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        # A file of no version is one of TensorBoard's first, whose steps may not decrease.
        content = encoded([] if start else [_header()], events)
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:  # Ctrl-C included
            # Half a record would make all later ones unreadable. What others wrote behind it is not ours to cut.
            end = file.tell()
            if start < end < start + len(content) and end == file.seek(0, os.SEEK_END):
                file.truncate(start)
            raise


def _header(wall_time: float | None = None) -> Event:
    source = SourceMetadata(writer="ntk_monitor.recorder")
    return Event(wall_time=wall_time or time.time(), file_version="brain.Event:2", source_metadata=source)


def beginning(wall_time: float) -> bytes:
    """Return how an event file that was begun at this time starts."""
    return encoded([_header(wall_time)])


def encoded(*parts: Iterable[Event]) -> bytes:
    """Return records as they stand in an event file."""
    records = io.BytesIO()
    for one in itertools.chain(*parts):
        RecordWriter(records).write(one.SerializeToString())
    return records.getvalue()
