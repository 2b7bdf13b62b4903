"""A look at a run: every part stands for itself, says what it could not do, and leaves the run alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.metrics import METRICS, metric
from ntk_monitor.snapshot import FACTS, TEXTS, Snapshot

CLASSES = 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


class Run:
    """A small classifier under the monitor, reference samples included."""

    def __init__(self, module: nn.Module | None = None, optimizer: Any = None, **options: Any) -> None:
        self.module = module or net()
        self.x, self.y = torch.randn(20, 4), torch.arange(20) % CLASSES
        self.optimizer = optimizer or torch.optim.SGD(self.module.parameters(), lr=0.3, momentum=0.9)
        probe = options.pop("probe", (self.x[:8], self.y[:8]))
        given = {
            "every_n_steps": 3,
            "batch_size": 20,
            "total_steps": 30,
            "reference": (self.x, self.y),
            "forecast_every": 1,
            **options,
        }
        self.monitor = ntk.Monitor(self.module, self.optimizer, probe, given.pop("loss", "cross_entropy"), **given)

    def steps(self, count: int = 3) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            F.cross_entropy(self.module(self.x), self.y).backward()
            self.optimizer.step()
            self.monitor.observe()

    def second(self) -> Snapshot:
        self.monitor.snapshot()
        self.steps()
        return self.monitor.snapshot()


# What each part leaves in a record.
SIGNS: dict[str, Any] = {
    "facts": lambda s: "output_rms" in s.facts,
    "stability": lambda s: "sharpness" in s.metrics,
    "noise": lambda s: "gradient_norm" in s.facts,
    "layers": lambda s: bool(s.layer_trace.size),
    "metrics": lambda s: "top_share" in s.facts,
    "updates": lambda s: "linearisation_error" in s.metrics,
    "directions": lambda s: bool(s.direction_residual.size),
    "forecast": lambda s: "forecast_error_residual" in s.facts and bool(s.time_to_learn.size),
}

# What looks back and needs two looks.
LATER = {"updates", "forecast"}

# Where each part can fail, and what else cannot be had without it.
FAULTS: dict[str, tuple[str, set[str]]] = {
    "ntk_monitor.outlook.facts.of_outputs": ("facts", set()),
    "ntk_monitor.outlook.stability": ("stability", set()),
    "ntk_monitor.outlook.read": ("stability", {"forecast"}),
    "ntk_monitor.outlook.gradient_gram": ("noise", set()),
    "ntk_monitor.outlook.layer_traces": ("layers", set()),
    "ntk_monitor.outlook.evaluate": ("metrics", set()),
    "ntk_monitor.outlook.decompose": ("updates", set()),
    "ntk_monitor.outlook.Kept.of": ("updates", set()),
    "ntk_monitor.outlook.directions.default_groups": ("directions", set()),
    "ntk_monitor.foresight.walked": ("forecast", set()),
    "ntk_monitor.foresight.learned": ("forecast", set()),
    "ntk_monitor.forecasting.linearise": ("forecast", set()),
}


def test_an_undisturbed_look_has_every_part() -> None:
    found = Run(strict=True).second()
    assert {part for part, there in SIGNS.items() if there(found)} == set(SIGNS)
    assert set(found.texts) <= set(TEXTS)
    assert set(found.facts) <= set(FACTS) | set(METRICS)
    assert not any("not measured" in text for text in found.texts.values())
    assert not {"uncovered", "structural_zeros", "scale_free"} & set(found.texts)


BOOM = RuntimeError("boom\nand more")


@pytest.mark.parametrize(
    ("place", "fault", "said"),
    [(place, BOOM, "RuntimeError: boom") for place in FAULTS]
    + [
        ("ntk_monitor.outlook.stability", MemoryError(), "MemoryError: no message"),
        ("ntk_monitor.outlook.stability", ntk.NetworkError("no such pass"), "no such pass"),
    ],
)
def test_a_fault_costs_only_its_part(place: str, fault: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise fault

    run, (part, without) = Run(), FAULTS[place]
    monkeypatch.setattr(place, fail)
    second = part in LATER
    found = run.second() if second else run.monitor.snapshot()
    assert found.status == "measured"
    lost = {name for name, there in SIGNS.items() if not there(found)}
    assert lost == {part} | without | (set() if second else LATER)
    assert found.texts[part] == f"not measured: {said}"
    assert set(found.texts) <= set(TEXTS)


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise BOOM

    run = Run(strict=True)
    run.monitor.snapshot()
    run.steps()
    for place in ("read", "stability", "Kept.of"):
        with monkeypatch.context() as patched:
            patched.setattr(f"ntk_monitor.outlook.{place}", fail)
            with pytest.raises(RuntimeError, match="boom"):
                run.monitor.snapshot()


def test_the_next_look_after_a_fault_is_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    with monkeypatch.context() as patched:
        for place in FAULTS:
            patched.setattr(place, fail)
        bare = run.second()
    assert not any(there(bare) for there in SIGNS.values())
    run.steps()
    run.monitor.snapshot()
    run.steps()
    found = run.monitor.snapshot()
    assert {part for part, there in SIGNS.items() if there(found)} == set(SIGNS)


class Everything(nn.Module):
    """BatchNorm, dropout and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_a_look_changes_nothing(kind: Any) -> None:
    module = Everything() if kind is torch.optim.SGD else net()
    optimizer = kind(module.parameters(), lr=1e-3)
    run = Run(module, optimizer, strict=True)
    run.steps(11)
    for _ in range(2):
        before, state = Fingerprint.of(module), str(optimizer.state_dict())
        run.monitor.snapshot()
        assert before.changes(Fingerprint.of(module)) == []
        assert str(optimizer.state_dict()) == state
        run.steps()


