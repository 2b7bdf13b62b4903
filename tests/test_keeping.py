"""A run leaves its probe behind, and what is measured later on it is what was measured then."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.history import load_history
from ntk_monitor.manifest import manifest
from ntk_monitor.monitor import Monitor
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import load, load_manifest
from ntk_monitor.recipe import Recipe
from ntk_monitor.say import NTKWarning
from ntk_monitor.session import Session
from ntk_monitor.snapshot import Snapshot
from tests.modules import Classifier, digits, mlp
from tests.training import seeded, trainer


def forward(module: nn.Module, x: Any) -> Any:
    return module(x) * 2


def test_a_manifest_says_what_to_repeat() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].bias.requires_grad_(False)
    probe = Probe(torch.randn(5, 3).double(), torch.randn(5, 2).double())
    monitor = Monitor(net, None, probe, "mse", params="weight", forward=forward, seed=7, log_prefix="b")
    got = manifest(monitor, monitor.snapshot(0))
    assert got.parameters == ("0.weight", "2.weight")
    assert (got.model, got.forward) == ("torch.nn.modules.container.Sequential", "tests.test_keeping.forward")
    assert (got.mode, got.layout, got.outputs, got.seed, got.prefix) == ("eval", "full", 2, 7, "b")
    assert got.precision == "float64 Jacobian, float64 Gram"
    assert got.loss.startswith("mse")
    assert got.engine in ("structured", "reference", "rows")


def test_a_plain_loop_keeps_its_probe_with_one_line(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    monitor = Monitor(net, None, (torch.randn(5, 3), torch.randn(5, 2)), "mse", log_prefix="p")
    first = monitor.snapshot(0)
    assert ntk.keep_probe(monitor, first, tmp_path) == tmp_path / "p_probe.json"
    assert load_manifest(tmp_path) == manifest(monitor, first)
    again = Monitor(net, None, load(tmp_path), "mse").snapshot(0)
    np.testing.assert_array_equal(again.eigenvalues, first.eigenvalues)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"log_dir": True}, marks=pytest.mark.slow),
        pytest.param({"logger": "csv"}, marks=pytest.mark.slow),
    ],
)
def test_a_lightning_run_leaves_its_probe_beside_its_record(options: dict[str, Any], tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    seeded()
    logger = (CSVLogger if options.get("logger") else TensorBoardLogger)(tmp_path / "logs")
    extra: dict[str, Any] = {"log_dir": str(tmp_path / "own")} if options.get("log_dir") else {}
    extra |= {"reference": 0, "gram_every": 0, "verify": False}
    monitors = [NTKMonitor(probe=12, every_n_steps=9, log_prefix=name, **extra) for name in ("ntk", "two/b")]
    module = Classifier(mlp())
    run = trainer(tmp_path, monitors, max_steps=4, logger=logger)
    run.fit(module, DataLoader(digits(64), 16))

    folder = Path(extra.get("log_dir") or logger.log_dir)
    assert sorted(p.name for p in folder.glob("*probe*")) == [
        *("ntk_probe.json", "ntk_probe.safetensors", "two%2Fb_probe.json", "two%2Fb_probe.safetensors")
    ]
    probe, told = load(folder / "ntk_probe.json"), load_manifest(folder / "ntk_probe.json")
    history = load_history(folder, prefix="ntk")
    last = monitors[0].last
    assert last is not None
    assert history.steps[-1] == last.step
    assert probe.hash == last.probe
    assert probe.source == last.probe_source
    assert told.parameters == tuple(name for name, _ in module.named_parameters())
    assert {"lightning", "torch"} <= set(told.versions)
    # The weights of the end and the stored samples give the eigenvalues of the last probe again.
    kernel = ntk.empirical_ntk(module, probe.inputs).reshape(120, 120)
    np.testing.assert_allclose(np.linalg.eigvalsh(kernel.numpy())[::-1][:20], last.eigenvalues[:20], rtol=1e-9)


class Kept:
    """A sink whose disk is full a few times."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors
        self.kept: list[tuple[Probe, Any]] = []
        self.written: list[Snapshot] = []

    def publish(self, metrics: Any) -> None: ...

    def flush(self) -> None: ...

    def write(self, snapshot: Snapshot) -> None:
        self.written.append(snapshot)

    def keep(self, probe: Probe, manifest: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.kept.append((probe, manifest))


def watched(errors: list[Exception], **options: Any) -> Kept:
    net = nn.Linear(3, 2)
    session = Session(Recipe(every_n_steps=1, loss="mse", **options))
    session.sink = sink = Kept(errors)
    probe = Probe(torch.randn(5, 3), torch.randn(5, 2))
    session.begin(Monitor(net, None, probe, recipe=session.recipe), net, None)
    for step in range(4):
        session.guarded(session.probe, step, None)
    assert session.resting == ""
    return sink


def test_the_probe_is_kept_once() -> None:
    sink = watched([])
    assert len(sink.kept) == 1
    assert sink.kept[0][0].hash == sink.written[0].probe


def test_a_full_disk_is_tried_again_and_anything_else_is_not() -> None:
    message = "samples of the probe could not be stored beside the run"
    with pytest.warns(NTKWarning, match=rf"{message}: OSError: full"):
        sink = watched([OSError("full"), OSError("full")])
    assert len(sink.kept) == 1
    assert len(sink.written) == 4
    with pytest.warns(NTKWarning, match=rf"{message}: ValueError: odd"):
        assert watched([ValueError("odd")]).kept == []


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, [NTKMonitor(probe=8)], fast_dev_run=True)
    run.fit(Classifier(mlp()), DataLoader(digits(64), 16))
    assert not list(tmp_path.rglob("*probe*"))


