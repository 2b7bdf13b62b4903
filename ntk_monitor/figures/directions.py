"""Named directions of the residual: classes, outputs, tasks or a user's own."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.launch import SHADED, doubtful, launched, launches, limits, marks
from ntk_monitor.figures.style import (
    MODE_COLOURS,
    Figure,
    empty,
    layout_of,
    line,
    measured,
    numbers,
    series,
    thinned,
    value_axis,
    word,
)
from ntk_monitor.snapshot import ARRAYS, Snapshot

_SHOWN = 12
_DOTS = 120


def named_residuals(
    snapshots: Sequence[Snapshot], launch: int | None = None, unit: Unit = "step", *, log: bool = True
) -> Figure:
    """Return |residual| along each named direction: measured (dots), and forecast from the probe nearest to `launch`.

    The simulated time to learn, as it was at that launch, stands in its name. Twelve directions are drawn at most.
    """
    title = "Residual by class or direction"
    held = [s for s in measured(snapshots) if s.directions and s.direction_residual.size == len(s.directions)]
    if not held:
        reasons = [s.texts["directions"] for s in snapshots if "directions" in s.texts]
        return empty(title, reasons[-1] if reasons else "No directions are followed.")
    at = abscissa(snapshots, unit)
    start = launched(held, launch)
    told = start is not None and start.forecast_directions.ndim == 2
    eta = _times(held, start)
    names = list(dict.fromkeys(name for s in held for name in s.directions))
    shown = [held[i] for i in thinned(len(held), _DOTS)]
    data: list[Figure] = []
    for k, name in enumerate(names[:_SHOWN]):
        colour = MODE_COLOURS[k % len(MODE_COLOURS)]
        dash = "solid" if k < len(MODE_COLOURS) else "dot"
        found = [(s.step, _size(s, name)) for s in shown if name in s.directions]
        label = word(f"{name}, {eta[name]}" if name in eta else name)
        dots = {"mode": "markers+lines", "marker": {"size": 5, "color": colour}, "legendgroup": word(name)}
        points = {"x": at([step for step, _ in found]), "y": numbers([v for _, v in found], positive=log)} | dots
        look = {"color": colour, "dash": dash, "width": 0.5 if told else 1.5}
        data.append(series(label, colour, points, at.word, line=look))
        if told and start is not None and name in start.directions:
            forecast = np.abs(start.forecast_directions[:, start.directions.index(name)])
            bold = {"line": {"color": colour, "dash": dash, "width": 2}, "legendgroup": word(name), "showlegend": False}
            hover = f"forecast from step {start.step}: %{{y:.3g}}<extra>{word(name)}</extra>"
            x, y = at(start.forecast_steps.tolist()), numbers(forecast, positive=log)
            data.append(line(x, y, f"{label}, forecast", colour, hovertemplate=hover, **bold))
    more = f" The first {_SHOWN} of {len(names)} are drawn." if len(names) > _SHOWN else ""
    thick = f" Thick lines: forecast from step {start.step}. {SHADED}" if told and start is not None else ""
    ahead = np.abs(start.forecast_directions).ravel() if told and start is not None else np.empty(0)
    sizes = np.array([_size(s, name) for s in shown for name in names[:_SHOWN] if name in s.directions])
    layout = layout_of(
        title,
        "Residual of the probe along each direction, in the loss's own geometry (Pearson residual for cross-entropy). "
        "After the comma: steps, by simulation, until its energy is a tenth; beyond: not before the run ends."
        f"{thick}{more}",
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis(f"|residual| ({ARRAYS['direction_residual'].unit})", log=log, **limits(sizes, ahead, log=log)),
        showlegend=True,
        legend={"font": {"size": 10}, "tracegroupgap": 0},
        shapes=marks(at, start, _doubted(held, start)) if told and start is not None else [],
    )
    layout["meta"]["launches"] = launches(at, held)
    return {"data": data, "layout": layout}


def _size(snapshot: Snapshot, name: str) -> float:
    return float(abs(snapshot.direction_residual[snapshot.directions.index(name)]))


def _times(held: Sequence[Snapshot], start: Snapshot | None) -> dict[str, str]:
    """Return the time to learn of each direction in words, as simulated up to the launch."""
    eta: dict[str, str] = {}
    for s in held:
        if start is not None and s.step > start.step:
            break
        if s.direction_eta.size == len(s.directions):
            for name, steps in zip(s.directions, s.direction_eta.tolist(), strict=True):
                if not np.isnan(steps):
                    eta[name] = f"{steps:.0f} steps" if np.isfinite(steps) else "beyond"
    return eta


def _doubted(held: Sequence[Snapshot], start: Snapshot) -> list[tuple[int, int]]:
    """Return where the forecast of all directions together is no better than none."""
    after = [s for s in held if s.step > start.step and s.directions == start.directions]
    found = np.array([float((s.direction_residual**2).sum()) for s in after])
    ahead, begun = (start.forecast_directions**2).sum(axis=1), float((start.direction_residual**2).sum())
    return doubtful(after, found, start, ahead, begun)
