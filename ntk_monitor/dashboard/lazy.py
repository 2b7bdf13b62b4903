"""A Snapshot whose arrays stay at the data server until somebody looks at them."""

from collections.abc import Iterable
from typing import Any

from ntk_monitor.dashboard.source import NOTHING, Array, Key, Source
from ntk_monitor.snapshot import ARRAYS, Snapshot

_FIELDS = tuple(name for name in Snapshot.__dataclass_fields__ if name not in ARRAYS)


class LazySnapshot(Snapshot):
    """A probe of a run. Arrays are read series by series, for all probes at once; blobs are hidden until `opened`."""

    __slots__ = ("_given", "_opened", "_source")

    _given: dict[str, Array]
    _source: Source | None
    _opened: frozenset[str]

    def __init__(self, source: Source | None = None, opened: Iterable[str] = (), **fields: Any) -> None:
        """Hold the fields of a record; `source` has the arrays that are not among them."""
        # The base is frozen, and forbids plain assignment to these as well.
        object.__setattr__(self, "_given", {})
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_opened", frozenset(opened))
        super().__init__(**fields)

    @property
    def key(self) -> Key:
        """What names the probe at the data server."""
        return self.step, self.wall_time

    def opened(self, names: Iterable[str]) -> "LazySnapshot":
        """Return the same probe with these blobs in sight, which are read when they are looked at."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return LazySnapshot(self._source, self._opened.union(names), **fields, **self._given)

    def array(self, name: str) -> Array:
        """Return an array: one that was given, or what the source has."""
        if name in self._given or self._source is None:
            return self._given.get(name, NOTHING)
        if ARRAYS[name].blob:
            return self._source.blob(name, self.key) if name in self._opened else NOTHING
        return self._source.array(name, self.key)


def _lazy(name: str) -> property:
    def get(snapshot: LazySnapshot) -> Array:
        return snapshot.array(name)

    def keep(snapshot: LazySnapshot, array: Array) -> None:
        # The dataclass's own constructor sets every field, most of them to the empty array that stands for none.
        if array.size:
            snapshot._given[name] = array

    return property(get, keep, doc=ARRAYS[name].meaning)


for _name in ARRAYS:
    setattr(LazySnapshot, _name, _lazy(_name))
