"""What is exported is what was recorded: every format is read back and compared, bit by bit."""

import csv
import io
import json
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntk_monitor.cli import main
from ntk_monitor.errors import InputError
from ntk_monitor.events import assemble
from ntk_monitor.export import SUFFIXES, export, rows
from ntk_monitor.history import History, load_history
from ntk_monitor.recorder import Recorder
from ntk_monitor.snapshot import ARRAYS, Snapshot
from tests.snapshots import broken, skipped, training, without_modes

RUN = training(9, 3, 4)
# Awkward on purpose: a skipped probe, one without modes, one of NaN, infinities, names with commas, quotes and slashes.
PROBES = (
    replace(
        RUN[0],
        facts=RUN[0].facts | {'a, "quoted" fact': -math.inf, "deep/fact": 1 / 3},
        texts={"stability": 'line one\nline two, with "quotes"'},
    ),
    skipped(20, "no memory; é ≥ 1"),
    without_modes(RUN[1]),
    broken(RUN[2]),
    replace(RUN[3], gram=np.empty(0)),
)
HISTORIES = {
    "awkward": History(PROBES, ("one note", "another")),
    "light": History((RUN[0], Snapshot(step=7, wall_time=1.0, status="light", metrics={"trace": 2.0}), RUN[1])),
    "nothing measured": History((skipped(0), skipped(10))),
    "empty": History(()),
    "one row": History(tuple(training(1, 1, 2))),
}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float):
        return bool(ours == theirs or (math.isnan(ours) and (theirs is None or math.isnan(theirs))))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    return bool(ours == theirs)


def assert_same(ours: Snapshot, theirs: Snapshot) -> None:
    for field in fields(Snapshot):
        left, right = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in ARRAYS:
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert same(left, right), field.name


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("name", HISTORIES)
def test_json_is_strict_and_holds_every_probe(name: str, tmp_path: Path) -> None:
    history = HISTORIES[name]
    path = export(history, tmp_path / "deep" / "history.json", "json")
    read = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert (read["prefix"], read["notes"]) == (history.prefix, list(history.notes))
    assert len(read["probes"]) == len(history)
    for probe, ours in zip(read["probes"], history, strict=True):
        arrays = {key: np.array(probe.pop(key), dtype=np.float64) for key in ARRAYS if key in probe}
        theirs = assemble(json.dumps({"schema": read["schema"]} | probe), arrays)
        assert_same(ours, theirs)
    assert read["about"]["eigenvalues"]["unit"] == ARRAYS["eigenvalues"].unit
    assert read["about"]["alignment"]["meaning"]


