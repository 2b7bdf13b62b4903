"""The probes of a run, from wherever its event files lie: found, put in order, and stitched where it was resumed.

A run that resumes from a checkpoint writes some steps again. The later record is the truth: it replaces every earlier
one at the same or a later step. TensorBoard's data server applies the same rule.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ntk_monitor.errors import DamagedRecordError, HistoryError
from ntk_monitor.events import decode, prefixes
from ntk_monitor.records import Records
from ntk_monitor.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Run:
    """Probes in increasing order of step, and sentences about what was lost or replaced on the way."""

    snapshots: tuple[Snapshot, ...]
    notes: tuple[str, ...]
    prefix: str


@dataclass(slots=True)
class _File:
    """What one event file holds."""

    path: Path
    started: float = math.inf
    probes: dict[str, list[Snapshot]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def order(self) -> tuple[int, float, str]:
        """Seconds in the file's name first: the events inside may carry any wall time their writer gave them."""
        seconds = re.search(r"tfevents\.(\d+)", self.path.name)
        return (int(seconds[1]) if seconds else 0, self.started, self.path.name)


def read(paths: Sequence[str | os.PathLike[str]], prefix: str | None = None) -> Run:
    """Return the probes under a prefix (None: the only one there is) in runs' directories or event files.

    Raises:
        HistoryError: no event files, no probes, several prefixes to choose from, or probes of a newer schema.
    """
    found = dict.fromkeys(file.resolve() for path in paths for file in _event_files(path))
    files = _ordered([_contents(file, prefix) for file in found])
    present = sorted({name for file in files for name, probes in file.probes.items() if probes or name == prefix})
    where = ", ".join(str(path) for path in paths)
    if prefix is None and len(present) > 1:
        raise HistoryError(f"wanted one prefix in {where}, got {', '.join(map(repr, present))}; pass prefix=...")
    chosen = prefix if prefix is not None else (present or ["ntk"])[0]
    kept, replaced = _stitched((file, probe) for file in files for probe in file.probes.get(chosen, []))
    if not kept:
        others = sorted({name for file in files for name in file.probes} - {chosen})
        lost = "".join(f" ({note})" for file in files for note in file.notes)
        advice = (
            f"pass one of the prefixes found: {', '.join(map(repr, others))}"
            if others
            else "train with NTKMonitor() to write some, or wait for the first one"
        )
        raise HistoryError(f"wanted probes under {chosen!r} in {where}, got none{lost}; {advice}")
    notes = [note for file in files for note in file.notes] + replaced + list(probe_changes(kept))
    return Run(tuple(kept), tuple(notes), chosen)


def _event_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the event files of one run: a file itself, a directory's own, or those of the only run below it."""
    where = Path(path)
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise HistoryError(f"wanted a run's directory or an event file on this machine, got {path}; check the path")
    if here := [file for file in where.glob("*tfevents*") if file.is_file()]:
        return here
    below = sorted({file.parent for file in where.rglob("*tfevents*") if file.is_file()})
    if not below:
        raise HistoryError(
            f"wanted event files (*tfevents*) in {path}, got none there or below; "
            "pass the directory that the logger wrote, such as lightning_logs/version_0"
        )
    if len(below) > 1:
        listed = ", ".join(str(run) for run in below[:8]) + (", ..." if len(below) > 8 else "")
        raise HistoryError(
            f"wanted one run in {path}, got {len(below)}: {listed}; "
            "pass one of them, or all parts of a resumed run together"
        )
    return _event_files(below[0])


def _contents(path: Path, prefix: str | None) -> _File:
    file = _File(path)
    events = Records(path)
    damage: list[str] = []
    for event in events:
        file.started = min(file.started, event.wall_time)
        for name in prefixes(event):
            probes = file.probes.setdefault(name, [])
            if prefix not in (None, name):
                continue
            try:
                snapshot = decode(event, name)
            except DamagedRecordError as error:
                damage.append(str(error))
            except HistoryError as error:
                raise HistoryError(f"{path}: {error}") from error
            else:
                probes += [snapshot] if snapshot else []
    damage += ["not an Event"] * events.unreadable
    if damage:
        file.notes.append(f"{file.name}: {len(damage)} damaged records were passed over, first: {damage[0]}")
    if events.stopped:
        count = sum(map(len, file.probes.values()))
        file.notes.append(
            f"{file.name}: read {count} probes up to byte {events.position} of {events.size}, where {events.stopped}; "
            "it was cut off while writing, or is being written now"
        )
    return file


def _ordered(files: list[_File]) -> list[_File]:
    """Return the files by run (a directory, earliest first event first) and within a run by the time in their names."""
    first: dict[Path, float] = {}
    for file in files:
        first[file.path.parent] = min(file.started, first.get(file.path.parent, math.inf))
    return sorted(files, key=lambda file: (first[file.path.parent], str(file.path.parent), file.order))


def _stitched(probes: Iterable[tuple[_File, Snapshot]]) -> tuple[list[Snapshot], list[str]]:
    kept: list[tuple[_File, Snapshot]] = []
    sources: dict[str, None] = {}
    notes: list[str] = []
    for file, snapshot in probes:
        sources[file.name] = None
        replaced: list[tuple[_File, Snapshot]] = []
        while kept and kept[-1][1].step >= snapshot.step:
            old = kept.pop()
            # The full probe at the end of a run stands for a light one at the same step.
            if not (old[1].status == "light" and old[1].step == snapshot.step and old[0] is file):
                replaced.append(old)
        if replaced:
            steps = [old.step for _, old in replaced]
            owners = ", ".join(sorted({old.name for old, _ in replaced}))
            notes.append(
                f"{owners}: {len(steps)} probes at steps {min(steps)} to {max(steps)} were replaced by later records "
                f"from step {snapshot.step} on in {file.name}, as after resuming from a checkpoint"
            )
        kept.append((file, snapshot))
    gone = [name for name in sources if all(file.name != name for file, _ in kept)]
    notes += [f"{name}: nothing is left of it; load independent runs one at a time" for name in gone]
    return [snapshot for _, snapshot in kept], notes


def probe_changes(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    """Yield a sentence for every change of the probe batch, across which values are not comparable."""
    hashed = [snapshot for snapshot in snapshots if snapshot.probe]
    for before, after in pairwise(hashed):
        if before.probe != after.probe:
            yield (
                f"the probe batch changed between steps {before.step} and {after.step} "
                f"({before.probe} to {after.probe}): values before and after are not comparable"
            )
