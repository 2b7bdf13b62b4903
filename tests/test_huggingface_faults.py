"""What is refused, what is not believed, and what goes wrong: a Hugging Face run trains on as if nothing had been."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitorCallback, huggingface, huggingface_run, huggingface_sink
from ntk_monitor.errors import InputError
from ntk_monitor.say import NTKWarning
from tests.huggingface_runs import STEPS, Sentences, gpt2, outcome, padded, trainer
from tests.training import seeded


def small() -> nn.Module:
    return gpt2(n_layer=1, n_embd=4, n_head=1)


def monitor(**options: Any) -> NTKMonitorCallback:
    return NTKMonitorCallback(**{"probe": 4, "every_n_steps": 2, "gram_every": 0, **options})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcome(small, tmp_path_factory.mktemp("plain"), [])


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken on purpose")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the Trainer": (huggingface, "trainer_of", broken),
    "the place to write": (huggingface_sink, "Recorder", full),
    "the draw": (huggingface, "drawn", broken),
    "the loss": (huggingface, "matched", broken),
    "the measurement": (ntk.Monitor, "measure", broken),
    "the rest of a probe": (ntk.Monitor, "finish", broken),
    "learning rates": (ntk.Monitor, "observe", broken),
    "the cadence": (ntk.Monitor, "tier", broken),
    "writing": (ntk.Recorder, "write", full),
    "flushing": (ntk.Recorder, "flush", full),
}


QUICK = {"the draw", "the loss", "the measurement", "writing"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_fault_changes_nothing(
    name: str, plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS[name])
    with pytest.warns(NTKWarning):
        assert outcome(small, tmp_path, [monitor()]) == plain


def test_interrupts_and_errors_of_the_user_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        outcome(small, tmp_path / "a", [monitor(every_n_steps=2), Stopped()])
    assert ntk.load_history(tmp_path / "a" / "ntk").steps.tolist() == [0, 2]

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ntk.Monitor, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outcome(small, tmp_path / "b", [monitor()])


class OwnLoss(transformers.Trainer):
    """Trains something else than what its model computes."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        options["return_outputs"] = False
        return 2 * super().compute_loss(*arguments, **options)


def test_a_loss_that_the_model_does_not_compute_is_not_believed(tmp_path: Path) -> None:
    callback = monitor(outputs="loss", every_n_steps=100)
    with pytest.warns(NTKWarning, match="not verified: OwnLoss computes the loss itself; pass loss="):
        outcome(small, tmp_path / "a", [callback], kind=OwnLoss)
    assert callback.monitor is None  # no loss, no kernel of losses
    trusting = monitor(loss="model", every_n_steps=100)
    outcome(small, tmp_path / "b", [trusting], kind=OwnLoss)
    assert trusting.last is not None
    assert (trusting.last.loss, trusting.last.kernel) == ("token_cross_entropy(mean, shifted)", "loss")


def test_other_ways_to_a_loss_of_ones_own() -> None:
    class Stub:
        compute_loss_func: Any = None
        compute_loss = transformers.Trainer.compute_loss

    stub = Stub()
    assert huggingface_run.own_loss(stub) == ""
    stub.compute_loss_func = broken
    assert "compute_loss_func" in huggingface_run.own_loss(stub)
    assert "could not be asked" in huggingface_run.own_loss(None)


@pytest.mark.slow
def test_positions_are_measured_without_a_loss(plain: dict[str, str], tmp_path: Path) -> None:
    callback = monitor(positions="last", probe=5)
    with pytest.warns(NTKWarning, match="nothing is trained at chosen positions alone"):
        assert outcome(small, tmp_path, [callback]) == plain
    assert callback.last is not None
    assert (callback.last.kernel, callback.last.outputs, callback.last.samples) == ("full", 24, 5)
    assert "sharpness" not in callback.last.metrics


@pytest.mark.parametrize("options", [{"fsdp": ["full_shard"]}, {"deepspeed": {"stage": 2}}])
def test_sharded_runs_are_refused_in_one_sentence(options: dict[str, Any]) -> None:
    (name,) = options
    assert {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[name] in huggingface_run.refusal(_Arguments(**options))
    assert huggingface_run.refusal(_Arguments()) == ""


class _Arguments:
    def __init__(self, fsdp: Any = None, deepspeed: Any = None) -> None:
        self.fsdp, self.deepspeed = fsdp or [], deepspeed


@pytest.mark.parametrize(
    "options", [{"positions": "first"}, {"positions": ()}, {"positions": (0.5,)}, {"probe": 0}, {"loss": "what"}]
)
def test_options_out_of_range_are_refused_at_the_door(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        NTKMonitorCallback(**options)


@pytest.mark.slow
def test_other_integrations_get_the_scalars(plain: dict[str, str], tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []

    class Server(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            heard.append(dict(logs))
            if "ntk/trace" in logs:
                raise ConnectionError("server lost")

    Server.__module__ = "transformers.integrations.server"
    with pytest.warns(NTKWarning, match="server lost"):
        assert outcome(small, tmp_path, [Server(), monitor()]) == plain
    assert sum("ntk/trace" in logs for logs in heard) == 3
    assert ntk.load_history(tmp_path / "ntk").steps.tolist() == [0, 2, STEPS]


class Stream(torch.utils.data.IterableDataset[Any]):
    """Texts without indices."""

    def __iter__(self) -> Any:
        data: Dataset[Any] = Sentences()
        return (data[i] for i in range(24))


@pytest.mark.slow
def test_streams_are_read_from_a_copy(tmp_path: Path) -> None:
    callback = monitor()
    seen = outcome(small, tmp_path / "a", [callback], Stream())
    assert seen == outcome(small, tmp_path / "b", [], Stream())
    assert callback.last is not None
    assert (callback.last.samples, callback.last.status) == (4, "measured")


@pytest.mark.slow
def test_a_probe_of_ones_own_and_the_best_weights_at_the_end(tmp_path: Path) -> None:
    items = padded([Sentences()[i] for i in range(3)])
    labels = items.pop("labels")
    callback = monitor(probe=(items, labels), every_n_steps=100)
    seeded()
    best: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": True, "eval_dataset": Sentences(4), "optim": "sgd", "max_grad_norm": 0.0}
    run = trainer(small(), tmp_path, [callback], **best, learning_rate=10.0)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")  # every later one is worse, at such a rate
    history = ntk.load_history(tmp_path / "ntk")
    assert history.steps.tolist() == [0, STEPS]
    first, last = (snapshot.loss_value for snapshot in history)
    assert last > 1.2 * first  # of the last weights, not of the best, which are loaded by now