def test_a_users_metric_that_draws_numbers_leaves_them_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dict(METRICS)

    @metric(name="drawn", formula="random", unit="none")
    def drawn(measured: Any) -> float:
        return float(np.random.rand()) + 0 * float(torch.rand(1)) + 1

    try:
        run = Run(strict=True)
        before = Fingerprint.of(run.module)
        found = run.monitor.snapshot()
        assert 1 <= found.facts["drawn"] < 2
        assert before.changes(Fingerprint.of(run.module)) == []
    finally:
        METRICS.clear()
        METRICS.update(kept)


def test_a_probe_whose_weights_have_moved_on_has_no_look() -> None:
    run = Run(strict=True)
    raw = run.monitor.measure(0)
    run.steps()
    found = run.monitor.finish(raw, fresh=False)
    assert not any(there(found) for there in SIGNS.values())
    assert "not known yet" in found.texts["stability"]
    assert found.rates.size  # modes are numbers of that time


def test_without_an_optimizer_or_a_loss_the_rest_is_there() -> None:
    x, y = torch.randn(8, 4), torch.arange(8) % CLASSES
    bare = ntk.Monitor(net(), None, (x, y), "cross_entropy", reference=(x, y), strict=True).snapshot(0)
    assert bare.texts["stability"] == "not measured: no optimizer was given"
    assert bare.texts["forecast"] == "none: it takes a known loss, targets and an optimizer"
    assert bare.layer_share == pytest.approx(bare.layer_trace / bare.layer_trace.sum())
    unknown = Run(loss=None, strict=True).monitor.snapshot(0)
    assert unknown.texts["stability"] == "not measured: the loss is not known"
    assert not unknown.directions
    assert unknown.layer_trace.size
    blind = Run(probe=torch.randn(8, 4), strict=True).monitor.snapshot(0)
    assert blind.texts["stability"] == "not measured: the probe has no targets"


def test_layers_that_no_optimizer_moves_are_named_and_have_no_share() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    found = Run(module, torch.optim.SGD(module[2].parameters(), lr=0.1), strict=True).second()
    assert found.texts["uncovered"] == "0.weight, 0.bias"
    assert found.facts["uncovered"] == 30
    assert found.layers == ("0", "2")
    assert found.layer_trace[0] > 0
    assert list(found.layer_share) == [0, 1]
    assert list(found.layer_update) == [0, 1]
    assert list(found.layer_moved > 0) == [False, True]


