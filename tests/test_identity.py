"""The first promise: a run with the monitor ends, to the bit, where the run without it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ntk_monitor.callbacks import NTKMonitor
from tests.modules import NETWORKS, Classifier, Noisy, Validated, cnn, digits, loader
from tests.training import outcome, seeded, trainer

STEPS = 30


def run(build: Callable[[], nn.Module], root: Path, callbacks: list[Any], **setting: Any) -> dict[str, str]:
    seeded()
    validate = setting.pop("validate", False)
    module = (Validated if validate else Classifier)(build(), optimizer=setting.pop("optimizer", "sgd"))
    data = Noisy(digits()) if setting.pop("noisy", False) else digits()
    loading = loader(data, workers=setting.pop("workers", 0), own_generator=setting.pop("own_generator", False))
    fitted = trainer(root, callbacks, max_steps=STEPS, max_epochs=-1, **setting)
    fitted.fit(module, loading, DataLoader(digits(64), 32) if validate else None)
    assert fitted.global_step == STEPS
    return outcome(module, fitted)


def monitor(**options: Any) -> NTKMonitor:
    return NTKMonitor(**{"probe": 12, "every_n_steps": 4, "strict": True, **options})


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_ends_where_it_would(name: str, tmp_path: Path) -> None:
    watched = monitor()
    assert run(NETWORKS[name], tmp_path / "b", [watched]) == run(NETWORKS[name], tmp_path / "a", [])
    assert watched.last is not None
    assert watched.last.status == "measured"
    assert watched.last.step == STEPS


SETTINGS: dict[str, dict[str, Any]] = {
    "noisy data, 2 workers": {"noisy": True, "workers": 2},
    "noisy data, no workers": {"noisy": True},
    "loader with its own generator": {"own_generator": True},
    "accumulate 4": {"accumulate_grad_batches": 4},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "validation and clipping": {
        "validate": True,
        "val_check_interval": 4,
        "gradient_clip_val": 0.5,
        "num_sanity_val_steps": 2,
    },
    "adamw": {"optimizer": "adamw"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_ends_where_it_would(name: str, tmp_path: Path) -> None:
    watched = monitor()
    assert run(cnn, tmp_path / "b", [watched], **SETTINGS[name]) == run(cnn, tmp_path / "a", [], **SETTINGS[name])
    assert watched.last is not None
    assert watched.last.status == "measured"


def test_rows_engine_and_loss_kernel_are_harmless_too(tmp_path: Path) -> None:
    plain = run(cnn, tmp_path / "a", [])
    assert run(cnn, tmp_path / "b", [monitor(engine="rows", probe=6)]) == plain
    assert run(cnn, tmp_path / "c", [monitor(outputs="loss", loss="cross_entropy")]) == plain


def test_two_monitors_and_a_budget_are_harmless_too(tmp_path: Path) -> None:
    two = [NTKMonitor(probe=8, max_overhead=0.5), monitor(log_prefix="second", outputs="trace")]
    assert run(cnn, tmp_path / "b", two) == run(cnn, tmp_path / "a", [])


class Careless(L.Callback):
    """What a monitor written in an afternoon does. Each of these is known to change a run."""

    def __init__(self, deed: str) -> None:
        self.deed = deed

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            return
        if self.deed == "forward in train mode":
            pl_module(batch[0])
        elif self.deed == "eval and forget":
            pl_module.eval()
        elif self.deed == "draw a random number":
            torch.randn(3)
        elif self.deed == "iterate the training loader":
            next(iter(trainer.train_dataloader))


@pytest.mark.parametrize(
    "deed", ["forward in train mode", "eval and forget", "draw a random number", "iterate the training loader"]
)
def test_this_harness_can_fail(deed: str, tmp_path: Path) -> None:
    assert run(cnn, tmp_path / "b", [Careless(deed)]) != run(cnn, tmp_path / "a", [])
