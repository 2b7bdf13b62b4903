"""What the data server holds of one run under one prefix: series by tag, each read when it is first asked for.

All values of a probe were written in one Event, so they share step and wall time. A value belongs to a record only if
both agree: after resuming, arrays of a probe that was replaced may still be there under the same step.
"""

import io
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter, TensorDatum

from ntk_monitor.errors import HistoryError
from ntk_monitor.events import PLUGIN, RECORD, tag
from ntk_monitor.snapshot import ARRAYS

Key: TypeAlias = tuple[int, float]
"""Optimizer step and wall time, which name a probe."""
Array: TypeAlias = NDArray[Any]

ALL = 10**9
"""More steps than any run has: the data server is asked for all of them."""
NOTHING: Array = np.empty(0)
_HELD = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks: what a data server needs to know of a request."""

    context: RequestContext
    experiment: str


@dataclass(slots=True)
class _Series:
    """Values by probe, as they stood at one version of the run."""

    version: str
    values: Mapping[Key, Any] = field(default_factory=dict)


class Source:
    """The series of one run. Thread-safe."""

    def __init__(self, provider: DataProvider, run: str, prefix: str) -> None:
        self.run, self.prefix = run, prefix
        self.blobs: tuple[str, ...] = ()
        """The blobs that the run holds anywhere."""
        self._version = ""
        self._provider = provider
        self._asked = Asked(RequestContext(), "")
        self._lock = threading.RLock()
        self._series: dict[str, _Series] = {}
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

    def records(self) -> list[TensorDatum]:
        """Return the record of every probe, in the order of writing."""
        with self._lock:
            return sorted(self._tensors(RECORD), key=lambda datum: datum.wall_time)

    def array(self, name: str, key: Key) -> Array:
        """Return an array of a probe, floating point widened to float64; empty where it has none."""
        series = self._series.get(name)
        found = None if series is None else series.values.get(key)
        # What is there does not change; only what is missing may have come meanwhile.
        return _wide(self._current(name, key).get(key, NOTHING) if found is None else found)

    def stored(self, name: str) -> Iterable[Key]:
        """Return the probes that hold a blob; only its keys are read."""
        return self._current(name, None)

    def blob(self, name: str, key: Key) -> Array:
        """Return a blob of a probe, floating point widened to float64; empty where it has none or cannot be read."""
        reference = self._current(name, key).get(key)
        if reference is None:
            return NOTHING
        with self._lock:
            if (name, key) not in self._held:
                while len(self._held) >= _HELD:
                    del self._held[next(iter(self._held))]
                content = self._provider.read_blob(self._asked.context, blob_key=reference)
                self._held[name, key] = _array(content, len(ARRAYS[name].dims))
            return self._held[name, key]

    def _current(self, name: str, key: Key | None) -> Mapping[Key, Any]:
        """Return a series, read again if the run has grown since and the probe (None: any) may be among the new."""
        with self._lock:
            series = self._series.get(name)
            if series is None or (series.version != self._version and (key is None or key not in series.values)):
                read = self._references if ARRAYS[name].blob else self._arrays
                series = self._series[name] = _Series(self._version, read(name))
            return series.values

    def _present(self) -> tuple[str, ...]:
        chosen = self._chosen(self._asked, *(name for name, stored in ARRAYS.items() if stored.blob))
        found = self._provider.list_blob_sequences(self._asked.context, **chosen).get(self.run, {})
        return tuple(name for name in ARRAYS if tag(name, self.prefix) in found)

    def _arrays(self, name: str) -> dict[Key, Array]:
        dimensions = len(ARRAYS[name].dims)
        found = ((datum.step, datum.wall_time, datum.numpy) for datum in self._tensors(name))
        return {(step, time): array for step, time, array in found if _sound(array, dimensions)}

    def _references(self, name: str) -> dict[Key, str]:
        found = self._provider.read_blob_sequences(
            self._asked.context, downsample=ALL, **self._chosen(self._asked, name)
        ).get(self.run, {})
        series = found.get(tag(name, self.prefix), ())
        return {(datum.step, datum.wall_time): datum.values[0].blob_key for datum in series if datum.values}

    def _tensors(self, name: str) -> list[TensorDatum]:
        try:
            found = self._provider.read_tensors(
                self._asked.context, downsample=ALL, **self._chosen(self._asked, name)
            ).get(self.run, {})
        except (TypeError, ValueError):  # bytes that TensorBoard itself cannot take apart cost this series alone
            return []
        return list(found.get(tag(name, self.prefix), ()))

    def _chosen(self, asked: Asked, *names: str) -> dict[str, Any]:
        chosen = RunTagFilter(runs=[self.run], tags=[tag(name, self.prefix) for name in names])
        return {"experiment_id": asked.experiment, "plugin_name": PLUGIN, "run_tag_filter": chosen}


def _array(content: bytes, dimensions: int) -> Array:
    try:
        array: Array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return NOTHING
    return _wide(array) if _sound(array, dimensions) else NOTHING


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _sound(array: Array, dimensions: int) -> bool:
    """Whether this can be the array it is named as: nobody else guards against files made by hand."""
    return array.ndim == dimensions and array.dtype.kind in "fiub"
