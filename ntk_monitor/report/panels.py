"""Which figures a run is shown by, in which order, and what each of them tells."""

from collections.abc import Sequence
from dataclasses import dataclass

from ntk_monitor import figures
from ntk_monitor.figures import Figure
from ntk_monitor.history import History
from ntk_monitor.panels import GROUPS
from ntk_monitor.snapshot import Snapshot

# Single modes drawn in the drill-down.
_MODES = (1, 2, 3, 5, 9, 16)


__all__ = ["GROUPS", "Panel", "panels"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure of a page."""

    name: str
    group: str
    figure: Figure
    wide: bool = False

    @property
    def tells(self) -> str:
        """What the figure shows and how to read it, in a sentence or two."""
        return str(self.figure["layout"].get("meta", {}).get("tooltip", ""))


def panels(history: History) -> tuple[Panel, ...]:
    """Return the panels of one run. A figure without data keeps its place and says why it is empty."""
    shown = history.snapshots
    steps, rates = history.learning_rates
    end = shown[-1].step if shown else 0
    found = [
        Panel("learning-rate-interval", "learning rate", figures.learning_rate_interval(shown)),
        Panel("learning-rates", "learning rate", figures.learning_rates(steps.tolist(), rates.tolist(), end)),
        Panel("loss-forecast", "loss", figures.loss_forecast(shown)),
        Panel("forecast-error", "loss", figures.forecast_error(shown)),
        Panel("residual-reach", "residual", figures.residual_reach(shown)),
        Panel("residual-bands", "residual", figures.residual_bands(shown)),
        Panel("named-residuals", "residual", figures.named_residuals(shown)),
        Panel("mode-decay", "residual", figures.mode_decay(shown, _MODES)),
        Panel("layer-updates", "layers", figures.layer_updates(shown)),
        Panel("spectrum", "kernel", figures.spectrum(shown)),
        Panel("spectrum-over-training", "kernel", figures.spectrum_over_training(shown)),
    ]
    if grams := _grams(shown):
        found += [Panel(f"gram-{when}", "kernel", figures.gram(one, cosine=True)) for when, one in grams.items()]
    found.append(Panel("scalars", "numbers", figures.scalars(shown), wide=True))
    return tuple(found)


def _grams(snapshots: Sequence[Snapshot]) -> dict[str, Snapshot]:
    """Return the first and the last probe that stored a Gram matrix."""
    stored = [s for s in snapshots if s.gram.size]
    return (
        {"last": stored[0]}
        if len(stored) == 1
        else dict(zip(("first", "last"), (*stored[:1], *stored[-1:]), strict=False))
    )
