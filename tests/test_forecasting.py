"""Forecasts of a live run: right where theory says so, scored by what happened, and silent with a reason elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

import ntk_monitor as ntk
from ntk_monitor.forecasting import coming, horizon, ticks
from ntk_monitor.optimizers import read
from ntk_monitor.snapshot import Snapshot

SAMPLES, PROBE, EVERY, TOTAL = 24, 6, 5, 40

Optimizers = Callable[[Any], torch.optim.Optimizer]


def wave(t: int) -> float:
    """A factor of the learning rate that changes at every step."""
    return 0.6 + 0.4 * float(np.cos(0.7 * t))


def recipe(**options: Any) -> ntk.Recipe:
    return ntk.Recipe(**{"total_steps": TOTAL, "strict": True, "forecast_every": 1, "every_n_steps": EVERY, **options})


class Run:
    """A linear model under full-batch steps, with a monitor that draws or is given its probe."""

    def __init__(self, optimizer: Optimizers, loss: str = "mse", *, rides: bool = False, **options: Any) -> None:
        self.model: nn.Module = options.pop("model", None) or nn.Linear(4, 3).double()
        self.x, held = torch.randn(SAMPLES, 4).double(), torch.randn(PROBE, 4).double()
        y = torch.randn(SAMPLES + PROBE, 3).double() if loss == "mse" else torch.arange(SAMPLES + PROBE) % 3
        self.y, self.loss = y[:SAMPLES], {"mse": nn.MSELoss(), "cross_entropy": nn.CrossEntropyLoss()}[loss]
        self.optimizer = optimizer(self.model.parameters())
        self.schedule = LambdaLR(self.optimizer, wave)
        self.clip: float | None = options.pop("clip", None)
        train = TensorDataset(self.x, self.y)
        probe: Any = (held, y[SAMPLES:]) if rides else ntk.Probe.of(train, PROBE)
        options = {
            "reference": train,
            "recipe": recipe(),
            **options,
        }
        self.monitor = ntk.Monitor(self.model, self.optimizer, probe, loss, **options)
        self.monitor.clip = self.clip
        self.monitor.rates_ahead = self.rates_ahead

    def rates_ahead(self, steps: int) -> Any:
        first = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        return np.array([[lr * wave(self.monitor.steps + t) for lr in first] for t in range(steps)])

    def steps(self, count: int, scale: float = 1.0) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss(self.model(self.x), self.y).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(scale)
            self.optimizer.step()
            self.monitor.observe()
            self.schedule.step()

    def value(self) -> float:
        probe = self.monitor.probe
        return float(self.loss(self.model(probe.inputs), probe.targets).detach())

    def scored(self, warm: int = 0) -> Snapshot:
        self.steps(warm)
        self.monitor.snapshot()
        self.steps(EVERY)
        return self.monitor.snapshot()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True)


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.05)


def rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=0.02)


@pytest.mark.parametrize(("loss", "rides"), [("mse", False), ("cross_entropy", True)])
@pytest.mark.parametrize(
    ("optimizer", "warm", "error"), [(sgd, 3, 1e-5), (adamw, 0, 1e-5), (adamw, 15, 1e-5), (rmsprop, 2, 1e-5)]
)
def test_forecasts_of_a_linear_model_come_true(
    optimizer: Optimizers, warm: int, error: float, rides: bool, loss: str
) -> None:
    found = Run(optimizer, loss, rides=rides).scored(warm)
    assert found.facts["motion"] > 0.01
    assert found.facts["forecast_error_residual"] < error * found.facts["motion"]
    assert ("forecast_error" in found.facts) == (found.facts["motion"] > 0.05)
    assert found.facts.get("forecast_error", 0.0) < error
    assert found.facts.get("explained_error", 0.0) < error
    name = found.texts["optimizer"]
    assert found.texts["forecast"] == f"from the tangent at this step, 24 training samples and {name}"


def test_steps_other_than_foretold_are_an_error() -> None:
    run = Run(plain)
    run.monitor.snapshot()
    run.steps(EVERY, scale=0.5)  # half of each step is lost, which no record of rates shows
    assert 0.5 < run.monitor.snapshot().facts["forecast_error"] < 2


def test_clipping_is_part_of_the_forecast() -> None:
    found = Run(plain, clip=0.05).scored(2)
    assert found.facts["forecast_error_residual"] < 1e-6
    run = Run(plain, clip=0.05)
    run.monitor.clip = None
    assert run.scored(2).facts["forecast_error_residual"] > 0.01


def test_the_loss_at_the_end_and_the_time_to_learn_come_true() -> None:
    run = Run(lambda p: torch.optim.SGD(p, lr=0.2))
    run.steps(2)
    first = run.monitor.snapshot()
    assert first.forecast_steps[0] in (2, 3)
    assert first.forecast_steps[-1] == TOTAL
    run.steps(TOTAL - 2)
    assert run.value() == pytest.approx(first.facts["loss_remaining"], rel=1e-5)
    assert 0 <= first.metrics["residual_out_of_reach"] <= 1
    last = run.monitor.snapshot()
    assert "loss_remaining" not in last.facts  # nothing is ahead any more
    assert last.texts["forecast_score"].startswith("the forecast of the previous probe covers 5 of the 38 steps since")


def test_modes_of_a_probe_that_is_the_training_set_are_learned_when_they_should() -> None:
    model, x, y = nn.Linear(4, 1).double(), torch.randn(12, 4).double(), torch.randn(12, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = recipe(total_steps=60)
    found = ntk.Monitor(model, optimizer, (x, y), "mse", reference=(x, y), recipe=options).snapshot(0)
    alive = found.rates > found.rates_floor
    with np.errstate(divide="ignore"):
        wanted = np.ceil(np.log(10**-0.5) / np.log(np.abs(1 - 0.05 * found.rates[alive])))
    reached = wanted <= 60
    assert reached.any()
    assert not reached.all()
    np.testing.assert_allclose(found.time_to_learn[alive][reached], wanted[reached], atol=1)
    assert np.isinf(found.time_to_learn[alive][~reached]).all()
    assert np.isinf(found.time_to_learn[~alive]).all()


def test_a_forecast_that_diverges_is_the_worst_and_not_lost() -> None:
    run = Run(lambda p: torch.optim.SGD(p, lr=1e80))
    run.monitor.snapshot()
    for _ in range(EVERY):  # what the monitor is told to have happened, while next to nothing did
        run.monitor.observe()
    with torch.no_grad():
        run.model.weight.add_(0.5)  # type: ignore[operator]
    found = run.monitor.snapshot()
    assert found.facts["forecast_error"] == found.facts["forecast_error_residual"] == 100


def test_without_a_schedule_the_rate_in_force_is_taken() -> None:
    run = Run(plain)
    run.monitor.rates_ahead = None
    assert run.scored().facts["forecast_error"] > 0.05  # the wave is not known
    steady = Run(plain)
    steady.monitor.rates_ahead = None
    steady.schedule = LambdaLR(steady.optimizer, lambda t: 1.0)
    assert steady.scored().facts["forecast_error"] < 1e-5


def test_a_group_that_comes_in_between_costs_a_score_and_not_the_probe() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    run = Run(lambda _: torch.optim.SGD(model[1].parameters(), lr=0.1), model=model)
    run.monitor.snapshot()
    run.steps(2)
    run.optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    run.monitor.observe()
    found = run.monitor.snapshot()
    assert found.status == "measured"
    assert found.facts["forecast_error_residual"] > 0


def test_a_probe_without_a_loss_in_between_drops_the_forecast() -> None:
    run = Run(plain)
    run.monitor.snapshot()
    run.steps(3)
    loss, run.monitor.loss = run.monitor.loss, None
    assert run.monitor.snapshot().texts["forecast"].startswith("none: it takes a known loss")
    run.steps(3)
    run.monitor.loss = loss
    # No forecast was made at the probe in between.
    assert "forecast_error" not in run.monitor.snapshot().facts
    run.steps(3)
    assert run.monitor.snapshot().facts["forecast_error"] < 1e-4


class Rows(nn.Module):
    """Two linear layers around a norm over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        (plain, {"recipe": recipe(outputs="trace")}, ""),
        (rmsprop, {}, "RMSprop has no function-space form"),
        (adamw, {}, "not available before about 10 steps of Adam"),
        (plain, {"model": Rows()}, "BatchNorm couples the samples"),
    ],
)
def test_where_the_rest_of_the_run_cannot_be_simulated_the_reason_is_said(
    optimizer: Optimizers, options: Any, words: str
) -> None:
    run = Run(optimizer, **options)
    found = run.monitor.snapshot()
    assert found.texts["ahead"]
    assert words in found.texts["ahead"]
    assert not found.time_to_learn.size
    assert "residual_out_of_reach" not in found.metrics
    run.steps(EVERY)
    assert "motion" in run.monitor.snapshot().facts  # the next steps are forecast all the same


