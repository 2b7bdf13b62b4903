"""Light probes: what they say agrees with what full ones say, they are cheap, and nothing takes them for full ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor import figures, summary
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.dynamics.refreshed import refreshed, ritz
from ntk_monitor.dynamics.stability import Stability, stability
from ntk_monitor.errors import NumericsError
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.health import findings
from ntk_monitor.optimizers import read
from ntk_monitor.say import NTKWarning
from ntk_monitor.schedule import Schedule
from ntk_monitor.snapshot import FACTS, TEXTS
from tests.modules import Classifier, digits, loader, mlp
from tests.training import outcome, seeded, trainer

CLASSES = 3


class Run:
    """A small classifier in a plain loop."""

    def __init__(self, loss: Any = "cross_entropy", **options: Any) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()
        self.x, self.y = torch.randn(20, 4).double(), torch.arange(20) % CLASSES
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        options = {"reference": (self.x, self.y), "batch_size": 20, "strict": True, **options}
        self.monitor = ntk.Monitor(self.net, self.optimizer, (self.x[:8], self.y[:8]), loss, **options)

    def steps(self, count: int = 4) -> "Run":
        for _ in range(count):
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(self.x), self.y).backward()
            self.optimizer.step()
            self.monitor.observe()
        return self


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("products", [1, 3, 7])
def test_the_largest_ritz_value_is_a_bound_and_exact_in_the_whole_space(seed: int, products: int) -> None:
    random = np.random.default_rng(seed)
    root = random.standard_normal((7, 7))
    matrix = root @ root.T
    values, vectors = np.linalg.eigh(matrix)
    near = vectors[:, -1] + 0.2 * random.standard_normal(7)
    found, vector = ritz(lambda v: matrix @ v, near, products)
    assert found <= values[-1] * (1 + 1e-12)
    assert found >= near @ matrix @ near / (near @ near) - 1e-12  # no worse than the start
    assert vector @ matrix @ vector == pytest.approx(found, rel=1e-9)
    assert products < 7 or found == pytest.approx(values[-1], rel=1e-9)
    exact, _ = ritz(lambda v: matrix @ v, vectors[:, -1], 1)
    assert exact == pytest.approx(values[-1], rel=1e-12)


def test_a_space_that_ends_early_and_what_has_no_ritz_value() -> None:
    assert ritz(lambda v: 2 * v, np.ones(4), 5)[0] == pytest.approx(2)
    assert ritz(lambda v: 0 * v, np.ones(4), 5)[0] == 0
    with pytest.raises(NumericsError, match="to start from is zero"):
        ritz(lambda v: v, np.zeros(4), 3)
    for bad in (lambda v: v * np.nan, lambda v: v * np.inf):
        with pytest.raises(NumericsError, match="not finite"):
            ritz(bad, np.ones(4), 1)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_refreshed_gauge_follows_the_full_one(kind: str) -> None:
    run = Run()
    if kind == "adam":
        run.optimizer = torch.optim.Adam(run.net.parameters(), lr=0.003)
        run.monitor.optimizers = [run.optimizer]
    run.steps(12)
    data: tuple[Any, Any] = (run.x, run.y)
    last = stability(run.net, run.optimizer, data, "cross_entropy", batch_size=5)
    run.steps(5)
    run.optimizer.param_groups[0]["lr"] *= 0.5
    rates = (2 * run.optimizer.param_groups[0]["lr"],)
    full = stability(run.net, run.optimizer, data, "cross_entropy", batch_size=5, tolerance=1e-8)
    light = refreshed(run.net, read(run.net, run.optimizer), data, "cross_entropy", last, rates=rates, batch_size=5)
    assert light.available
    assert 0.97 * full.sharpness < light.sharpness <= full.sharpness * (1 + 1e-6)
    assert light.noise == pytest.approx(0.5 * last.noise)
    assert light.high == pytest.approx(full.high, rel=0.03)
    assert light.low < light.high
    assert light.bound_high == full.bound_high
    more = refreshed(run.net, read(run.net, run.optimizer), data, "cross_entropy", light, products=8, batch_size=5)
    assert more.sharpness == pytest.approx(full.sharpness, rel=1e-4)


def test_a_gauge_without_a_start_says_so() -> None:
    run = Run().steps(2)
    state, data = read(run.net, run.optimizer), (run.x, run.y)
    assert "no eigenvector" in refreshed(run.net, state, data, "cross_entropy", Stability()).reason
    last = stability(run.net, run.optimizer, data, "cross_entropy")
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert "learning rate is 0" in refreshed(run.net, read(run.net, run.optimizer), data, "mse", last).reason


def test_a_light_probe_agrees_with_a_full_one_at_the_same_weights() -> None:
    run = Run()
    first = run.monitor.snapshot(0)
    run.steps()
    before = Fingerprint.of(run.net)
    light = run.monitor.snapshot(tier="light")
    assert before.changes(Fingerprint.of(run.net)) == []
    full = run.monitor.snapshot(tier="full")
    assert (light.status, full.status, light.step, light.previous_step) == ("light", "measured", 4, 0)
    assert light.loss_value == pytest.approx(full.loss_value, rel=1e-12)
    assert np.allclose(light.carried, full.carried, rtol=1e-9, atol=1e-12)
    assert len(light.carried) == len(first.coordinates)
    assert light.metrics["linearisation_error"] == pytest.approx(full.metrics["linearisation_error"], rel=1e-6)
    assert light.facts["accuracy"] == full.facts["accuracy"]
    assert light.facts["lr"] == full.facts["lr"]
    assert 0.95 * full.metrics["sharpness"] < light.metrics["sharpness"] <= full.metrics["sharpness"] * (1 + 1e-3)
    assert light.eigenvalues.size == light.predictions.size == light.lr_steps.size == 0
    assert "a lower bound" in light.texts["stability"]
    assert set(light.texts) <= set(TEXTS)
    assert set(light.facts) <= set(FACTS)
    assert set(light.seconds) == {"forward", "gauge", "updates"}
    assert list(full.lr_steps) == [0]  # what a light probe reads is not taken away from the next full one
    assert "light: since the probe at step 0" in repr(light)


def test_light_probes_leave_full_ones_as_they_are() -> None:
    alone, both = Run(forecast_every=0), Run(forecast_every=0)
    records = []
    for run, light in ((alone, False), (both, True)):
        run.monitor.snapshot(0)
        for _ in range(3):
            run.steps(2)
            if light:
                run.monitor.snapshot(tier="light")
        records.append(run.monitor.snapshot(tier="full"))
    one, two = records
    for name in ("eigenvalues", "coordinates", "carried", "layer_update", "layer_moved", "lr_values"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert two.previous_step == 0
    # The gauge starts from another vector and stops at its tolerance.
    assert two.metrics["sharpness"] == pytest.approx(one.metrics["sharpness"], rel=2e-3)


def test_costs_are_told_apart_and_add_up() -> None:
    run = Run()
    record = run.monitor.snapshot(0)
    assert set(record.seconds) == {"kernel", "spectrum", "modes", "facts", "gauge", "layers", "updates", "forecast"}
    assert min(record.seconds.values()) >= 0
    run.monitor.observe()
    assert sum(record.seconds.values()) <= run.monitor.schedule.startup
    assert record.facts["memory_limit"] > 0
    assert "overhead" not in record.metrics
    later = run.steps().monitor.snapshot()
    assert later.facts["startup_seconds"] == run.monitor.schedule.startup
    assert 0 < later.metrics["overhead"] <= 1


def test_a_loop_that_asks_gets_the_tier_that_is_due() -> None:
    run = Run(max_overhead=0.01)
    assert run.monitor.due(0)
    assert run.monitor.snapshot(0).status == "measured"
    run.steps(1)
    assert run.monitor.tier() == "light"
    assert run.monitor.snapshot().status == "light"
    assert not run.monitor.due()
    assert run.monitor.snapshot().status == "measured"  # nobody said it was due, somebody wanted it


def test_without_a_loss_there_is_nothing_light_to_measure() -> None:
    run = Run(loss=None, max_overhead=0.01)
    run.monitor.snapshot(0)
    run.steps(1)
    assert run.monitor.tier() is None


@pytest.mark.parametrize("part", ["refreshed", "change"])
def test_a_fault_costs_only_its_part(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(strict=False)
    run.monitor.snapshot(0)
    run.steps()

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("boom")

    monkeypatch.setattr(f"ntk_monitor.tiers.{part}", fail)
    found = run.monitor.snapshot(tier="light")
    text = {"refreshed": "stability", "change": "updates"}[part]
    assert found.status == "light"
    assert found.texts[text] == "not measured: MemoryError: boom"
    assert ("sharpness" in found.metrics) == (part == "change")
    assert ("linearisation_error" in found.metrics) == (part == "refreshed")


def test_outputs_that_are_not_finite_are_a_skip() -> None:
    run = Run(strict=False)
    run.monitor.snapshot(0)
    with torch.no_grad():
        next(run.net.parameters()).fill_(float("nan"))
    with pytest.warns(NTKWarning, match="the outputs on the probe are NaN or infinite"):
        assert run.monitor.snapshot(3, tier="light").status == "skipped"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> ntk.History:
    """Full probes at steps 0, 4 and 8, light ones in between, and at the end one of each."""
    run, root = Run(forecast_every=0), tmp_path_factory.mktemp("run")
    with ntk.Recorder(root) as recorder:
        for step in range(9):
            recorder.write(run.monitor.snapshot(step, tier="light" if step % 4 else "full"))
            run.steps(1)
        recorder.write(run.monitor.snapshot(9, tier="light"))
        recorder.write(run.monitor.snapshot(9, tier="full"))
    return ntk.load_history(root)


def test_a_history_tells_the_tiers_apart(recorded: ntk.History) -> None:
    assert recorded.notes == ()
    assert list(recorded.steps) == [0, 4, 8, 9]
    assert [s.step for s in recorded.light] == [1, 2, 3, 5, 6, 7]
    assert recorded.eigenvalues.shape == (4, 8 * CLASSES)
    assert np.isfinite(recorded.scalar("sharpness")).all()
    steps, values = recorded.series("sharpness")
    assert list(steps) == list(range(10))
    assert np.isfinite(values).all()
    assert list(recorded.series("trace")[0]) == [0, 4, 8, 9]
    with pytest.raises(ntk.InputError, match="no scalar is called"):
        recorded.series("sharp")
    assert recorded.to_pandas()["status"].tolist() == [s.status for s in recorded]
    assert list(recorded.to_xarray()["step"].values) == [0, 4, 8, 9]
    carried = recorded[2].carried
    assert carried.size == 8 * CLASSES


def test_summary_figures_and_health_cope_with_light_probes(recorded: ntk.History) -> None:
    rows = {row.quantity: row for row in summary.rows(recorded.snapshots)}
    assert rows["measured"].value.startswith("4 probes, last at step 9")
    assert "6 light probes in between" in rows["measured"].meaning
    assert "after a start-up of" in rows["monitor overhead"].meaning
    assert len(summary.rows(recorded.snapshots[1:3])) == 1  # light ones alone describe nothing
    drawn = figures.scalars(recorded.snapshots)["data"]
    points = {trace["name"]: list(trace["x"]) for trace in drawn}
    assert points["sharpness"] == list(range(10))
    assert points["trace"] == [0, 4, 8, 9]
    assert findings(recorded.snapshots) == findings(recorded.measured)


def test_light_probes_change_nothing_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cadence(self: Schedule, step: int) -> Any:
        if self.last_step is not None and (step <= self.last_step or self.hold):
            return None
        return "full" if step % 5 == 0 else "light"

    monkeypatch.setattr(Schedule, "tier", cadence)
    found = []
    for callbacks in ([], [NTKMonitor(probe=8)]):
        seeded()
        module = Classifier(mlp())
        run = trainer(tmp_path, callbacks, max_steps=14, max_epochs=-1, logger=TensorBoardLogger(tmp_path))
        run.fit(module, loader(digits()))
        found.append(outcome(module, run))
    assert found[0] == found[1]
    history = ntk.load_history(tmp_path / "lightning_logs" / "version_1")
    assert history.notes == ()
    assert [s.status for s in history if s.step in (10, 14)] == ["measured", "measured"]
    assert {s.step for s in history.light} >= {11, 12, 13}
    assert history.light[-1].metrics["sharpness"] > 0
    assert "write" in history.light[-1].seconds
