"""Callbacks that average weights: which weights are measured, wherever the monitor stands in the list."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.say import NTKWarning
from tests.fitting import fit, history, tensorboard, validation
from tests.modules import Classifier, Validated, cnn, mlp
from tests.training import outcome


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def monitor() -> NTKMonitor:
    return NTKMonitor(probe=8, every_n_steps=6, reference=0, verify=False, gram_every=0)


def ema() -> L.Callback:
    return EMAWeightAveraging(decay=0.5)


class Stops(L.Callback):
    """Ends the run after its second epoch: what nobody could know beforehand."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize("first", [slow(True), False])
def test_the_weights_being_trained_are_measured_beside_an_average(first: bool, tmp_path: Path) -> None:
    both: list[Any] = [monitor(), ema()] if first else [ema(), monitor()]
    for root, callbacks in ((tmp_path / "a", [monitor()]), (tmp_path / "b", both)):
        # Validation in between swaps the average in and out.
        fit(root, callbacks, lambda: Validated(mlp()), logger=tensorboard(root), max_epochs=2, valid=validation())
    alone, beside = history(tmp_path / "a"), history(tmp_path / "b")
    assert list(beside.steps) == [0, 6, 12, 18, 20]
    assert [s.metrics["trace"] for s in beside] == [s.metrics["trace"] for s in alone]
    assert "not the average that EMAWeightAveraging keeps" in beside[0].texts["weights"]
    assert "weights" not in alone[0].texts


def test_an_average_put_in_place_before_a_sudden_end_is_not_measured(tmp_path: Path) -> None:
    with pytest.warns(NTKWarning, match="list NTKMonitor before it"):
        fit(tmp_path, [ema(), monitor(), Stops()], logger=tensorboard(tmp_path), max_epochs=9)
    last = history(tmp_path)[-1]
    assert (last.step, last.status) == (20, "skipped")
    assert "EMAWeightAveraging has replaced the trained weights" in last.reason


@pytest.mark.slow
def test_a_monitor_listed_first_measures_the_last_weights_of_a_sudden_end(tmp_path: Path) -> None:
    fit(tmp_path / "b", [monitor(), ema(), Stops()], logger=tensorboard(tmp_path / "b"), max_epochs=9)
    fit(tmp_path / "a", [monitor()], logger=tensorboard(tmp_path / "a"), max_epochs=2)
    found = history(tmp_path / "b")
    assert (found[-1].step, found[-1].status) == (20, "measured")
    assert found[-1].metrics["trace"] == history(tmp_path / "a")[-1].metrics["trace"]


@pytest.mark.parametrize(("build", "first"), [(cnn, False), slow(mlp, False), slow(cnn, True)])
def test_stochastic_averaging_and_its_last_pass_are_left_alone(build: Any, first: bool, tmp_path: Path) -> None:
    def run(root: Path, watched: list[Any]) -> dict[str, str]:
        swa = StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1)
        callbacks = [*watched, swa] if first else [swa, *watched]
        logger = tensorboard(root) if watched else False
        done = fit(root, callbacks, lambda: Classifier(build()), logger=logger, max_epochs=3)
        return outcome(done.lightning_module, done)

    assert run(tmp_path / "b", [monitor()]) == run(tmp_path / "a", [])
    found = history(tmp_path / "b")
    # Three epochs train; with BatchNorm a fourth one renews its statistics, under a step number of its own.
    assert list(found.steps) == [0, 6, 12, 18, 24, 30]
    assert all(s.status == "measured" for s in found)
    assert found[1].facts["total_steps"] == 30
    assert "StochasticWeightAveraging" in found[0].texts["weights"]


def test_the_last_probe_of_a_planned_end_comes_before_epoch_end(tmp_path: Path) -> None:
    """So that checkpoints and early stopping of the last epoch see it."""
    seen: list[float] = []

    class Sees(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["ntk/trace"]))

    watched = NTKMonitor(probe=8, every_n_steps=100, reference=0)
    fit(tmp_path, [watched, Sees()], max_epochs=1)
    assert watched.last is not None
    assert watched.last.step == 10
    assert seen == [pytest.approx(watched.last.metrics["trace"])]
