"""Monitor without a framework: the record it makes, and the laws that its numbers obey."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ntk_monitor as ntk
from ntk_monitor.errors import InputError, LossUnknownError
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.say import NTKWarning


def linear(samples: int, outputs: int, *, momentum: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Linear(6, outputs).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    return model, optimizer, (torch.randn(samples, 6).double(), torch.randn(samples, outputs).double())


@pytest.mark.parametrize(("samples", "outputs"), [(5, 1), (12, 1), (5, 3), (12, 3)])
def test_modes_of_a_linear_model_decay_as_gradient_descent_says(samples: int, outputs: int) -> None:
    model, optimizer, (x, y) = linear(samples, outputs)
    monitor = ntk.Monitor(model, optimizer, (x, y), "mse", every_n_steps=1)
    before = monitor.snapshot()
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        monitor.observe()
        now = monitor.snapshot()
        alive = before.eigenvalues > before.noise_floor
        predicted = 1 - 2 * 0.05 * before.eigenvalues / (samples * outputs)
        measured = now.carried[alive] / before.coordinates[alive]
        assert np.abs(measured - predicted[alive]).max() < 1e-8
        assert now.previous_step == before.step
        before = now


def test_residual_energy_is_the_same_in_both_bases() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = torch.randn(9, 6), torch.randn(9, 3)
    monitor = ntk.Monitor(model, optimizer, (x, y), "mse")
    monitor.snapshot(0)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    now = monitor.snapshot(5)
    assert (now.carried**2).sum() == pytest.approx((now.coordinates**2).sum(), rel=1e-10)
    assert (now.coordinates**2).sum() == pytest.approx(2 * now.loss_value, rel=1e-10)  # |u|² = s |f - y|² = 2 L


def test_scalars_are_the_quantities_they_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    monitor = ntk.Monitor(model, None, (x, y), "cross_entropy")
    snapshot = monitor.snapshot(0)
    kernel = ntk.empirical_ntk(model, x)
    spectrum = ntk.Spectrum.of(kernel)
    assert snapshot.metrics["trace"] == pytest.approx(float(torch.einsum("ncnc->", kernel)), rel=1e-6)
    assert snapshot.metrics["effective_rank"] == pytest.approx(spectrum.effective_rank, rel=1e-6)
    assert snapshot.loss_value == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)
    assert set(snapshot.metrics) == {"trace", "condition_log10", "effective_rank", "alignment"}
    assert monitor.snapshot(0).metrics["kernel_change"] == pytest.approx(0, abs=1e-12)


def test_a_fresh_monitor_forgets_nothing_and_shares_nothing() -> None:
    model, optimizer, data = linear(6, 2)
    x = data[0].clone()
    monitor = ntk.Monitor(model, optimizer, data, "mse")
    data[0].zero_()
    assert torch.equal(monitor.probe.inputs, x)


def test_learning_rates_are_stored_where_they_change() -> None:
    model, optimizer, data = linear(6, 2)
    monitor = ntk.Monitor(model, optimizer, data, "mse", every_n_steps=3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    for _ in range(4):
        optimizer.step()
        monitor.observe()
        schedule.step()
    snapshot = monitor.snapshot()
    assert list(snapshot.lr_steps) == [0, 2]
    assert np.allclose(snapshot.lr_values, [[0.05], [0.005]])


def test_cadence_in_a_plain_loop() -> None:
    model, optimizer, data = linear(6, 2)
    monitor = ntk.Monitor(model, optimizer, data, "mse", every_n_steps=4)
    probed = []
    for _ in range(10):
        if monitor.due():
            probed.append(monitor.snapshot().step)
        optimizer.step()
        monitor.observe()
    assert probed == [0, 4, 8]


def test_failure_is_a_record_unless_strict() -> None:
    model, optimizer, data = linear(6, 2)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model = nn.Sequential(model, nn.Tanh())
    with pytest.warns(NTKWarning, match="probe at step 3 skipped: the kernel must be finite"):
        snapshot = ntk.Monitor(model, optimizer, data, "mse").snapshot(3)
    assert (snapshot.status, snapshot.step) == ("skipped", 3)
    assert snapshot.eigenvalues.size == 0
    with pytest.raises(ntk.NumericsError):
        ntk.Monitor(model, optimizer, data, "mse", strict=True).snapshot(3)


def test_modes_are_off_with_the_reason() -> None:
    model, optimizer, (x, y) = linear(6, 2)
    without_loss = ntk.Monitor(model, optimizer, (x, y)).snapshot(0)
    assert "pass loss=" in without_loss.modes_reason
    without_targets = ntk.Monitor(model, optimizer, x, "mse").snapshot(0)
    assert without_targets.modes_reason == "the probe has no targets"
    clipped = ntk.Monitor(model, optimizer, (x, y), nn.HuberLoss()).snapshot(0)
    assert "huber" in clipped.modes_reason
    assert clipped.loss_value > 0
    trace = ntk.Monitor(model, optimizer, (x, y), "mse", outputs="trace").snapshot(0)
    assert "full kernel" in trace.modes_reason
    for snapshot in (without_loss, without_targets, clipped, trace):
        assert snapshot.rates.size == 0
        assert snapshot.rank > 0


def test_a_large_output_needs_the_loss() -> None:
    model = nn.Linear(4, 300)
    x, y = torch.randn(8, 4), torch.randint(0, 300, (8,))
    with pytest.raises(LossUnknownError, match=r'pass loss= and targets, or outputs="trace"'):
        ntk.Monitor(model, None, (x, y), strict=True).snapshot(0)
    assert ntk.Monitor(model, None, (x, y), "cross_entropy").snapshot(0).kernel == "loss"


def test_options_come_once() -> None:
    model, optimizer, data = linear(6, 2)
    with pytest.raises(InputError, match="not both"):
        ntk.Monitor(model, optimizer, data, recipe=ntk.Recipe(), every_n_steps=3)


def test_a_record_survives_the_event_file(tmp_path: Any) -> None:
    model, optimizer, data = linear(8, 3)
    monitor = ntk.Monitor(model, optimizer, data, "mse", every_n_steps=1)
    with ntk.Recorder(tmp_path) as recorder:
        made = [monitor.snapshot(0), monitor.snapshot(1)]
        for snapshot in made:
            recorder.write(snapshot)
    read = ntk.load_history(tmp_path)
    for before, after in zip(made, read, strict=True):
        assert np.allclose(before.eigenvalues, after.eigenvalues, rtol=1e-6)
        assert before.metrics == pytest.approx(after.metrics)
        assert (before.probe, before.engine, before.loss_status) == (after.probe, after.engine, after.loss_status)


def training_set(samples: int = 40) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 6).double(), torch.randn(samples, 2).double())


def test_reference_samples_come_from_the_training_set_beside_the_probe() -> None:
    model, optimizer, (x, y) = linear(6, 2)
    train = training_set(600)  # a probe of the default size leaves 88
    probe = ntk.Probe.of(train, 10)
    for data in (probe, DataLoader(train, 4), train):
        monitor = ntk.Monitor(model, optimizer, data, "mse", reference=train, recipe=ntk.Recipe(reference=12))
        assert monitor.reference is not None
        assert monitor.probe.indices
        assert not set(monitor.reference.indices) & set(monitor.probe.indices)
        assert monitor.reference.samples == 12
    other = ntk.Monitor(model, optimizer, training_set(9), "mse", reference=train)
    assert other.probe.indices == ()  # places in another set
    given = ntk.Monitor(model, optimizer, (x, y), "mse", reference=train.tensors, recipe=ntk.Recipe(reference=12))
    assert given.reference is not None
    assert given.reference.samples == 12
    assert (given.population, other.population) == (600, 600)
    assert (
        ntk.Monitor(model, optimizer, (x, y), "mse", reference=train, recipe=ntk.Recipe(reference=0)).reference is None
    )
    assert ntk.Monitor(model, optimizer, (x, y), "mse", reference=probe).reference is probe
    bare = ntk.Monitor(model, optimizer, (x, y), "mse")
    assert (bare.reference, bare.population) == (None, None)


def test_batch_size_and_length_of_the_run_are_recorded() -> None:
    model, optimizer, data = linear(6, 2)
    known = ntk.Monitor(model, optimizer, data, "mse", batch_size=3, total_steps=70).snapshot(0)
    assert (known.facts["batch_size"], known.facts["total_steps"], known.facts["lr"]) == (3, 70, 0.05)
    unknown = ntk.Monitor(model, optimizer, data, "mse").snapshot(0)
    assert not {"batch_size", "total_steps"} & set(unknown.facts)


def test_batches_that_are_the_whole_population_have_no_noise() -> None:
    model, optimizer, data = linear(6, 2)
    monitor = ntk.Monitor(model, optimizer, data, "mse", batch_size=6)
    noisy = monitor.snapshot(0).metrics
    monitor.population = 6
    still = monitor.snapshot(0).metrics
    assert noisy["lr_headroom_low"] < still["lr_headroom_low"] == pytest.approx(still["lr_headroom_high"])


def test_losses_since_the_last_probe_are_averaged() -> None:
    model, optimizer, data = linear(6, 2)
    monitor = ntk.Monitor(model, optimizer, data, "mse")
    assert "train_loss" not in monitor.snapshot(0).facts
    for value in (1.0, 3.0):
        monitor.losses.add(torch.tensor(value))
    assert monitor.snapshot(1).facts["train_loss"] == 2
    assert "train_loss" not in monitor.snapshot(2).facts


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": -1}, r"reference must be 0 \(no forecasts\) or positive, got -1"),
        ({"reference": None}, "reference must be int, got None"),
        ({"reference": 1.5}, "reference must be int, got 1.5"),
        ({"forecast_every": -1}, "forecast_every must be 0"),
        ({"batch_size": 0}, "batch_size must be at least 1 or None, got 0"),
        ({"batch_size": True}, "batch_size must be int or None, got True"),
        ({"total_steps": 0}, "total_steps must be at least 1 or None, got 0"),
        ({"total_steps": "many"}, "total_steps must be int or None, got 'many'"),
        ({"directions": [1.0]}, "directions must map names to arrays"),
    ],
)
def test_options_of_looks_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ntk.Recipe(**options)


CHANGES: dict[str, Any] = {
    "a parameter": lambda m: m[0].weight.data.add_(1e-7),
    "a buffer": lambda m: m[1].running_mean.add_(1e-7),
    "a training flag": lambda m: m[1].eval(),
    "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
    "a gradient": lambda m: setattr(m[0].bias, "grad", torch.zeros(3)),
    "requires_grad": lambda m: m[0].weight.requires_grad_(False),
    "the parameter object": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
    "torch's generator": lambda _: torch.rand(1),
    "NumPy's generator": lambda _: np.random.rand(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_fingerprint_sees(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = Fingerprint.of(model)
    assert before.changes(Fingerprint.of(model)) == []
    CHANGES[name](model)
    assert len(before.changes(Fingerprint.of(model))) >= 1
