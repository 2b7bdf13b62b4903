"""Eigenvalues of K: at one step, and over training."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    STEPS,
    VIRIDIS,
    Figure,
    empty,
    kernel_words,
    layout_of,
    line,
    log_axis,
    measured,
    numbers,
    thinned,
)
from ntk_monitor.snapshot import ARRAYS, Snapshot

# A heat map has at most this many columns and rows: more cells than pixels only make the page slow.
_COLUMNS, _ROWS = 250, 128


def spectrum(snapshots: Sequence[Snapshot], step: int | None = None) -> Figure:
    """Return the eigenvalues of K against mode index, both logarithmic, at one step (default: the last probe).

    The probe nearest to `step` is drawn. Dotted: the first probe of the same samples; dashed: the noise floor.
    """
    drawn = [snapshot for snapshot in measured(snapshots) if snapshot.eigenvalues.size]
    if not drawn:
        return empty("Spectrum", "No probe has been measured yet.")
    shown = drawn[-1] if step is None else min(drawn, key=lambda snapshot: abs(snapshot.step - step))
    first = next(snapshot for snapshot in drawn if snapshot.probe == shown.probe)
    unit = ARRAYS["eigenvalues"].unit
    hover = "mode %{x}: %{y:.4g}<extra>%{fullData.name}</extra>"
    data: list[Figure] = []
    styles: list[tuple[Snapshot, Figure]] = [(shown, {"color": BLUE, "width": 2})]
    if first is not shown:
        styles.insert(0, (first, {"color": GREY, "dash": "dot"}))
    for snapshot, look in styles:
        values = numbers(snapshot.eigenvalues, positive=True)
        ranks = list(range(1, len(values) + 1))
        # A line needs two points; markers keep a kernel of a few rows visible.
        mode = "lines+markers" if len(values) <= 24 else "lines"
        data.append(line(ranks, values, f"step {snapshot.step}", BLUE, line=look, mode=mode, hovertemplate=hover))
    n = shown.eigenvalues.size
    yaxis = log_axis(f"eigenvalue ({unit})")
    if np.isfinite(shown.noise_floor) and shown.noise_floor > 0:
        ends, floor = [1, max(n, 2)], float(shown.noise_floor)
        dashed = {"color": ORANGE, "dash": "dash"}
        data.append(line(ends, numbers([floor, floor]), f"noise floor {floor:.1e}", ORANGE, line=dashed))
        top = max(float(np.nanmax(snapshot.eigenvalues, initial=floor)) for snapshot in (first, shown))
        # Rounding noise reaches far below the floor; a decade of it is enough to see that it is there.
        yaxis["range"] = [float(np.log10(floor)) - 1, float(np.log10(top)) + 0.5]
    # Eigenvalues descend, so the upper right corner is always free.
    legend = {"x": 0.98, "y": 0.98, "xanchor": "right", "yanchor": "top"}
    layout = layout_of(
        f"Spectrum, step {shown.step}",
        f"Eigenvalues of the {kernel_words(shown)}. A large eigenvalue is a direction learned fast.",
        xaxis=log_axis("mode index", exponentformat="none"),
        yaxis=yaxis,
        showlegend=True,
        legend=legend,
    )
    return {"data": data, "layout": layout}


def spectrum_over_training(snapshots: Sequence[Snapshot]) -> Figure:
    """Return log10 eigenvalue as a heat map, steps across and mode index (logarithmic) upwards.

    Cells at or below that probe's noise floor are blank. Long histories and large kernels are thinned evenly.
    """
    drawn = [snapshot for snapshot in measured(snapshots) if snapshot.eigenvalues.size]
    if not drawn:
        return empty("Spectrum over training", "No probe has been measured yet.")
    columns = [drawn[i] for i in thinned(len(drawn), _COLUMNS)]
    modes = max(snapshot.eigenvalues.size for snapshot in columns)
    ranks = np.unique(np.geomspace(1, modes, _ROWS).round().astype(int)) if modes > _ROWS else np.arange(1, modes + 1)
    table = np.full((ranks.size, len(columns)), np.nan)
    for j, snapshot in enumerate(columns):
        values = snapshot.eigenvalues
        floor = snapshot.noise_floor if np.isfinite(snapshot.noise_floor) else 0.0
        present = ranks[ranks <= values.size]
        kept = values[present - 1]
        resolved = kept > max(floor, 0.0)
        table[: present.size, j][resolved] = np.log10(kept[resolved])
    heat = {
        "type": "heatmap",
        "x": [snapshot.step for snapshot in columns],
        "y": ranks.tolist(),
        "z": [numbers(row) for row in table],
        "colorscale": VIRIDIS,
        "colorbar": {"title": {"text": "log10 eigenvalue", "side": "right"}},
        "hovertemplate": "step %{x}, mode %{y}: 10^%{z:.2f}<extra></extra>",
    }
    tooltip = f"log10 of the eigenvalues of the {kernel_words(columns[-1])}. Blank: below the noise floor."
    yaxis = log_axis("mode index", exponentformat="none")
    layout = layout_of("Spectrum over training", tooltip, xaxis={"title": {"text": STEPS}}, yaxis=yaxis)
    return {"data": [heat], "layout": layout}
