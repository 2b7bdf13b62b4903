"""What else a Trainer can do around a monitor: other loops, tuners, odd steps, limits, unfreezing, checkpointing."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ntk_monitor.callbacks import NTKMonitor
from tests.fitting import fit, history, tensorboard, validation
from tests.modules import Classifier, Validated, cnn, digits, loader, mlp
from tests.training import outcome, seeded, trainer


def monitor(**options: Any) -> NTKMonitor:
    fixed: dict[str, Any] = {"probe": 8, "every_n_steps": 4, "reference": 0, "verify": False, "gram_every": 0}
    return NTKMonitor(**{**fixed, **options})


class Everything(Validated):
    """All loops of a Trainer."""

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        made: Tensor = self(batch[0])
        return made


def test_loops_that_do_not_train_are_left_alone(tmp_path: Path) -> None:
    def after(callbacks: list[Any]) -> tuple[dict[str, str], Any]:
        seeded()
        module, run = Everything(cnn()), trainer(tmp_path, callbacks)
        run.validate(module, validation(), verbose=False)
        run.test(module, validation(), verbose=False)
        made = run.predict(module, validation())
        return outcome(module, run), made

    watched = monitor()
    (plain, first), (seen, second) = after([]), after([watched])
    assert seen == plain
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert watched.last is None
    assert watched.monitor is None


def test_tuners_search_without_the_monitor_and_the_fit_has_it(tmp_path: Path) -> None:
    def tuned(root: Path, callbacks: list[Any]) -> tuple[Any, dict[str, str]]:
        seeded()
        module = Classifier(mlp())
        run = trainer(root, callbacks, max_epochs=1, logger=tensorboard(root) if callbacks else False)
        finder = Tuner(run).lr_find(module, loader(digits()), num_training=20, attr_name="lr")
        assert finder is not None
        if callbacks:
            assert callbacks[0].last is None
        run.fit(module, loader(digits()))
        return finder.results["loss"], outcome(module, run)

    watched = monitor()
    assert tuned(tmp_path / "b", [watched]) == tuned(tmp_path / "a", [])
    assert list(history(tmp_path / "b").steps) == [0, 4, 8, 10]


@pytest.mark.slow
def test_batch_sizes_are_tuned_without_the_monitor(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        batch_size = 8

        def train_dataloader(self) -> Any:
            return loader(digits(96), batch=self.batch_size)

    seeded()
    watched, data = monitor(), Data()
    run = trainer(tmp_path, [watched], max_epochs=1)
    tuner = Tuner(run)
    tuner.scale_batch_size(Classifier(mlp()), datamodule=data, init_val=16, max_trials=2, steps_per_trial=2)
    assert data.batch_size == 32
    assert watched.last is None
    run.fit(Classifier(mlp()), datamodule=data)
    assert watched.last is not None
    assert watched.last.step == 3
    assert watched.last.facts["batch_size"] == 32


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_that_leave_a_batch_out_cost_neither_loss_nor_run(tmp_path: Path) -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)

    plain = fit(tmp_path / "a", [], lambda: Skips(mlp()))
    seen = fit(tmp_path / "b", monitor(), lambda: Skips(mlp()), logger=tensorboard(tmp_path / "b"))
    assert outcome(seen.lightning_module, seen) == outcome(plain.lightning_module, plain)
    found = history(tmp_path / "b")
    assert list(found.steps) == [0, 4, 8, 12]  # Lightning counts a step left out, too
    assert {s.loss_status for s in found} == {"matched"}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_never_returns_a_loss_is_not_waited_for(tmp_path: Path) -> None:
    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    watched = monitor()
    fit(tmp_path, watched, lambda: Silent(mlp()))
    assert watched.last is not None
    assert "training_step returned no loss" in watched.last.loss_status


def test_losses_in_a_dict_are_matched_under_accumulation(tmp_path: Path) -> None:
    class Dicts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = self(batch[0])
            return {"loss": F.cross_entropy(outputs, batch[1]), "outputs": outputs.detach()}

    watched = monitor()
    fit(tmp_path, watched, lambda: Dicts(mlp()), accumulate_grad_batches=2)
    assert watched.last is not None
    assert watched.last.loss_status == "matched"
    assert watched.last.facts["train_loss"] == pytest.approx(watched.last.loss_value, rel=0.5)


LIMITS: dict[str, tuple[dict[str, Any], int | None, float | None]] = {
    "half of the batches": ({"max_epochs": 2, "limit_train_batches": 0.5}, 10, 10.0),
    "five batches": ({"max_epochs": 2, "limit_train_batches": 5}, 10, 10.0),
    "epochs with leftovers": ({"max_epochs": 2, "accumulate_grad_batches": 4}, 6, 6.0),
    "steps before epochs": ({"max_epochs": 5, "max_steps": 7}, 7, 7.0),
    "validation now and then": (
        {"max_epochs": 2, "check_val_every_n_epoch": 2, "limit_val_batches": 1, "valid": validation()},
        20,
        20.0,
    ),
    "no time left": ({"max_epochs": -1, "max_time": timedelta(milliseconds=50)}, None, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_last_step_is_probed_whatever_ends_the_run(name: str, tmp_path: Path) -> None:
    options, last, planned = LIMITS[name]
    watched = monitor(every_n_steps=100, loss="cross_entropy")
    run = fit(tmp_path, watched, lambda: (Validated if "valid" in options else Classifier)(mlp()), **options)
    assert run.global_step == (last or run.global_step) > 0
    assert watched.last is not None
    assert (watched.last.step, watched.last.status) == (run.global_step, "measured")
    assert watched.last.facts.get("total_steps") == planned


class Backbone(Classifier):
    """A backbone that starts frozen, and a head."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x))
        return y

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_backbone_that_is_unfrozen_joins_kernel_and_rates(tmp_path: Path) -> None:
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False)
    ends = []
    for root, watched in ((tmp_path / "a", []), (tmp_path / "b", [monitor(loss="cross_entropy")])):
        run = fit(root, [*watched, tuning], Backbone, logger=tensorboard(root), max_epochs=2)
        ends.append(outcome(run.lightning_module, run))
    assert ends[0] == ends[1]
    found = history(tmp_path / "b")
    assert list(found.steps) == [0, 4, 8, 12, 16, 20]
    # 170 parameters of the head, 1040 more from the second epoch on.
    assert [s.parameters for s in found] == [170, 170, 170, 1210, 1210, 1210]
    assert found[0].facts["frozen"] == 1040
    assert found[-1].facts["frozen"] == 0
    assert found[-1].layers == ("backbone.1", "head")
    joined = found[3].lr_values
    assert np.isnan(joined[0, 1])
    assert list(joined[-1]) == pytest.approx([0.1, 0.01])


def test_activation_checkpointing_changes_nothing_in_the_record(tmp_path: Path) -> None:
    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.net[:3], x, use_reentrant=False)  # type: ignore[index]
            y: Tensor = self.net[3](hidden)  # type: ignore[index]
            return y

    for root, kind in ((tmp_path / "a", Classifier), (tmp_path / "b", Checkpointed)):
        fit(root, monitor(verify=True), partial(lambda kind: kind(mlp()), kind), logger=tensorboard(root))
    plain, saved = history(tmp_path / "a"), history(tmp_path / "b")
    assert [s.status for s in saved] == ["measured"] * 4
    for one, other in zip(plain, saved, strict=True):
        assert np.allclose(one.eigenvalues, other.eigenvalues, rtol=1e-5, atol=1e-7 * one.eigenvalues[0])
