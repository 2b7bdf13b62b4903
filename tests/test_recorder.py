"""What Recorder writes, and the stock values beside it, as TensorBoard's own reader sees them."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_SCALAR, DATA_CLASS_TENSOR
from tensorboard.util import tensor_util

from ntk_monitor.errors import InputError
from ntk_monitor.history import load_history
from ntk_monitor.recorder import Recorder
from ntk_monitor.records import records
from ntk_monitor.stock import histogram_value, image_value, scalar_value
from tests.probes import probe
from tests.snapshots import training


def _png() -> bytes:
    """One grey pixel."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\x7f")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _reader(directory: Path) -> EventAccumulator:
    reader = EventAccumulator(str(directory), size_guidance={"tensors": 0, "images": 0})
    reader.Reload()
    return reader


def _buckets(values: Any, **options: Any) -> Any:
    return tensor_util.make_ndarray(histogram_value("h", values, **options).tensor)


def test_everything_of_a_probe_shares_one_event(tmp_path: Path) -> None:
    extra = [
        histogram_value("mine/h", [-1.0, 0.0, 1.0]),
        image_value("mine/i", _png(), 1, 1, description="one grey pixel"),
        scalar_value("mine/s", 1e300),
    ]
    with Recorder(tmp_path) as recorder:
        recorder.write(training(12, 3, 1)[0], extra=extra)
    assert len(list(records(recorder.path))) == 2  # the file's header and the probe
    reader = _reader(tmp_path)
    assert set(reader.PluginTagToContent("histograms")) == {"ntk/log10_eigenvalues", "mine/h"}
    assert set(reader.PluginTagToContent("images")) == {"ntk/gram", "mine/i"}
    assert {"ntk/trace", "ntk/effective_rank", "mine/s"} <= set(reader.PluginTagToContent("scalars"))
    (event,) = reader.Tensors("mine/h")
    assert tensor_util.make_ndarray(event.tensor_proto).shape == (48, 3)
    (event,) = reader.Tensors("mine/i")
    assert tensor_util.make_ndarray(event.tensor_proto).tolist() == [b"1", b"1", _png()]
    assert reader.SummaryMetadata("mine/i").summary_description == "one grey pixel"
    assert tensor_util.make_ndarray(reader.Tensors("mine/s")[0].tensor_proto) == np.inf
    assert len(load_history(tmp_path)) == 1


def test_scalars_reach_the_scalar_dashboard_with_their_meaning(tmp_path: Path) -> None:
    made = training(12, 3, 3)
    with Recorder(tmp_path) as recorder:
        for snapshot in made:
            recorder.write(snapshot, "mine")
    reader = _reader(tmp_path)
    read = [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in reader.Tensors("mine/trace")]
    assert read == [(snapshot.step, pytest.approx(snapshot.metrics["trace"], rel=1e-6)) for snapshot in made]
    assert reader.Tensors("mine/trace")[0].wall_time == made[0].wall_time
    assert "unit: squared output units" in reader.SummaryMetadata("mine/trace").summary_description


def test_stock_values_name_their_data_class() -> None:
    assert scalar_value("a", 1.0).metadata.data_class == DATA_CLASS_SCALAR
    assert histogram_value("a", [1.0]).metadata.data_class == DATA_CLASS_TENSOR
    assert image_value("a", _png(), 1, 1).metadata.data_class == DATA_CLASS_BLOB_SEQUENCE


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([np.nan, -np.inf, np.inf]), max_size=20), st.integers(1, 60))
def test_a_histogram_counts_every_finite_value_once(values: list[float], bins: int) -> None:
    buckets = _buckets(values, bins=bins)
    finite = [value for value in values if np.isfinite(value)]
    assert buckets.shape == (bins, 3)
    assert buckets[:, 2].sum() == len(finite)
    if finite:
        assert buckets[0, 0] <= min(finite)
        assert buckets[-1, 1] >= max(finite)
        assert (buckets[:, 1] > buckets[:, 0]).all()
        np.testing.assert_array_equal(buckets[1:, 0], buckets[:-1, 1])


def test_values_one_rounding_error_apart_still_make_a_histogram() -> None:
    assert _buckets([1.0, np.nextafter(1.0, 2.0)])[:, 2].sum() == 2


def test_histogram_counts_fall_where_the_values_are() -> None:
    assert _buckets([0.0, 0.1, 1.0], bins=2).tolist() == [[0.0, 0.5, 2.0], [0.5, 1.0, 1.0]]


def test_file_names_are_tensorboards_and_distinct(tmp_path: Path) -> None:
    names = {Recorder(tmp_path).path.name for _ in range(3)}
    assert len(names) == 3
    assert all(re.fullmatch(r"events\.out\.tfevents\.\d{10}\..+\.ntk", name) for name in names)


def test_probes_are_on_disk_before_flush_and_close(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "new" / "directory")
    recorder.write(probe(1))
    assert len(load_history(recorder.log_dir)) == 1
    recorder.flush()
    recorder.write(probe(2))
    assert len(load_history(recorder.log_dir)) == 2


def test_a_closed_recorder_refuses(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.close()
    recorder.close()
    with pytest.raises(InputError, match="is closed; open a new Recorder"):
        recorder.write(probe(1))


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs://bucket/run"])
def test_addresses_are_refused(place: str) -> None:
    with pytest.raises(InputError, match="must be a local directory"):
        Recorder(place)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="got the file"):
        Recorder(tmp_path / "file")


class _FullDisk(io.FileIO):
    """Takes half of what it is given, then no more."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a")
        self.full = False

    def write(self, data: Any, /) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        self.full = True
        return super().write(bytes(data)[: len(data) // 2])


def test_a_record_that_met_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    recorder.write(probe(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: _FullDisk(path))
        with pytest.raises(OSError, match="No space left"):
            recorder.write(probe(2))
    recorder.write(probe(3))
    history = load_history(tmp_path)
    assert history.steps.tolist() == [1, 3]
    assert history.notes == ()
