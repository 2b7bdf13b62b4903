"""Every figure once, as a plain plotly dict {"data": [...], "layout": {...}} that json.dumps accepts.

K = J Jᵀ is the unnormalised kernel of n rows, λ₁ ≥ … ≥ λₙ its eigenvalues; M is K weighted by the loss, and the
residual of the probe has one coordinate along each eigenvector (mode) of M. Skipped probes are left out. A value that
is not finite, or not positive on a logarithmic axis, becomes None: a gap. `layout["meta"]["tooltip"]` says in one
sentence what is drawn, for the page to show beside the title. A figure without data carries the reason in its middle.
"""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ntk_monitor.bands import NAMES, band_energy, bands
from ntk_monitor.metrics import SCALARS, Scalar
from ntk_monitor.snapshot import ARRAYS, Floats, Snapshot, shown_order

Figure = dict[str, Any]

STEPS = "optimizer steps"
GREY, BLUE, ORANGE = "#7a7a7a", "#2a78c2", "#e07b00"
BAND_COLOURS = ("#fde08a", "#fdb75e", "#f48849", "#db5c68", "#b83289", "#8b0aa5", "#4c02a1", "#b0b0b0")
"""Warm and light for fast modes, dark for slow ones, grey for what no training time resolves."""
MODE_COLOURS = ("#2a78c2", "#e07b00", "#2e9e55", "#c23b3b", "#7d5fb2", "#8a5a44", "#d45fa5", "#17a2b8")
DIVERGING = [[0.0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1.0, "#b2182b"]]
VIRIDIS = [[0.0, "#440154"], [0.2, "#414487"], [0.4, "#2a788e"], [0.6, "#22a884"], [0.8, "#7ad151"], [1.0, "#fde725"]]

# A heat map has at most this many columns and rows: more cells than pixels only make the page slow.
_COLUMNS, _ROWS = 250, 128


def _numbers(values: Iterable[Any], *, positive: bool = False) -> list[float | None]:
    """Return JSON numbers of six digits, None where not finite (or, when asked, not above zero)."""
    array = np.asarray(values, dtype=np.float64).ravel()
    kept = np.isfinite(array) & ((array > 0) if positive else True)
    return [float(f"{value:.6g}") if keep else None for value, keep in zip(array.tolist(), kept, strict=True)]


def _measured(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    return [snapshot for snapshot in snapshots if snapshot.status == "measured"]


def _layout(title: str, tooltip: str, **layout: Any) -> Figure:
    base = {"title": {"text": title}, "meta": {"tooltip": tooltip}, "hovermode": "closest", "showlegend": False}
    return base | layout


def _log_axis(title: str, **axis: Any) -> Figure:
    # dtick=1 labels whole decades only; plotly's minor labels crowd the axis.
    return {"type": "log", "dtick": 1, "exponentformat": "power", "title": {"text": title}} | axis


def _note(text: str, *, size: int = 12, width: int = 50, **place: Any) -> Figure:
    note = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    return note | {"text": "<br>".join(textwrap.wrap(text, width)), "font": {"size": size, "color": GREY}} | place


def _empty(title: str, reason: str) -> Figure:
    axis = {"visible": False}
    layout = _layout(title, reason, xaxis=axis, yaxis=axis, annotations=[_note(reason)])
    return {"data": [], "layout": layout}


def _kernel(snapshot: Snapshot) -> str:
    return (
        f"{snapshot.kernel or 'unnamed'} kernel, unnormalised K = J J^T, N = {snapshot.samples} samples, "
        f"C = {snapshot.outputs} outputs, {snapshot.mode} mode"
    )


def _line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **trace: Any) -> Figure:
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": {"color": colour}} | trace


