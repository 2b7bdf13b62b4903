"""The three lines of a plain loop: they change nothing, and nothing that goes wrong in them ends the loop."""

import contextlib
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ntk_monitor as ntk
from ntk_monitor import board
from ntk_monitor import recorder as recording
from ntk_monitor.look import Measurement
from ntk_monitor.outlook import Watch
from ntk_monitor.say import NTKWarning
from tests.training import seeded, state_hash

STEPS = 6


def loop(root: Path | None, **options: Any) -> dict[str, str]:
    """Train with BatchNorm and dropout, watched when there is a place to write; return what is left behind."""
    seeded()
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    m = ntk.Monitor(model, optimizer, (x[:8], y[:8]), "cross_entropy", **{"every_n_steps": 2, **options})
    losses = []
    recorder = None if root is None else ntk.Recorder(root, strict=False)
    with recorder or contextlib.nullcontext():
        for _ in range(STEPS):
            rows = torch.randint(0, 40, (10,))
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() + random.random() + np.random.rand())
            if recorder is not None:
                m.observe()
                if m.due():
                    recorder.write(m.snapshot())
    return {
        "weights": state_hash(model.state_dict()),
        "gradients": state_hash([p.grad for p in model.parameters()]),
        "optimizer": state_hash(optimizer.state_dict()),
        "losses": state_hash(losses),
        "flags": state_hash([part.training for part in model.modules()]),
        "torch": state_hash(torch.get_rng_state()),
        "numpy": state_hash(np.random.get_state(legacy=False)),
        "python": state_hash(random.getstate()),
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    return loop(None)


def test_three_lines_change_nothing(plain: dict[str, str], tmp_path: Path) -> None:
    assert loop(tmp_path, strict=True) == plain
    history = ntk.load_history(tmp_path)
    assert history.steps.tolist() == [1, 2, 4, 6]
    assert {snapshot.status for snapshot in history} == {"measured"}


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken on purpose")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the kernel": (ntk.Monitor, "measure", broken),
    "what follows from it": (ntk.Monitor, "finish", broken),
    "a look": (Watch, "look", broken),
    "drawing": (board, "pictures", broken),
    "encoding": (recording, "event", broken),
    "the disk": (ntk.Recorder, "_append", full),
    "closing": (ntk.Recorder, "flush", full),
}


QUICK = {"the kernel", "a look", "the disk"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_fault_ends_no_loop(
    name: str, plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS[name])
    with pytest.warns(NTKWarning):
        assert loop(tmp_path) == plain


def test_weights_that_are_not_finite_are_a_skipped_probe_with_its_reason(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    m = ntk.Monitor(model, None, (torch.randn(4, 2), torch.randn(4, 1)), "mse")
    with pytest.warns(NTKWarning, match="probe at step 0 skipped"):
        snapshot = m.snapshot()
    assert (snapshot.status, bool(snapshot.reason)) == ("skipped", True)


def test_strict_is_for_debugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntk.Monitor, "finish", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        loop(tmp_path, strict=True)
    monkeypatch.undo()
    monkeypatch.setattr(recording, "append", full)
    with pytest.raises(OSError, match="No space"):
        ntk.Recorder(tmp_path).close()


def test_interrupts_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, step: int, epoch: int | None = None) -> Measurement:
        raise KeyboardInterrupt

    monkeypatch.setattr(ntk.Monitor, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path)
