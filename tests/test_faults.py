"""Whatever goes wrong in the monitor, training goes on, or ends by its own error."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

import ntk_monitor as ntk
from ntk_monitor import kernel
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.say import NTKWarning
from tests.modules import Classifier, digits, loader, mlp
from tests.training import outcome, seeded, trainer


def run(root: Path, callbacks: list[Any], net: nn.Module | None = None, **options: Any) -> dict[str, str]:
    seeded()
    module = Classifier(net or mlp())
    fitted = trainer(root, callbacks, **{"max_steps": 12, "max_epochs": -1, **options})
    fitted.fit(module, loader(digits()))
    return outcome(module, fitted)


# Every stage of a probe, as the name of what fails there.
STAGES = [
    "ntk_monitor.callbacks.monitor.Sink",
    "ntk_monitor.callbacks.monitor.drawn",
    "ntk_monitor.callbacks.monitor.reference_samples",
    "ntk_monitor.callbacks.monitor.Monitor",
    "ntk_monitor.callbacks.monitor.candidates",
    "ntk_monitor.callbacks.monitor.training_outputs",
    "ntk_monitor.callbacks.monitor.returned_loss",
    "ntk_monitor.session.Fingerprint.of",
    "ntk_monitor.monitor.Monitor.measure",
    "ntk_monitor.monitor.Network",
    "ntk_monitor.monitor.measured",
    "ntk_monitor.monitor.Spectrum.of",
    "ntk_monitor.monitor.Modes.of",
    "ntk_monitor.outlook.Watch.look",
    "ntk_monitor.monitor.Monitor.finish",
    "ntk_monitor.monitor.Monitor.observe",
    "ntk_monitor.callbacks.sink.event",
    "ntk_monitor.callbacks.sink.board.pictures",
    "ntk_monitor.callbacks.sink.Sink.write",
    "ntk_monitor.callbacks.sink.Sink.flush",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("plain"), [])


@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError("boom"), np.linalg.LinAlgError("boom")], ids=repr)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("default::ntk_monitor.say.NTKWarning")
def test_a_fault_in_any_stage_costs_at_most_the_probe(
    stage: str, fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise fault

    monkeypatch.setattr(stage, fail)
    found = run(tmp_path, [NTKMonitor(probe=6, every_n_steps=3)], logger=TensorBoardLogger(tmp_path))
    assert found == undisturbed


def test_reference_samples_that_cannot_be_drawn_cost_the_forecasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.callbacks.monitor.reference_samples", fail)
    callback = NTKMonitor(probe=6, every_n_steps=6, loss="cross_entropy")
    with pytest.warns(NTKWarning, match="there will be no forecasts, as .*RuntimeError: boom"):
        run(tmp_path, [callback])
    assert callback.last is not None
    assert callback.last.texts["forecast"].startswith("none:")
    assert callback.last.layer_update.size


def test_warnings_as_errors_do_not_turn_our_sentence_into_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undisturbed: dict[str, str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.monitor.measured", fail)
    assert run(tmp_path, [NTKMonitor(probe=6, every_n_steps=3)]) == undisturbed  # pytest runs under -W error
    assert "boom" in capsys.readouterr().err


def test_failed_probes_are_recorded_and_the_monitor_rests_after_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.monitor.measured", fail)
    with pytest.warns(NTKWarning, match=r"rests|skipped") as said:
        run(tmp_path, [NTKMonitor(probe=6, every_n_steps=1)], logger=TensorBoardLogger(tmp_path))
    skips = ntk.load_history(tmp_path / "lightning_logs" / "version_0").snapshots
    assert [(s.step, s.status) for s in skips] == [(0, "skipped"), (1, "skipped"), (2, "skipped")]
    assert all("boom" in s.reason for s in skips)
    assert sum("rests for the remainder" in str(w.message) for w in said) == 1


def test_one_failure_does_not_end_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"n": 0}
    real = kernel.measured

    def sometimes(*arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 2:
            raise RuntimeError("boom")
        return real(*arguments, **options)

    monkeypatch.setattr("ntk_monitor.monitor.measured", sometimes)
    with pytest.warns(NTKWarning, match="probe at step 4 skipped: RuntimeError: boom"):
        run(tmp_path, [NTKMonitor(probe=6, every_n_steps=4)], logger=TensorBoardLogger(tmp_path))
    found = ntk.load_history(tmp_path / "lightning_logs" / "version_0").snapshots
    assert [s.status for s in found] == ["measured", "skipped", "measured", "measured"]


class Diverges(nn.Module):
    """Weights turn NaN at the fifth training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.calls += 1
        y: Tensor = self.body(x)
        return y * float("nan") if self.calls == 5 else y


