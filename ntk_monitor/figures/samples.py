"""Single samples of the probe: which of them a mode lives on, who learns with one of them, what is left of it."""

from collections.abc import Sequence

import numpy as np

from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.gram import centred_cosines
from ntk_monitor.figures.style import (
    BLUE,
    GREY,
    MODE_COLOURS,
    ORANGE,
    Figure,
    drawn,
    empty,
    layout_of,
    line,
    measured,
    nearest,
    numbers,
    series,
    thinned,
    value_axis,
    word,
)
from ntk_monitor.snapshot import ARRAYS, Floats, Snapshot, shown_order

_EACH = 10
"""Samples of each sign in the bars of a mode."""
_FAINT = 0.02
"""Loadings below this fraction of the largest are not drawn."""
_WORST = 5
"""Samples that are followed when none is chosen."""
_LETTERS = 28
_AREAS = 180


def mode_samples(snapshots: Sequence[Snapshot], mode: int | None = None, step: int | None = None) -> Figure:
    """Return the samples on which a mode of the residual loads most, positive and negative.

    Args:
        snapshots: of the run; the probe nearest to `step` that stored patterns of modes is drawn.
        mode: rank, 1 the fastest; default 1.
        step: optimizer step; default: the last.
    """
    rank = mode or 1
    title = f"Samples of mode {rank}"
    stored = [s for s in measured(snapshots) if s.mode_samples.ndim == 2 and s.mode_samples.size]
    if not stored:
        return empty("Samples of a mode", "This run did not store which samples its modes live on.")
    shown = nearest(stored, step)
    if rank > len(shown.mode_samples):
        return empty(title, f"Samples are stored for the {len(shown.mode_samples)} fastest modes.")
    pattern = shown.mode_samples[rank - 1]
    order = np.argsort(np.nan_to_num(pattern), kind="stable")
    least = _FAINT * float(np.nanmax(np.abs(pattern), initial=0.0))
    below, above = ([int(i) for i in order if sign * pattern[i] > least] for sign in (-1, 1))
    chosen = [*below[:_EACH], *above[-_EACH:]]
    values = pattern[chosen]
    outputs = shown.mode_outputs[rank - 1] if shown.mode_outputs.ndim == 2 and len(shown.mode_outputs) >= rank else ()
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": f"mode {rank}",
        "x": numbers(values),
        "y": [_name(shown, snapshots, i) for i in chosen],
        "customdata": chosen,
        "marker": {"color": [MODE_COLOURS[3] if value < 0 else BLUE for value in values]},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }
    total = float(np.nansum(pattern**2))
    held = float((values**2).sum()) / total if total > 0 else 0.0
    layout = layout_of(
        f"{title}, step {shown.step}",
        f"How strongly the mode loads on each sample: blue and red samples pull it in opposite directions, and a step "
        f"along it moves them apart. Drawn: {len(chosen)} of {len(pattern)} samples with {held:.0%} of the mode."
        f"{_outputs(outputs)}",
        xaxis={"title": {"text": "loading (fraction)"}, "nticks": 5},
        yaxis={"type": "category", "tickfont": {"size": 10}},
    )
    layout["meta"] |= {"click": "sample", "mode": rank}
    return {"data": [bars], "layout": layout}


def _outputs(weights: Sequence[float] | Floats) -> str:
    """Say which outputs a mode lives on."""
    values = np.asarray(weights, dtype=np.float64)
    if values.size < 2 or not values.any():
        return ""
    largest = np.argsort(-np.abs(values))[:3]
    return " Outputs: " + ", ".join(f"{int(i)} ({values[i]:+.2f})" for i in largest) + "."


def _name(shown: Snapshot, snapshots: Sequence[Snapshot], sample: int) -> str:
    """Return what a reader calls a sample: its index, class and the beginning of its text."""
    known = shown.labels.size > sample
    label = f" (class {shown.labels[sample]:g})" if known else ""
    texts = next((s.sample_texts for s in snapshots if len(s.sample_texts) > sample and s.probe == shown.probe), ())
    return f"{sample}{label}" + (f" {word(texts[sample][:_LETTERS])}" if texts else "")


