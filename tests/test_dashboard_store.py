"""Histories out of TensorBoard's data server: what load_history reads from the files, and nothing unasked."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.context import RequestContext

from ntk_monitor.dashboard.bulk import Asked
from ntk_monitor.dashboard.store import Store
from ntk_monitor.errors import HistoryError
from ntk_monitor.events import event
from ntk_monitor.history import History, load_history
from ntk_monitor.recorder import append
from ntk_monitor.snapshot import ARRAYS, Snapshot
from tests.dashboard import Tab, recorded
from tests.histories import EVERY, HEALTHY

ASKED = Asked(RequestContext(), "")


def counted(provider: Any) -> Counter[str]:
    """Count what is read from a data server from now on, by method and by array."""
    read: Counter[str] = Counter()

    def counting(method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            chosen = options.get("run_tag_filter")
            read.update([method, *(tag.rpartition("/")[2] for tag in (chosen.tags if chosen else ()))])
            return call(*arguments, **options)

        return wrapped

    for method in ("read_tensors", "read_blob_sequences", "read_blob"):
        setattr(provider, method, counting(method, getattr(provider, method)))
    return read


def gram(k: int) -> np.ndarray[Any, Any]:
    return np.full((3, 3), float(k))


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    probes = [replace(one, gram=gram(k) if k % 3 == 1 else np.empty(0)) for k, one in enumerate(HEALTHY)]
    recorded(tmp_path / "run", probes)
    return tmp_path


def same(left: History, right: History) -> None:
    assert [s.step for s in left] == [s.step for s in right]
    for one, other in zip(left, right, strict=True):
        for name in Snapshot.__dataclass_fields__:
            np.testing.assert_equal(getattr(one, name), getattr(other, name), err_msg=name)


def opened(store: Store, run: str) -> History:
    """The run with all its blobs in sight."""
    history = store.reading(ASKED, run).history
    blobs = [name for name, stored in ARRAYS.items() if stored.blob]
    return replace(history, snapshots=tuple(probe.opened(blobs) for probe in history))  # type: ignore[attr-defined]


def test_the_server_and_the_files_tell_the_same(logdir: Path) -> None:
    same(opened(Store(Tab(logdir).provider), "run"), load_history(logdir / "run"))


def test_nothing_is_read_before_somebody_looks(logdir: Path) -> None:
    provider = Tab(logdir).provider
    read = counted(provider)
    store = Store(provider)
    assert store.names(ASKED) == ["run"]
    assert not read
    history = store.reading(ASKED, "run").history
    assert read.keys() <= {"read_tensors", "read_blob_sequences", "record", *ARRAYS}
    assert not read.keys() & {"eigenvalues", "predictions", "read_blob"}
    assert history.eigenvalues.shape == history.eigenvalues.shape == (12, 10)
    assert read["eigenvalues"] == 1
    assert read["record"] == 1


def test_blobs_in_sight_are_the_first_the_last_and_the_nearest(logdir: Path) -> None:
    store = Store(Tab(logdir).provider)

    def seen(step: int | None) -> list[int]:
        return [s.step // EVERY for s in store.reading(ASKED, "run").opened(step) if s.gram.size]

    assert seen(None) == [1, 10]
    assert seen(0) == [1, 10]
    assert seen(4 * EVERY) == [1, 4, 10]
    assert seen(5 * EVERY) == [1, 4, 10]
    assert seen(6 * EVERY) == [1, 7, 10]
    assert seen(10**12) == [1, 10]
    np.testing.assert_array_equal(store.reading(ASKED, "run").opened(4 * EVERY)[4].gram, gram(4))


def test_new_probes_are_seen_and_old_ones_are_kept(logdir: Path) -> None:
    tab = Tab(logdir)
    read = counted(tab.provider)
    store = Store(tab.provider)
    before, version = store.reading(ASKED, "run").history, store.reading(ASKED, "run").version
    assert len(before.eigenvalues) == 12
    later = replace(HEALTHY[3], step=1000, wall_time=1.8e9, eigenvalues=np.full(10, 7.0))
    append(next((logdir / "run").iterdir()), event(later))
    assert store.reading(ASKED, "run").version == version
    tab.reload()
    assert store.reading(ASKED, "run").version != version
    after = store.reading(ASKED, "run").history
    assert [s.step for s in after][-2:] == [275, 1000]
    np.testing.assert_array_equal(after.eigenvalues[-1], np.full(10, 7.0))
    assert read["eigenvalues"] == 2
    assert len(before) == 12


def test_a_resumed_run_reads_as_one(logdir: Path) -> None:
    again = [replace(s, wall_time=s.wall_time + 1e6, loss_value=9.0) for s in HEALTHY[6:9]]
    # Light probes hold no spectrum: the eigenvalues of the probe they replace must not be taken for theirs.
    again[1] = Snapshot(step=again[1].step, wall_time=again[1].wall_time, status="light", metrics={"trace": 1.0})
    recorded(logdir / "run", again, name="1700000900.test.0")
    found = opened(Store(Tab(logdir).provider), "run")
    truth = load_history(logdir / "run")
    assert [s.loss_value for s in found.measured[-2:]] == [9.0, 9.0]
    assert any("replaced by later records" in note for note in found.notes)
    # Of two blobs at one step TensorBoard keeps the first: the second is missing, and the first is not shown for it.
    for one in (found[7], truth[7]):
        assert not one.gram.size
    same(replace(found, snapshots=found.snapshots[:6]), replace(truth, snapshots=truth.snapshots[:6]))
    assert not found[7].eigenvalues.size


def test_several_monitors_have_names_of_their_own(tmp_path: Path) -> None:
    recorded(tmp_path / "a", HEALTHY[:2])
    recorded(tmp_path / "a", HEALTHY[:3], prefix="held/out", name="1700000001.test.0")
    recorded(tmp_path / "b", HEALTHY[:4], prefix="held/out")
    store = Store(Tab(tmp_path).provider)
    assert store.names(ASKED) == ["a", "a · held/out", "b"]
    assert [len(store.reading(ASKED, name).history) for name in store.names(ASKED)] == [2, 3, 4]


def test_versions_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("version_10", "version_9", "x", "7"):
        recorded(tmp_path / name, HEALTHY[:1])
    assert Store(Tab(tmp_path).provider).names(ASKED) == ["7", "version_9", "version_10", "x"]


def edited(snapshot: Snapshot, **fields: Any) -> Any:
    """The event of a probe, with fields of its record replaced."""
    content = event(snapshot)
    record = content.summary.value[-1].tensor
    record.string_val[0] = json.dumps(json.loads(record.string_val[0]) | fields).encode()
    return content


def test_newer_schemas_say_so(tmp_path: Path) -> None:
    path = recorded(tmp_path / "new", ())
    append(path, edited(HEALTHY[0], schema=99))
    path = recorded(tmp_path / "mixed", HEALTHY[:2])
    append(path, edited(HEALTHY[2], schema=99))
    store = Store(Tab(tmp_path).provider)
    with pytest.raises(HistoryError, match="got schema 99; upgrade"):
        store.reading(ASKED, "new")
    mixed = store.reading(ASKED, "mixed").history
    assert len(mixed) == 2
    assert "1 probes are not shown" in mixed.notes[0]
    assert "upgrade" in mixed.notes[0]


def test_records_that_are_not_what_they_should_be_are_passed_over(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run", HEALTHY[:1])
    nonsense = event(HEALTHY[1])
    nonsense.summary.value[-1].tensor.string_val[0] = b"\xff{"
    append(path, nonsense, edited(HEALTHY[2], step=7), edited(HEALTHY[3], wall_time="soon"), event(HEALTHY[4]))
    history = Store(Tab(tmp_path).provider).reading(ASKED, "run").history
    assert [s.step for s in history] == [0, 100]
    assert history.notes[0].startswith("3 damaged records were passed over")


def test_arrays_that_are_not_what_they_should_be_are_not_there(tmp_path: Path) -> None:
    def replaced(name: str, value: Summary.Value) -> Any:
        content = event(HEALTHY[0])
        (place,) = (i for i, one in enumerate(content.summary.value) if one.tag.endswith(f"/{name}"))
        content.summary.value[place].tensor.CopyFrom(value.tensor)
        return content

    one, three = (TensorShapeProto(dim=[TensorShapeProto.Dim(size=size)]) for size in (1, 3))

    def written(of: str) -> Summary.Value:
        return next(one for one in event(HEALTHY[0]).summary.value if one.tag.endswith(f"/{of}"))

    odd = Summary.Value(tensor=TensorProto(dtype=DT_STRING, string_val=[b"\x93NUMPY nonsense"], tensor_shape=one))
    short = Summary.Value(tensor=TensorProto(dtype=DT_FLOAT, tensor_content=b"1234", tensor_shape=three))
    for run, name, value in (
        ("a", "eigenvalues", written("predictions")),
        ("b", "eigenvalues", odd),
        ("c", "eigenvalues", short),
        ("d", "gram", odd),
        ("e", "gram", written("gram")),
    ):
        append(recorded(tmp_path / run, ()), replaced(name, value))
    store = Store(Tab(tmp_path).provider)
    found = [opened(store, run)[0] for run in "abcde"]
    assert [probe.eigenvalues.size for probe in found] == [0, 0, 0, 10, 10]
    assert [probe.gram.size for probe in found] == [64**2, 64**2, 64**2, 0, 64**2]
    assert all(probe.predictions.size for probe in found)


def test_unknown_runs_are_refused_by_name(logdir: Path) -> None:
    with pytest.raises(HistoryError, match=r"no run with probes is called '\.\./run'"):
        Store(Tab(logdir).provider).reading(ASKED, "../run")
