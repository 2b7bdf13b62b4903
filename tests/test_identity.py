"""What the matrix of identity (tests/test_matrix.py) leaves out: precisions, validation, engines, two monitors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader

from ntk_monitor.callbacks import NTKMonitor
from tests.modules import Classifier, Validated, cnn, digits, loader
from tests.training import outcome, seeded, trainer

STEPS = 12


def run(build: Callable[[], nn.Module], root: Path, callbacks: list[Any], **setting: Any) -> dict[str, str]:
    seeded()
    validate = setting.pop("validate", False)
    module = (Validated if validate else Classifier)(build(), optimizer=setting.pop("optimizer", "sgd"))
    fitted = trainer(root, callbacks, max_steps=STEPS, max_epochs=-1, **setting)
    fitted.fit(module, loader(digits()), DataLoader(digits(64), 32) if validate else None)
    assert fitted.global_step == STEPS
    return outcome(module, fitted)


def monitor(**options: Any) -> NTKMonitor:
    return NTKMonitor(**{"probe": 12, "every_n_steps": 4, "strict": True, **options})


SETTINGS: dict[str, dict[str, Any]] = {
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
