"""Histories of runs out of TensorBoard's data server, read when they are asked for and kept until new probes arrive."""

import bisect
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorboard.data.provider import DataProvider

from ntk_monitor.dashboard.bulk import Asked, Key
from ntk_monitor.dashboard.lazy import LazySnapshot
from ntk_monitor.dashboard.source import Source
from ntk_monitor.errors import DamagedRecordError, HistoryError
from ntk_monitor.events import PLUGIN, RECORD, all_loaded, tag
from ntk_monitor.history import History
from ntk_monitor.runs import probe_changes

MOST = 8
"""Runs that are kept in memory; a page shows three at once."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A run as it stands at one version: all its records, and arrays where somebody looks."""

    version: str
    """Changes when probes have come, or were replaced."""
    probes: tuple[LazySnapshot, ...]
    notes: tuple[str, ...]
    source: Source
    _places: dict[str, list[int]] = field(default_factory=dict)

    @property
    def history(self) -> History:
        """The probes with no blob in sight."""
        return History(self.probes, self.notes, self.source.prefix)

    def opened(self, step: int | None = None) -> History:
        """Return the probes with the blobs that are nearest to a step (None: the last) in sight.

        In sight are also the first and the last of each kind, which fixed scales rest on. Keys of blobs are read at the
        first call, blobs when they are looked at.
        """
        shown: dict[int, set[str]] = {}
        for name in self.source.blobs:
            if stored := self._stored(name):
                chosen = stored[nearest([self.probes[i].step for i in stored], step)]
                for i in (stored[0], chosen, stored[-1]):
                    shown.setdefault(i, set()).add(name)
        probes = list(self.probes)
        for i, names in shown.items():
            probes[i] = probes[i].opened(names)
        return History(tuple(probes), self.notes, self.source.prefix)

    def _stored(self, name: str) -> list[int]:
        """Return the places of the probes that hold a blob."""
        if name not in self._places:
            keys = set(self.source.stored(name))
            self._places[name] = [i for i, probe in enumerate(self.probes) if probe.key in keys]
        return self._places[name]


@dataclass(slots=True)
class _Run:
    """A run as it was last read."""

    source: Source
    reading: Reading | None = None
    error: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Store:
    """Runs by name. Thread-safe: requests for one run wait for one reading of it."""

    def __init__(self, provider: DataProvider) -> None:
        self._provider = provider
        self._runs: dict[tuple[str, str], _Run] = {}
        self._lock = threading.Lock()

    def names(self, asked: Asked) -> list[str]:
        """Return the names of the runs that hold probes, versions in the order of their numbers; nothing is read.

        A run with several monitors appears once for each: under its own name for the prefix "ntk" (or the first), and
        with the prefix behind it for the others.
        """
        return sorted(self._listed(asked), key=_natural)

    def version(self, asked: Asked, name: str) -> str:
        """Return the version of a run as it stands now, of which nothing is read.

        Raises:
            HistoryError: the run is unknown.
        """
        return self._run(asked, name).source.refresh(asked)

    def reading(self, asked: Asked, name: str) -> Reading:
        """Return a run as it stands now.

        Costs a question to the data server, and 0.1 ms for every probe that has not been read before.

        Raises:
            HistoryError: the run is unknown, or all its probes are of a newer schema.
        """
        run = self._run(asked, name)
        with run.lock:
            version = run.source.refresh(asked)
            if run.reading is None or version != run.reading.version:
                run.reading, run.error = _read(run.source, version, run.reading)
            if run.error:
                raise HistoryError(run.error)
            return run.reading

    def _run(self, asked: Asked, name: str) -> _Run:
        with self._lock:
            key = asked.experiment, name
            found = self._runs.pop(key, None)
        if found is None:
            listed = self._listed(asked)
            if name not in listed:
                raise HistoryError(f"no run with probes is called {name!r}; choose one of those listed")
            found = _Run(Source(self._provider, *listed[name]))
        with self._lock:
            found = self._runs.setdefault(key, found)
            while len(self._runs) > MOST:
                del self._runs[next(iter(self._runs))]
        return found

    def _listed(self, asked: Asked) -> dict[str, tuple[str, str]]:
        """Return run and prefix by the name under which they are shown."""
        found = self._provider.list_tensors(asked.context, experiment_id=asked.experiment, plugin_name=PLUGIN)
        ending = tag(RECORD, "")
        names: dict[str, tuple[str, str]] = {}
        for run, tags in found.items():
            prefixes = sorted(one.removesuffix(ending) for one in tags if one.endswith(ending))
            own = "ntk" if "ntk" in prefixes else next(iter(prefixes), "")
            names |= {run if prefix == own else f"{run} · {prefix}": (run, prefix) for prefix in prefixes}
        return names


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(source: Source, version: str, before: Reading | None) -> tuple[Reading, str]:
    """Return the probes of a run in order, and why there are none.

    What was read before is not taken apart again.
    """
    known = {probe.key: probe for probe in before.probes} if before else {}
    records = source.records()
    fresh = iter(all_loaded([record for key, record in records if key not in known]))
    probes: list[LazySnapshot] = []
    damaged: list[str] = []
    newer: list[str] = []
    for key, _ in records:
        found = known.get(key) or _probe(source, key, next(fresh))
        if isinstance(found, LazySnapshot):
            probes.append(found)
        else:
            (damaged if isinstance(found, DamagedRecordError) else newer).append(str(found))
    kept, notes = _stitched(probes)
    if newer:
        notes.append(f"{len(newer)} probes are not shown: {newer[0]}")
    if damaged:
        notes.append(f"{len(damaged)} damaged records were passed over, first: {damaged[0]}")
    reading = Reading(version, tuple(kept), (*notes, *probe_changes(kept)), source)
    return reading, newer[0] if newer and not kept else ""


def _probe(source: Source, key: Key, record: dict[str, Any] | HistoryError) -> LazySnapshot | HistoryError:
    if isinstance(record, HistoryError):
        return record
    if (record["step"], record["wall_time"]) != key:
        return DamagedRecordError(f"the record at step {key[0]} speaks of step {record['step']!r}")
    return LazySnapshot(source, source.row(key), record)


def _stitched(probes: Iterable[LazySnapshot]) -> tuple[list[LazySnapshot], list[str]]:
    """Return the probes that count, in order of steps: a later record replaces earlier ones at its step or behind."""
    kept: list[LazySnapshot] = []
    notes: list[str] = []
    for probe in probes:
        replaced = []
        while kept and kept[-1].step >= probe.step:
            old = kept.pop()
            # The full probe at the end of a run stands for a light one at the same step.
            if not (old.status == "light" and old.step == probe.step):
                replaced.append(old.step)
        if replaced:
            notes.append(
                f"{len(replaced)} probes at steps {min(replaced)} to {max(replaced)} were replaced by later records "
                f"from step {probe.step} on, as after resuming from a checkpoint"
            )
        kept.append(probe)
    return kept, notes


def nearest(steps: Sequence[int], step: int | None) -> int:
    """Return the place of the ascending step nearest to one, the earlier of two as near; None: the last place."""
    if step is None or step >= steps[-1]:
        return len(steps) - 1
    after = bisect.bisect_left(steps, step)
    return after - 1 if after and step - steps[after - 1] <= steps[after] - step else after
