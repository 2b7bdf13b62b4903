"""However an analysis is interrupted, shared or extended: nothing is measured twice, and the history is the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import ntk_monitor as ntk
from ntk_monitor import analysis
from ntk_monitor.cli import analyze, main
from ntk_monitor.cli.analyze import alone
from ntk_monitor.history import History
from ntk_monitor.reading import read
from ntk_monitor.restored import optimizers
from ntk_monitor.series import FOLDER, Ledger
from ntk_monitor.snapshot import Snapshot
from tests import analyses
from tests.analyses import DATA, differences, options
from tests.launch import environment
from tests.processes import in_child

COUNT = 5
MODEL = ["--model", "tests.analyses:network", "--data", DATA, "--loss", "cross_entropy", "--probe", "8", "--no-report"]


def analyzed(run: Path, out: Path, *words: str) -> int:
    return main(["analyze", str(run), "--out", str(out), *MODEL, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    analyses.series(root, COUNT)
    return root


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    """The history of an analysis that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert analyzed(run, out) == 0
    return ntk.load_history(out)


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[int]]:
    """Steps whose record was finished, in any process that is forked from this one, in the order of finishing."""
    log = tmp_path / "finished"
    write = Ledger.write

    def noted(self: Ledger, name: str, snapshot: Snapshot, prefix: str) -> None:
        write(self, name, snapshot, prefix)
        with log.open("a") as file:
            file.write(f"{snapshot.step}\n")

    monkeypatch.setattr(Ledger, "write", noted)
    return lambda: [int(line) for line in log.read_text().split()] if log.exists() else []


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before_a_record(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    calls, write = count(1), Ledger.write

    def fatal(self: Ledger, *words: Any) -> None:
        if next(calls) == nth:
            killed()
        write(self, *words)

    monkeypatch.setattr(Ledger, "write", fatal)


def _inside_a_file(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Half of what a record or an event file holds is written, under the name that it has until it is whole."""
    calls, replaced = count(1), Ledger._replace

    def fatal(path: Path, content: bytes) -> None:
        if next(calls) == nth:
            path.with_name(f".{path.name}.{os.getpid()}.partial").write_bytes(content[: len(content) // 2])
            killed()
        replaced(path, content)

    monkeypatch.setattr(Ledger, "_replace", staticmethod(fatal))


def _inside_the_event_file(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    calls, publish = count(1), Ledger.publish

    def fatal(self: Ledger, wanted: Any) -> Path | None:
        path = publish(self, wanted)
        if next(calls) == nth and path is not None:
            path.write_bytes(path.read_bytes()[:-700])
            killed()
        return path

    monkeypatch.setattr(Ledger, "publish", fatal)


def _inside_a_measurement(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    calls = count(1)

    def fatal(*words: Any) -> Any:
        if next(calls) == nth:
            killed()
        return optimizers(*words)

    monkeypatch.setattr("ntk_monitor.analysis.optimizers", fatal)


KILLS = [
    (_before_a_record, 4),
    *(
        pytest.param(where, nth, marks=pytest.mark.slow)
        for nth in (1, 3)
        for where in (_before_a_record, _inside_a_file, _inside_the_event_file, _inside_a_measurement)
    ),
]


@pytest.mark.parametrize(("where", "nth"), KILLS)
def test_killed_and_started_again(
    where: Callable[[pytest.MonkeyPatch, int], None],
    nth: int,
    run: Path,
    whole: History,
    finished: Callable[[], list[int]],
    tmp_path: Path,
) -> None:
    def doomed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            where(patch, nth)
            analyzed(run, tmp_path / "out")

    assert in_child(doomed) == -signal.SIGKILL
    assert len(finished()) < COUNT
    assert analyzed(run, tmp_path / "out") == 0
    assert finished() == list(range(COUNT))
    assert differences(ntk.load_history(tmp_path / "out"), whole) == []


def test_a_second_call_measures_nothing(
    run: Path, finished: Callable[[], list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert analyzed(run, tmp_path / "out", "--reference", "0") == 0
    assert finished() == list(range(COUNT))
    assert f"0 checkpoints measured, {COUNT} were measured before" in capsys.readouterr().out
    (state,) = (tmp_path / "out" / FOLDER).glob("*.state")
    assert isinstance(torch.load(state, weights_only=True), dict)
    (events,) = (tmp_path / "out").glob("*tfevents*")
    before = events.read_bytes()
    # Other options are other records.
    assert analyzed(run, tmp_path / "out", "--reference", "0", "--outputs", "trace") == 0
    assert finished() == 2 * list(range(COUNT))
    assert {s.kernel for s in ntk.load_history(tmp_path / "out")} == {"trace"}
    assert analyzed(run, tmp_path / "out", "--reference", "0") == 0
    assert events.read_bytes() == before
    assert len(finished()) == 2 * COUNT


def test_ctrl_c_keeps_what_is_finished(
    run: Path, whole: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        calls, load = count(), analysis.Analysis._load

        def pressed(self: analysis.Analysis, i: int) -> Any:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return load(self, i)

        patch.setattr(analysis.Analysis, "_load", pressed)
        assert analyzed(run, tmp_path / "out") == 130
    assert "interrupted: 2 checkpoints to go, by the same command" in capsys.readouterr().out
    assert len(ntk.load_history(tmp_path / "out")) == 3
    assert analyzed(run, tmp_path / "out") == 0
    assert differences(ntk.load_history(tmp_path / "out"), whole) == []


def test_a_checkpoint_in_between_changes_only_what_follows_it(
    finished: Callable[[], list[int]], tmp_path: Path
) -> None:
    paths = analyses.series(tmp_path / "run", 6)
    late = paths[3].rename(tmp_path / "late")
    assert analyzed(tmp_path / "run", tmp_path / "out", "--reference", "0") == 0
    assert finished() == [0, 1, 2, 4, 5]
    late.rename(paths[3])
    assert analyzed(tmp_path / "run", tmp_path / "out", "--reference", "0") == 0
    assert finished()[5:] == [3, 4]
    assert analyzed(tmp_path / "run", tmp_path / "new", "--reference", "0") == 0
    assert differences(ntk.load_history(tmp_path / "out"), ntk.load_history(tmp_path / "new")) == []


@pytest.mark.slow
def test_a_series_that_grows_keeps_its_records(finished: Callable[[], list[int]], tmp_path: Path) -> None:
    """The last record before does not know of a next one, yet hands it the forecast of the right length."""
    paths = analyses.series(tmp_path / "run", 6)
    late = paths[5].rename(tmp_path / "late")
    words = ("--total-steps", "20")
    assert analyzed(tmp_path / "run", tmp_path / "out", *words) == 0
    late.rename(paths[5])
    assert analyzed(tmp_path / "run", tmp_path / "out", *words) == 0
    assert finished() == list(range(6))
    assert analyzed(tmp_path / "run", tmp_path / "new", *words) == 0
    grown, whole = ntk.load_history(tmp_path / "out"), ntk.load_history(tmp_path / "new")
    assert "forecast_error_residual" in whole[5].facts
    # Only that it was the last of its time is in the record of step 4.
    assert all(found.startswith("texts of step 4") for found in differences(grown, whole))


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_processes_give_the_same_bits(
    first: int, run: Path, whole: History, finished: Callable[[], list[int]], tmp_path: Path
) -> None:
    given = options(str(run), "--out", str(tmp_path / "out"), *MODEL)
    for rank in (1, 0) if first else (0, 1, 0):
        assert alone(given, rank, 2) == 0
    assert sorted(finished()) == list(range(COUNT))
    assert differences(ntk.load_history(tmp_path / "out"), whole) == []


@pytest.mark.slow
def test_what_fails_leaves_the_series_and_is_tried_again(
    run: Path, whole: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        load = analysis.Analysis._load

        def failing(self: analysis.Analysis, i: int) -> Any:
            if self.entries[i].step == 2:
                raise RuntimeError("the file system is away")
            return load(self, i)

        patch.setattr(analysis.Analysis, "_load", failing)
        assert analyzed(run, tmp_path / "out") == 0
        assert "not measured: c002.pt: " in capsys.readouterr().out
    others = [str(path) for path in sorted(run.glob("*.pt")) if path.stem != "c002"]
    assert main(["analyze", *others, "--out", str(tmp_path / "others"), *MODEL]) == 0
    assert differences(ntk.load_history(tmp_path / "out"), ntk.load_history(tmp_path / "others")) == []
    assert analyzed(run, tmp_path / "out") == 0
    assert differences(ntk.load_history(tmp_path / "out"), whole) == []


class Clock:
    """A clock that only sleeping moves; each sleep lets the run that is being watched write something."""

    def __init__(self, writing: Iterator[Any]) -> None:
        self.now, self.writing = 0.0, writing

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        next(self.writing, None)

    def monotonic(self) -> float:
        return self.now


def test_watch_follows_a_run_and_reads_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = analyses.series(tmp_path / "made", COUNT)
    run, sizes = tmp_path / "run", {path.name: path.stat().st_size for path in made}

    def writing() -> Iterator[None]:
        run.mkdir()
        yield
        for path in made:
            content, target = path.read_bytes(), run / path.name
            for part in (1, len(content) // 2, len(content)):
                target.write_bytes(content[:part])
                yield
            yield
        made_again = run / made[0].name
        made_again.unlink()  # as save_top_k does
        yield

    seen = []

    def noted(path: Path, **words: Any) -> Any:
        seen.append((path.name, path.stat().st_size))
        return read(path, **words)

    monkeypatch.setattr("ntk_monitor.series.read", noted)
    monkeypatch.setattr(analyze, "time", Clock(writing()))
    assert analyzed(run, tmp_path / "out", "--watch", "60", "--reference", "0") == 0
    assert seen == list(sizes.items())  # each once, and whole
    assert [s.step for s in ntk.load_history(tmp_path / "out")] == list(range(COUNT))
    monkeypatch.setattr(analyze, "time", Clock(iter(())))
    assert analyzed(tmp_path / "nowhere", tmp_path / "none", "--watch", "5") == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fabric", "torchrun"])
def test_two_real_processes_give_the_same_bits(start: str, run: Path, whole: History, tmp_path: Path) -> None:
    words = ["ntk_monitor.cli", "analyze", str(run), "--out", str(tmp_path / "out"), *MODEL]
    command = [sys.executable, "-m", *words, "--devices", "2"]
    if start == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", *words]
    known = environment()
    known = {name: known[name] for name in known if not name.startswith("MASTER_")}
    done = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{COUNT} checkpoints measured" in done.stdout
    assert differences(ntk.load_history(tmp_path / "out"), whole) == []


@pytest.mark.slow
def test_twenty_checkpoints_killed_in_the_middle(tmp_path: Path) -> None:
    analyses.series(tmp_path / "run", 20)
    words = ["analyze", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *MODEL]
    process = subprocess.Popen([sys.executable, "-m", "ntk_monitor.cli", *words], env=environment(), cwd=tmp_path)
    folder = tmp_path / "out" / FOLDER
    while process.poll() is None and len(list(folder.glob("*.event"))) < 7:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.event")}
    assert 7 <= len(before) < 20
    assert main(words) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.event")}
    assert len(after) == 20
    assert before.items() <= after.items()
    assert analyzed(tmp_path / "run", tmp_path / "new") == 0
    assert differences(ntk.load_history(tmp_path / "out"), ntk.load_history(tmp_path / "new")) == []


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_cut_a_series_into_neighbours(world: int) -> None:
    from ntk_monitor.cli.analyze import share

    for length in range(40):
        places: Any = list(range(length))
        assert [place for rank in range(world) for place in share(places, rank, world)] == places
    assert [len(share(list(range(16)), rank, 2)) for rank in range(2)] == [9, 7]  # type: ignore[arg-type]
