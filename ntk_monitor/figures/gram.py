"""The kernel between samples."""

import numpy as np

from ntk_monitor.figures.style import DIVERGING, Figure, empty, kernel_words, layout_of, numbers
from ntk_monitor.snapshot import ARRAYS, Floats, Snapshot, shown_order


def _classes(snapshot: Snapshot) -> tuple[Floats, Floats] | None:
    """Return sorted class values and their counts, or None when they do not describe the rows of the Gram."""
    labels = snapshot.labels[shown_order(snapshot.labels, snapshot.labels.size)]
    if labels.size == 0 or labels.size != snapshot.gram.shape[0]:
        return None
    values, counts = np.unique(labels, return_counts=True)
    return values.astype(np.float64), counts.astype(np.float64)


def centred_cosines(matrix: Floats) -> Floats:
    """Return a Gram matrix without what all samples share, as cosines; NaN where a sample is like the mean of all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = matrix - matrix.mean(axis=0) - matrix.mean(axis=1)[:, None] + matrix.mean()
        scale = np.sqrt(np.diag(centred))
        cosines: Floats = centred / scale[:, None] / scale
    return cosines


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
        matrix, unit, limit = centred_cosines(matrix), "cosine of the centred kernel", limit or 1.0
    if snapshot.gram.ndim != 2 or snapshot.gram.size == 0 or not np.isfinite(matrix).any():
        return empty(title, "No Gram matrix was stored at this step.")
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
            axis |= {"tickvals": numbers(middles), "ticktext": [f"{value:g}" for value in values]}
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
        # Three digits are more than colours tell.
        "z": [numbers(row.round(3) if cosine else row) for row in matrix],
        "zmin": -extent,
        "zmax": extent,
        "colorscale": DIVERGING,
        "colorbar": {"title": {"text": unit, "side": "right"}},
        "hovertemplate": "samples %{y} and %{x}: %{z:.4g}<extra></extra>",
    }
    order = shown_order(snapshot.labels, snapshot.samples or n)
    layout = layout_of(
        f"{title}, step {snapshot.step}",
        f"Mean over outputs of the {kernel_words(snapshot)}{about}. Colours end at ±{extent:.3g}.",
        xaxis=axis | {"title": {"text": word}},
        yaxis=axis | {"title": {"text": word}, "range": [n - 0.5, -0.5], "scaleanchor": "x"},
        shapes=shapes,
    )
    # Which sample of the probe stands at each place, for a page that opens the one that is clicked.
    layout["meta"] |= {"click": "sample", "order": order.tolist() if len(order) == n else list(range(n))}
    return {"data": [heat], "layout": layout}
