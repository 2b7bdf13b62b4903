"""Checkpoints as a series: which are there, what each is called in the ledger, and the ledger itself.

The name of a record is a hash of everything it depends on: the weights of this checkpoint, of the one before and of the
first, the probe, the options. A record that is there under its name is never computed again, whoever computed it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

from ntk_monitor import weights
from ntk_monitor.checkpoints import Checkpoint, digest, find, ordered
from ntk_monitor.errors import NTKMonitorError, said
from ntk_monitor.events import event
from ntk_monitor.reading import read
from ntk_monitor.recorder import whole
from ntk_monitor.snapshot import Snapshot

FOLDER = ".ntk_analysis"


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint of a series, without its tensors."""

    path: Path
    step: int
    epoch: int | None
    digest: str
    """Of the weights that are measured."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies at the given paths."""

    entries: tuple[Entry, ...]
    failures: tuple[tuple[Path, str], ...]
    """Files that cannot be read, each with one sentence."""
    notes: tuple[str, ...] = ()


def survey(
    paths: Sequence[str | os.PathLike[str]], *, key: str | None = None, average: bool = False, trust: bool = False
) -> Survey:
    """Find checkpoints, read each once for its step and the hash of its weights, and put them in order.

    Args:
        paths: files and directories.
        key: name of the state dict to measure; None: the live weights.
        average: measure averaged weights (EMA, SWA).
        trust: see `reading.read`.

    Raises:
        CheckpointError: nothing there, or steps for some of the checkpoints only.
    """
    found, failures = [], []
    for path in find(paths):
        try:
            whole = read(path, trust=trust)
            state = weights.chosen(whole, key=key, average=average)
            found.append(_Read(whole, digest(state)))
        except NTKMonitorError as error:
            failures.append((path, said(error)))
    kept, notes = ordered([one.light() for one in found]) if found else ((), ())
    digests = {one.path: one.digest for one in found}
    entries = tuple(Entry(one.path, one.step or 0, one.epoch, digests[one.path]) for one in kept)
    return Survey(entries, tuple(failures), notes)


class _Read:
    """A checkpoint whose tensors are let go as soon as they are hashed."""

    def __init__(self, whole: Checkpoint, chosen: str) -> None:
        self.path, self.digest = whole.path, chosen
        self._whole = Checkpoint(whole.path, whole.kind, whole.step, whole.epoch, {})
        self._whole.__dict__["digest"] = chosen  # what a cached property looks for

    def light(self) -> Checkpoint:
        return self._whole


def names(entries: Sequence[Entry], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the name of every record."""
    common = json.dumps(options, sort_keys=True, default=str)
    found = []
    for i, entry in enumerate(entries):
        before = entries[i - 1] if i else entry
        parts = (common, str(i), str(entry.step), entries[0].digest, str(before.step), before.digest, entry.digest)
        found.append(hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32])
    return tuple(found)


class Ledger:
    """Finished records below the directory of an analysis, one file each, and the event file made of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._folder = directory / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """True when this record is finished."""
        return (self._folder / f"{name}.event").is_file()

    def write(self, name: str, snapshot: Snapshot, prefix: str) -> None:
        """Keep a finished record; the file appears whole or not at all."""
        self._replace(self._folder / f"{name}.event", event(snapshot, prefix).SerializeToString())

    def state(self, name: str) -> Path:
        """Return where the state that this record hands to the next is kept."""
        return self._folder / f"{name}.state"

    def forget(self, but: Iterable[str]) -> None:
        """Remove states that no record to come asks for: each holds two copies of the weights."""
        kept = {self.state(name) for name in but}
        for path in self._folder.glob("*.state"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def publish(self, wanted: Sequence[str]) -> Path | None:
        """Make the event file hold exactly these records, as far as they are finished, in this order.

        A file that TensorBoard follows is appended to where its content allows. None: nothing is finished.
        """
        events = [self._event(name) for name in wanted if self.has(name)]
        if not events:
            return None
        content = whole(events)
        path = self._file(events[0])
        old = path.read_bytes() if path.exists() else b""
        if old and content.startswith(old):
            with path.open("ab") as file:
                file.write(content[len(old) :])
        elif content != old:
            self._replace(path, content)
        return path

    def _file(self, first: Event) -> Path:
        for path in sorted(self.directory.glob("events.out.tfevents.*.analysis.ntk")):
            return path
        return self.directory / f"events.out.tfevents.{int(first.wall_time):010d}.analysis.ntk"

    def _event(self, name: str) -> Event:
        return Event.FromString((self._folder / f"{name}.event").read_bytes())

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
