"""A Snapshot that is read where somebody looks: fields out of its record, arrays out of the data server."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from ntk_monitor.dashboard.bulk import NOTHING, Array, Key
from ntk_monitor.dashboard.source import Source, wide
from ntk_monitor.events import field_of
from ntk_monitor.snapshot import ARRAYS, Snapshot

_FIELDS = {field.name: field for field in fields(Snapshot) if field.name not in ARRAYS}
_FIRST = ("step", "wall_time", "status", "probe")
"""What is asked of every probe of every run."""


class LazySnapshot(Snapshot):
    """A probe of a run. Arrays are read series by series, for all probes at once; blobs are hidden until `opened`."""

    __slots__ = ("_opened", "_record", "_row", "_source")

    _source: Source
    _row: int
    _record: Mapping[str, Any]
    _opened: frozenset[str]

    def __init__(self, source: Source, row: int, record: Mapping[str, Any], opened: Iterable[str] = ()) -> None:
        """Take the JSON object of a record, and the place of its arrays in the columns of a source."""
        # Not the base's constructor, which would make thirty empty arrays for each of ten thousand probes. The base is
        # frozen, and forbids plain assignment to our own attributes as well.
        keep = object.__setattr__
        keep(self, "_source", source)
        keep(self, "_row", row)
        keep(self, "_record", record)
        keep(self, "_opened", frozenset(opened))
        for name in _FIRST:
            keep(self, name, record[name] if name in record else _FIELDS[name].default)

    def __getattr__(self, name: str) -> Any:
        """Fill the field that nobody has looked at yet; Python asks only then."""
        if name not in _FIELDS:
            raise AttributeError(f"a probe has no {name!r}")
        value = _value(self._record, name)
        object.__setattr__(self, name, value)
        return value

    @property
    def key(self) -> Key:
        """What names the probe at the data server."""
        return self.step, self.wall_time

    def opened(self, names: Iterable[str]) -> "LazySnapshot":
        """Return the same probe with these blobs in sight, which are read when they are looked at."""
        return LazySnapshot(self._source, self._row, self._record, self._opened.union(names))


def _value(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of a record; what is missing, or no such thing, as it is in a Snapshot that says nothing of it."""
    field = _FIELDS[name]
    try:
        return field_of(record, name)
    except (KeyError, TypeError, ValueError, AttributeError):
        return field.default if field.default_factory is MISSING else field.default_factory()


def _column(name: str) -> property:
    def get(snapshot: LazySnapshot) -> Array:
        # Figures ask this a hundred thousand times; it is a matter of places, not of keys.
        try:
            found = snapshot._source.columns[name][snapshot._row]
        except (KeyError, IndexError):
            found = snapshot._source.column(name)[snapshot._row]
        return wide(found)

    return property(get, doc=ARRAYS[name].meaning)


def _blob(name: str) -> property:
    def get(snapshot: LazySnapshot) -> Array:
        return snapshot._source.blob(name, snapshot.key) if name in snapshot._opened else NOTHING

    return property(get, doc=ARRAYS[name].meaning)


for _name, _stored in ARRAYS.items():
    setattr(LazySnapshot, _name, _blob(_name) if _stored.blob else _column(_name))