def spectrum(snapshots: Sequence[Snapshot], step: int | None = None) -> Figure:
    """Return the eigenvalues of K against mode index, both logarithmic, at one step (default: the last probe).

    The probe nearest to `step` is drawn. Dotted: the first probe of the same samples; dashed: the noise floor.
    """
    drawn = [snapshot for snapshot in _measured(snapshots) if snapshot.eigenvalues.size]
    if not drawn:
        return _empty("Spectrum", "No probe has been measured yet.")
    shown = drawn[-1] if step is None else min(drawn, key=lambda snapshot: abs(snapshot.step - step))
    first = next(snapshot for snapshot in drawn if snapshot.probe == shown.probe)
    unit = ARRAYS["eigenvalues"].unit
    hover = "mode %{x}: %{y:.4g}<extra>%{fullData.name}</extra>"
    data: list[Figure] = []
    styles: list[tuple[Snapshot, Figure]] = [(shown, {"color": BLUE, "width": 2})]
    if first is not shown:
        styles.insert(0, (first, {"color": GREY, "dash": "dot"}))
    for snapshot, line in styles:
        values = _numbers(snapshot.eigenvalues, positive=True)
        ranks = list(range(1, len(values) + 1))
        # A line needs two points; markers keep a kernel of a few rows visible.
        mode = "lines+markers" if len(values) <= 24 else "lines"
        data.append(_line(ranks, values, f"step {snapshot.step}", BLUE, line=line, mode=mode, hovertemplate=hover))
    n = shown.eigenvalues.size
    yaxis = _log_axis(f"eigenvalue ({unit})")
    if np.isfinite(shown.noise_floor) and shown.noise_floor > 0:
        ends, floor = [1, max(n, 2)], float(shown.noise_floor)
        dashed = {"color": ORANGE, "dash": "dash"}
        data.append(_line(ends, _numbers([floor, floor]), f"noise floor {floor:.1e}", ORANGE, line=dashed))
        top = max(float(np.nanmax(snapshot.eigenvalues, initial=floor)) for snapshot in (first, shown))
        # Rounding noise reaches far below the floor; a decade of it is enough to see that it is there.
        yaxis["range"] = [float(np.log10(floor)) - 1, float(np.log10(top)) + 0.5]
    # Eigenvalues descend, so the upper right corner is always free.
    legend = {"x": 0.98, "y": 0.98, "xanchor": "right", "yanchor": "top"}
    layout = _layout(
        f"Spectrum, step {shown.step}",
        f"Eigenvalues of the {_kernel(shown)}. A large eigenvalue is a direction learned fast.",
        xaxis=_log_axis("mode index", exponentformat="none"),
        yaxis=yaxis,
        showlegend=True,
        legend=legend,
    )
    return {"data": data, "layout": layout}


def _thinned(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 … count-1, evenly spread, first and last included."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def spectrum_over_training(snapshots: Sequence[Snapshot]) -> Figure:
    """Return log10 eigenvalue as a heat map, steps across and mode index (logarithmic) upwards.

    Cells at or below that probe's noise floor are blank. Long histories and large kernels are thinned evenly.
    """
    drawn = [snapshot for snapshot in _measured(snapshots) if snapshot.eigenvalues.size]
    if not drawn:
        return _empty("Spectrum over training", "No probe has been measured yet.")
    columns = [drawn[i] for i in _thinned(len(drawn), _COLUMNS)]
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
        "z": [_numbers(row) for row in table],
        "colorscale": VIRIDIS,
        "colorbar": {"title": {"text": "log10 eigenvalue", "side": "right"}},
        "hovertemplate": "step %{x}, mode %{y}: 10^%{z:.2f}<extra></extra>",
    }
    tooltip = f"log10 of the eigenvalues of the {_kernel(columns[-1])}. Blank: below the noise floor."
    yaxis = _log_axis("mode index", exponentformat="none")
    layout = _layout("Spectrum over training", tooltip, xaxis={"title": {"text": STEPS}}, yaxis=yaxis)
    return {"data": [heat], "layout": layout}


