"""One probe, one Event: how a Snapshot becomes TensorBoard values, and how it is read back.

Under a prefix P the tag P/probe/NAME holds the array NAME of the Snapshot and P/probe/record holds JSON of everything
else. All of them sit in one Event, which is one record on disk: a probe is there completely or not at all.

Infinities are the strings "inf" and "-inf" in the record and NaN is null, because JSON has neither.
"""

import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_INT32, DT_INT64, DT_STRING

from ntk_monitor.errors import DamagedRecordError, HistoryError
from ntk_monitor.snapshot import ARRAYS, SCHEMA, Snapshot

PLUGIN = "ntk"
RECORD = "record"

Array = NDArray[Any]

DTYPES: dict[int, np.dtype[Any]] = {
    DT_FLOAT: np.dtype("<f4"),
    DT_DOUBLE: np.dtype("<f8"),
    DT_INT32: np.dtype("<i4"),
    DT_INT64: np.dtype("<i8"),
}
"""How the content of a tensor that is no blob is read, by its dtype."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FIELDS = {field.name: field for field in fields(Snapshot) if field.name not in ARRAYS}
_PARSED = {
    name: field.type for name, field in _FIELDS.items() if field.type in (float, tuple[str, ...], dict[str, float])
}
"""Fields that JSON holds in another form than the Snapshot."""
_REQUIRED = tuple(
    name for name, field in _FIELDS.items() if field.default is MISSING and field.default_factory is MISSING
)
_CHECKSUM = ', "checksum": '


def tag(name: str, prefix: str = "ntk") -> str:
    """Return the tag under which an array of the Snapshot, or "record", is written."""
    return f"{prefix}/probe/{name}"


def summary(snapshot: Snapshot, prefix: str = "ntk") -> Summary:
    """Return all values of one probe, to be written in one Event at `snapshot.step` and `snapshot.wall_time`.

    Arrays are rounded to the dtype in `ARRAYS`, except where that would overflow or underflow: those keep float64.
    Empty arrays are left out. Every value names its data class, without which TensorBoard's data server drops it.
    """
    values = [
        Summary.Value(
            tag=tag(name, prefix),
            metadata=_metadata(
                {"dims": stored.dims, "unit": stored.unit, "meaning": stored.meaning},
                DATA_CLASS_BLOB_SEQUENCE if stored.blob else DATA_CLASS_TENSOR,
            ),
            tensor=_packed(_rounded(getattr(snapshot, name), stored.dtype), blob=stored.blob),
        )
        for name, stored in ARRAYS.items()
        if getattr(snapshot, name).size
    ]
    body = json.dumps({"schema": SCHEMA} | {name: _plain(getattr(snapshot, name)) for name in _FIELDS}, allow_nan=False)
    record = f"{body[:-1]}{_CHECKSUM}{_checksum(body, values)}}}"
    about = {"dims": (), "unit": "JSON", "meaning": "every field of the probe that is not an array"}
    values.append(
        Summary.Value(
            tag=tag(RECORD, prefix),
            metadata=_metadata(about, DATA_CLASS_TENSOR),
            tensor=TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[record.encode()]),
        )
    )
    return Summary(value=values)


def event(snapshot: Snapshot, prefix: str = "ntk", extra: Iterable[Summary.Value] = ()) -> Event:
    """Return the one Event of a probe, with further values (see `ntk_monitor.stock`) beside its own."""
    content = summary(snapshot, prefix)
    content.value.extend(extra)
    return Event(step=snapshot.step, wall_time=snapshot.wall_time, summary=content)


def prefixes(event: Event) -> tuple[str, ...]:
    """Return the prefixes under which an Event holds values of a probe, in order of appearance."""
    ours = (value.tag for value in event.summary.value if value.metadata.plugin_data.plugin_name == PLUGIN)
    return tuple(dict.fromkeys(t.rpartition("/probe/")[0] for t in ours if "/probe/" in t))


def decode(event: Event | Summary, prefix: str = "ntk") -> Snapshot | None:
    """Return the probe that an Event (or its Summary) holds under the prefix, or None when it holds none.

    Raises:
        DamagedRecordError: the bytes are not those that were written (checksum), or cannot be taken apart.
        HistoryError: the probe was written by a newer version with another schema.
    """
    start = tag("", prefix)
    values = {
        value.tag.removeprefix(start): value
        for value in (event if isinstance(event, Summary) else event.summary).value
        if value.tag.startswith(start) and value.metadata.plugin_data.plugin_name == PLUGIN
    }
    if not values:
        return None
    try:
        record = values.pop(RECORD).tensor.string_val[0].decode()
        body, _, checksum = record.rpartition(_CHECKSUM)
        intact = int(checksum.rstrip("}")) == _checksum(body + "}", values.values())
    except (KeyError, IndexError, ValueError) as error:
        raise DamagedRecordError(f"a probe under {prefix!r} has no readable record ({error!r})") from error
    if not intact:
        raise DamagedRecordError(f"a probe under {prefix!r} does not match its checksum")
    return assemble(record, {name: unpack(value.tensor) for name, value in values.items() if name in ARRAYS})


def assemble(record: str | bytes, arrays: Mapping[str, Array]) -> Snapshot:
    """Return the Snapshot of a record (JSON text) and its arrays; fields this version does not know are ignored.

    Raises:
        HistoryError: the record's schema is newer than this version reads.
        DamagedRecordError: the record is no JSON object, or lacks a field that every probe has.
    """
    return Snapshot(**contents(record) | {name: array for name, array in arrays.items() if name in ARRAYS})


def contents(record: str | bytes) -> dict[str, Any]:
    """Return the fields of a Snapshot that its record (JSON text) holds, which are all but the arrays.

    Raises:
        HistoryError, DamagedRecordError: see `assemble`.
    """
    raw = loaded(record)
    return {name: field_of(raw, name) for name in _FIELDS if name in raw}


def loaded(record: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a record, whose fields `field_of` reads.

    Raises:
        HistoryError, DamagedRecordError: see `assemble`.
    """
    try:
        raw = json.loads(record)
    except ValueError as error:
        raise DamagedRecordError(f"a probe's record is not the JSON object it should be ({error!r})") from error
    checked: dict[str, Any] = _checked(raw)
    return checked


