"""Checkpoints as a series: which are there, what each is called in the ledger, and the ledger itself.

The name of a record is a hash of everything it depends on: the weights of this checkpoint, of the one before and of the
first, the probe, the options. A record that is there under its name is never computed again, whoever computed it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

from ntk_monitor import events, weights
from ntk_monitor.atomic import whole
from ntk_monitor.checkpoints import LIVE, Checkpoint, State, find, ordered
from ntk_monitor.errors import CheckpointError, NTKMonitorError
from ntk_monitor.reading import read
from ntk_monitor.recorder import beginning, encoded
from ntk_monitor.snapshot import Snapshot

FOLDER = ".ntk_analysis"

Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint of a series, without its tensors."""

    path: Path
    step: int
    epoch: int | None
    digest: str
    """Of the weights that are measured."""
    optimizers: int
    """How many of them have their state saved."""
    weights: State = field(compare=False, repr=False)
    """Their names, shapes and dtypes: tensors without data."""

    @property
    def layout(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """The same in plain words, equal for checkpoints of one network."""
        return tuple((name, tuple(value.shape), str(value.dtype)) for name, value in sorted(self.weights.items()))


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies at the given paths."""

    entries: tuple[Entry, ...]
    failures: tuple[tuple[Path, str], ...]
    """Files that cannot be read, each with one sentence."""
    notes: tuple[str, ...] = ()


class Lookout:
    """Looks at paths for checkpoints, again and again, and reads each once: for its step and the hash of its weights.

    Args:
        paths: files and directories.
        key: name of the state dict to measure; None: the live weights.
        average: measure averaged weights (EMA, SWA).
        trust: see `reading.read`.
        but: files below these paths that are something else.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        key: str | None = None,
        average: bool = False,
        trust: bool = False,
        but: Collection[Path] = (),
    ) -> None:
        self._paths, self._key, self._average, self._trust = paths, key, average, trust
        self._but = {path.resolve() for path in but}
        self._stamps: dict[Path, Stamp] = {}
        self._read: dict[Path, Checkpoint | str] = {}
        self._gone: dict[tuple[int | None, str], Checkpoint] = {}

    def look(self, *, growing: bool = False) -> Survey:
        """Return what is there.

        Args:
            growing: a run is still writing. A file is then read when it has not changed since the look before, and a
                checkpoint that was replaced or removed since it was read stays in the series.

        Raises:
            CheckpointError: nothing there (with `growing`: nothing is found yet).
        """
        try:
            found = [path for path in find(self._paths) if path.resolve() not in self._but]
        except CheckpointError:
            if not growing:
                raise
            found = []
        for path in [*self._read]:
            if path not in found:
                self._forget(path)
        for path in found:
            stamp = _stamp(path)
            before, self._stamps[path] = self._stamps.get(path), stamp
            if before != stamp:
                self._forget(path)
            if path not in self._read and (before == stamp or not growing):
                self._read[path] = self._opened(path)
        return self._surveyed(growing)

    def _forget(self, path: Path) -> None:
        if isinstance(was := self._read.pop(path, None), Checkpoint):
            self._gone[was.step, was.digest] = was

    def _opened(self, path: Path) -> Checkpoint | str:
        try:
            whole = read(path, trust=self._trust)
            return whole.light(weights.chosen(whole, key=self._key, average=self._average))
        except (NTKMonitorError, OSError) as error:
            return str(error)

    def _surveyed(self, growing: bool) -> Survey:
        seen = [one for one in self._read.values() if isinstance(one, Checkpoint)]
        failures = [(path, one) for path, one in self._read.items() if isinstance(one, str)]
        if growing:
            here = {(one.step, one.digest) for one in seen}
            seen += [one for what, one in self._gone.items() if what not in here and what[0] is not None]
        if any(one.step is not None for one in seen):
            failures += [(one.path, _NO_STEP) for one in seen if one.step is None]
            seen = [one for one in seen if one.step is not None]
        kept, notes = ordered(seen)
        entries = tuple(
            Entry(one.path, one.step or 0, one.epoch, one.digest, len(one.optimizers), one.states[LIVE]) for one in kept
        )
        return Survey(entries, tuple(failures), notes)


_NO_STEP = (
    "it does not say at which step it was saved, others do; put the number into its name (step=100.pt) or leave it out"
)


def _stamp(path: Path) -> Stamp:
    """Return what changes when a file, or one in a directory, is written to."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = []
    for one in files:
        with suppress(FileNotFoundError):
            status = one.stat()
            found.append((one.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def names(
    entries: Sequence[Entry], options: Mapping[str, Any], turn: Callable[[int], Any] = lambda _: None
) -> tuple[str, ...]:
    """Return the name of every record.

    Args:
        entries: in order.
        options: what else the records depend on.
        turn: what a record depends on of its place in the series.
    """
    common = json.dumps(options, sort_keys=True, default=str)
    found = []
    for i, entry in enumerate(entries):
        parts = [common, str(turn(i))]
        for one in (entries[0], entries[max(0, i - 1)], entry):
            parts += [str(one.step), one.digest, str(one.optimizers)]
        found.append(hashlib.sha256("\n".join([*parts, str(entry.epoch)]).encode()).hexdigest()[:32])
    return tuple(found)


class Ledger:
    """Finished records below the directory of an analysis, one file each, and the event file made of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._folder = directory / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, tuple[float, bytes]] = {}

    def has(self, name: str) -> bool:
        """True when this record is finished."""
        return (self._folder / f"{name}.event").is_file()

    def write(self, name: str, snapshot: Snapshot, prefix: str) -> None:
        """Keep a finished record; the file appears whole or not at all."""
        self._replace(self._folder / f"{name}.event", events.event(snapshot, prefix).SerializeToString())

    def state(self, name: str) -> Path:
        """Return where the state that this record hands to the next is kept."""
        return self._folder / f"{name}.state"

    def publish(self, wanted: Sequence[str]) -> Path | None:
        """Make the event file hold exactly these records, as far as they are finished, in this order.

        A file that TensorBoard follows is appended to where its content allows. None: nothing is finished.
        """
        records = [self._record(name) for name in wanted if self.has(name)]
        if not records:
            return None
        content = b"".join([beginning(records[0][0]), *(record for _, record in records)])
        path = self._file(records[0][0])
        old = path.read_bytes() if path.exists() else b""
        if old and content.startswith(old):
            with path.open("ab") as file:
                file.write(content[len(old) :])
        elif content != old:
            self._replace(path, content)
        return path

    def _file(self, wall_time: float) -> Path:
        for path in sorted(self.directory.glob("events.out.tfevents.*.analysis.ntk")):
            return path
        return self.directory / f"events.out.tfevents.{int(wall_time):010d}.analysis.ntk"

    def _record(self, name: str) -> tuple[float, bytes]:
        """Return when a record was made, and the record as it stands in an event file."""
        if name not in self._records:
            event = Event.FromString((self._folder / f"{name}.event").read_bytes())
            self._records[name] = event.wall_time, encoded([event])
        return self._records[name]

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        with whole(path) as part:
            part.write_bytes(content)