def residual_bands(snapshots: Sequence[Snapshot]) -> Figure:
    """Return the share of the residual's energy in each band of modes over training, stacked to 1.

    Probes without modes leave a note with their reason. A single probe is drawn as one stacked bar.
    """
    title = "Residual by learning speed"
    measured = _measured(snapshots)
    drawn = [(snapshot, energy) for snapshot in measured if (energy := band_energy(snapshot))]
    reasons = [snapshot.modes_reason for snapshot in measured if snapshot.modes_reason]
    if not drawn:
        return _empty(title, f"Modes are off: {reasons[-1]}" if reasons else "No probe with modes yet.")
    steps = [snapshot.step for snapshot, _ in drawn]
    split = [band for snapshot, _ in drawn for band in bands(snapshot.rates, snapshot.rates_floor)]
    alive = {band.name for band in split if band.mask.any()}
    data: list[Figure] = []
    for name, colour in zip(NAMES, BAND_COLOURS, strict=True):
        shares = _numbers([energy[name] for _, energy in drawn])
        trace = {"name": name, "y": shares, "showlegend": name in alive, "hovertemplate": "%{y:.1%}"}
        if len(steps) == 1:
            data.append(trace | {"type": "bar", "x": [f"step {steps[0]}"], "marker": {"color": colour}})
        else:
            area = {"stackgroup": "energy", "fillcolor": colour, "line": {"color": colour, "width": 0.5}}
            data.append(trace | area | {"type": "scatter", "mode": "lines", "x": steps})
    off = f"Modes are off at {len(reasons)} of {len(measured)} probes: {reasons[-1]}" if reasons else ""
    layout = _layout(
        title,
        "Share of the probe's residual energy in modes learned at a similar speed; 10x slower needs 10x more steps "
        "of plain gradient descent. Modes are eigenvectors of K weighted by the loss.",
        xaxis={"title": {"text": STEPS}} if len(steps) > 1 else {"type": "category"},
        yaxis={"title": {"text": "share of the residual's energy"}, "range": [0, 1]},
        showlegend=True,
        legend={"traceorder": "reversed"},
        hovermode="x unified",
        barmode="stack",
        annotations=[_note(off, size=11, width=60, y=1.01, yanchor="bottom")] if off else [],
    )
    return {"data": data, "layout": layout}


def mode_decay(snapshots: Sequence[Snapshot], modes: Sequence[int]) -> Figure:
    """Return the residual's energy in single modes, and how fast each decayed between neighbouring probes.

    `modes` are ranks, 1 the fastest. Above, dots: coordinate² (loss units) of that rank in each probe's own basis;
    lines: the same residual followed in the basis of the earlier probe, the only comparison that means decay. Below:
    that decay, -ln|end / start| per step; negative where the residual grew. Ranks beyond the last mode are left out.
    """
    drawn = [snapshot for snapshot in _measured(snapshots) if snapshot.coordinates.size]
    if not drawn or not modes:
        reasons = [snapshot.modes_reason for snapshot in _measured(snapshots) if snapshot.modes_reason]
        return _empty("Single modes", f"Modes are off: {reasons[-1]}" if reasons else "No probe with modes yet.")
    data: list[Figure] = []
    for k, rank in enumerate(modes):
        colour, i = MODE_COLOURS[k % len(MODE_COLOURS)], rank - 1
        own = [snapshot for snapshot in drawn if 0 <= i < snapshot.coordinates.size]
        energy = _numbers([snapshot.coordinates[i] ** 2 for snapshot in own], positive=True)
        dots = {"mode": "markers", "marker": {"color": colour, "size": 7}, "legendgroup": f"mode {rank}"}
        data.append(_line([snapshot.step for snapshot in own], energy, f"mode {rank}", colour, **dots))
        x: list[int | None] = []
        followed: list[float | None] = []
        speed: list[float | None] = []
        for before, after in pairwise(own):
            if after.previous_step != before.step or after.carried.size <= i or after.step == before.step:
                continue
            start, end = float(before.coordinates[i]), float(after.carried[i])
            with np.errstate(divide="ignore", invalid="ignore"):
                rate = -np.log(np.abs(np.divide(end, start))) / (after.step - before.step)
            x += [before.step, after.step, None]
            followed += [*_numbers([start**2, end**2], positive=True), None]
            speed += [*_numbers([rate, rate]), None]
        quiet = {"showlegend": False, "legendgroup": f"mode {rank}"}
        data.append(_line(x, followed, f"mode {rank}, followed", colour, **quiet))
        data.append(_line(x, speed, f"mode {rank}, decay", colour, xaxis="x2", yaxis="y2", **quiet))
    layout = _layout(
        "Single modes: energy and decay",
        "Dots: each probe's own basis. Lines: one residual followed in the basis of the earlier probe.",
        xaxis={"anchor": "y", "matches": "x2", "showticklabels": False},
        yaxis=_log_axis(f"energy ({ARRAYS['coordinates'].unit.removeprefix('sqrt(').removesuffix(')')})"),
        xaxis2={"anchor": "y2", "title": {"text": STEPS}},
        yaxis2={"title": {"text": "decay per step"}, "domain": [0, 0.36]},
        showlegend=True,
    )
    layout["yaxis"]["domain"] = [0.44, 1]
    return {"data": data, "layout": layout}


