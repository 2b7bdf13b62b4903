"""Histories of runs out of TensorBoard's data server, read when they are asked for and kept until new probes arrive."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter, TensorDatum

from ntk_monitor.errors import DamagedRecordError, HistoryError
from ntk_monitor.events import PLUGIN, RECORD, assemble, tag
from ntk_monitor.history import History
from ntk_monitor.snapshot import ARRAYS, Snapshot

ALL = 10**9
"""More steps than any run has: the data server is asked for all of them."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks: what a data server needs to know of a request."""

    context: RequestContext
    experiment: str


@dataclass(slots=True)
class _Kept:
    version: str = ""
    history: History = field(default_factory=lambda: History(()))
    error: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Store:
    """Histories by run. Thread-safe: requests for one run wait for one reading of it."""

    def __init__(self, provider: DataProvider) -> None:
        self._provider = provider
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._lock = threading.Lock()

    def runs(self, asked: Asked) -> list[str]:
        """Return the names of the runs that hold probes; nothing of them is read."""
        found = self._provider.list_tensors(asked.context, experiment_id=asked.experiment, plugin_name=PLUGIN)
        return sorted(run for run, tags in found.items() if tag(RECORD) in tags)

    def history(self, asked: Asked, run: str) -> tuple[History, str]:
        """Return the probes of a run and what changes when new ones arrive.

        Raises:
            HistoryError: the run is unknown, or its probes are of a newer schema.
        """
        with self._lock:
            kept = self._kept.setdefault((asked.experiment, run), _Kept())
        with kept.lock:
            version = self._version(asked, run)
            if version != kept.version:
                kept.history, kept.error = self._read(asked, run)
                kept.version = version
            if kept.error is not None:
                raise HistoryError(kept.error)
            return kept.history, kept.version

    def _version(self, asked: Asked, run: str) -> str:
        chosen = RunTagFilter(runs=[run], tags=[tag(RECORD)])
        found = self._provider.list_tensors(
            asked.context, experiment_id=asked.experiment, plugin_name=PLUGIN, run_tag_filter=chosen
        )
        if run not in found:
            raise HistoryError(f"no run with probes is called {run!r}; choose one of those listed")
        series = found[run][tag(RECORD)]
        return f"{series.max_step}-{series.max_wall_time!r}"

    def _read(self, asked: Asked, run: str) -> tuple[History, str | None]:
        found: Mapping[str, list[TensorDatum]] = self._provider.read_tensors(
            asked.context,
            experiment_id=asked.experiment,
            plugin_name=PLUGIN,
            downsample=ALL,
            run_tag_filter=RunTagFilter(runs=[run]),
        ).get(run, {})
        arrays: dict[tuple[int, float], dict[str, NDArray[Any]]] = {}
        for name, stored in ARRAYS.items():
            if not stored.blob:
                for datum in found.get(tag(name), ()):
                    arrays.setdefault((datum.step, datum.wall_time), {})[name] = _widened(datum.numpy)
        probes: list[Snapshot] = []
        notes: list[str] = []
        for datum in sorted(found.get(tag(RECORD), ()), key=lambda one: one.wall_time):
            try:
                snapshot = assemble(datum.numpy.item(), arrays.get((datum.step, datum.wall_time), {}))
            except DamagedRecordError as error:
                notes.append(str(error))
                continue
            except HistoryError as error:
                return History(()), str(error)
            while probes and probes[-1].step >= snapshot.step:
                probes.pop()
            probes.append(snapshot)
        return History(tuple(probes), tuple(notes)), None


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float64) if array.dtype.kind == "f" else array
