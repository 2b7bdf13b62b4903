"""A Snapshot whose arrays stay at the data server until somebody looks at them."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from ntk_monitor.dashboard.source import NOTHING, Array, Key, Source
from ntk_monitor.snapshot import ARRAYS, Snapshot

_FIELDS = tuple(
    (field.name, field.default, None if field.default_factory is MISSING else field.default_factory)
    for field in fields(Snapshot)
    if field.name not in ARRAYS
)
"""Name, default and factory of every field that is no array."""


class LazySnapshot(Snapshot):
    """A probe of a run. Arrays are read series by series, for all probes at once; blobs are hidden until `opened`."""

    __slots__ = ("_given", "_opened", "_source")

    _given: dict[str, Array]
    _source: Source | None
    _opened: frozenset[str]

    def __init__(self, source: Source | None = None, opened: Iterable[str] = (), **record: Any) -> None:
        """Hold the fields of a record; `source` has the arrays that are not among them."""
        # Not the base's constructor, which would make thirty empty arrays for each of ten thousand probes. The base is
        # frozen, and forbids plain assignment to our own attributes as well.
        keep = object.__setattr__
        keep(self, "_source", source)
        keep(self, "_opened", frozenset(opened))
        keep(self, "_given", {name: record[name] for name in record.keys() & ARRAYS.keys() if record[name].size})
        for name, default, factory in _FIELDS:
            keep(self, name, record[name] if name in record else factory() if factory else default)

    @property
    def key(self) -> Key:
        """What names the probe at the data server."""
        return self.step, self.wall_time

    def opened(self, names: Iterable[str]) -> "LazySnapshot":
        """Return the same probe with these blobs in sight, which are read when they are looked at."""
        record = {name: getattr(self, name) for name, _, _ in _FIELDS}
        return LazySnapshot(self._source, self._opened.union(names), **record, **self._given)


def _array(name: str) -> property:
    blob = ARRAYS[name].blob

    def get(snapshot: LazySnapshot) -> Array:
        if name in snapshot._given or snapshot._source is None:
            return snapshot._given.get(name, NOTHING)
        # Figures ask this a hundred thousand times, hence a tuple here and not the property that makes it.
        key = (snapshot.step, snapshot.wall_time)
        if not blob:
            return snapshot._source.array(name, key)
        return snapshot._source.blob(name, key) if name in snapshot._opened else NOTHING

    return property(get, doc=ARRAYS[name].meaning)


for _name in ARRAYS:
    setattr(LazySnapshot, _name, _array(_name))