def _classes(snapshot: Snapshot) -> tuple[Floats, Floats] | None:
    """Return sorted class values and their counts, or None when they do not describe the rows of the Gram."""
    labels = snapshot.labels[shown_order(snapshot.labels, snapshot.labels.size)]
    if labels.size == 0 or labels.size != snapshot.gram.shape[0]:
        return None
    values, counts = np.unique(labels, return_counts=True)
    return values.astype(np.float64), counts.astype(np.float64)


def gram(snapshot: Snapshot, *, cosine: bool = False, limit: float | None = None) -> Figure:
    """Return the Gram matrix of one probe, samples sorted by class, with a line between classes.

    Red: a gradient step on one sample moves the other the same way; blue: the opposite way.

    Args:
        snapshot: a probe that stored its Gram matrix.
        cosine: centre the matrix, which takes out what all samples share, and show K_ij / √(K_ii K_jj), from -1 to 1:
            the same colours at every step, however much the kernel grows.
        limit: colours end at ±limit. Default: the 99th percentile of |entry| (1 for cosines), so that one outlier does
            not wash out the rest.
    """
    title = "Kernel between samples"
    matrix, unit = snapshot.gram, f"mean over outputs of K<br>({ARRAYS['gram'].unit})"
    if cosine and matrix.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            matrix = matrix - matrix.mean(axis=0) - matrix.mean(axis=1)[:, None] + matrix.mean()
            scale = np.sqrt(np.diag(matrix))
            matrix, unit, limit = matrix / scale[:, None] / scale, "cosine of the centred kernel", limit or 1.0
    if snapshot.gram.ndim != 2 or snapshot.gram.size == 0 or not np.isfinite(matrix).any():
        return _empty(title, "No Gram matrix was stored at this step.")
    finite = np.abs(matrix[np.isfinite(matrix)])
    about = f", in {ARRAYS['gram'].unit}. Red: learning one sample moves the other the same way; blue: the opposite way"
    if cosine:
        about = ", centred, as cosines. Red: learning one sample moves the other more than average; blue: less"
    extent = limit if limit is not None else float(np.quantile(finite, 0.99)) or 1.0
    n = snapshot.gram.shape[0]
    axis: Figure = {"constrain": "domain", "range": [-0.5, n - 0.5], "showgrid": False}
    shapes: list[Figure] = []
    word = "sample"
    classes = _classes(snapshot)
    if classes is not None:
        word = "sample, sorted by class"
        values, counts = classes
        ends = counts.cumsum()
        if values.size <= 20:
            middles = ends - counts / 2 - 0.5
            axis |= {"tickvals": _numbers(middles), "ticktext": [f"{value:g}" for value in values]}
            word = "class"
        line = {"color": "#404040", "width": 1}
        # Classes of one or two samples would turn the lines into a grid that hides the cells.
        for end in ends[:-1] - 0.5 if n > 2 * values.size or values.size <= 5 else []:
            for across in ("x", "y"):
                whole = {"x0": -0.5, "x1": n - 0.5, "y0": -0.5, "y1": n - 0.5}
                at = {f"{across}0": float(end), f"{across}1": float(end)}
                shapes.append({"type": "line", "line": line} | whole | at)
    heat = {
        "type": "heatmap",
        "x": list(range(n)),
        "y": list(range(n)),
        "z": [_numbers(row) for row in matrix],
        "zmin": -extent,
        "zmax": extent,
        "colorscale": DIVERGING,
        "colorbar": {"title": {"text": unit, "side": "right"}},
        "hovertemplate": "samples %{y} and %{x}: %{z:.4g}<extra></extra>",
    }
    layout = _layout(
        f"{title}, step {snapshot.step}",
        f"Mean over outputs of the {_kernel(snapshot)}{about}. Colours end at ±{extent:.3g}.",
        xaxis=axis | {"title": {"text": word}},
        yaxis=axis | {"title": {"text": word}, "range": [n - 0.5, -0.5], "scaleanchor": "x"},
        shapes=shapes,
    )
    return {"data": [heat], "layout": layout}


