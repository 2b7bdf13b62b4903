"""From which probe a forecast is drawn, and where what was measured later says that it does not hold.

A forecast freezes the kernel at its launch. It is doubted at a later probe where it misses, as a ratio, by at least as
much as forecasting no change would, or where the learning rate lies above the bound of full batches: there a frozen
kernel would grow without end, and real networks do not.
"""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.abscissa import Abscissa
from ntk_monitor.figures.style import Figure, measured, stripe, thinned, upright
from ntk_monitor.snapshot import Floats, Snapshot

SHADED = "Shaded: no better there than forecasting no change, or the learning rate is above its bound."

# Where less than this has changed since the launch (logarithm of the ratio), there is nothing to judge by.
_STILL = 0.02

_EARLY = 0.75
_LAUNCHES = 500


def launched(snapshots: Sequence[Snapshot], launch: int | None = None, holds: str = "forecast_loss") -> Snapshot | None:
    """Return the probe nearest to the wanted launch whose forecast holds an array; None when no probe has one.

    Default: the last forecast with at least two probes behind it, so that it can be judged, and a quarter of the run to
    go, without which it says little; else the last that can be judged; else the last.
    """
    probes = measured(snapshots)
    made = [s for s in probes if s.forecast_steps.size]
    if holds != "forecast_steps":
        made = [s for s in made if getattr(s, holds).size]
    if not made:
        return None
    if launch is not None:
        return min(made, key=lambda s: abs(s.step - launch))
    judged = [s for s in made if len(probes) > 2 and s.step < probes[-2].step]
    total = probes[-1].facts.get("total_steps", np.nan)
    early = [s for s in judged if s.step <= _EARLY * (total if np.isfinite(total) else probes[-1].step)]
    return (early or judged or made)[-1]


def doubtful(
    after: Sequence[Snapshot], found: Floats, launch: Snapshot, forecast: Floats, start: float
) -> list[tuple[int, int]]:
    """Return stretches of steps, first and last probe of each, where a forecast is no better than none.

    Args:
        after: probes behind the launch, in order.
        found: (len(after),) what was measured there, positive.
        launch: the probe that made the forecast.
        forecast: what it says at each of the launch's `forecast_steps`.
        start: what was measured at the launch.
    """
    if not len(after):
        return []
    steps = np.array([s.step for s in after], dtype=np.float64)
    said = np.interp(steps, np.asarray(launch.forecast_steps, dtype=np.float64), forecast, right=np.nan)
    with np.errstate(all="ignore"):
        miss, change = np.abs(np.log(said / found)), np.abs(np.log(start / found))
    bad = (miss >= change) & (change > _STILL)
    bad |= np.array([s.metrics.get("lr_headroom_high", np.inf) < 1 for s in after])
    stretches: list[tuple[int, int]] = []
    for i in np.flatnonzero(bad).tolist():
        # From the probe before, which was still right: what lies between was not looked at.
        first, last = int(steps[i - 1]) if i else launch.step, int(steps[i])
        if stretches and stretches[-1][1] >= first:
            stretches[-1] = (stretches[-1][0], last)
        else:
            stretches.append((first, last))
    return stretches


def marks(at: Abscissa, launch: Snapshot, stretches: Sequence[tuple[int, int]]) -> list[Figure]:
    """Return the shapes of a launched figure: doubted stretches, and the launch itself, by the name "launch"."""
    (x,) = at([launch.step])
    return [*(stripe(at([a])[0], at([b])[0]) for a, b in stretches), upright(x, "launch")]


def launches(at: Abscissa, snapshots: Sequence[Snapshot]) -> list[list[float]]:
    """Return step and place of forecasts, for a page that lets a reader drag the launch; of very many, some."""
    made = [s.step for s in measured(snapshots) if s.forecast_steps.size]
    steps = [made[i] for i in thinned(len(made), _LAUNCHES)] if made else []
    return [[step, x] for step, x in zip(steps, at(steps), strict=True)]


def limits(found: Floats, simulated: Floats, *, log: bool) -> Figure:
    """Return the range of a vertical axis by what was measured: simulations fall, or grow, without end.

    Logarithmic: what was simulated is in sight as far as a thirtieth of the least measured value, and ten times the
    largest. Linear: from zero to twice the largest measured value at most.
    """
    kept, told = (v[np.isfinite(v) & (v > 0)] for v in (found, simulated))
    if not kept.size:
        return {}
    low, high = float(kept.min()), float(kept.max())
    if not log:
        return {"range": [0, 1.05 * min(max(float(told.max(initial=0)), high), 2 * high)]}
    low, high = max(min(float(told.min(initial=low)), low), low / 30), min(float(told.max(initial=high)), 10 * high)
    return {"range": [float(np.log10(low)) - 0.1, float(np.log10(max(high, kept.max()))) + 0.1]}
