"""NTKMonitor inside a real Trainer: what it records, when, where, and what a resumed run goes on with."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.errors import InputError
from ntk_monitor.look import Outlook
from ntk_monitor.metrics import NAMES
from ntk_monitor.outlook import Watch
from ntk_monitor.say import NTKWarning
from tests.fitting import fit, history, tensorboard
from tests.modules import Classifier, digits, loader, mlp
from tests.training import seeded, trainer


def test_zero_configuration_measures_digits(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(), logger=tensorboard(tmp_path))
    found = history(tmp_path)
    first, last = found[0], found[-1]
    assert (first.step, last.step) == (0, 12)
    assert first.samples == 102  # 1024 // 10 outputs
    assert first.kernel == "full"
    assert first.loss == "cross_entropy(mean)"
    assert first.loss_status == "matched"
    assert first.residual_energy.sum() == pytest.approx(1)
    assert "stratified" in first.probe_source
    assert last.loss_value < first.loss_value


def test_cadence_counts_optimizer_steps_not_batches(tmp_path: Path) -> None:
    fit(
        tmp_path,
        NTKMonitor(probe=8, every_n_steps=5),
        logger=tensorboard(tmp_path),
        accumulate_grad_batches=3,
        data=loader(digits(), batch=16),
    )
    assert list(history(tmp_path).steps) == [0, 5, 10, 12]


def test_scalars_reach_every_logger(tmp_path: Path) -> None:
    csv = CSVLogger(tmp_path / "csv")
    fit(tmp_path, NTKMonitor(probe=16, every_n_steps=4), logger=[tensorboard(tmp_path), csv], log_every_n_steps=1)
    header = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()[0]
    # The noise scale may honestly be unresolved on sixteen samples.
    wanted = {f"ntk/{name}" for name in NAMES if name != "noise_scale"}
    assert wanted <= set(header.split(","))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"tensors": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert wanted <= scalars
    assert [e.step for e in events.Scalars("ntk/trace")] == [0, 4, 8, 12]
    assert {"ntk/log10_eigenvalues", "ntk/gram"} <= set(events.Tags()["tensors"])


def test_gram_is_stored_at_most_every_gram_every_probes(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=2, gram_every=3), logger=tensorboard(tmp_path))
    assert [bool(s.gram.size) for s in history(tmp_path)] == [True, False, False, True, False, False, True]


def test_csv_logger_alone_gets_an_event_file_beside_it(tmp_path: Path) -> None:
    csv = CSVLogger(tmp_path / "csv")
    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), logger=csv)
    assert list(ntk.load_history(csv.log_dir).steps) == [0, 4, 8, 12]


def test_no_logger_writes_nothing_but_measures(tmp_path: Path) -> None:
    callback = NTKMonitor(probe=8, every_n_steps=4)
    run = fit(tmp_path, callback, logger=False)
    assert callback.last is not None
    assert callback.last.step == 12
    assert not list(tmp_path.rglob("*tfevents*"))
    assert float(run.callback_metrics["ntk/trace"]) == pytest.approx(callback.last.metrics["trace"])


def test_no_logger_with_log_dir_writes_there(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4, log_dir=str(tmp_path / "here")), logger=False)
    assert list(ntk.load_history(tmp_path / "here").steps) == [0, 4, 8, 12]


def test_fast_dev_run_leaves_no_file(tmp_path: Path) -> None:
    callback = NTKMonitor(probe=8)
    fit(tmp_path, callback, fast_dev_run=True, max_epochs=1)
    assert callback.last is not None
    assert not list(tmp_path.rglob("*tfevents*"))


def test_learning_rates_of_every_group_are_those_used(tmp_path: Path) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            weights = list(self.net.parameters())
            groups: list[dict[str, Any]] = [{"params": weights[:2], "lr": 0.1}, {"params": weights[2:]}]
            optimizer = torch.optim.SGD(groups, lr=0.2)
            halve = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "interval": "step"}}

    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), Scheduled(mlp()), logger=tensorboard(tmp_path), max_steps=8)
    steps, rates = history(tmp_path).learning_rates
    assert list(steps) == [0, 3, 6]
    assert np.allclose(rates, [[0.1, 0.2], [0.05, 0.1], [0.025, 0.05]])


def test_metrics_serve_early_stopping_and_checkpoints(tmp_path: Path) -> None:
    stop = EarlyStopping("ntk/effective_rank", patience=1, min_delta=1e9, mode="max", check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path / "kept", monitor="ntk/trace", mode="max", save_top_k=1, every_n_epochs=1)
    run = fit(
        tmp_path,
        NTKMonitor(probe=8, every_n_steps=5),
        also=[stop, keep],
        enable_checkpointing=True,
        max_epochs=6,
    )
    assert run.current_epoch < 6  # an impossible improvement was asked for, so it stopped
    assert keep.best_model_path


def test_every_key_is_finite_even_when_no_probe_succeeds(tmp_path: Path) -> None:
    class Broken(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    with pytest.warns(NTKWarning, match=r"skipped|rests"):
        run = fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), Broken(mlp()))
    assert all(torch.isfinite(run.callback_metrics[f"ntk/{name}"]) for name in NAMES)
    assert run.global_step == 12


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        return iter(digits(64))


def test_streamed_data_are_probed_from_their_beginning(tmp_path: Path) -> None:
    callback = NTKMonitor(every_n_steps=2)
    fit(tmp_path, callback, data=DataLoader(Stream(), 16), max_steps=4, logger=tensorboard(tmp_path))
    found = history(tmp_path)
    assert found[0].step == 0
    assert found[0].samples == 64  # all there is, of the 102 wanted
    assert found[0].loss_status == "matched"


def test_dict_batches_and_a_module_without_forward(tmp_path: Path) -> None:
    whole = digits(64)

    class Records(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = whole[index]
            return {"image": x, "label": y}

    class Bare(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch["image"]), batch["label"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fit(tmp_path, NTKMonitor(every_n_steps=4), Bare(), data=DataLoader(Records(), 16), logger=tensorboard(tmp_path))
    assert history(tmp_path)[-1].loss_status == "matched"


def test_carried_modes_use_the_basis_of_the_previous_probe(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), logger=tensorboard(tmp_path))
    found = history(tmp_path)
    assert found[0].previous_step is None
    assert [s.previous_step for s in found][1:] == [0, 4, 8]
    assert found[1].carried.size == found[0].coordinates.size


def resumed(root: Path, first: NTKMonitor, second: NTKMonitor) -> tuple[Path, Path]:
    checkpoint = root / "at6.ckpt"
    run = fit(root, first, logger=tensorboard(root), max_steps=6)
    run.save_checkpoint(checkpoint)
    seeded()
    again = trainer(root, [second], max_steps=12, max_epochs=-1, logger=tensorboard(root))
    again.fit(Classifier(mlp()), loader(digits()), ckpt_path=checkpoint)
    versions = sorted((root / "lightning_logs").iterdir())
    return versions[0], versions[1]


RESUMED = "ignore:You're resuming from a checkpoint that ended before the epoch ended"


@pytest.mark.filterwarnings(RESUMED)
def test_a_resumed_run_continues_the_same_history(tmp_path: Path) -> None:
    before, after = resumed(tmp_path, NTKMonitor(probe=16, every_n_steps=3), NTKMonitor(probe=16, every_n_steps=3))
    both = ntk.load_history(before, after)
    assert list(both.steps) == [0, 3, 6, 9, 12]
    assert len({s.probe for s in both}) == 1
    assert ntk.load_history(after)[0].loss_status == "matched"


@pytest.mark.filterwarnings(RESUMED)
def test_resuming_keeps_the_probe_even_when_the_data_are_gone(tmp_path: Path) -> None:
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    given = NTKMonitor(probe=(x, y), every_n_steps=3)
    before, after = resumed(tmp_path, given, NTKMonitor(every_n_steps=3))
    assert len({s.probe for s in ntk.load_history(before, after)}) == 1


def test_two_monitors_have_two_histories(tmp_path: Path) -> None:
    trace = NTKMonitor(probe=8, every_n_steps=6, outputs="trace", log_prefix="ntk_trace")
    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=6), also=[trace], logger=tensorboard(tmp_path))
    assert history(tmp_path, prefix="ntk")[0].kernel == "full"
    assert history(tmp_path, prefix="ntk_trace")[0].kernel == "trace"


def test_two_optimizers_in_manual_optimisation(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            half = list(self.parameters())
            return torch.optim.SGD(half[:2], lr=0.1), torch.optim.SGD(half[2:], lr=0.2)

    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), Manual(mlp()), logger=tensorboard(tmp_path))
    found = history(tmp_path)
    assert list(found.steps) == [0, 4, 8, 12]
    assert "returned no loss" in found[0].loss_status
    assert np.allclose(found.learning_rates[1], [[0.1, 0.2]])


def test_pytorch_lightning_trainer_takes_it_too(tmp_path: Path) -> None:
    program = f"""
