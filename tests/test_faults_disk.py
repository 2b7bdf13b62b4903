"""Disks that fill up, files that vanish, processes that are killed: training goes on, what was measured can be read."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import ntk_monitor as ntk
from ntk_monitor import recorder
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.look import Outlook
from ntk_monitor.records import records
from ntk_monitor.say import NTKWarning
from tests.modules import Classifier, digits, loader, mlp
from tests.processes import in_child
from tests.training import outcome, seeded, trainer

_STEPS = 10


class AtStep(L.Callback):
    """Does something to the world after a step, behind the monitor."""

    def __init__(self, step: int, deed: Callable[[], None]) -> None:
        self.step, self.deed = step, deed

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.deed()


def run(root: Path, callbacks: list[Any], net: nn.Module | None = None, **options: Any) -> dict[str, str]:
    seeded()
    module = Classifier(net or mlp())
    fitted = trainer(root, callbacks, **{"max_steps": _STEPS, "max_epochs": -1, **options})
    fitted.fit(module, loader(digits(96)))
    return outcome(module, fitted)


def monitor(**options: Any) -> NTKMonitor:
    defaults = {"probe": 6, "every_n_steps": 2, "reference": 0, "loss": "cross_entropy", "gram_every": 0}
    return NTKMonitor(**{**defaults, **options})


def steps(root: Path) -> list[int]:
    return [snapshot.step for snapshot in ntk.load_history(root)]


def ours(said: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in said if isinstance(warning.message, NTKWarning)]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look no further than the kernel, which takes most of the time and writes nothing of its own."""
    monkeypatch.setattr("ntk_monitor.outlook.Watch.look", lambda self, now: Outlook())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("plain"), [])


