"""Looks at networks whose outputs are too many for the full kernel: layers and gauge next to the kernel of losses."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.dynamics import sharpness
from tests.training import seeded


def _run(outputs: Any) -> ntk.Snapshot:
    """Two probes of a classifier with three steps between them."""
    seeded()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"every_n_steps": 3, "strict": True, "outputs": outputs}
    monitor = ntk.Monitor(model, optimizer, (x, y), "cross_entropy", **options)
    monitor.snapshot()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.observe()
    return monitor.snapshot()


def test_updates_are_taken_apart_whatever_the_kernel() -> None:
    full, loss = _run("full"), _run("loss")
    assert (full.kernel, loss.kernel) == ("full", "loss")
    assert loss.metrics["linearisation_error"] == full.metrics["linearisation_error"]
    for name in ("layer_update", "layer_useful", "layer_moved"):
        assert np.allclose(getattr(loss, name), getattr(full, name), rtol=1e-5)
        assert getattr(loss, name).size == 2


def test_the_gauge_takes_as_many_samples_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run("loss")
    assert "operator of 12 samples" in whole.texts["stability"]
    monkeypatch.setattr(sharpness, "_OUTPUTS", 20)
    fewer = _run("loss")
    assert "operator of 6 samples" in fewer.texts["stability"]
    assert fewer.metrics["sharpness"] != whole.metrics["sharpness"]
    monkeypatch.setattr(sharpness, "_OUTPUTS", 11)
    none = _run("loss")
    assert none.texts["stability"] == "not measured: 3 outputs per sample are too many for Lanczos vectors"
    assert "sharpness" not in none.metrics
    assert none.metrics["linearisation_error"] == whole.metrics["linearisation_error"]