def _span(start: float, end: float) -> list[float]:
    # plotly refuses a domain that rounding pushes outside [0, 1].
    return [max(round(start, 6), 0.0), min(round(end, 6), 1.0)]


def _panel(k: int, count: int, columns: int, scalar: Scalar) -> tuple[Figure, list[Figure]]:
    """Return axes and headings of the k-th of `count` small panels, filled row by row."""
    lines = -(-count // columns)
    across, up = 0.09, 0.48 / lines
    width, height = (1 - across * (columns - 1)) / columns, (1 - up * (lines - 1)) / lines
    left, top = (k % columns) * (width + across), 1 - (k // columns) * (height + up)
    name = "" if k == 0 else str(k + 1)
    heading: Figure = {"x": left, "y": top, "xanchor": "left", "yanchor": "bottom", "align": "left"}
    unit = _note(scalar.unit, size=9, width=34, **heading)
    # The name stands above its unit, whatever number of lines that takes.
    word = _note(scalar.name, **heading, yshift=13 + 11 * unit["text"].count("<br>"))
    word["text"] = f"<b>{word['text']}</b>"
    word["hovertext"] = "<br>".join(textwrap.wrap(f"{scalar.meaning}. Misleads: {scalar.lies_when}.", 60))
    title = {"text": STEPS if k + columns >= count else "", "font": {"size": 10}}
    xaxis = {"domain": _span(left, left + width), "anchor": f"y{name}", "nticks": 4, "title": title}
    axes = {
        f"xaxis{name}": xaxis | ({"matches": "x"} if k else {}),
        f"yaxis{name}": {"domain": _span(top - height, top), "anchor": f"x{name}", "nticks": 4},
    }
    return axes, [unit, word]


def scalars(snapshots: Sequence[Snapshot], *, columns: int = 3) -> Figure:
    """Return the logged scalars over training, one small panel each, in the order of `metrics.SCALARS`.

    Three columns need about 800 pixels of width; a narrow page wants one.
    """
    drawn = _measured(snapshots)
    shown = [s for s in SCALARS if any(np.isfinite(snapshot.metrics.get(s.name, np.nan)) for snapshot in drawn)]
    if not shown:
        return _empty("Scalars", "No scalar has been measured yet.")
    layout = _layout("Scalars", "The numbers every logger receives.", annotations=[])
    data: list[Figure] = []
    for k, scalar in enumerate(shown):
        points = [(snapshot.step, snapshot.metrics.get(scalar.name, np.nan)) for snapshot in drawn]
        kept = [(step, value) for step, value in points if np.isfinite(value)]
        name = "" if k == 0 else str(k + 1)
        dots = {"mode": "lines+markers", "marker": {"size": 4, "color": BLUE}}
        place = {"xaxis": f"x{name}", "yaxis": f"y{name}"} | dots
        data.append(_line([step for step, _ in kept], _numbers([v for _, v in kept]), scalar.name, BLUE, **place))
        axes, words = _panel(k, len(shown), min(len(shown), columns), scalar)
        layout |= axes
        layout["annotations"] += words
    return {"data": data, "layout": layout}
