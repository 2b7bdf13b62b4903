"""Forecasts as part of a look at a run: the last one scored, the next one made, in words where there is none."""

from collections.abc import Sequence

from torch import nn

from ntk_monitor.bands import residual_out_of_reach
from ntk_monitor.directions import Direction, matrix
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.forecasting import (
    Forecaster,
    ForecastUnavailableError,
    Happened,
    Scored,
    coming,
    horizon,
    learned,
    scored,
    ticks,
)
from ntk_monitor.look import Now, Outlook
from ntk_monitor.optimizers import OptimizerState
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import Recipe


class Foresight:
    """Holds the forecast of one probe until the next, which scores it."""

    def __init__(self, model: nn.Module, recipe: Recipe, probe: Probe) -> None:
        self._model, self._recipe, self._probe = model, recipe, probe
        self._forecaster: Forecaster | None = None
        self._since = recipe.forecast_every

    def look(self, now: Now, found: Outlook, state: OptimizerState | None, named: Sequence[Direction]) -> None:
        """Score the forecast of the previous probe, then make the next."""
        forecaster = self._forecaster = self._forecaster or self._new_forecaster(now)
        if forecaster is None or state is None or now.terms is None or now.modes is None or now.loss is None:
            found.texts["forecast"] = self._no_forecast(now)
            if forecaster is not None:
                forecaster.forget()  # the rates handed over next time begin at this step
            return
        made = forecaster.last
        dynamics, reason, unscored = None, "", ""
        try:
            dynamics = forecaster.renew(now.loss, state, now.terms, clip=now.clip is not None)
        except ForecastUnavailableError as error:
            reason = str(error)
        targets = self._probe.targets
        if made is not None:
            happened = Happened(now.rates, now.terms.gradient, now.clip)
            try:
                judged = scored(made, forecaster.rows(made.dynamics), dynamics, now.loss, targets, happened)
            except ForecastUnavailableError as error:
                unscored = f"; the previous one is not scored: {error}"
            else:
                _write(judged, found)
        if dynamics is None:
            found.texts["forecast"] = reason + unscored
            return
        found.texts["forecast"] = (
            f"from {dynamics.driving} training samples and the kernel of this step, {state.name}{unscored}"
        )
        self._since += 1
        if self._since >= self._recipe.forecast_every > 0:
            self._ahead(now, found, state, dynamics, named)
            self._since = 0

    def _ahead(
        self, now: Now, found: Outlook, state: OptimizerState, dynamics: Dynamics, named: Sequence[Direction]
    ) -> None:
        """Simulate to the end of the run: when is each mode and each direction learned, and where the loss goes."""
        steps = horizon(now.step, now.total_steps)
        if self._forecaster is None or not steps or now.modes is None or now.terms is None or now.loss is None:
            return
        projections = {"modes": now.modes.vectors.T}
        if named:
            projections["directions"] = matrix(named)
        rates = coming(steps, state, now.rates_ahead)
        seen = learned(
            dynamics, self._forecaster.rows(dynamics), now.loss, self._probe.targets, projections, rates, now.clip
        )
        times = seen.times["modes"]
        at, loss = ticks(seen.steps, seen.loss)
        found.arrays |= {"time_to_learn": times, "forecast_steps": at + now.step, "forecast_loss": loss}
        if named:
            found.arrays["direction_eta"] = seen.times["directions"]
        if seen.reached == steps:
            found.facts["loss_remaining"] = float(seen.loss[-1])
        if now.total_steps is not None:
            share = residual_out_of_reach(now.modes.coordinates**2, times, float(steps))
            found.metrics["residual_out_of_reach"] = share

    def _new_forecaster(self, now: Now) -> Forecaster | None:
        if now.reference is None or self._recipe.reference == 0 or now.layout != "full":
            return None
        return Forecaster(self._model, self._probe, now.reference, self._recipe)

    def _no_forecast(self, now: Now) -> str:
        if now.layout != "full":
            return f"none: it needs the full kernel, and this is the {now.layout} kernel"
        if now.reference is None or self._recipe.reference == 0:
            return "none: a probe alone forecasts wrongly; it takes training samples that can be drawn (reference=)"
        return "none: it takes a known loss and an optimizer"


# A forecast that diverged missed by infinitely much, which no record can hold.
_WORST = 100.0


def _write(judged: Scored, found: Outlook) -> None:
    verdict = judged.forecast
    found.facts["motion"] = verdict.motion
    found.facts["forecast_error_residual"] = min(verdict.error_residual, _WORST)
    if not verdict.suppressed:
        found.facts["forecast_error"] = min(verdict.error, _WORST)
        if judged.explained is not None:
            found.facts["explained_error"] = min(judged.explained.error, _WORST)