def sample_row(snapshots: Sequence[Snapshot], sample: int | None = None, step: int | None = None) -> Figure:
    """Return one sample's row of the centred Gram matrix as cosines, samples sorted by class: who learns with it.

    Default: the sample with the largest residual at the last probe that has residuals of samples, else the first.
    """
    stored = [s for s in measured(snapshots) if s.gram.ndim == 2 and s.gram.size]
    if not stored:
        return empty("Who learns with a sample", "No Gram matrix was stored.")
    shown = nearest(stored, step)
    chosen = _worst(snapshots)[0] if sample is None else sample
    title = f"Who learns with sample {chosen}"
    n = len(shown.gram)
    order = shown_order(shown.labels, shown.samples or n)
    order = order if len(order) == n else np.arange(n)
    places = np.flatnonzero(order == chosen)
    if not places.size:
        return empty(title, f"The stored Gram matrix shows {n} of {shown.samples} samples, and not this one.")
    row = centred_cosines(shown.gram)[places[0]]
    labels = shown.labels[order] if shown.labels.size > order.max() else np.zeros(n)
    same = labels == labels[places[0]]
    names = [_name(shown, snapshots, i) for i in order.tolist()]
    data = []
    for kept, name, colour in (
        (same, "same class" if shown.labels.size else "samples", ORANGE),
        (~same, "other classes", BLUE),
    ):
        if kept.any():
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": np.flatnonzero(kept).tolist(),
                    "y": numbers(row[kept].round(4)),
                    "customdata": order[kept].tolist(),
                    "text": [names[i] for i in np.flatnonzero(kept)],
                    "line": {"color": colour},
                    "marker": {"size": 6, "color": colour},
                    "hovertemplate": "sample %{text}: %{y:.2f}<extra></extra>",
                }
            )
    ends = {"color": GREY, "width": 1}
    data.append(line([0, max(n - 1, 1)], [0, 0], "average", GREY, line=ends, hoverinfo="skip"))
    layout = layout_of(
        f"{title}, step {shown.step}",
        "Cosine of the centred kernel between this sample and every other. Above 0: a step on one moves the other the "
        "same way more than average; below: less, or the opposite way.",
        xaxis={"title": {"text": "sample, sorted by class" if shown.labels.size else "sample"}},
        yaxis={"title": {"text": "cosine of the centred kernel"}, "range": [-1.05, 1.05]},
        showlegend=True,
        legend={"orientation": "h", "y": -0.22},
    )
    layout["meta"] |= {"click": "sample", "sample": chosen}
    return {"data": data, "layout": layout}


def _worst(snapshots: Sequence[Snapshot]) -> list[int]:
    """Return the samples with the largest residuals at the last probe that has them, the largest first."""
    held = [s.sample_residual for s in measured(snapshots) if s.sample_residual.size]
    if not held:
        return [0]
    return [int(i) for i in np.argsort(-np.nan_to_num(held[-1]), kind="stable")[:_WORST]]


def sample_residual(
    snapshots: Sequence[Snapshot], sample: int | None = None, unit: Unit = "step", *, log: bool = True
) -> Figure:
    """Return the residual of one sample over training, against the middle and nine tenths of all samples.

    Default: the five samples with the largest residuals at the last probe.
    """
    held = [s for s in measured(snapshots) if s.sample_residual.size and np.isfinite(s.sample_residual).any()]
    held = [s for s in held if s.probe == held[-1].probe and len(s.sample_residual) == len(held[-1].sample_residual)]
    title = "Samples that lag behind" if sample is None else f"Residual of sample {sample}"
    if not held:
        return empty(title, "Residuals of single samples were not recorded.")
    count = len(held[-1].sample_residual)
    if sample is not None and not 0 <= sample < count:
        return empty(title, f"The probe has {count} samples.")
    at = abscissa(snapshots, unit)
    few = [held[i] for i in thinned(len(held), _AREAS)]
    low, middle, high = np.nanquantile(np.stack([s.sample_residual for s in few]), (0.05, 0.5, 0.95), axis=1)
    x = at([s.step for s in few])
    quiet: Figure = {"hoverinfo": "skip", "line": {"color": GREY, "width": 0}}
    grey = {"fill": "tonexty", "fillcolor": "rgba(122, 122, 122, 0.22)"}
    data = [
        line(x, numbers(low, positive=log), "low", GREY, showlegend=False, **quiet),
        line(x, numbers(high, positive=log), "nine tenths of all", GREY, **quiet, **grey),
        line(x, numbers(middle, positive=log), "middle of all", GREY, line={"color": GREY, "dash": "dash"}),
    ]
    for k, chosen in enumerate(_worst(snapshots) if sample is None else [sample]):
        colour = MODE_COLOURS[k % len(MODE_COLOURS)]
        values = [float(s.sample_residual[chosen]) for s in held]
        points = drawn(at, [s.step for s in held], values, log=log)
        name = f"sample {_name(held[-1], snapshots, chosen)}"
        data.append(series(name, colour, points, at.word, customdata=[chosen] * len(points["x"])))
    heights = [y for trace in data for y in trace["y"]]
    layout = layout_of(
        title,
        "Norm over outputs of a sample's residual, in the loss's own geometry (Pearson residual for cross-entropy). "
        "One that stays high while the others fall is hard, or its label is wrong.",
        xaxis={"title": {"text": at.title}},
        yaxis=value_axis(f"residual of the sample ({ARRAYS['sample_residual'].unit})", heights, log=log),
        showlegend=True,
        legend={"font": {"size": 10}},
    )
    layout["meta"]["click"] = "sample"
    return {"data": data, "layout": layout}