def all_loaded(records: Sequence[bytes]) -> list[dict[str, Any] | HistoryError]:
    """Return the same of many records, with the error in the place of what cannot be read.

    All of them are one text to the parser, which takes two thirds of the time of as many texts.
    """
    try:
        found = json.loads(b"[%s]" % b",".join(records))
    except ValueError:
        found = []
    # A damaged one may end in its neighbour.
    whole = len(found) == len(records)
    return [_or_error(_checked, raw) for raw in found] if whole else [_or_error(loaded, record) for record in records]


def field_of(raw: Mapping[str, Any], name: str) -> Any:
    """Return a field of the Snapshot out of the JSON object of its record."""
    return _parsed(raw[name], _PARSED[name]) if name in _PARSED else raw[name]


def _or_error(read: Callable[[Any], Any], record: Any) -> dict[str, Any] | HistoryError:
    try:
        found: dict[str, Any] = read(record)
        return found
    except HistoryError as error:
        return error


def _checked(raw: Any) -> Any:
    try:
        schema = int(raw["schema"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedRecordError(f"a probe's record is not the JSON object it should be ({error!r})") from error
    if schema > SCHEMA:
        raise HistoryError(
            f"this version of ntk-monitor reads probes up to schema {SCHEMA}, got schema {schema}; "
            "upgrade with: pip install --upgrade ntk-monitor"
        )
    absent = [name for name in _REQUIRED if name not in raw]
    if absent:
        raise DamagedRecordError(f"a probe's record lacks {', '.join(absent)}")
    return raw


def unpack(tensor: TensorProto) -> Array:
    """Return the array of one value, floating point widened to float64; blobs are `.npy` bytes.

    Raises:
        DamagedRecordError: dtype, shape and number of bytes do not fit together.
    """
    try:
        if tensor.dtype == DT_STRING:
            array: Array = np.load(io.BytesIO(tensor.string_val[0]), allow_pickle=False)
        else:
            shape = [dim.size for dim in tensor.tensor_shape.dim]
            array = np.frombuffer(tensor.tensor_content, DTYPES[tensor.dtype]).reshape(shape)
    except (KeyError, IndexError, ValueError, EOFError) as error:
        raise DamagedRecordError(f"an array of a probe cannot be taken apart ({error!r})") from error
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _metadata(about: Mapping[str, Any], data_class: int) -> SummaryMetadata:
    content = json.dumps({"schema": SCHEMA} | dict(about)).encode()
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
    return SummaryMetadata(data_class=data_class, plugin_data=plugin)


def _rounded(array: Array, dtype: str) -> Array:
    """Return the array in the dtype, or as it was where rounding costs more than that dtype's relative precision."""
    with np.errstate(all="ignore"):
        rounded = array.astype(dtype)
        kept = np.allclose(rounded, array, rtol=float(np.finfo(np.float32).eps), atol=0.0, equal_nan=True)
    return rounded if kept else array.astype(np.float64)


def _packed(array: Array, *, blob: bool) -> TensorProto:
    if blob:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        one = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        return TensorProto(dtype=DT_STRING, tensor_shape=one, string_val=[file.getvalue()])
    dtype = array.dtype.newbyteorder("<")
    return TensorProto(
        dtype=_CODES[dtype],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in array.shape]),
        tensor_content=array.astype(dtype, copy=False).tobytes(),
    )


def _checksum(body: str, values: Iterable[Summary.Value]) -> int:
    """CRC-32 of the record and of everything that gives the arrays their meaning. Never changes with the schema."""
    total = zlib.crc32(body.encode())
    for value in values:
        tensor = value.tensor
        shape = [dim.size for dim in tensor.tensor_shape.dim]
        total = zlib.crc32(f"{value.tag} {tensor.dtype} {shape}".encode(), total)
        for content in (tensor.tensor_content, *tensor.string_val):
            total = zlib.crc32(content, total)
    return total


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _parsed(value: Any, kind: Any) -> Any:
    """Undo `_plain` for a field of the given type."""
    if kind is float:
        return math.nan if value is None else float(value)
    if kind == tuple[str, ...]:
        return tuple(value)
    if kind == dict[str, float]:
        # Most are numbers already, and a long run has a million of them.
        return {key: item if type(item) is float else _parsed(item, float) for key, item in value.items()}
    return value
