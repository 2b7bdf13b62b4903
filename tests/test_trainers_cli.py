"""A LightningCLI run from one YAML file: module, data, trainer and monitor, with options of every type."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ntk_monitor as ntk
from tests.modules import Classifier, digits, loader, mlp


class Digits(L.LightningDataModule):
    """The digits, in batches of `batch`."""

    def __init__(self, batch: int = 32) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(digits(), batch=self.batch)


class Configured(Classifier):
    """A small classifier of the digits."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(mlp(), lr=lr)


def outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits, as an option that YAML names by its path."""
    found: Tensor = module(inputs)
    return found


CONFIG = """
seed_everything: 3
model: {{lr: 0.1}}
data: {{batch: 16}}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {root}
  callbacks:
    - class_path: ntk_monitor.callbacks.NTKMonitor
      init_args:
        probe: 12
        every_n_steps: 7
        max_overhead: 0.1
        outputs: full
        loss: cross_entropy
        forward: tests.test_trainers_cli.outputs
        params: [net.3.weight, net.3.bias]
        reference: 0
        forecast_every: 2
        optimizer: {optimizer}
        gram_every: 3
        verify: true
        log_prefix: mine
        engine: rows
        memory_limit: 100000000
        device: cpu
        seed: 5
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about what Lightning asks of it
@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("0", marks=pytest.mark.slow)])
def test_a_run_from_yaml(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, optimizer=optimizer))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", f"--config={config}"])
    cli = LightningCLI(Configured, Digits)
    monitor = next(c for c in cli.trainer.callbacks if type(c).__name__ == "NTKMonitor")  # type: ignore[attr-defined]
    assert monitor.recipe.optimizer == (0 if optimizer == "0" else "SGD")
    run = tmp_path / "lightning_logs" / "version_0"
    found = ntk.load_history(run, prefix="mine")
    assert list(found.steps) == [0, 7, 14, 20]
    assert {(s.samples, s.parameters, s.engine) for s in found} == {(12, 170, "rows")}
    assert found[0].texts["optimizer"] == "SGD"
    assert "forward: tests.test_trainers_cli.outputs" in (run / "config.yaml").read_text()
