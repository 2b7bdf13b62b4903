"""What a probe takes it gives back: no garbage that waits for the collector, flat memory, no open files."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.figures import gram
from ntk_monitor.network import Network
from ntk_monitor.render import png
from tests.benchmarks.leak import Watch, watched
from tests.modules import Attention, Recurrent, cnn, digits, mlp
from tests.snapshots import training


def _garbage(work: Callable[[], Any]) -> list[Any]:
    """Return what only the garbage collector can free after `work`, whose result is dropped."""
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be looked at again
    try:
        work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


@pytest.mark.parametrize("network", [mlp, cnn, Attention, Recurrent])
def test_a_probe_leaves_nothing_to_the_garbage_collector(network: Callable[[], nn.Module]) -> None:
    """A circle of ours that holds a tensor of a graph holds activations of a whole batch, unseen by the collector."""
    model, (x, y) = network(), digits(96).tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options: dict[str, Any] = {"reference": digits(96), "gram_every": 0, "forecast_every": 2}
    monitor = ntk.Monitor(model, optimizer, (x[:8], y[:8]), "cross_entropy", **options)

    def probe(*_: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.observe()
        assert monitor.snapshot().status == "measured"

    probe()  # what is imported and cached at the first probe is no leak
    found = _garbage(lambda: list(map(probe, range(2))))
    assert not [item for item in found if isinstance(item, (torch.Tensor, nn.Module, Network))]
    assert len(found) < 100


def test_a_picture_leaves_nothing_to_the_garbage_collector() -> None:
    figure = gram(training(12, 3, 1)[0], cosine=True)
    png(figure, width=350, height=320)  # fonts and styles are kept
    gc.collect()
    gc.freeze()
    try:
        png(figure, width=350, height=320)
        assert gc.collect() < 100  # of some six thousand
    finally:
        gc.unfreeze()


def test_the_collector_would_find_a_circle() -> None:
    """The harness can fail."""

    def work() -> None:
        network = mlp()
        network.circle = lambda: network  # type: ignore[assignment]

    assert any(isinstance(item, nn.Linear) for item in _garbage(work))


@pytest.mark.parametrize(
    ("memory", "files", "flat"),
    [
        ([100.0] * 50 + [96.0] * 5 + [100.5] * 45, [8] * 100, True),
        ([100 + 0.03 * i for i in range(100)], [8] * 100, False),
        ([100.0] * 100, [8] * 99 + [9], False),
    ],
    ids=["given back", "grows", "opens a file"],
)
def test_a_leak_is_called_one(memory: list[float], files: list[int], flat: bool) -> None:
    seen = Watch(NTKMonitor(), 1)
    seen.memory, seen.files = [int(1e6 * value) for value in memory], files
    assert seen.flat(100) is flat


@pytest.mark.slow
def test_memory_and_files_stay_flat(tmp_path: Path) -> None:
    """The allocator needs some fifty probes to find its level; `python -m tests.benchmarks.leak` runs longer."""
    seen = watched(tmp_path, 2000, 100)
    assert len(seen.memory) == 100
    assert seen.flat(40, most=0.02), (seen.rise(40), set(seen.files))
