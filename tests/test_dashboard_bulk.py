"""Long runs in the tab: read in bulk from the fast data server, they are the runs that the files hold."""

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_BOOL, DT_FLOAT, DT_STRING
from tensorboard.context import RequestContext
from tensorboard.data.proto import data_provider_pb2 as messages
from tensorboard.util.tensor_util import make_ndarray

from ntk_monitor import events
from ntk_monitor.cards import cards
from ntk_monitor.dashboard import bulk, collector, payload
from ntk_monitor.dashboard.answers import BLOBS
from ntk_monitor.dashboard.bulk import Asked
from ntk_monitor.dashboard.store import Store
from ntk_monitor.errors import DamagedRecordError, HistoryError
from ntk_monitor.events import event
from ntk_monitor.figures.style import MOST
from ntk_monitor.health import findings
from ntk_monitor.history import History, load_history
from ntk_monitor.mode_table import mode_table
from ntk_monitor.panels import CATALOGUE, View, draw
from ntk_monitor.recorder import append
from ntk_monitor.records import Records
from ntk_monitor.snapshot import ARRAYS, Snapshot
from tests.dashboard import Tab, recorded
from tests.histories import HEALTHY

ASKED = Asked(RequestContext(), "")
NAMES = [entry.name for entry in CATALOGUE]


class Fast(MultiplexerDataProvider):  # type: ignore[misc]  # tensorboard has no types
    """A data server that also answers as TensorBoard's fast one, with protocol buffers; `asked` counts its series."""

    def __init__(self, tab: Tab) -> None:
        super().__init__(tab.multiplexer, str(tab.logdir))
        self.logdir, self.asked, self.refuses = tab.logdir, Counter[str](), False
        self._stub = self

    def read_tensors(self, *arguments: Any, **options: Any) -> Any:
        self.asked["slowly"] += 1
        return super().read_tensors(*arguments, **options)

    def ReadTensors(self, request: Any) -> Any:
        if self.refuses:
            raise grpc.RpcError
        ((run,), (tag,)) = request.run_tag_filter.runs.names, request.run_tag_filter.tags.names
        self.asked[tag.rpartition("/")[2]] += 1
        data = messages.TensorData()
        for found in self._events(run):
            for value in found.summary.value:
                if value.tag == tag:
                    data.step.append(found.step)
                    data.wall_time.append(found.wall_time)
                    data.value.append(value.tensor)
        tags = [messages.ReadTensorsResponse.TagEntry(tag_name=tag, data=data)]
        return messages.ReadTensorsResponse(
            runs=[messages.ReadTensorsResponse.RunEntry(run_name=run, tags=tags if data.step else [])]
        )

    def _events(self, run: str) -> Iterator[Event]:
        for path in sorted((self.logdir / run).iterdir()):
            yield from Records(path)


def long(count: int) -> list[Snapshot]:
    """A run of many probes, of which every seventh is light and some have arrays of other lengths."""
    found = []
    for k in range(count):
        one = HEALTHY[k % len(HEALTHY)]
        step = 25 * k
        if k % 7 == 3:
            one = Snapshot(step=step, wall_time=1.7e9 + k, status="light", metrics=one.metrics, probe=one.probe)
        else:
            wave = 1 + np.sin(k) ** 2
            changes = np.arange(max(step - 24, 0), step + 1)[-(k % 3 + 1) :]
            one = replace(
                one,
                step=step,
                wall_time=1.7e9 + k,
                previous_step=step - 25 if k else None,
                loss_value=wave,
                facts=one.facts | {"total_steps": 25 * count},
                metrics=one.metrics | {"lr_headroom_high": 9 * wave},
                forecast_steps=one.forecast_steps - one.step + step,
                forecast_loss=wave * one.forecast_loss,
                lr_steps=changes,
                lr_values=0.1 * (1 + np.cos(changes / count))[:, None],
                gram=one.gram if k % 10 == 0 else np.empty(0),
                thumbnails=one.thumbnails if not k else np.empty(0),
            )
        found.append(one)
    return found


def as_seen(snapshot: Snapshot, by: Snapshot) -> Snapshot:
    """The snapshot with those of its blobs that are in sight in another one."""
    blobs = [name for name, stored in ARRAYS.items() if stored.blob and not getattr(by, name).size]
    hidden: dict[str, Any] = dict.fromkeys(blobs, np.empty(0))
    return replace(snapshot, **hidden)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    logdir = tmp_path_factory.mktemp("logdir")
    recorded(logdir / "run", long(450))
    return Tab(logdir)


@pytest.fixture(scope="module")
def loaded(tab: Tab) -> History:
    return load_history(tab.logdir / "run")


@pytest.fixture(scope="module", params=["fast", "slow"])
def store(request: pytest.FixtureRequest, tab: Tab) -> Store:
    return Store(Fast(tab) if request.param == "fast" else tab.provider)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "view", [View(mode=2, sample=3), View(step=3000, launch=5000, unit="time", log=False)], ids=str
)
def test_every_panel_is_that_of_the_files(store: Store, loaded: History, name: str, view: View) -> None:
    reading = store.reading(ASKED, "run")
    history = reading.opened(view.step) if name in BLOBS else reading.history
    if name in BLOBS:  # of those the tab shows the first, the last and the nearest, the files all
        loaded = replace(loaded, snapshots=tuple(map(as_seen, loaded, history)))
    told = payload.text(draw(name, {"run": history}, view))
    assert told == payload.text(draw(name, {"run": loaded}, view))
    assert len(told) < 150_000