def test_a_disk_that_is_full_for_a_while_costs_the_records_of_that_time(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """A device that is always full stands in the place of the file, so that the error is the system's own."""
    files = tmp_path / "here"

    def fills() -> None:
        (file,) = files.glob("*tfevents*")
        file.rename(tmp_path / "kept")
        file.symlink_to("/dev/full")

    def empties() -> None:
        (file,) = files.glob("*tfevents*")
        file.unlink()
        (tmp_path / "kept").rename(file)

    callbacks = [monitor(log_dir=str(files)), AtStep(2, fills), AtStep(6, empties)]
    with pytest.warns(NTKWarning) as said:
        found = run(tmp_path, callbacks, logger=CSVLogger(tmp_path / "csv"))
    assert found == undisturbed
    assert steps(files) == [0, 2, 8, 10]
    assert sum("No space left" in sentence for sentence in ours(said)) == 1  # though two probes were lost
    assert any("2 times a probe could not be written" in sentence for sentence in ours(said))


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_record_that_does_not_fit_leaves_the_users_own_writer_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    real = recorder.append

    def first_ones_fit(path: Path, *events: Any) -> None:
        if any(event.step > 2 for event in events):
            _full()
        real(path, *events)

    monkeypatch.setattr("ntk_monitor.callbacks.event_files.append", first_ones_fit)
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(NTKWarning) as said:
        assert run(tmp_path, [monitor()], logger=logger, log_every_n_steps=1) == undisturbed
    assert "could not be written to the record in TensorBoardLogger: OSError: [Errno 28]" in ours(said)[0]
    assert steps(tmp_path) == [0, 2]
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert len(events.Scalars("train_loss")) == _STEPS


def _limited_file(root: Path, size: int) -> Callable[[], None]:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        found = run(root, [monitor()], logger=TensorBoardLogger(root))
        (root / "outcome.json").write_text(json.dumps(found))

    return work


@pytest.mark.filterwarnings("default::ntk_monitor.say.NTKWarning")
def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    assert in_child(_limited_file(tmp_path, 20_000)) == 0
    assert json.loads((tmp_path / "outcome.json").read_text()) == undisturbed
    (file,) = tmp_path.rglob("*tfevents*")
    whole = records(file)
    assert len(list(whole)) > 2
    assert not whole.stopped  # no half record
    found = steps(tmp_path)
    assert found[:2] == [0, 2]
    assert len(found) < 6  # the limit was met


@pytest.mark.parametrize("what", ["file", "directory"])
@pytest.mark.parametrize("where", ["recorder", "logger"])
def test_what_is_deleted_in_mid_run_is_begun_again(
    what: str, where: str, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    def deletes() -> None:
        (file,) = tmp_path.rglob("*tfevents*")
        if what == "file":
            file.unlink()
        else:
            shutil.rmtree(file.parent)

    own = where == "recorder"
    logger: Any = CSVLogger(tmp_path / "csv") if own else TensorBoardLogger(tmp_path)
    callback = monitor(log_dir=str(tmp_path / "here")) if own else monitor()
    assert run(tmp_path, [callback, AtStep(4, deletes)], logger=logger) == undisturbed
    assert steps(tmp_path) == [6, 8, 10]
    (file,) = tmp_path.rglob("*tfevents*")
    assert next(iter(records(file))).file_version == "brain.Event:2"


def test_a_killed_process_leaves_every_finished_probe(tmp_path: Path) -> None:
    def work() -> None:
        dies = AtStep(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(tmp_path, [monitor(), dies], logger=TensorBoardLogger(tmp_path))

    assert in_child(work) == -signal.SIGKILL
    assert steps(tmp_path) == [0, 2, 4, 6]


class Unreachable(CSVLogger):
    """A logger whose server stops answering when training starts; its owner's own calls are caught by its owner."""

    lost = False

    @property
    def experiment(self) -> Any:
        if self.lost:
            raise ConnectionError("no answer")
        return super().experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("ntk/") for name in metrics):
            raise ConnectionError("no answer")

    def save(self) -> None:
        return


class Loses(L.Callback):
    """Takes the server away."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for logger in trainer.loggers:
            logger.lost = True


@pytest.mark.parametrize("first", [True, False])
def test_a_logger_without_its_server_loses_only_its_own_copy(
    first: bool, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    loggers: list[Logger] = [Unreachable(tmp_path / "csv"), TensorBoardLogger(tmp_path)]
    with pytest.warns(NTKWarning) as said:
        found = run(tmp_path, [Loses(), monitor()], logger=loggers if first else loggers[::-1])
    assert found == undisturbed
    assert steps(tmp_path) == [0, 2, 4, 6, 8, 10]
    assert "written to Unreachable: ConnectionError: no answer" in ours(said)[0]
    assert len(ours(said)) == 2  # the first time, and how often at the end


@pytest.mark.slow
@pytest.mark.filterwarnings("default::ntk_monitor.say.NTKWarning")
def test_memory_that_runs_out_costs_the_probe_and_not_the_run(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """2560 x 2560 entries in float64 take 52 MB, and there are 40."""

    def work() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20,) * 2)
        large = monitor(probe=256, outputs="full", every_n_steps=5)
        data = loader(digits(1024))
        seeded()
        module = Classifier(mlp())
        fitted = trainer(tmp_path, [large], max_steps=_STEPS, max_epochs=-1, logger=TensorBoardLogger(tmp_path))
        fitted.fit(module, data)
        (tmp_path / "outcome.json").write_text(json.dumps(outcome(module, fitted)))

    seeded()
    module = Classifier(mlp())
    plain = trainer(tmp_path / "plain", [], max_steps=_STEPS, max_epochs=-1)
    plain.fit(module, loader(digits(1024)))
    assert in_child(work) == 0
    assert json.loads((tmp_path / "outcome.json").read_text()) == outcome(module, plain)
    found = ntk.load_history(tmp_path)
    assert {snapshot.status for snapshot in found} == {"skipped"}
    assert all("memory" in snapshot.reason or "Memory" in snapshot.reason for snapshot in found)