def test_what_is_zero_or_free_of_scale_by_construction_is_named() -> None:
    head = nn.Linear(6, CLASSES)
    nn.init.zeros_(head.weight)
    behind = Run(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), head)).monitor.snapshot(0)
    assert list(behind.layer_trace > 0) == [False, True]
    assert "0" in behind.texts["structural_zeros"].split(", ")
    free = Run(nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, CLASSES))).monitor.snapshot(0)
    assert free.texts["scale_free"] == "0"


def test_updates_compare_with_the_probe_before() -> None:
    run = Run(nn.Linear(4, CLASSES).double(), probe=(torch.randn(8, 4).double(), torch.arange(8) % CLASSES))
    run.x = run.x.double()
    first = run.monitor.snapshot()
    run.steps()
    second = run.monitor.snapshot()
    assert not first.layer_update.size
    assert not first.layer_moved.any()
    assert second.metrics["linearisation_error"] < 1e-6
    assert second.layers == ("weight", "bias")  # loose parameters of the root
    assert second.layer_update.sum() == pytest.approx(1)
    assert (second.layer_useful > 0).all()
    run.steps()
    third = run.monitor.snapshot()
    assert third.layer_moved[0] > second.layer_moved[0] > 0  # both from the first probe


def test_weights_that_are_too_large_to_keep_are_said_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntk_monitor.outlook._KEPT_BYTES", 100)
    monkeypatch.setattr("ntk_monitor.outlook.Kept.of", lambda *_: pytest.fail("copied all the same"))
    found = Run(strict=True).second()
    assert found.texts["updates"].startswith("not measured: a copy of the weights takes")
    assert not found.layer_update.size


def test_directions_of_ones_own_are_followed() -> None:
    wrong = np.zeros((8, CLASSES))
    wrong[3, 1] = 2.0
    found = Run(directions={"sample 3": wrong, "all": np.ones((8, CLASSES))}, strict=True).second()
    assert found.directions == ("sample 3", "all")
    assert found.direction_eta.shape == found.direction_rate.shape == (2,)
    bad = Run(directions={"short": np.ones((3, CLASSES))}).monitor.snapshot(0)
    assert bad.texts["directions"].startswith("not measured: direction 'short' needs one number per output")


def test_classes_are_followed_by_default_and_their_residuals_are_parts_of_it() -> None:
    found = Run(strict=True).monitor.snapshot(0)
    assert found.directions == ("class 0", "class 1", "class 2")
    assert (found.direction_residual**2).sum() == pytest.approx((found.coordinates**2).sum())
    assert found.interference.shape == (3, 3)


def test_noise_is_off_where_samples_are_coupled() -> None:
    coupled = Run(Everything(), strict=True, reference=None).monitor.snapshot(0)
    assert "BatchNorm couples the samples" in coupled.texts["noise"]
    assert not {"noise_scale", "noise_scale_bound"} & {*coupled.metrics, *coupled.facts}


@pytest.mark.parametrize("samples", [1, 2])
def test_the_smallest_probes_say_what_they_are_too_small_for(samples: int) -> None:
    run = Run()
    found = Run(strict=True, reference=None, probe=(run.x[:samples], run.y[:samples])).second()
    assert found.texts["noise"] == f"not measured: a noise scale needs 3 probe samples or more, got {samples}"
    assert found.facts["gradient_norm"] > 0
    assert not {"noise_scale", "noise_scale_bound"} & {*found.metrics, *found.facts}


def test_wrapped_modules_are_seen_through() -> None:
    module = net()
    whole = Run(nn.DataParallel(module), torch.optim.SGD(list(module.parameters())[:2], lr=0.3), strict=True).second()
    assert whole.layers == ("0", "2")
    assert whole.facts["uncovered"] == 21
    assert np.isfinite(whole.layer_norm).all()
    assert whole.layer_update.tolist() == [1, 0]


def test_the_first_errors_of_leaving_out_are_the_only_ones() -> None:
    run = Run(strict=True, reference=None)
    found = [run.monitor.snapshot(step) for step in range(4)]
    assert ["sample_loo" in s.facts for s in found] == [True, True, True, False]
