"""What TensorBoard shows of a run without the tab: two ends of an interval in one chart, and how to get there."""

import io
import logging
import re
import shlex
import sys
from pathlib import Path

import pytest
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard.writer import SummaryWriter

from ntk_monitor import board
from ntk_monitor import say as saying
from ntk_monitor.callbacks.event_files import layout, local_file
from ntk_monitor.metrics import NAMES
from ntk_monitor.recorder import Recorder
from ntk_monitor.records import records
from ntk_monitor.say import tell, watching
from tests.histories import HEALTHY

TAG = "custom_scalars__config__"


def charts(value: Summary.Value) -> dict[str, list[str]]:
    (category,) = Layout.FromString(value.tensor.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def layouts(path: Path) -> list[Summary.Value]:
    return [value for event in records(path) for value in event.summary.value if value.tag == TAG]


@pytest.mark.parametrize("prefix", ["ntk", "a.b/c+d"])
def test_charts_hold_scalars_that_are_logged(prefix: str) -> None:
    value = board.layout(prefix)
    assert value.metadata.data_class == DATA_CLASS_TENSOR
    assert value.metadata.plugin_data.plugin_name == "custom_scalars"
    tags = [f"{prefix}/{name}" for name in NAMES]
    drawn = charts(value)
    assert len(drawn) == 3
    for expressions in drawn.values():
        found = [[tag for tag in [*tags, "ntkx/lr_headroom_low"] if re.match(e, tag)] for e in expressions]
        assert [len(one) for one in found] == [1, 1]
    ends = drawn["the learning rate could be multiplied by"]
    assert all(re.match(e, f"{prefix}/lr_headroom_{end}") for e, end in zip(ends, ("low", "high"), strict=True))


def test_a_record_of_its_own_has_one_layout(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for snapshot in HEALTHY[:3]:
            recorder.write(snapshot)
        recorder.write(HEALTHY[3], "other")
    assert len(layouts(recorder.path)) == 1
    with Recorder(tmp_path / "bare") as recorder:
        recorder.write(HEALTHY[0], stock=False)
        assert not layouts(recorder.path)
        recorder.write(HEALTHY[1])
    assert len(layouts(recorder.path)) == 1


@pytest.mark.usefixtures("fresh")
def test_a_loop_is_told_how_to_watch_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path / "run") as recorder:
        for snapshot in HEALTHY[:3]:
            recorder.write(snapshot, "mine")
    assert capsys.readouterr().err == f"ntk_monitor: {watching(tmp_path / 'run', 'mine')}\n"


def test_a_layout_of_the_users_own_keeps_its_place(tmp_path: Path) -> None:
    own = SummaryWriter(str(tmp_path / "own"))
    own.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
    own.flush()
    assert layout(local_file(own), "ntk") == []
    plain = SummaryWriter(str(tmp_path / "plain"))
    plain.add_scalar("loss", 1.0, 0)
    plain.flush()
    assert len(layout(local_file(plain), "ntk")) == 1
    assert len(layout(None, "ntk")) == 1
    own.close()
    plain.close()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The logger of a program that has set up no logging; pytest listens to all that it finds."""
    logger = logging.Logger("ntk_monitor")
    monkeypatch.setattr(saying, "_LOGGER", logger)
    monkeypatch.setattr(saying, "_told", set())
    return logger


@pytest.mark.usefixtures("fresh")
def test_it_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for message in ("one", "two", "one"):
        tell(message)
    assert capsys.readouterr().err == "ntk_monitor: one\nntk_monitor: two\n"


@pytest.mark.usefixtures("fresh")
def test_nobody_who_listens_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = io.StringIO()
    gone.close()
    for stream in (gone, None):
        monkeypatch.setattr(sys, "stderr", stream)
        tell(f"into {stream}")


def test_a_program_with_levels_of_its_own_decides(fresh: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.setLevel(logging.WARNING)
    tell("hidden")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("run", "shown"),
    [("logs/version_3", "logs"), ("my runs/a", "my runs/a"), ("version_0", "version_0"), ("runs/x;y", "runs/x;y")],
)
def test_the_command_shows_the_run(run: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (run, tmp_path / run):
        words = shlex.split(watching(place, "a/ntk").splitlines()[0])
        wanted = shown if run != "version_0" or not isinstance(place, Path) else "."
        assert words[-3:] == ["tensorboard", "--logdir", wanted]
    addresses = watching(run, "a/ntk").splitlines()[1]
    assert "http://localhost:6006/#ntk" in addresses
    assert "?tagFilter=a%2Fntk%2F&smoothing=0#timeseries" in addresses
