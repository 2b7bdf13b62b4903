"""Monitor without a framework: the record it makes, and the laws that its numbers obey."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