def test_nan_weights_are_a_skip_with_the_reason(tmp_path: Path) -> None:
    with pytest.warns(NTKWarning, match="NaN or infinite"):
        run(tmp_path, [NTKMonitor(probe=6, every_n_steps=3)], Diverges(), logger=TensorBoardLogger(tmp_path))
    found = ntk.load_history(tmp_path / "lightning_logs" / "version_0").snapshots
    assert [(s.step, s.status) for s in found] == [
        (0, "measured"),
        (3, "measured"),
        (6, "skipped"),
        (9, "skipped"),
        (12, "skipped"),
    ]


class OwnError(Exception):
    """The user's own error."""


class RaisesLater(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 7:
            raise OwnError("theirs")
        return super().training_step(batch, batch_idx)


def test_the_users_own_error_passes_and_history_is_kept(tmp_path: Path) -> None:
    seeded()
    fitted = trainer(
        tmp_path,
        [NTKMonitor(probe=6, every_n_steps=2)],
        max_steps=12,
        max_epochs=-1,
        logger=TensorBoardLogger(tmp_path),
    )
    with pytest.raises(OwnError, match="theirs"):
        fitted.fit(RaisesLater(mlp()), loader(digits()))
    assert list(ntk.load_history(tmp_path / "lightning_logs" / "version_0").steps) == [0, 2, 4, 6]


def test_ctrl_c_in_the_middle_of_a_probe_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"n": 0}
    real = kernel.measured

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr("ntk_monitor.monitor.measured", interrupted)
    seeded()
    module = Classifier(mlp())
    fitted = trainer(
        tmp_path,
        [NTKMonitor(probe=6, every_n_steps=2)],
        max_steps=12,
        max_epochs=-1,
        logger=TensorBoardLogger(tmp_path),
    )
    with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
        fitted.fit(module, loader(digits()))
    assert fitted.global_step == 4
    assert all(m.training for m in module.modules())
    assert list(ntk.load_history(tmp_path / "lightning_logs" / "version_0").steps) == [0, 2]


def test_a_logger_that_raises_loses_only_its_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    real = CSVLogger.log_metrics

    def fail(self: CSVLogger, metrics: dict[str, Tensor | float], step: int | None = None) -> None:
        if any(name.startswith("ntk/") for name in metrics):
            raise OSError("no space left on device")
        real(self, metrics, step)

    monkeypatch.setattr(CSVLogger, "log_metrics", fail)
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path)]
    with pytest.warns(NTKWarning, match="could not be written: OSError"):
        assert run(tmp_path, [NTKMonitor(probe=6, every_n_steps=4)], logger=loggers) == undisturbed
    assert list(ntk.load_history(tmp_path / "lightning_logs" / "version_0").steps) == [0, 4, 8, 12]


def test_a_probe_that_changes_the_run_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel.measured

    def careless(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        torch.rand(1)
        with torch.no_grad():
            next(model.parameters()).add_(1e-9)
        return real(model, *arguments, **options)

    monkeypatch.setattr("ntk_monitor.monitor.measured", careless)
    callback = NTKMonitor(probe=6, every_n_steps=2)
    with pytest.warns(NTKWarning, match=r"would change this run.*net\.1\.weight"):
        run(tmp_path, [callback])
    assert callback.monitor is None


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda module, x: [module(x), module(x)], "several floating tensors"),
        (lambda module, x: "text", "no floating tensor"),
        (lambda module, x: module(x).argmax(1), "real and floating"),
        (lambda module, x: module(x).sum(), "one row per sample"),
    ],
)
def test_outputs_that_cannot_be_measured_are_named(forward: Any, words: str, tmp_path: Path) -> None:
    with pytest.warns(NTKWarning, match=words):
        run(tmp_path, [NTKMonitor(probe=6, every_n_steps=6, forward=forward)])


def test_a_probe_on_another_device_is_moved_or_refused(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    meta = (torch.empty(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ntk.InputError, match="meta device"):
        NTKMonitor(probe=meta)


def test_nothing_trainable_is_one_sentence(tmp_path: Path) -> None:
    with pytest.warns(NTKWarning, match="no trainable parameter"):
        run(tmp_path, [NTKMonitor(probe=6, params="no such layer")])
