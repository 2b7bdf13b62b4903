"""A history as a file that other tools read: json, csv, parquet, netcdf, npz. The event file stays the one store.

json and parquet hold every probe with all its arrays, csv one row per probe with numbers and words, netcdf and npz the
arrays of the full probes over (step, mode, ...). All but csv carry units and meanings. float64 throughout.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.history import History
from ntk_monitor.metrics import METRICS, SCALARS
from ntk_monitor.snapshot import ARRAYS, FACTS, SCHEMA, TEXTS, Snapshot

SUFFIXES: dict[str, str] = {"json": ".json", "csv": ".csv", "parquet": ".parquet", "netcdf": ".nc", "npz": ".npz"}
"""File name endings by format."""

_PLAIN = tuple(f.name for f in fields(Snapshot) if f.name not in ARRAYS)
_GROUPS = {"metrics": "", "facts": "", "texts": "text_", "seconds": "seconds_"}
_LISTS = {"layers": ",", "directions": ",", "sample_texts": "\n"}
"""What stands between the words of a list in one cell."""


def export(history: History, path: str | os.PathLike[str], kind: str) -> Path:
    """Write a history to a file and return its path.

    Args:
        history: of one run.
        path: file to write; a plain file is replaced when the new one is complete, a link or a pipe is written to.
        kind: a key of `SUFFIXES`.

    Raises:
        InputError: an unknown format, or one whose package is not installed.
        OSError: the file cannot be written.
    """
    if kind not in _WRITERS:
        raise InputError(f"a format must be one of {', '.join(SUFFIXES)}, got {kind!r}")
    target = Path(path)
    if target.is_dir():
        raise InputError(f"a file is needed to write to, {target} is a directory")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        # A rename would put a file where the link, the pipe or the device was; /dev/stdout is a link to any of them.
        with target.open("wb") as stream:
            _WRITERS[kind](history, stream)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("wb") as stream:
            _WRITERS[kind](history, stream)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def rows(history: History) -> list[dict[str, Any]]:
    """Return one dict per probe, skipped and light ones included: every number and text, no array.

    Words of `Snapshot.texts` begin with text_, seconds by stage with seconds_; names of layers and directions are
    joined by commas. All dicts have the same keys; what a probe lacks is None.
    """
    found = [dict(_flat(snapshot)) for snapshot in history]
    names = list(dict.fromkeys(name for row in found for name in row))
    return [{name: row.get(name) for name in names} for row in found]


def document(history: History) -> dict[str, Any]:
    """Return the history as JSON can hold it: NaN is null, infinities are the strings "inf" and "-inf"."""
    return {
        "schema": SCHEMA,
        "prefix": history.prefix,
        "notes": list(history.notes),
        "about": about(),
        "probes": [_strict(_whole(snapshot)) for snapshot in history],
    }


def about() -> dict[str, dict[str, Any]]:
    """Return unit and meaning of every name that can appear in a file."""
    arrays = {
        name: {"dims": list(stored.dims), "unit": stored.unit, "meaning": stored.meaning}
        for name, stored in ARRAYS.items()
    }
    scalars = {one.name: {"unit": one.unit, "meaning": one.meaning} for one in SCALARS}
    metrics = {one.name: {"unit": one.unit, "meaning": one.meaning} for one in METRICS.values()}
    return arrays | {name: {"meaning": words} for name, words in (FACTS | TEXTS).items()} | metrics | scalars


def _flat(snapshot: Snapshot) -> Iterator[tuple[str, Any]]:
    for name in _PLAIN:
        value = getattr(snapshot, name)
        if name in _GROUPS:
            yield from ((f"{_GROUPS[name]}{key}", item) for key, item in value.items())
        else:
            yield name, _LISTS[name].join(value) if name in _LISTS else value


def _whole(snapshot: Snapshot) -> dict[str, Any]:
    arrays = {name: getattr(snapshot, name) for name in ARRAYS}
    return {name: getattr(snapshot, name) for name in _PLAIN} | {
        name: array.tolist() for name, array in arrays.items() if array.size
    }


def _strict(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _json(history: History, stream: BinaryIO) -> None:
    stream.write(json.dumps(document(history), allow_nan=False, separators=(",", ":")).encode() + b"\n")


def _csv(history: History, stream: BinaryIO) -> None:
    found = rows(history)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]) if found else ["step"], lineterminator="\n")
    writer.writeheader()
    for row in found:
        # An empty cell is what every reader takes for a missing number.
        writer.writerow({name: "" if _missing(value) else value for name, value in row.items()})
    stream.write(text.getvalue().encode())


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _npz(history: History, stream: BinaryIO) -> None:
    variables = _variables(history)
    words = {name: {"dims": list(dims)} | dict(more) for name, (dims, _, more) in variables.items()}
    text = json.dumps({"attributes": _attributes(history), "arrays": words}, allow_nan=False)
    np.savez_compressed(
        stream, allow_pickle=False, about=np.array(text), **{name: values for name, (_, values, _) in variables.items()}
    )


def _variables(history: History) -> dict[str, tuple[tuple[str, ...], NDArray[Any], Mapping[str, Any]]]:
    """Return every array of the full probes with its dimensions, unit and meaning; facts and seconds included."""
    found: dict[str, Any] = {"step": (("step",), history.steps, {"units": "optimizer steps"})}
    for name, (dims, values, more) in history.variables.items():
        found[_key(name)] = ((dims,) if isinstance(dims, str) else dims, values, more)
    probes = history.measured
    for name in dict.fromkeys(key for one in probes for key in one.facts):
        values = np.array([one.facts.get(name, math.nan) for one in probes])
        found.setdefault(_key(name), (("step",), values, {"meaning": FACTS.get(name, "")}))
    for name in dict.fromkeys(key for one in probes for key in one.seconds):
        values = np.array([one.seconds.get(name, math.nan) for one in probes])
        found[_key(f"seconds_{name}")] = (("step",), values, {"meaning": f"seconds of a probe spent on: {name}"})
    for name, dim in (("layers", "layer"), ("directions", "direction")):
        known = {getattr(one, name) for one in probes if getattr(one, name)}
        # Names along an axis exist only where they are the same at every probe.
        if len(known) == 1:
            found[name] = ((dim,), np.array(known.pop(), dtype=np.str_), {"meaning": f"names along the axis {dim}"})
    return found


def _key(name: str) -> str:
    # netCDF has groups, and npz is an archive of files: a slash is a place in both.
    return name.replace("/", "_").replace(" ", "_")


def _attributes(history: History) -> dict[str, Any]:
    last = history.measured[-1:]
    words = {name: getattr(one, name) for one in last for name in ("kernel", "mode", "loss", "probe", "probe_source")}
    return {"schema": SCHEMA, "prefix": history.prefix, "notes": "\n".join(history.notes)} | words


def _netcdf(history: History, stream: BinaryIO) -> None:
    xarray = _package("xarray", "netcdf", "xarray scipy")
    variables: dict[str, Any] = {}
    for name, (dims, values, more) in _variables(history).items():
        # netCDF 3 knows no 64-bit integers; steps fit into a float64 to the last one.
        small = values.dtype.kind != "i" or (np.abs(values) < 2**31).all()
        plain = values if small and values.dtype.kind != "i" else values.astype(np.int32 if small else np.float64)
        if values.shape and all(size > 0 for size in values.shape):
            variables[name] = (dims, plain, dict(more))
    dataset = xarray.Dataset(variables, attrs={f"ntk_{name}": value for name, value in _attributes(history).items()})
    # Attributes bear a prefix, because scipy's file object has a "mode" of its own.
    content = dataset.to_netcdf(engine="scipy", format="NETCDF3_64BIT")
    stream.write(bytes(content))


def _parquet(history: History, stream: BinaryIO) -> None:
    pyarrow = _package("pyarrow", "parquet", "pyarrow")
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {}
    found = rows(history)
    for name in found[0] if found else ():
        columns[name] = [row[name] for row in found]
    for name in ARRAYS:
        if any(getattr(one, name).size for one in history):
            columns[name] = [getattr(one, name).tolist() if getattr(one, name).size else None for one in history]
    table = pyarrow.table(columns)
    words = json.dumps({"attributes": _attributes(history), "columns": about()}, allow_nan=False)
    parquet.write_table(table.replace_schema_metadata({"ntk_monitor": words}), stream)


def _package(name: str, kind: str, wanted: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{kind} needs {name}, which is not installed; run: pip install {wanted}") from error


_WRITERS: dict[str, Callable[[History, BinaryIO], None]] = {
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "netcdf": _netcdf,
    "npz": _npz,
}
