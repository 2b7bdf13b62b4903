"""Samples as the kernel sees them: its two leading principal components, turned so that steps can be compared.

Kernel PCA of the centred Gram matrix of cosines: a sample lies at x = (v₁ √λ₁, v₂ √λ₂), within the unit circle, and
samples that learn together lie together. Signs of eigenvectors are arbitrary and close ones turn freely, so the points
are turned (or mirrored) to lie as near as possible to those of the first stored probe: orthogonal Procrustes, R = U Vᵀ
of the singular vectors of Xᵀ Y (Schönemann 1966).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.figures.gram import centred_cosines
from ntk_monitor.figures.style import (
    MODE_COLOURS,
    VIRIDIS,
    Figure,
    empty,
    kernel_words,
    layout_of,
    measured,
    nearest,
    numbers,
    word,
)
from ntk_monitor.snapshot import Floats, Integers, Snapshot, shown_order

_CLASSES = 20
_LETTERS = 60


def coordinates(gram: Floats) -> tuple[Floats, float]:
    """Return where samples lie (N, 2), and the share of the kernel's spread that these two directions hold."""
    cosines = np.nan_to_num(centred_cosines(gram))
    values, vectors = np.linalg.eigh((cosines + cosines.T) / 2)
    kept = np.maximum(values[::-1][:2], 0.0)
    points: Floats = vectors[:, ::-1][:, :2] * np.sqrt(kept)
    total = float(np.maximum(values, 0.0).sum())
    return points, float(kept.sum()) / total if total > 0 else 0.0


def turned(points: Floats, towards: Floats) -> Floats:
    """Return points (N, 2), turned or mirrored to lie nearest to others of the same samples."""
    if points.shape != towards.shape:
        return points
    left, _, right = np.linalg.svd(points.T @ towards)
    found: Floats = points @ left @ right
    return found


def kernel_map(snapshots: Sequence[Snapshot], step: int | None = None) -> Figure:
    """Return the samples of the stored probe nearest to a step in the plane of the kernel's two leading components.

    Turned towards the last stored probe, which itself is turned towards the first: so that the map of every step is
    near to that of the end, where classes lie apart.
    """
    title = "Map of the kernel"
    stored = [s for s in measured(snapshots) if s.gram.ndim == 2 and len(s.gram) > 2 and np.isfinite(s.gram).all()]
    if not stored:
        return empty(title, "No Gram matrix was stored.")
    shown = nearest(stored, step)
    like = [s for s in stored if s.probe == shown.probe]
    points, share = coordinates(shown.gram)
    end = turned(coordinates(like[-1].gram)[0], coordinates(like[0].gram)[0])
    points = end if shown is like[-1] else turned(points, end)
    order = shown_order(shown.labels, shown.samples or len(points))
    order = order if len(order) == len(points) else np.arange(len(points))
    texts = next((s.sample_texts for s in reversed(like) if len(s.sample_texts) > order.max(initial=0)), ())
    data = _groups(points, order, shown, texts)
    axis: Figure = {"range": [-1.05, 1.05], "zeroline": True, "nticks": 5}
    layout = layout_of(
        f"{title}, step {shown.step}",
        "Samples that learn together lie together: the two leading principal components of the centred "
        f"{kernel_words(shown)}, as cosines; they hold {share:.0%} of its spread. The map is turned so that points of "
        "different steps can be compared.",
        xaxis=axis | {"title": {"text": "first component"}, "constrain": "domain"},
        yaxis=axis | {"title": {"text": "second component"}, "scaleanchor": "x"},
        showlegend=len(data) > 1,
        legend={"font": {"size": 10}},
    )
    layout["meta"]["click"] = "sample"
    return {"data": data, "layout": layout}


def _groups(points: Floats, order: Integers, shown: Snapshot, texts: Sequence[str]) -> list[Figure]:
    """Return one cloud of points per class; one in all, coloured by value, where there are many or none."""
    labels = shown.labels[order] if shown.labels.size > order.max(initial=0) else np.zeros(len(order))
    classes = np.unique(labels)
    said = np.array([f"sample {i}{_text(texts, i)}" for i in order.tolist()], dtype=object)

    def cloud(chosen: NDArray[np.bool_], name: str, marker: Figure) -> Figure:
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": numbers(points[chosen, 0].round(4)),
            "y": numbers(points[chosen, 1].round(4)),
            "customdata": order[chosen].tolist(),
            "text": said[chosen].tolist(),
            "line": {"color": marker.get("color") if isinstance(marker.get("color"), str) else MODE_COLOURS[0]},
            "marker": {"size": 8} | marker,
            "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
        }

    if len(classes) > _CLASSES:
        shades = {"color": numbers(labels), "colorscale": VIRIDIS, "colorbar": {"title": {"text": "label"}}}
        return [cloud(np.ones(len(order), dtype=bool), "samples", shades)]
    found = []
    for k, value in enumerate(classes.tolist()):
        colour = MODE_COLOURS[k % len(MODE_COLOURS)]
        symbol = ("circle", "diamond", "square")[k // len(MODE_COLOURS)]
        name = f"class {value:g}" if shown.labels.size else "samples"
        found.append(cloud(labels == value, name, {"color": colour, "symbol": symbol}))
    return found


def _text(texts: Sequence[str], sample: int) -> str:
    return f": {word(texts[sample][:_LETTERS])}" if sample < len(texts) else ""