def test_findings_cards_and_modes_are_those_of_the_files(store: Store, loaded: History) -> None:
    history = store.reading(ASKED, "run").history
    assert findings(history.snapshots) == findings(loaded.snapshots)
    for step in (None, 4000):
        assert cards(history, View(step=step)) == cards(loaded, View(step=step))
    one, other = (mode_table(each.measured[-1], each.measured[-2], each) for each in (history, loaded))
    assert one == other


def test_a_line_has_no_more_points_than_a_panel_has_pixels_for(store: Store, loaded: History) -> None:
    figure = draw("loss-forecast", {"run": store.reading(ASKED, "run").history})
    values = next(trace["y"] for trace in figure["data"] if trace["name"] == "measured")
    measured = [s.loss_value for s in loaded.measured]
    assert len(values) <= MOST < len(measured)
    assert (min(values), max(values)) == pytest.approx((min(measured), max(measured)), rel=1e-5)


def test_a_series_is_asked_for_once_and_values_one_by_one_never(tab: Tab) -> None:
    server = Fast(tab)
    history = Store(server).reading(ASKED, "run").history
    for name in set(NAMES) - BLOBS:
        draw(name, {"run": history})
    findings(history.snapshots)
    assert server.asked["slowly"] == 0
    assert set(server.asked.values()) == {1}
    assert "gram" not in server.asked


def test_probes_that_come_are_appended_to_what_is_read(tmp_path: Path) -> None:
    probes = long(41)
    path = recorded(tmp_path / "run", probes[:40])
    tab = Tab(tmp_path)
    server = Fast(tab)
    store = Store(server)
    before = store.reading(ASKED, "run").history
    assert before[39].rates.size
    row = before[39]._source.columns["rates"][39]  # type: ignore[attr-defined]
    append(path, event(probes[40]))
    tab.reload()
    after = store.reading(ASKED, "run").history
    np.testing.assert_array_equal(after[40].rates, np.float32(probes[40].rates))
    # What was read is neither made anew nor asked for again where nobody looks at the new probe.
    assert after[39] is before[39]
    assert after[39]._source.columns["rates"][39] is row  # type: ignore[attr-defined]
    assert server.asked["rates"] == 2
    assert before[39].coordinates.size
    assert server.asked["coordinates"] == 1


def test_a_server_that_refuses_is_asked_in_the_public_way(tab: Tab) -> None:
    server = Fast(tab)
    server.refuses = True
    history = Store(server).reading(ASKED, "run").history
    assert history[5].rates.size
    assert server.asked["slowly"] == 2


def odd() -> list[TensorProto]:
    """Values as we write them, and as others might."""
    (rates,) = (value.tensor for value in event(HEALTHY[2]).summary.value if value.tag.endswith("/rates"))
    shorter = TensorProto.FromString(rates.SerializeToString())
    shorter.tensor_content = rates.tensor_content[:-4]
    flat = TensorProto(dtype=DT_FLOAT, tensor_shape=rates.tensor_shape, float_val=[1.0] * 10)
    table = TensorProto.FromString(rates.SerializeToString())
    table.tensor_shape.dim[0].size = 5
    table.tensor_shape.dim.add(size=2)
    yes = TensorProto(dtype=DT_BOOL, bool_val=[True])
    word = TensorProto(dtype=DT_STRING, string_val=[b"word"])
    return [rates, shorter, flat, rates, table, yes, word]


def test_arrays_are_those_of_tensorboard_where_it_has_one() -> None:
    values = odd()
    found = bulk.arrays(values)
    assert len(found) == len(values)
    for array, value in zip(found, values, strict=True):
        if value is values[1]:
            assert not array.size
        else:
            np.testing.assert_array_equal(array, make_ndarray(value))
            assert array.shape == make_ndarray(value).shape
    assert bulk.arrays([]) == []


def test_texts_are_bytes_or_nothing() -> None:
    assert bulk.texts(odd()) == [b""] * 6 + [b"word"]
    arrays = [np.array(b"one", dtype=object), np.array([b"a", b"b"], dtype=object), np.float32(1.0).reshape(())]
    assert bulk.texts(arrays) == [b"one", b"", b""]


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b"\xff", b'{"schema": 1},{"schema": 1}', b'{"schema": 99}'])
def test_a_damaged_record_costs_no_other(damage: bytes) -> None:
    whole = [value.tensor.string_val[0] for one in islice(HEALTHY, 3) for value in event(one).summary.value[-1:]]
    found = events.all_loaded([*whole[:2], damage, whole[2]])
    assert isinstance(found[2], HistoryError)
    assert isinstance(found[2], DamagedRecordError) == (b"99" not in damage)
    assert [one["step"] for one in found if not isinstance(one, HistoryError)] == [0, 25, 50]


def test_a_field_that_is_no_such_thing_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    content = event(HEALTHY[0])
    record = content.summary.value[-1].tensor
    fields = {"facts": 7, "loss_value": "low", "metrics": {"trace": "inf"}, "layers": None}
    record.string_val[0] = json.dumps(json.loads(record.string_val[0]) | fields).encode()
    append(recorded(tmp_path / "run", ()), content)
    (probe,) = Store(Tab(tmp_path).provider).reading(ASKED, "run").history
    assert (probe.facts, probe.layers, probe.metrics) == ({}, (), {"trace": np.inf})
    assert np.isnan(probe.loss_value)
    with pytest.raises(AttributeError, match="no 'colour'"):
        probe.colour  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(KeyError), collector.paused():
            with collector.paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
