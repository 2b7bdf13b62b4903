"""Which loss drives the modes: found by matching, given, or said to be unknown."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from tests.fitting import fit, history, tensorboard
from tests.modules import Classifier, cnn, loader, mlp


def test_loss_is_matched_under_accumulation_dropout_and_batchnorm(tmp_path: Path) -> None:
    callback = NTKMonitor(probe=8, every_n_steps=50)
    fit(tmp_path, callback, Classifier(cnn()), logger=tensorboard(tmp_path), accumulate_grad_batches=2)
    assert {s.loss_status for s in history(tmp_path)} == {"matched"}


def test_regression_matches_mse_and_counts_are_no_classes(tmp_path: Path) -> None:
    class Regressor(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]).squeeze(1), batch[1])

    data = TensorDataset(torch.randn(96, 5), torch.arange(96).float())
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    fit(tmp_path, NTKMonitor(every_n_steps=4), Regressor(net), data=loader(data), logger=tensorboard(tmp_path))
    last = history(tmp_path)[-1]
    assert (last.loss, last.loss_status, last.labels.size) == ("mse(mean)", "matched", 0)
    assert last.samples == 96  # the default of 512 takes the whole set


def test_unknown_loss_is_labelled_and_only_modes_stay_off(tmp_path: Path) -> None:
    class Odd(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) ** 1.5 + 0.3

    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), Odd(mlp()), logger=tensorboard(tmp_path))
    for snapshot in history(tmp_path):
        assert snapshot.loss_status.startswith("not verified")
        assert "pass loss=" in snapshot.modes_reason
        assert snapshot.rates.size == 0
        assert snapshot.rank > 0


def test_a_given_loss_is_used_as_given(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(probe=8, loss=nn.CrossEntropyLoss(label_smoothing=0.1)), logger=tensorboard(tmp_path))
    last = history(tmp_path)[-1]
    assert (last.loss, last.loss_status) == ("cross_entropy(mean, label_smoothing=0.1)", "given")
    assert last.rates.size == 80


def test_many_outputs_use_the_kernel_of_the_losses(tmp_path: Path) -> None:
    callback = NTKMonitor(probe=256, every_n_steps=6, loss="cross_entropy")
    fit(tmp_path, callback, logger=tensorboard(tmp_path))
    last = history(tmp_path)[-1]
    assert last.kernel == "loss"
    assert last.eigenvalues.size == 256
    assert "full kernel" in last.modes_reason


def test_many_classes_are_still_classes_for_cross_entropy() -> None:
    x, y = torch.randn(24, 5), torch.arange(24) % 16
    snapshot = ntk.Monitor(nn.Linear(5, 40), None, (x, y), "cross_entropy", outputs="full").snapshot(0)
    assert snapshot.labels.size == 24
    assert "alignment" in snapshot.metrics
    counts = ntk.Monitor(nn.Linear(5, 40), None, (x, y)).snapshot(0)
    assert counts.labels.size == 0
    assert "alignment" not in counts.metrics


def test_the_kernel_of_weighted_losses_carries_the_weights() -> None:
    model, x, y = nn.Linear(5, 3).double(), torch.randn(6, 5).double(), torch.arange(6) % 3
    weight = torch.tensor([1.0, 10.0, 0.1]).double()
    plain = ntk.empirical_ntk(model, x, outputs="loss", targets=y, loss=nn.CrossEntropyLoss())
    weighted = ntk.empirical_ntk(model, x, outputs="loss", targets=y, loss=nn.CrossEntropyLoss(weight))
    assert torch.allclose(weighted, plain * weight[y] * weight[y][:, None])


def test_the_same_loss_attached_twice_is_one_candidate(tmp_path: Path) -> None:
    module = Classifier(mlp())
    module.train_loss, module.valid_loss = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    callback = NTKMonitor(probe=8, every_n_steps=4)
    fit(tmp_path, callback, module)
    assert callback.last is not None
    assert callback.last.loss_status == "matched"


def test_probes_that_wait_for_the_loss_have_no_look_at_weights_of_later_steps(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=1), logger=tensorboard(tmp_path), max_steps=6)
    found = history(tmp_path)
    assert list(found.steps) == [0, 1, 2, 3, 4, 5, 6]
    waited = [bool(s.rates.size) and not s.layer_trace.size for s in found]
    assert waited == sorted(waited, reverse=True)
    assert waited[0]
    assert not waited[-1]
    for snapshot, late in zip(found, waited, strict=True):
        assert ("not known yet" in snapshot.texts["stability"]) == late
        assert ("train_loss" in snapshot.facts) == (not late)
    given = NTKMonitor(probe=8, every_n_steps=1, loss="cross_entropy")
    fit(tmp_path, given, logger=tensorboard(tmp_path), max_steps=2)
    assert ntk.load_history(tmp_path / "lightning_logs" / "version_1")[0].layer_trace.size
