"""Whatever goes wrong in the monitor, training goes on, or ends by its own error."""

import gc
import signal
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

import ntk_monitor as ntk
from ntk_monitor import kernel
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.outlook import Watch
from ntk_monitor.say import NTKWarning
from tests.modules import Classifier, digits, loader, mlp
from tests.training import outcome, seeded, trainer


def monitor(**options: Any) -> NTKMonitor:
    """Without what takes most of the time and has tests of its own."""
    return NTKMonitor(**{"reference": 0, "gram_every": 0, **options})


def run(root: Path, callbacks: list[Any], net: nn.Module | None = None, **options: Any) -> dict[str, str]:
    seeded()
    module = Classifier(net or mlp())
    fitted = trainer(root, callbacks, **{"max_steps": 12, "max_epochs": -1, **options})
    fitted.fit(module, loader(digits()))
    return outcome(module, fitted)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("plain"), [])


def test_reference_samples_that_cannot_be_drawn_cost_the_forecasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.callbacks.monitor.reference_samples", fail)
    callback = monitor(probe=6, every_n_steps=6, loss="cross_entropy", reference=16)
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
    assert run(tmp_path, [monitor(probe=6, every_n_steps=3)]) == undisturbed  # pytest runs under -W error
    assert "boom" in capsys.readouterr().err


def test_failed_probes_are_recorded_and_the_monitor_rests_after_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.monitor.measured", fail)
    with pytest.warns(NTKWarning, match=r"rests|skipped") as said:
        run(tmp_path, [monitor(probe=6, every_n_steps=1)], logger=TensorBoardLogger(tmp_path))
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
        run(tmp_path, [monitor(probe=6, every_n_steps=4)], logger=TensorBoardLogger(tmp_path))
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
        run(tmp_path, [monitor(probe=6, every_n_steps=3)], Diverges(), logger=TensorBoardLogger(tmp_path))
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
        [monitor(probe=6, every_n_steps=2)],
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
        [monitor(probe=6, every_n_steps=2)],
        max_steps=12,
        max_epochs=-1,
        logger=TensorBoardLogger(tmp_path),
    )
    with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
        fitted.fit(module, loader(digits()))
    assert fitted.global_step == 4
    assert all(m.training for m in module.modules())
    assert list(ntk.load_history(tmp_path / "lightning_logs" / "version_0").steps) == [0, 2]


def test_ctrl_c_while_a_measured_probe_is_looked_at_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"n": 0}
    real = Watch.look

    def interrupted(self: Watch, *arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Watch, "look", interrupted)
    seeded()
    callback = monitor(probe=6, every_n_steps=2, loss="cross_entropy")
    logger = TensorBoardLogger(tmp_path)
    fitted = trainer(tmp_path, [callback], max_steps=12, max_epochs=-1, logger=logger)
    with pytest.raises(SystemExit):
        fitted.fit(Classifier(mlp()), loader(digits()))
    found = ntk.load_history(tmp_path)
    assert list(found.steps) == [0, 2, 4]
    assert found[-1].eigenvalues.size == 60
    assert "stability" in found[-1].texts


def test_a_first_probe_that_fails_does_not_cost_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches that tell which loss it is come after it."""
    calls = {"n": 0}
    real = kernel.measured

    def sometimes(*arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 1:
            raise RuntimeError("boom")
        return real(*arguments, **options)

    monkeypatch.setattr("ntk_monitor.monitor.measured", sometimes)
    with pytest.warns(NTKWarning, match="probe at step 0 skipped"):
        run(tmp_path, [monitor(probe=6, every_n_steps=6)], logger=TensorBoardLogger(tmp_path))
    found = ntk.load_history(tmp_path)
    assert [(s.step, s.status) for s in found] == [(0, "skipped"), (6, "measured"), (12, "measured")]
    assert found[-1].loss_status == "matched"


def test_probes_that_cannot_be_finished_put_the_monitor_to_rest_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.monitor.Modes.of", fail)
    callback = monitor(probe=6, every_n_steps=1, loss="cross_entropy")
    with pytest.warns(NTKWarning, match=r"rests|skipped") as said:
        run(tmp_path, [callback], logger=TensorBoardLogger(tmp_path))
    assert [s.step for s in ntk.load_history(tmp_path)] == [0, 1, 2]
    assert sum("3 probes in a row failed, the last with RuntimeError: boom" in str(w.message) for w in said) == 1
    assert callback.monitor is None


@pytest.mark.parametrize("stage", ["monitor.measured", "monitor.Modes.of", "monitor.Monitor.observe"])
@pytest.mark.filterwarnings("default::ntk_monitor.say.NTKWarning")
def test_what_a_failed_probe_held_is_free_at_once(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames of an error hold the tensors of the probe, until nobody holds the error; no collector is needed."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def fail(*_: Any, **__: Any) -> Any:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise RuntimeError("boom")

    class Counts(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            alive.append(sum(found() is not None for found in held))

    monkeypatch.setattr(f"ntk_monitor.{stage}", fail)
    gc.disable()
    try:
        run(tmp_path, [monitor(probe=6, every_n_steps=1, loss="cross_entropy"), Counts()])
    finally:
        gc.enable()
    assert held
    assert not any(alive)


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
    with pytest.warns(NTKWarning) as said:
        assert run(tmp_path, [monitor(probe=6, every_n_steps=4)], logger=loggers) == undisturbed
    spoken = [str(warning.message) for warning in said if isinstance(warning.message, NTKWarning)]
    assert "could not be written to CSVLogger: OSError: no space left" in spoken[0]
    assert list(ntk.load_history(tmp_path / "lightning_logs" / "version_0").steps) == [0, 4, 8, 12]


def test_a_probe_that_changes_the_run_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel.measured

    def careless(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        torch.rand(1)
        with torch.no_grad():
            next(model.parameters()).add_(1e-9)
        return real(model, *arguments, **options)

    monkeypatch.setattr("ntk_monitor.monitor.measured", careless)
    callback = monitor(probe=6, every_n_steps=2)
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
        run(tmp_path, [monitor(probe=6, every_n_steps=6, forward=forward)])


def test_a_probe_on_another_device_is_moved_or_refused(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    meta = (torch.empty(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ntk.InputError, match="meta device"):
        NTKMonitor(probe=meta)


def test_nothing_trainable_is_one_sentence(tmp_path: Path) -> None:
    with pytest.warns(NTKWarning, match="no trainable parameter"):
        run(tmp_path, [monitor(probe=6, params="no such layer")])


def test_a_checkpoint_is_written_without_the_monitor_when_its_state_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.callbacks.monitor.probe_bytes", fail)
    callback = NTKMonitor(probe=6, every_n_steps=6)
    run(tmp_path, [callback])
    with pytest.warns(NTKWarning, match="nothing of the monitor: RuntimeError: boom"):
        assert callback.state_dict() == {}
