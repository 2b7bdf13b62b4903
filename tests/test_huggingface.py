"""A Hugging Face Trainer ends bit for bit where it would without the monitor, and what it measured is on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitorCallback
from tests.huggingface_runs import STEPS, Labelled, Sentences, bert, flat, gpt2, llama, lora, outcome, t5, vit


def monitor(**options: Any) -> NTKMonitorCallback:
    return NTKMonitorCallback(**{"probe": 8, "every_n_steps": 3, "strict": True, **options})


@dataclass
class Watched:
    plain: dict[str, str]
    seen: dict[str, str]
    monitor: NTKMonitorCallback
    folder: Path


# Evaluation and checkpoints in between, accumulation, clipping, a schedule by step, texts of many lengths, dropout.
BUSY: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset": Sentences(5),
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": ["tensorboard"],
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    root = tmp_path_factory.mktemp("runs")
    plain = outcome(gpt2, root / "plain", [], **BUSY)
    callback = monitor()
    return Watched(plain, outcome(gpt2, root / "seen", [callback], **BUSY), callback, root / "seen")


def test_a_language_model_ends_where_it_would(watched: Watched) -> None:
    assert watched.seen == watched.plain


def test_its_loss_is_the_one_the_model_computes_and_its_kernel_that_of_sequences(watched: Watched) -> None:
    last = watched.monitor.last
    assert last is not None
    assert (last.status, last.step, last.kernel, last.samples) == ("measured", STEPS, "loss", 8)
    assert (last.loss, last.loss_status) == ("token_cross_entropy(mean, shifted)", "matched")
    assert last.probe_source.startswith("8 of 24 training samples")
    assert {"trace", "effective_rank", "kernel_change"} <= set(last.metrics)
    assert last.layer_update.sum() == pytest.approx(1, rel=1e-6)  # which layers moved the logits
    assert last.texts["stability"] == "the learning rate is 0 at this step"  # of a cosine, at its end
    assert last.facts["batch_size"] == 8
    assert last.facts["total_steps"] == STEPS
    assert last.facts["train_loss"] > 0


def test_the_record_is_in_the_trainers_own_log(watched: Watched) -> None:
    (folder,) = (watched.folder / "runs").iterdir()
    history = ntk.load_history(folder)
    assert history.steps.tolist() == [0, 3, 4]
    assert not (watched.folder / "ntk").exists()
    rates = torch.tensor([0.1 * (1 + torch.cos(torch.tensor(torch.pi * s / STEPS))) / 2 for s in range(STEPS)])
    snapshots = list(history)
    assert {"sharpness", "lr_headroom_low", "lr_headroom_high"} <= set(snapshots[1].metrics)
    noted = {int(s): v[0] for shot in snapshots for s, v in zip(shot.lr_steps, shot.lr_values, strict=True)}
    assert [noted[s] for s in range(STEPS)] == pytest.approx(rates.tolist(), rel=1e-5)


def test_a_resumed_run_goes_on_with_the_same_probe_and_history(watched: Watched, tmp_path: Path) -> None:
    callback = monitor(every_n_steps=4)
    checkpoint = watched.folder / "checkpoint-2"
    again = outcome(gpt2, watched.folder, [callback], resume=str(checkpoint), **BUSY)
    assert again["weights"] == watched.plain["weights"]
    assert callback.monitor is not None
    assert watched.monitor.monitor is not None
    assert callback.monitor.probe.hash == watched.monitor.monitor.probe.hash
    # Not measured at step 2, where it was resumed: the last probe was at step 0.
    assert callback.monitor.probes == 2
    assert callback.last is not None
    assert callback.last.step == STEPS


@pytest.mark.slow
def test_adapters_checkpointing_and_bf16_end_where_they_would(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpointing": "not reentrant", "bf16": True}
    callback = monitor(every_n_steps=100)
    seen = outcome(lora, tmp_path / "seen", [callback], **options)
    assert seen == outcome(lora, tmp_path / "plain", [], **options)
    assert callback.last is not None
    assert (callback.last.status, callback.last.loss_status) == ("measured", "matched")
    assert callback.last.precision.startswith("float32")


BUILDS = {"gpt2": gpt2, "llama": llama, "lora": lora, "t5": t5, "bert": bert, "vit": vit}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "checkpointing": {"checkpointing": "not reentrant"},
    "reentrant checkpointing": {"checkpointing": "reentrant"},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "workers": {"dataloader_num_workers": 2},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "packed": {"collate": flat},
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", BUILDS)
def test_every_run_ends_where_it_would(name: str, setting: str, tmp_path: Path) -> None:
    text, options = name not in ("bert", "vit"), dict(SETTINGS[setting])
    if setting == "packed" and name != "llama":
        pytest.skip("packing is for decoders that read position_ids")
    if (name, setting) == ("t5", "label smoothing"):
        pytest.skip("the Trainer then wants decoder inputs from the collator, and fails without them")
    data = Sentences() if text else Labelled(pictures=name == "vit")
    if "eval_strategy" in options:
        options["eval_dataset"] = data
    if not text:
        options["collate"] = None
    callback = monitor()
    seen = outcome(BUILDS[name], tmp_path / "seen", [callback], data, **options)
    assert seen == outcome(BUILDS[name], tmp_path / "plain", [], data, **options)
    assert callback.last is not None
    assert (callback.last.status, callback.last.step) == ("measured", STEPS)
    assert callback.last.loss_status == "matched"
    assert callback.last.kernel == ("loss" if text else "full")


class Careless(transformers.TrainerCallback):
    """Draws a random number, as a monitor written in an afternoon does."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.randn(3)


def test_this_harness_can_fail(tmp_path: Path) -> None:
    plain, changed = outcome(gpt2, tmp_path / "a", []), outcome(gpt2, tmp_path / "b", [Careless()])
    assert {name for name in plain if plain[name] != changed[name]} >= {"weights", "losses", "torch"}