def test_without_training_samples_there_is_no_forecast() -> None:
    for options in ({"reference": None}, {"recipe": recipe(reference=0)}):
        found = Run(plain, **options).monitor.snapshot()
        assert found.texts["forecast"].startswith("none: a probe alone forecasts wrongly")
        assert not found.time_to_learn.size


@pytest.mark.parametrize(("every", "simulated"), [(0, []), (2, [0, 2])])
def test_forecasts_are_made_at_some_probes_and_scored_at_the_next(every: int, simulated: list[int]) -> None:
    run, found = Run(plain, recipe=recipe(forecast_every=every)), []
    for _ in range(3):
        found.append(run.monitor.snapshot())
        run.steps(1)
    assert [i for i, s in enumerate(found) if s.time_to_learn.size] == simulated
    assert ["motion" in s.facts for s in found] == [i - 1 in simulated for i in range(3)]


def test_an_expensive_kernel_is_no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(plain)
    monkeypatch.setattr("ntk_monitor.forecasting.FULL_KERNEL_PRODUCTS", 10)
    assert "a smaller reference= makes it cheaper" in run.monitor.snapshot().texts["ahead"]


def test_the_whole_training_set_drives_or_a_draw_beside_the_probe() -> None:
    # The probe drives with the reference where they are the whole set; of a larger one it would be a biased part.
    for size, driving in ((10, 10), (512, SAMPLES)):
        found = Run(plain, recipe=recipe(reference=size)).monitor.snapshot()
        assert f"{driving} training samples" in found.texts["forecast"]
        assert f"{driving} training samples" in found.texts["ahead"]
    found = Run(plain, recipe=recipe(reference=10), rides=True).monitor.snapshot()
    assert "10 training samples" in found.texts["forecast"]


def test_how_far_ahead_and_at_which_rates() -> None:
    assert [horizon(step, total) for step, total in ((0, 40), (40, 40), (50, 40), (5, None))] == [40, 0, 0, 1000]
    model = nn.Linear(2, 1)
    groups: list[Any] = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
    state = read(model, torch.optim.SGD(groups))
    now = np.tile([0.1, 0.2], (3, 1))
    planned = np.arange(6.0).reshape(3, 2)
    assert np.array_equal(coming(3, state, lambda steps: planned[:steps]), planned)
    for wrong in (None, lambda _: None, lambda _: planned[:, :1], lambda _: planned * np.nan):
        assert np.array_equal(coming(3, state, wrong), now)


def test_few_ticks_hold_the_first_and_the_last_step() -> None:
    places = ticks(5000)
    assert (places[0], places[-1]) == (0, 4999)
    assert len(places) <= 60
    assert (np.diff(places) > 0).all()
    assert ticks(7).tolist() == list(range(7))