import warnings; warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
from torch.utils.data import DataLoader, TensorDataset
from ntk_monitor.callbacks import NTKMonitor
class M(pl.LightningModule):
    def __init__(self):
        super().__init__(); self.net = torch.nn.Linear(4, 2)
    def forward(self, x): return self.net(x)
    def training_step(self, b, i): return torch.nn.functional.cross_entropy(self(b[0]), b[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
data = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 2), 8)
monitor = NTKMonitor(every_n_steps=2)
pl.Trainer(max_epochs=1, callbacks=[monitor], logger=False, accelerator="cpu", enable_checkpointing=False,
           enable_progress_bar=False, enable_model_summary=False, default_root_dir={str(tmp_path)!r}).fit(M(), data)
assert isinstance(monitor, pl.Callback)
print(monitor.last.status, monitor.last.step, monitor.last.loss_status)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["measured", "4", "matched"], done.stderr[-2000:]


def test_a_hook_that_changes_batches_is_part_of_the_data(tmp_path: Path) -> None:
    class Scaled(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 0.01, batch[1]

    callback = NTKMonitor(every_n_steps=4)
    fit(tmp_path, callback, Scaled(mlp()))
    assert callback.monitor is not None
    assert float(callback.monitor.probe.inputs.max()) <= 0.01
    assert callback.last is not None
    assert callback.last.loss_status == "matched"


def test_unfreezing_in_mid_run_loses_no_probe(tmp_path: Path) -> None:
    class Unfreezes(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(list(self.net.parameters())[2:], lr=0.1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 6 and len(self.trainer.optimizers[0].param_groups) == 1:
                self.trainer.optimizers[0].add_param_group({"params": list(self.net.parameters())[:2], "lr": 0.01})

    fit(tmp_path, NTKMonitor(probe=8, every_n_steps=4), Unfreezes(mlp()), logger=tensorboard(tmp_path))
    assert list(history(tmp_path).steps) == [0, 4, 8, 12]
    assert np.allclose(history(tmp_path)[2].lr_values, [[0.1, np.nan], [0.1, 0.01]], equal_nan=True)


def test_a_given_probe_beats_the_one_of_the_interrupted_run(tmp_path: Path) -> None:
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    run = fit(tmp_path, NTKMonitor(probe=16), max_steps=6)
    run.save_checkpoint(tmp_path / "at6.ckpt")
    second = NTKMonitor(probe=(x, y), every_n_steps=3)
    seeded()
    again = trainer(tmp_path, [second], max_steps=12, max_epochs=-1)
    with pytest.warns() as said:
        again.fit(Classifier(mlp()), loader(digits()), ckpt_path=tmp_path / "at6.ckpt")
    assert any("not the one of the interrupted run" in str(w.message) for w in said)
    assert second.monitor is not None
    assert second.monitor.probe.samples == 8


def test_an_unwritable_directory_costs_only_the_record(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    csv = CSVLogger(tmp_path / "csv")
    with pytest.warns(NTKWarning, match="no record is written"):
        fit(tmp_path, NTKMonitor(probe=8, log_dir=str(blocked)), logger=csv)
    assert "ntk/trace" in (Path(csv.log_dir) / "metrics.csv").read_text()


def test_a_rest_at_the_start_leaves_its_reason_in_the_history(tmp_path: Path) -> None:
    with pytest.warns(NTKWarning, match="rests for the remainder"):
        fit(tmp_path, NTKMonitor(forward=lambda module, x: [x, x]), logger=tensorboard(tmp_path))
    found = history(tmp_path)
    assert found[0].status == "skipped"
    assert "several floating tensors" in found[0].reason


def test_a_large_network_gets_the_small_kernel_and_a_word_of_warning() -> None:
    assert ntk.Recipe().layout(102, 10, 6_000) == "full"
    assert ntk.Recipe().layout(102, 10, 11_000_000) == "loss"
    model, x = nn.Linear(2000, 1000), torch.randn(12, 2000)
    monitor = ntk.Monitor(model, None, (x, torch.zeros(12, dtype=torch.long)), strict=True, outputs="trace")
    monitor.probe = ntk.Probe(torch.randn(64, 2000))
    rows = ntk.Monitor(model, None, (x, torch.zeros(12, dtype=torch.long)), strict=True, outputs="trace", engine="rows")
    rows.probe = monitor.probe
    with pytest.raises(InputError, match=r"7.5 GiB \(1000 x 2,001,000 parameters\); select some"):
        rows._weigh("full", 1000, 2_001_000)
    with pytest.warns(NTKWarning, match=r"needs about 8e\+13 multiply-adds"):
        monitor._weigh("full", 100, 2_001_000)
    with pytest.warns(NTKWarning, match="minutes on a CPU"):
        rows._weigh("loss", 10, 11_000_000)  # a ResNet-18: 64 gradients of 42 MiB are more than two limits


def test_a_look_that_changes_the_run_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Watch, now: Any) -> Any:
        with torch.no_grad():
            next(self._model.parameters()).add_(1e-9)
        return Outlook()

    monkeypatch.setattr(Watch, "look", careless)
    callback = NTKMonitor(probe=8, every_n_steps=2)
    with pytest.warns(NTKWarning, match="a probe would change this run"):
        fit(tmp_path, callback, logger=tensorboard(tmp_path))
    assert callback.monitor is None
    assert callback.last is not None
    assert callback.last.status == "measured"


def test_the_monitor_knows_the_run_it_is_in(tmp_path: Path) -> None:
    callback = NTKMonitor(probe=8, every_n_steps=6, reference=20)  # the first look is at step 6
    fit(tmp_path, callback, accumulate_grad_batches=2, gradient_clip_val=0.7)
    monitor, last = callback.monitor, callback.last
    assert monitor is not None
    assert last is not None
    assert (monitor.batch_size, monitor.total_steps, monitor.population, monitor.clip) == (64, 12, 320, 0.7)
    assert monitor.reference is not None
    assert monitor.reference.samples == 20
    assert not set(monitor.reference.indices) & set(monitor.probe.indices)
    assert last.facts["batch_size"] == 64
    assert last.facts["total_steps"] == 12
    assert last.facts["motion"] > 0


def test_records_print_in_one_line(tmp_path: Path) -> None:
    fit(tmp_path, NTKMonitor(probe=8), logger=tensorboard(tmp_path))
    found = history(tmp_path)
    for shown in (repr(found), repr(found[0]), repr(ntk.Spectrum.of(np.eye(3)))):
        assert len(shown) < 200
        assert "\n" not in shown