@pytest.mark.parametrize("name", HISTORIES)
def test_csv_has_one_row_per_probe(name: str, tmp_path: Path) -> None:
    history = HISTORIES[name]
    text = export(history, tmp_path / "history.csv", "csv").read_text("utf-8")
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(read) == len(history)
    for theirs, ours in zip(read, rows(history), strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in ours.items():
            if value is None or (isinstance(value, float) and math.isnan(value)):
                assert theirs[key] == ""
            elif isinstance(value, float):
                assert float(theirs[key]) == value
            else:
                assert theirs[key] == str(value)


def test_csv_holds_metrics_facts_words_and_seconds() -> None:
    (row, *_) = rows(HISTORIES["awkward"])
    assert row["trace"] == PROBES[0].metrics["trace"]
    assert row["lr"] == PROBES[0].facts["lr"]
    assert row["text_stability"] == PROBES[0].texts["stability"]
    assert row["seconds_gram"] == 0.01
    assert row["layers"] == "body,head"


@pytest.mark.parametrize("name", HISTORIES)
def test_npz_holds_all_arrays_with_their_meaning(name: str, tmp_path: Path) -> None:
    history = HISTORIES[name]
    with np.load(export(history, tmp_path / "history.npz", "npz"), allow_pickle=False) as read:
        about = json.loads(str(read["about"]), parse_constant=refuse)
        assert set(about["arrays"]) == set(read.files) - {"about"}
        np.testing.assert_array_equal(read["step"], history.steps)
        for key, (dims, values, _) in history.variables.items():
            np.testing.assert_array_equal(read[key], values)
            assert read[key].ndim == len(about["arrays"][key]["dims"])
            assert about["arrays"][key]["dims"] == [dims] if isinstance(dims, str) else list(dims)
        if name == "awkward":
            assert about["arrays"]["eigenvalues"]["units"] == "squared output units"
            assert about["attributes"]["notes"] == "one note\nanother"
            assert read["layers"].tolist() == ["body", "head"]
            assert read["deep_fact"][0] == 1 / 3


@pytest.mark.parametrize("name", HISTORIES)
def test_netcdf_opens_in_xarray(name: str, tmp_path: Path) -> None:
    import xarray

    history = HISTORIES[name]
    path = export(history, tmp_path / "history.nc", "netcdf")
    with xarray.open_dataset(path, engine="scipy") as read:
        for key, (_, values, _) in history.variables.items():
            if all(size > 0 for size in values.shape):
                np.testing.assert_array_equal(read[key].values, values, err_msg=key)
        if history.measured:
            np.testing.assert_array_equal(read["step"].values, history.steps)
            assert read["eigenvalues"].attrs["units"] == "squared output units"
            assert read.attrs["ntk_mode"] == "eval"
            assert [str(one) for one in read["layers"].values] == ["body", "head"]


def test_netcdf_keeps_steps_beyond_32_bits(tmp_path: Path) -> None:
    import xarray

    far = History((replace(RUN[0], step=2**40 + 1), replace(RUN[1], step=2**40 + 3)))
    with xarray.open_dataset(export(far, tmp_path / "far.nc", "netcdf"), engine="scipy") as read:
        assert read["step"].values.tolist() == [2**40 + 1, 2**40 + 3]


@pytest.mark.parametrize("name", HISTORIES)
def test_parquet_holds_every_probe(name: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    history = HISTORIES[name]
    table = parquet.read_table(export(history, tmp_path / "history.parquet", "parquet"))
    read = table.to_pylist()
    assert len(read) == len(history)
    for theirs, ours, probe in zip(read, rows(history), history, strict=True):
        assert all(same(value, theirs[key]) for key, value in ours.items())
        for key in ARRAYS:
            held = theirs.get(key)
            np.testing.assert_array_equal(np.array([] if held is None else held, dtype=float), getattr(probe, key))
    words = json.loads(table.schema.metadata[b"ntk_monitor"], parse_constant=refuse)
    assert words["columns"]["gram"]["dims"] == ["sample", "sample_2"]


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("netcdf", "xarray")])
def test_a_missing_package_is_named_with_its_command(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{kind} needs {package}.*pip install {package}"):
        export(HISTORIES["light"], tmp_path / "history", kind)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.csv"
    path.write_text("before")

    def breaks(history: History) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ntk_monitor.export.rows", breaks)
    with pytest.raises(OSError, match="disk full"):
        export(HISTORIES["light"], path, "csv")
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["history.csv"]


def test_a_link_is_written_through_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("longer than what comes after it" * 1000)
    export(HISTORIES["light"], tmp_path / "link", "csv")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == export(HISTORIES["light"], tmp_path / "plain", "csv").read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "plain", "target"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        export(HISTORIES["light"], pipe, "csv")
        assert os.read(reader, 1 << 16).startswith(b"step,")
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert [one.name for one in tmp_path.iterdir()] == ["pipe"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "run"
    recorder = Recorder(directory)
    for one in RUN:
        recorder.write(one)
    recorder.close()
    return directory


def test_the_command_writes_what_was_asked_for(recorded: Path, tmp_path: Path) -> None:
    assert main(["export", str(recorded), "--to", "json"]) == 0
    assert len(json.loads((recorded / "history.json").read_text())["probes"]) == 4
    assert main(["export", str(recorded), "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as read:
        np.testing.assert_array_equal(read["eigenvalues"], load_history(recorded).eigenvalues)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}"], ", ".join(SUFFIXES)),
        (["{run}", "--to", "xls"], "got xls"),
        (["{run}", "--to", "csv", "--out", "{run}"], "is a directory"),
        (["{run}/nowhere", "--to", "csv"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], said: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *(word.format(run=recorded) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
