"""A Snapshot comes back from its Event as it went in, and nothing but a Snapshot does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_TENSOR,
    Summary,
)
from tensorboard.util import tensor_util

from ntk_monitor import events
from ntk_monitor.errors import DamagedRecordError, HistoryError
from ntk_monitor.recorder import Recorder
from ntk_monitor.records import records
from ntk_monitor.snapshot import ARRAYS, SCHEMA, Snapshot
from tests.probes import assert_same, probe, skipped, snapshots


def _record(snapshot: Snapshot, **changes: Any) -> str:
    text = events.summary(snapshot).value[-1].tensor.string_val[0].decode()
    return json.dumps(json.loads(text) | changes)


@given(snapshots)
def test_round_trip_returns_every_field(snapshot: Snapshot) -> None:
    event = Event.FromString(Event(summary=events.summary(snapshot)).SerializeToString())
    decoded = events.decode(event)
    assert decoded is not None
    assert_same(decoded, snapshot)


def test_round_trip_of_a_full_and_a_skipped_probe() -> None:
    for snapshot in (probe(7), skipped(8)):
        decoded = events.decode(events.summary(snapshot, "a/b"), "a/b")
        assert decoded is not None
        assert_same(decoded, snapshot)


@pytest.mark.usefixtures("unchecked")
def test_numpy_numbers_come_back_as_plain_ones() -> None:
    changes: dict[str, Any] = {"step": np.int64(7), "rank": np.int32(2), "metrics": {"trace": np.float32("inf")}}
    numbers = replace(probe(7), **changes)
    decoded = events.decode(events.summary(numbers))
    assert decoded is not None
    assert (type(decoded.step), decoded.rank, decoded.metrics) == (int, 2, {"trace": np.inf})


def test_arrays_are_rounded_to_the_declared_dtype() -> None:
    values = {value.tag: value for value in events.summary(probe(7)).value}
    for name, stored in ARRAYS.items():
        if not stored.blob:
            tensor = values[events.tag(name)].tensor
            size = getattr(probe(7), name).size * np.dtype(stored.dtype).itemsize
            assert len(tensor.tensor_content) == size, name


@pytest.mark.parametrize("extreme", [1e300, 1e-300])
def test_values_beyond_float32_keep_float64(extreme: float) -> None:
    decoded = events.decode(events.summary(replace(probe(7), eigenvalues=np.array([extreme, 0.0]))))
    assert decoded is not None
    assert decoded.eigenvalues.tolist() == [extreme, 0.0]


def test_every_value_has_data_class_plugin_and_meaning() -> None:
    values = events.summary(probe(7)).value
    assert len(values) == len(ARRAYS) + 1
    for value in values:
        name = value.tag.removeprefix("ntk/probe/")
        blob = name in ARRAYS and ARRAYS[name].blob
        assert value.metadata.data_class == (DATA_CLASS_BLOB_SEQUENCE if blob else DATA_CLASS_TENSOR)
        assert value.metadata.plugin_data.plugin_name == "ntk"
        about = json.loads(value.metadata.plugin_data.content)
        assert about["schema"] == SCHEMA
        assert len(about["dims"]) == (getattr(probe(7), name).ndim if name in ARRAYS else 0)
        assert about["unit"]
        assert about["meaning"]


def test_the_record_is_strict_json() -> None:
    snapshot = probe(7, noise_floor=np.nan, metrics={"trace": np.inf, "alignment": -np.inf, "overhead": np.nan})
    text = events.summary(snapshot).value[-1].tensor.string_val[0].decode()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["noise_floor"] is None
    assert record["metrics"] == {"trace": "inf", "alignment": "-inf", "overhead": None}


def test_unknown_fields_and_arrays_of_the_same_schema_are_ignored() -> None:
    arrays = {"eigenvalues": np.array([1.0]), "invented": np.array([2.0])}
    snapshot = events.assemble(_record(probe(7), invented=3), arrays)
    assert snapshot.step == 7
    assert snapshot.eigenvalues.tolist() == [1.0]


def test_fields_written_by_an_older_version_may_be_missing() -> None:
    snapshot = events.assemble('{"schema": 1, "step": 3, "wall_time": 4.0}', {})
    assert_same(snapshot, Snapshot(step=3, wall_time=4.0))


def test_a_newer_schema_says_so() -> None:
    with pytest.raises(HistoryError, match=rf"up to schema {SCHEMA}, got schema {SCHEMA + 1}; upgrade"):
        events.assemble(_record(probe(7), schema=SCHEMA + 1), {})


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"schema": 1}', '{"schema": 1, "step": 2}', '{"schema": null}'])
def test_a_record_that_is_none_is_damaged(text: str) -> None:
    with pytest.raises(DamagedRecordError):
        events.assemble(text, {})


@pytest.mark.parametrize("size", [0, 3, 5])
def test_an_array_of_the_wrong_length_is_damaged(size: int) -> None:
    tensor = events.summary(probe(7)).value[0].tensor
    tensor.tensor_content = b"\0" * size
    with pytest.raises(DamagedRecordError):
        events.unpack(tensor)


def test_changed_arrays_are_noticed() -> None:
    for position in range(len(ARRAYS)):
        changed = events.summary(probe(7))
        del changed.value[position]
        with pytest.raises(DamagedRecordError, match="checksum"):
            events.decode(changed)


def test_a_probe_without_its_record_is_damaged() -> None:
    changed = events.summary(probe(7))
    del changed.value[-1]
    with pytest.raises(DamagedRecordError, match="no readable record"):
        events.decode(changed)


def test_other_values_are_no_probe() -> None:
    foreign = Summary.Value(tag="ntk/probe/record", simple_value=1.0)
    event = Event(summary=Summary(value=[foreign, Summary.Value(tag="loss", simple_value=2.0)]))
    assert events.prefixes(event) == ()
    assert events.decode(event) is None
    event.summary.MergeFrom(events.summary(probe(7), "mine"))
    assert events.prefixes(event) == ("mine",)
    assert events.decode(event) is None
    assert events.decode(event, "mine") is not None


def test_one_probe_is_one_event(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.write(probe(7), stock=False)
        recorder.write(skipped(8))
    found = list(records(recorder.path))
    assert [(event.step, event.wall_time) for event in found[1:]] == [(7, probe(7).wall_time), (8, 8.0)]
    assert len(found[1].summary.value) == len(ARRAYS) + 1


def test_tensorboards_own_reader_sees_every_tag(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in range(30):
            recorder.write(probe(step), stock=False)
    reader = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    reader.Reload()
    assert set(reader.Tags()["tensors"]) == {events.tag(name) for name in (*ARRAYS, "record")}
    assert set(reader.PluginTagToContent("ntk")) == set(reader.Tags()["tensors"])
    read = reader.Tensors("ntk/probe/rates")
    assert [event.step for event in read] == list(range(30))
    np.testing.assert_array_equal(
        tensor_util.make_ndarray(read[3].tensor_proto), probe(3).rates.astype(np.float32), strict=True
    )


# The server ends with its standard input; tensorboard neither waits for it nor removes its directory.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_tensorboards_data_server_serves_arrays_records_and_blobs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard_data_server")
    pytest.importorskip("grpc")
    from tensorboard.data import provider, server_ingester
    from tensorboard.util import grpc_util

    with Recorder(tmp_path) as recorder:
        for step in range(3):
            recorder.write(probe(step))
    server = server_ingester.SubprocessServerDataIngester(
        server_ingester.get_server_binary(),
        str(tmp_path),
        reload_interval=0,
        channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
        samples_per_plugin={"ntk": 0},
    )
    server.start()
    try:
        source, where = server.data_provider, {"ctx": None, "experiment_id": "", "plugin_name": "ntk"}
        tensors = source.list_tensors(**where)["."]
        assert all(series.plugin_content for series in tensors.values())
        assert set(tensors) == {events.tag(n) for n in (*ARRAYS, "record") if n not in ARRAYS or not ARRAYS[n].blob}
        wanted = provider.RunTagFilter(runs=["."], tags=["ntk/probe/predictions", "ntk/probe/record"])
        read = source.read_tensors(**where, downsample=100, run_tag_filter=wanted)["."]
        np.testing.assert_array_equal(read["ntk/probe/predictions"][2].numpy, probe(2).predictions.astype(np.float32))
        assert json.loads(read["ntk/probe/record"][1].numpy.item())["step"] == 1
        wanted = provider.RunTagFilter(runs=["."], tags=["ntk/probe/gram"])
        blobs = source.read_blob_sequences(**where, downsample=100, run_tag_filter=wanted)["."]["ntk/probe/gram"]
        npy = source.read_blob(None, blob_key=blobs[1].values[0].blob_key)
        assert npy.startswith(b"\x93NUMPY")
    finally:
        server._stdin_handle.close()
