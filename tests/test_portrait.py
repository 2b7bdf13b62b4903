"""What a record shows of its samples: shares that add up, modes that are modes, pictures once, and nothing lost."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor.look import Place
from ntk_monitor.snapshot import Snapshot

SAMPLES = 9


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(SAMPLES, 1, 6, 6, generator=generator), torch.arange(SAMPLES) % 3


def classifier(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, outputs))


def measured(loss: Any = "cross_entropy", outputs: int = 3, targets: Any = None, **options: Any) -> Snapshot:
    x, y = pictures()
    model = classifier(outputs)
    given = y if targets is None else targets
    return ntk.Monitor(model, None, (x, given), loss, strict=True, **options).snapshot(0)


def test_the_residual_of_a_sample_under_cross_entropy_is_what_its_probability_says() -> None:
    x, y = pictures()
    snapshot = measured()
    p = F.softmax(classifier()(x).double(), dim=1)[torch.arange(SAMPLES), y].detach().numpy()
    np.testing.assert_allclose(snapshot.sample_residual**2, (1 / p - 1) / SAMPLES, rtol=1e-5)
    assert (snapshot.sample_residual**2).sum() == pytest.approx((snapshot.coordinates**2).sum(), rel=1e-10)


def test_the_residual_of_a_sample_under_squared_errors_is_its_distance() -> None:
    x, _ = pictures()
    y = torch.randn(SAMPLES, 2)
    snapshot = measured("mse", 2, y)
    far = (classifier(2)(x) - y).double().square().sum(dim=1).detach().numpy()
    np.testing.assert_allclose(snapshot.sample_residual**2, 2 / (SAMPLES * 2) * far, rtol=1e-5)


def jacobian(outputs: int) -> Any:
    """One backward pass for each output of each sample, float64."""
    model, (x, _) = classifier(outputs).double(), pictures()
    rows = []
    for f in model(x.double()).reshape(-1):
        gradients = torch.autograd.grad(f, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows).numpy()


def test_patterns_of_one_output_are_eigenvectors_that_point_along_the_residual() -> None:
    x, _ = pictures()
    y = torch.randn(SAMPLES, 1)
    snapshot = measured("mse", 1, y)
    j = jacobian(1)
    m = 2 / SAMPLES * j @ j.T
    residual = (classifier(1)(x) - y).double().detach().numpy()[:, 0]
    for pattern, output, rate in zip(snapshot.mode_samples, snapshot.mode_outputs, snapshot.rates, strict=True):
        np.testing.assert_allclose(m @ pattern, rate * pattern, atol=2e-5 * m.max())
        assert pattern @ residual > 0
        assert output.tolist() == [1.0]


def test_without_modes_patterns_are_those_of_the_kernel() -> None:
    snapshot = measured(None, 2)
    j = jacobian(2)
    k = j @ j.T
    _, vectors = np.linalg.eigh(k)
    assert snapshot.sample_residual.size == 0
    assert snapshot.mode_samples.shape == (16, SAMPLES)
    for i, (u, w) in enumerate(zip(snapshot.mode_samples[:4], snapshot.mode_outputs[:4], strict=True)):
        left, sizes, right = np.linalg.svd(vectors[:, -1 - i].reshape(SAMPLES, 2))
        np.testing.assert_allclose(np.abs(np.outer(u, w)), np.abs(sizes[0] * np.outer(left[:, 0], right[0])), atol=1e-4)


def test_samples_are_shown_once_in_a_process() -> None:
    monitor = ntk.Monitor(classifier(), None, pictures(), "cross_entropy", strict=True)
    monitor.portrait.texts = tuple(f"sample {n}" for n in range(SAMPLES))
    first, second = monitor.snapshot(0), monitor.snapshot(1)
    assert first.thumbnails.shape == (SAMPLES, 6, 6, 1)
    assert first.sample_texts == monitor.portrait.texts
    assert (second.thumbnails.size, second.sample_texts) == (0, ())
    assert second.mode_samples.shape == first.mode_samples.shape
    # Texts of other samples than the probe's are not shown.
    monitor = ntk.Monitor(classifier(), None, pictures(), "cross_entropy", strict=True)
    monitor.portrait.texts = ("one",)
    assert monitor.snapshot(0).sample_texts == ()


def test_of_a_series_the_first_record_shows_the_samples() -> None:
    monitor = ntk.Monitor(classifier(), None, pictures(), "cross_entropy", strict=True)
    for index, shown in ((3, False), (0, True), (0, True), (1, False)):
        monitor.place = Place(index=index, interval=None)
        assert bool(monitor.snapshot(index).thumbnails.size) is shown


def test_a_fault_in_what_is_shown_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("ntk_monitor.portrait.thumbnails", fail)
    whole = ntk.Monitor(classifier(), None, pictures(), "cross_entropy")
    found = whole.snapshot(0)
    assert found.status == "measured"
    assert found.texts["samples"] == "not shown: RuntimeError: boom"
    assert found.sample_residual.size == SAMPLES
    with pytest.raises(RuntimeError, match="boom"):
        measured()
