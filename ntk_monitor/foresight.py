"""Forecasts as part of a look at a run: the last one scored, the next one made, in words where there is none."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.bands import reach, residual_out_of_reach
from ntk_monitor.directions import Direction, matrix
from ntk_monitor.errors import NTKMonitorError, said
from ntk_monitor.forecasting import band_energies, coming, foreseen, horizon, learned, linearised, ticks
from ntk_monitor.look import Now, Outlook
from ntk_monitor.losses import Loss, Terms
from ntk_monitor.modes import Modes
from ntk_monitor.optimizers import OptimizerState
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import Recipe
from ntk_monitor.walk import NoForecastError, Path, Scored, everything, scored, walked

# A forecast may cost this many times what the kernel of its probe did, but a second is always allowed.
_PRICE = 4.0

Naming = Callable[[Terms], tuple[Direction, ...]]
"""Which directions a probe with these loss terms follows."""

# Step, bands of modes, and the modes of the probe that made the last forecast.
_Launch = tuple[int, dict[str, NDArray[np.bool_]], Modes]

# A forecast that diverged missed by infinitely much, which no record can hold.
_WORST = 100.0


class Foresight:
    """Holds the forecast of one probe until the next, which scores it."""

    def __init__(self, model: nn.Module, recipe: Recipe, probe: Probe) -> None:
        self._model, self._recipe, self._probe = model, recipe, probe
        self._since = recipe.forecast_every
        self._made: Path | None = None
        self._interval: int | None = recipe.every_n_steps
        self._step: int | None = None
        self._cost: float | None = None
        self._launch: _Launch | None = None

    def look(self, now: Now, found: Outlook, state: OptimizerState | None, naming: Naming) -> None:
        """Score the forecast of the previous probe, then make the next when it is due."""
        self._score(now, found)
        if now.terms is not None:
            self.compare(found, now.terms)
        if now.place is not None:
            self._interval = now.place.interval
            due = now.place.index % max(1, self._recipe.forecast_every) == 0
            self._since = self._recipe.forecast_every if due else 0
            self._launch = None  # a record of a series depends on the one before it alone
        elif self._recipe.every_n_steps is None and self._step is not None:
            self._interval = now.step - self._step
        self._step = now.step
        self._since += 1
        if reason := self._none(now, state):
            found.texts["forecast"] = reason
        elif self._recipe.forecast_every > 0 and state is not None and now.loss is not None:
            found.saving = self._expected(now)
            if self._since >= self._recipe.forecast_every:
                self._forecast(now, found, state, now.loss, naming)

    def compare(self, found: Outlook, terms: Terms) -> None:
        """Measure the residual in the bands of the last forecast, in the modes and the curvature it was made with."""
        if self._launch is None:
            return
        step, masks, modes = self._launch
        with np.errstate(all="ignore"):
            found.arrays["launched_bands"] = band_energies(modes.carried(terms.gradient)[None], masks)[0]
        found.facts["launch_step"] = float(step)

    def handed(self) -> dict[str, Any]:
        """Return the forecasts that the next probe scores."""
        return {"made": self._made, "made_at": self._step, "launch": self._launch}

    def take(self, handed: dict[str, Any]) -> None:
        """Take over a forecast that was made before."""
        self._made, self._step, self._launch = handed["made"], handed["made_at"], handed["launch"]

    def _forecast(self, now: Now, found: Outlook, state: OptimizerState, loss: Loss, naming: Naming) -> None:
        if found.saving > now.affordable:
            found.texts["forecast"] = (
                f"none yet: one would take about {found.saving:.1g} s, and max_overhead has saved "
                f"{now.affordable:.1g} s for it; fewer reference= samples make it quicker"
            )
            return
        start = time.perf_counter()
        self._made = self._walk(now, found, state, loss)
        self._ahead(now, found, state, naming)
        self._since = 0
        found.forecast = self._cost = found.saving = time.perf_counter() - start

    def _expected(self, now: Now) -> float:
        """Return the seconds of the next forecast: those of the last one, or a guess by the size of its kernels."""
        if self._cost is not None:
            return self._cost
        samples = self._probe.samples
        others = 0 if now.reference is None else now.reference.samples
        # 27 times the kernel of 64 probe samples with 512 others, where 35 were measured on a CNN for digits.
        return float(now.cost * ((samples + others) / samples) ** 1.5)

    def _score(self, now: Now, found: Outlook) -> None:
        made, self._made = self._made, None
        if made is None or self._step is None or now.loss is None:
            return
        try:
            steps = now.step - self._step
            judged = scored(self._model, made, steps, self._probe, now.loss, now.predictions, self._recipe)
        except NoForecastError as error:
            found.texts["forecast_score"] = str(error)
            return
        _write(judged, found)

    def _walk(self, now: Now, found: Outlook, state: OptimizerState, loss: Loss) -> Path | None:
        if self._interval is None:
            if now.place is None:
                found.texts["forecast_score"] = "the first interval between probes is not known beforehand"
            return None
        steps = min(self._interval, horizon(now.step, now.total_steps))
        try:
            made = walked(
                self._model,
                now.optimizers[0],
                self._probe,
                now.reference,
                loss,
                self._recipe,
                start=now.predictions,
                rates=coming(steps, state, now.rates_ahead),
                clip=now.clip,
                seconds=math.inf if now.place else max(1.0, _PRICE * now.cost),
                population=now.population,
            )
        except (NoForecastError, NTKMonitorError) as error:
            found.texts["forecast"] = said(error, kind=False)
            return None
        found.texts["forecast"] = f"from the tangent at this step, {made.reference} training samples and {state.name}"
        return made

    def _ahead(self, now: Now, found: Outlook, state: OptimizerState, naming: Naming) -> None:
        """Simulate to the end of the run: when is each mode and each direction learned, and where the loss goes."""
        steps = horizon(now.step, now.total_steps)
        if not steps or now.modes is None or now.terms is None or now.loss is None:
            found.texts.setdefault("ahead", "none: it needs the residual's modes and steps to come")
            return
        try:
            dynamics, rows = linearised(self._model, self._probe, now, state, self._recipe)
        except (NoForecastError, NTKMonitorError) as error:
            found.texts["ahead"] = said(error, kind=False)
            return
        projections = {"modes": now.modes.vectors.T}
        if named := naming(now.terms):
            projections["directions"] = matrix(named)
        rates = coming(steps, state, now.rates_ahead)
        seen = learned(dynamics, rows, now.loss, self._probe.targets, projections, rates, now.clip)
        found.texts["ahead"] = f"from the kernel of this step, {dynamics.driving} training samples and {state.name}"
        times = seen.times["modes"]
        at = ticks(len(seen.steps))
        found.arrays |= {
            "time_to_learn": times,
            "forecast_steps": seen.steps[at] + now.step,
            "forecast_loss": seen.loss[at],
        }
        if named:
            found.arrays["direction_eta"] = seen.times["directions"]
        if seen.reached == steps:
            found.facts["loss_remaining"] = float(seen.loss[-1])
        if now.total_steps is not None:
            share = residual_out_of_reach(now.modes.coordinates**2, times, float(steps))
            found.metrics["residual_out_of_reach"] = share
        self._bands(now, found, seen.outputs[at], naming)

    def _bands(self, now: Now, found: Outlook, outputs: Tensor, naming: Naming) -> None:
        """Write down what the simulation leaves of the residual, and remember what to compare it with."""
        assert now.modes is not None
        assert now.loss is not None
        times, left = found.arrays["time_to_learn"], math.nan if now.total_steps is None else now.total_steps - now.step
        masks = reach(now.modes.rates, now.modes.floor, times, float(left))
        # Far out probabilities underflow.
        with np.errstate(all="ignore"):
            along, named = foreseen(outputs, now.loss, self._probe.targets, now.modes, naming)
            found.arrays |= {"forecast_bands": band_energies(along, masks), "forecast_directions": named}
        self._launch = (now.step, masks, now.modes) if masks else None

    def _none(self, now: Now, state: OptimizerState | None) -> str:
        """Return why there can be no forecast at all; empty when there can."""
        if state is None or now.loss is None or self._probe.targets is None:
            return "none: it takes a known loss, targets and an optimizer"
        if self._recipe.reference == 0 or not (now.reference or everything(self._probe, now.reference, now.population)):
            return "none: a probe alone forecasts wrongly; it takes training samples that can be drawn (reference=)"
        if len(now.optimizers) > 1:
            return "none: several optimizers take turns"
        return ""


def _write(judged: Scored, found: Outlook) -> None:
    verdict = judged.forecast
    found.facts["motion"] = verdict.motion
    found.facts["forecast_error_residual"] = min(verdict.error_residual, _WORST)
    if not verdict.suppressed:
        found.facts["forecast_error"] = min(verdict.error, _WORST)
        if judged.explained is not None:
            found.facts["explained_error"] = min(judged.explained.error, _WORST)