class Endless(IterableDataset[Any]):
    """Digits without end, in an order that the data set itself remembers."""

    def __init__(self) -> None:
        self.data = digits(64)
        self.generator = torch.Generator().manual_seed(3)
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        while True:
            yield self.data[int(torch.randint(64, (1,), generator=self.generator))]


class Single(Endless):
    """Has something inside that cannot be copied, as an open file."""

    def __init__(self) -> None:
        super().__init__()
        self.source = (i for i in range(10**6))


def trained(data: Any, root: Path, *callbacks: Any) -> tuple[dict[str, Any], Any]:
    seeded()
    module = Classifier(mlp())
    run = trainer(root, list(callbacks), max_steps=4)
    run.fit(module, DataLoader(data, 8))
    return module.state_dict(), data


@pytest.mark.parametrize(
    ("kind", "samples", "source"),
    [(Endless, 102, "the first 102 samples of a copy of Endless"), (Single, 8, "the first training batch")],
)
def test_runs_on_streams_are_the_same_with_and_without(kind: Any, samples: int, source: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reference": 0, "gram_every": 0, "outputs": "trace"}
    monitor = NTKMonitor(every_n_steps=9, strict=True, log_dir=str(tmp_path / "own"), **options)
    plain, before = trained(kind(), tmp_path)
    seen, after = trained(kind(), tmp_path, monitor)
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(before.generator.get_state(), after.generator.get_state())
    assert before.passes == after.passes
    assert monitor.last is not None
    assert monitor.last.samples == samples
    assert monitor.last.probe_source.startswith(source)
    assert load(tmp_path / "own").hash == monitor.last.probe


def test_what_is_left_out_by_a_sampler_is_not_probed(tmp_path: Path) -> None:
    from torch.utils.data import SubsetRandomSampler

    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) % 2)
    probe = Probe.of(DataLoader(data, 4, sampler=SubsetRandomSampler(range(10, 20))), 6)
    assert set(probe.indices) <= set(range(10, 20))
    assert probe.source.startswith("6 of 10 training samples, drawn stratified by class")
