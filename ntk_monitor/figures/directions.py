"""Named directions of the residual: classes, outputs, tasks or a user's own."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.style import MODE_COLOURS, STEPS, Figure, empty, layout_of, line, log_axis, measured, numbers
from ntk_monitor.snapshot import ARRAYS, Snapshot

_SHOWN = 12


def named_residuals(snapshots: Sequence[Snapshot]) -> Figure:
    """Return |residual| along each named direction over training; the last simulated time to learn is in its name."""
    title = "Residual by class or direction"
    drawn = [s for s in measured(snapshots) if s.directions and s.direction_residual.size == len(s.directions)]
    if not drawn:
        reasons = [s.texts["directions"] for s in snapshots if "directions" in s.texts]
        return empty(title, reasons[-1] if reasons else "No directions are followed.")
    eta: dict[str, str] = {}
    for s in drawn:
        if s.direction_eta.size == len(s.directions):
            for name, steps in zip(s.directions, s.direction_eta.tolist(), strict=True):
                if not np.isnan(steps):
                    eta[name] = f"{steps:.0f} steps" if np.isfinite(steps) else "beyond"
    names = list(dict.fromkeys(name for s in drawn for name in s.directions))[:_SHOWN]
    data = []
    for k, name in enumerate(names):
        found = [
            (s.step, float(abs(s.direction_residual[s.directions.index(name)]))) for s in drawn if name in s.directions
        ]
        label = f"{name}, {eta[name]}" if name in eta else name
        look = {"color": MODE_COLOURS[k % len(MODE_COLOURS)], "dash": "solid" if k < len(MODE_COLOURS) else "dot"}
        values = numbers([value for _, value in found], positive=True)
        hover = "step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>"
        data.append(line([step for step, _ in found], values, label, "", line=look, hovertemplate=hover))
    layout = layout_of(
        title,
        "Residual of the probe along each direction, in the loss's own geometry (Pearson residual for cross-entropy). "
        "After the comma: steps, as last simulated, until its energy is a tenth; beyond: not before the run ends.",
        xaxis={"title": {"text": STEPS}},
        yaxis=log_axis(f"|residual| ({ARRAYS['direction_residual'].unit})", dtick=None),
        showlegend=True,
        legend={"font": {"size": 10}},
    )
    return {"data": data, "layout": layout}
