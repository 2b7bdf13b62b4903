"""What the data server holds of one run under one prefix: series by tag, each read when it is first asked for.

All values of a probe were written in one Event, so they share step and wall time. A value belongs to a record only if
both agree: after resuming, arrays of a probe that was replaced may still be there under the same step.

Every probe has a row, in the order in which probes were first seen, and a series is a column over the rows: what a
figure of ten thousand probes asks for is found by place.
"""

import io
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter

from ntk_monitor.dashboard import bulk
from ntk_monitor.dashboard.bulk import ALL, NOTHING, Array, Asked, Key
from ntk_monitor.errors import HistoryError
from ntk_monitor.events import PLUGIN, RECORD, tag
from ntk_monitor.snapshot import ARRAYS

_HELD = 64


class Source:
    """The series of one run. Thread-safe."""

    def __init__(self, provider: DataProvider, run: str, prefix: str) -> None:
        self.run, self.prefix = run, prefix
        self.blobs: tuple[str, ...] = ()
        """The blobs that the run holds anywhere."""
        self.columns: dict[str, list[Array]] = {}
        """What has been read of arrays that are no blobs, by row; see `column`."""
        self._version = ""
        self._provider = provider
        self._asked = Asked(RequestContext(), "")
        self._lock = threading.RLock()
        self._rows: dict[Key, int] = {}
        self._references: dict[str, tuple[str, Mapping[Key, str]]] = {}
        self._held: dict[tuple[str, Key], Array] = {}

    def refresh(self, asked: Asked) -> str:
        """Ask whether there are new probes, and return the version.

        Raises:
            HistoryError: the run holds no probes, or no longer.
        """
        found = self._provider.list_tensors(asked.context, **self._chosen(asked, RECORD)).get(self.run, {})
        if tag(RECORD, self.prefix) not in found:
            raise HistoryError(f"no run with probes is called {self.run!r}; choose one of those listed")
        series = found[tag(RECORD, self.prefix)]
        version = f"{series.max_step}-{series.max_wall_time!r}"
        with self._lock:
            self._asked = asked
            if version != self._version:
                self._version, self.blobs = version, self._present()
        return version

    def records(self) -> list[tuple[Key, bytes]]:
        """Return the record of every probe, in the order of writing; empty where a value is no text."""
        with self._lock:
            keys, values = self._series(RECORD)
            return sorted(zip(keys, bulk.texts(values), strict=True), key=lambda record: record[0][1])

    def row(self, key: Key) -> int:
        """Return the row of a probe, the next one where it is new."""
        with self._lock:
            return self._rows.setdefault(key, len(self._rows))

    def column(self, name: str) -> list[Array]:
        """Return an array of every probe by row, as it was stored; empty where a probe has none.

        What has been read is not taken apart again when probes have come; theirs are appended.
        """
        with self._lock:
            column = self.columns.get(name, [])
            if len(column) < len(self._rows):
                column = column + [NOTHING] * (len(self._rows) - len(column))
                keys, values = self._series(name)
                rows = [self._rows.get(key) for key in keys]
                found = [(row, i) for i, row in enumerate(rows) if row is not None and not column[row].size]
                read = bulk.arrays([values[i] for _, i in found])
                dimensions = len(ARRAYS[name].dims)
                for (row, _), array in zip(found, read, strict=True):
                    if _sound(array, dimensions):
                        column[row] = array
                self.columns[name] = column
            return column

    def stored(self, name: str) -> Iterable[Key]:
        """Return the probes that hold a blob; only its keys are read."""
        return self._current(name)

    def blob(self, name: str, key: Key) -> Array:
        """Return a blob of a probe, floating point widened to float64; empty where it has none or cannot be read."""
        reference = self._current(name).get(key)
        if reference is None:
            return NOTHING
        with self._lock:
            if (name, key) not in self._held:
                while len(self._held) >= _HELD:
                    del self._held[next(iter(self._held))]
                content = self._provider.read_blob(self._asked.context, blob_key=reference)
                self._held[name, key] = _array(content, len(ARRAYS[name].dims))
            return self._held[name, key]

    def _current(self, name: str) -> Mapping[Key, str]:
        """Return where the blobs of a name are, asked again if the run has grown since."""
        with self._lock:
            version, found = self._references.get(name, (None, {}))
            if version != self._version:
                version, found = self._references[name] = self._version, self._keys(name)
            return found

    def _present(self) -> tuple[str, ...]:
        chosen = self._chosen(self._asked, *(name for name, stored in ARRAYS.items() if stored.blob))
        found = self._provider.list_blob_sequences(self._asked.context, **chosen).get(self.run, {})
        return tuple(name for name in ARRAYS if tag(name, self.prefix) in found)

    def _keys(self, name: str) -> dict[Key, str]:
        found = self._provider.read_blob_sequences(
            self._asked.context, downsample=ALL, **self._chosen(self._asked, name)
        ).get(self.run, {})
        series = found.get(tag(name, self.prefix), ())
        return {(datum.step, datum.wall_time): datum.values[0].blob_key for datum in series if datum.values}

    def _series(self, name: str) -> tuple[list[Key], list[bulk.Value]]:
        return bulk.series(self._provider, self._asked, self.run, tag(name, self.prefix))

    def _chosen(self, asked: Asked, *names: str) -> dict[str, Any]:
        chosen = RunTagFilter(runs=[self.run], tags=[tag(name, self.prefix) for name in names])
        return {"experiment_id": asked.experiment, "plugin_name": PLUGIN, "run_tag_filter": chosen}


def _array(content: bytes, dimensions: int) -> Array:
    try:
        array: Array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return NOTHING
    return wide(array) if _sound(array, dimensions) else NOTHING


def wide(array: Array) -> Array:
    """Return floating point as float64, everything else as it is."""
    return array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array


def _sound(array: Array, dimensions: int) -> bool:
    """Whether this can be the array it is named as: nobody else guards against files made by hand."""
    return array.ndim == dimensions and array.dtype.kind in "fiub"
