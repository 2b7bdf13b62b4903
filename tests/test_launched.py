"""Forecasts by band and by direction: exact where the kernel is frozen, and measured in what they were made with."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor import directions
from ntk_monitor.forecasting import band_energies, foreseen
from ntk_monitor.losses import Terms, recognised
from ntk_monitor.modes import Modes
from ntk_monitor.snapshot import Snapshot

SAMPLES, OUTPUTS, STEPS = 12, 3, 40


class Linear:
    """A linear model under full-batch gradient descent on squared errors, whose forecasts are exact."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(SAMPLES, 6), torch.randn(SAMPLES, OUTPUTS)
        self.model = nn.Linear(6, OUTPUTS)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        given = {"total_steps": STEPS, "batch_size": SAMPLES, "every_n_steps": 5, "forecast_every": 3, **options}
        data = (self.x, self.y)
        self.monitor = ntk.Monitor(self.model, self.optimizer, data, "mse", reference=data, strict=True, **given)

    def steps(self, count: int = 5) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            F.mse_loss(self.model(self.x), self.y).backward()
            self.optimizer.step()
            self.monitor.observe()

    def run(self, tiers: str) -> list[Snapshot]:
        """Probe at every fifth step: full (f) or light (l)."""
        found = []
        for letter in tiers:
            found.append(self.monitor.snapshot(tier="full" if letter == "f" else "light"))
            self.steps()
        return found


@pytest.fixture(scope="module")
def frozen() -> list[Snapshot]:
    return Linear().run("flfffl")


def test_bands_come_out_as_they_were_forecast(frozen: list[Snapshot]) -> None:
    launch = frozen[0]
    ticks = launch.forecast_steps.tolist()
    assert ticks == list(range(STEPS + 1))
    assert launch.forecast_bands.shape == (STEPS + 1, 4)
    np.testing.assert_allclose(launch.forecast_bands.sum(axis=1), 2 * launch.forecast_loss, rtol=1e-5)
    np.testing.assert_allclose(launch.forecast_bands[0].sum(), (launch.coordinates**2).sum(), rtol=1e-5)
    assert (launch.forecast_bands[0] > 0).sum() >= 2  # else there is nothing to tell apart
    for later in frozen[1:4]:
        assert later.facts["launch_step"] == 0
        assert later.launched_bands.shape == (4,)
        np.testing.assert_allclose(
            later.launched_bands,
            launch.forecast_bands[later.step],
            rtol=1e-4,
            atol=1e-6 * launch.forecast_bands[0].sum(),
        )


def test_the_next_forecast_takes_over(frozen: list[Snapshot]) -> None:
    assert [bool(s.forecast_bands.size) for s in frozen] == [True, False, False, False, True, False]
    assert [s.facts.get("launch_step") for s in frozen] == [None, 0, 0, 0, 0, 20]
    last = frozen[4].forecast_bands[frozen[4].forecast_steps.tolist().index(frozen[5].step)]
    np.testing.assert_allclose(frozen[5].launched_bands, last, rtol=1e-3, atol=1e-7)


def test_directions_come_out_as_they_were_forecast(frozen: list[Snapshot]) -> None:
    launch = frozen[0]
    assert launch.forecast_directions.shape == (STEPS + 1, OUTPUTS)
    for probe in (frozen[0], frozen[2], frozen[3], frozen[4]):
        assert probe.directions == launch.directions
        np.testing.assert_allclose(launch.forecast_directions[probe.step], probe.direction_residual, rtol=1e-4)


def test_patterns_of_ones_own_keep_their_sign() -> None:
    w = np.zeros((SAMPLES, OUTPUTS))
    w[:4, 1] = -1.0
    run = Linear(directions={"low": w, "high": -w})
    launch, later = run.run("ff")
    assert launch.forecast_directions[0, 0] == pytest.approx(-launch.forecast_directions[0, 1])
    np.testing.assert_allclose(launch.forecast_directions[0], launch.direction_residual, rtol=1e-4)
    np.testing.assert_allclose(launch.forecast_directions[5], later.direction_residual, rtol=1e-4)


def test_without_a_planned_length_there_are_no_bands() -> None:
    first, second = Linear(total_steps=None).run("ff")
    assert first.forecast_loss.size
    assert first.forecast_directions.size
    assert first.forecast_bands.size == 0
    assert second.launched_bands.size == 0
    assert "launch_step" not in second.facts


def slow(terms: Terms, gradient: Any) -> Any:
    """Return S⁺ g sample by sample: the shortest solution of S u = g."""
    rows = [np.linalg.lstsq(s, g, rcond=None)[0] for s, g in zip(terms.root, gradient, strict=True)]
    return np.concatenate(rows)


def test_a_simulated_residual_is_taken_apart_as_a_measured_one() -> None:
    generator = np.random.default_rng(0)
    loss, y = recognised("cross_entropy"), torch.arange(5) % 3
    outputs = torch.from_numpy(generator.normal(size=(4, 5, 3)))
    draw = generator.normal(size=(15, 15))
    modes = Modes.of(draw @ draw.T, loss.terms(outputs[0], y))
    groups = directions.class_groups(y.numpy(), 3)
    along, named = foreseen(outputs, loss, y, modes, lambda terms: directions.parts(groups, terms.residual()))
    masks = {"first": np.arange(15) < 4, "rest": np.arange(15) >= 4, "none": np.zeros(15, dtype=bool)}
    bands = band_energies(along, masks)
    for t, f in enumerate(outputs):
        p = torch.softmax(f, dim=1).numpy()
        g = (p - np.eye(3)[y.numpy()]) / 5
        u = slow(modes.terms, g)
        for i in range(15):
            assert along[t, i] == pytest.approx(sum(modes.vectors[r, i] * u[r] for r in range(15)), abs=1e-9)
        assert bands[t].tolist() == pytest.approx([(along[t, :4] ** 2).sum(), (along[t, 4:] ** 2).sum(), 0.0])
        own = [sum((1 / p[n, y[n]] - 1) / 5 for n in range(5) if y[n] == c) ** 0.5 for c in range(3)]
        np.testing.assert_allclose(named[t], own, rtol=1e-9)
    assert band_energies(along, {}).size == 0
