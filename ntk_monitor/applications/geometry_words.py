"""What the study of geometry says: its words, tables and figures."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.figures.style import BLUE, GREY, MODE_COLOURS, Figure, layout_of, line, numbers, thinned

Array = NDArray[np.float64]

FOLLOWS = 0.5
"""Pearson correlation from which distances in the kernel are said to follow those of the inputs."""
SHOWS = 0.8
"""Share of the variance from which a picture is said to show the geometry."""
_DOTS = 3000


def told(
    *,
    points: Array,
    explained: Array,
    correlations: Mapping[str, tuple[float, float]],
    distances: tuple[Array, Array],
    classes: Array | None,
    paths: Mapping[str, Array],
) -> Report:
    """Return the report of one kernel's geometry.

    Args:
        points: (n, k) kernel PCA.
        explained: share of the variance by component.
        correlations: method → correlation and Mantel p-value.
        distances: between inputs and in the kernel, (n, n).
        classes: (n,) or None.
        paths: checkpoint → (n, 2) aligned points.
    """
    pearson, p = correlations["pearson"]
    shown = float(explained[: points.shape[1]].sum())
    separation = None if classes is None else tuple(_separation(one, classes) for one in distances)
    return Report(
        name="geometry",
        title="How does the network arrange the samples?",
        summary=_summary(len(points), pearson, p, shown, points.shape[1], separation),
        numbers=(
            Number("Pearson", pearson, note="distances in the kernel against distances between inputs"),
            Number("Spearman", correlations["spearman"][0], note="the same by ranks"),
            Number("Mantel p-value", p, note="by permuting samples"),
            Number("explained variance", shown, note=f"by the {points.shape[1]} components drawn"),
            *(
                ()
                if separation is None
                else (
                    Number("class separation, inputs", separation[0], note="mean distance between / within classes"),
                    Number("class separation, kernel", separation[1]),
                )
            ),
        ),
        verdicts=tuple(_verdicts(pearson, p, shown, points.shape[1], separation)),
        tables={"components": _components(explained)} | ({"checkpoints": _moves(paths)} if paths else {}),
        figures={"embedding": _embedding(points, explained, classes), "shepard": _shepard(distances, pearson)}
        | ({"trajectory": _trajectory(paths, classes)} if paths else {}),
        caveats=(
            "The p-value permutes samples; the ordinary p-value of a correlation of pairwise distances is invalid.",
            "A picture of few components makes distances too short, never too long.",
        ),
    )


def _summary(
    count: int, pearson: float, p: float, shown: float, components: int, separation: tuple[float, ...] | None
) -> str:
    words = (
        f"Distances between the gradients of {count} samples correlate {pearson:.2f} with distances between the inputs "
        f"(Mantel p = {p:.3g}). {components} components explain {100 * shown:.0f} % of the kernel's variance."
    )
    if separation is None:
        return words
    return (
        f"{words} Samples of different classes are {separation[1]:.2f} times as far apart as samples of one class in "
        f"the kernel, {separation[0]:.2f} times in the inputs."
    )


def _verdicts(
    pearson: float, p: float, shown: float, components: int, separation: tuple[float, ...] | None
) -> list[Verdict]:
    known = bool(np.isfinite(pearson) and np.isfinite(p))
    found = [
        Verdict(
            "distances in the kernel follow distances between the inputs",
            bool(pearson >= FOLLOWS and p <= 0.05) if known else None,
            f"Pearson {pearson:.3f}, Mantel p = {p:.3g}; wanted {FOLLOWS} and p ≤ 0.05"
            if known
            else "all distances are the same, or no permutation was drawn",
        ),
        Verdict(
            f"{components} components show the geometry of the kernel",
            shown >= SHOWS,
            f"they explain {100 * shown:.1f} % of the variance; wanted {100 * SHOWS:.0f} %",
        ),
    ]
    if separation is not None:
        found.append(
            Verdict(
                "the kernel keeps classes further apart than the inputs do",
                separation[1] > separation[0],
                f"distance between classes over that within: kernel {separation[1]:.3f}, inputs {separation[0]:.3f}",
            )
        )
    return found


def _separation(distances: Array, classes: Array) -> float:
    """Return the mean distance between samples of different classes over that between samples of one class."""
    upper = np.triu_indices(len(classes), 1)
    same = classes[upper[0]] == classes[upper[1]]
    within = distances[upper][same].mean()
    return float(distances[upper][~same].mean() / within) if within > 0 else float("inf")


def _components(explained: Array) -> Table:
    total = np.cumsum(explained)
    rows = [(k, float(explained[k - 1]), float(total[k - 1])) for k in (1, 2, 3, 4, 5, 10, 20) if k <= len(explained)]
    return Table(("component", "explained", "explained up to here"), tuple(rows))


def _moves(paths: Mapping[str, Array]) -> Table:
    names, points = list(paths), list(paths.values())
    rows = [(names[0], "")]
    for name, after, before in zip(names[1:], points[1:], points[:-1], strict=True):
        size = float(np.linalg.norm(before)) or float("nan")
        rows.append((name, f"{float(np.linalg.norm(after - before)) / size:.3f}"))
    return Table(("checkpoint", "moved since the one before, relative"), tuple(rows))


def _groups(classes: Array | None, count: int) -> list[tuple[str, NDArray[np.intp], str]]:
    if classes is None or len(np.unique(classes)) > len(MODE_COLOURS) + 2:
        return [("samples", np.arange(count), BLUE)]
    colours = (*MODE_COLOURS, "#404040", "#b5bd00")
    return [
        (f"class {value:g}", np.flatnonzero(classes == value), colour)
        for value, colour in zip(np.unique(classes), colours, strict=False)
    ]


def _plane(points: Array) -> tuple[Array, Array]:
    # A kernel of one direction, or of none, has fewer columns than a plane.
    both = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
    return both[:, 0], both[:, 1]


def _embedding(points: Array, explained: Array, classes: Array | None) -> Figure:
    across, up = _plane(points)
    data = [
        line(
            numbers(across[rows]), numbers(up[rows]), name, colour, mode="markers", marker={"color": colour, "size": 7}
        )
        for name, rows, colour in _groups(classes, len(points))
    ]
    share = [*(100 * explained[:2]).tolist(), 0.0, 0.0]
    layout = layout_of(
        "The samples as the kernel sees them",
        "Kernel PCA. Samples that lie together have like gradients: learning one moves the other. Distances in the "
        "picture are at most those of the kernel.",
        xaxis={"tickformat": "~g", "title": {"text": f"component 1 ({share[0]:.0f} % of the variance)"}},
        yaxis={"title": {"text": f"component 2 ({share[1]:.0f} % of the variance)"}, "scaleanchor": "x"},
        showlegend=len(data) > 1,
    )
    return {"data": data, "layout": layout}


def _shepard(distances: tuple[Array, Array], pearson: float) -> Figure:
    upper = np.triu_indices(len(distances[0]), 1)
    inputs, kernel = distances[0][upper], distances[1][upper]
    kept = thinned(len(inputs), _DOTS)
    dots = {"mode": "markers", "marker": {"color": BLUE, "size": 3}}
    data = [line(numbers(inputs[kept]), numbers(kernel[kept]), "pairs", BLUE, **dots)]
    if np.isfinite(pearson):
        slope, offset = np.polyfit(inputs, kernel, 1)
        ends = np.array([inputs.min(), inputs.max()])
        dash = {"color": GREY, "dash": "dash", "width": 1}
        data.append(line(numbers(ends), numbers(slope * ends + offset), "best line", GREY, line=dash))
    layout = layout_of(
        "Distances in the kernel against distances between inputs",
        f"One dot per pair of samples (Shepard diagram), Pearson {pearson:.3f}. On a line: the network keeps the "
        "geometry of its inputs. A cloud: it has made its own.",
        xaxis={"tickformat": "~g", "title": {"text": "distance between inputs (units of x)"}},
        yaxis={"title": {"text": "distance in the kernel (√ of units of K)"}},
    )
    return {"data": data, "layout": layout}


def _trajectory(paths: Mapping[str, Array], classes: Array | None) -> Figure:
    steps = np.stack(list(paths.values()))
    data: list[Figure] = []
    for name, rows, colour in _groups(classes, steps.shape[1]):
        # None lifts the pen between samples.
        x = [value for n in rows for value in (*numbers(steps[:, n, 0]), None)]
        y = [value for n in rows for value in (*numbers(steps[:, n, 1]), None)]
        data.append(line(x, y, f"{name}, path", colour, line={"color": colour, "width": 0.6}, showlegend=False))
        dots = {"mode": "markers", "marker": {"color": colour, "size": 7}}
        data.append(line(numbers(steps[-1][rows, 0]), numbers(steps[-1][rows, 1]), name, colour, **dots))
    layout = layout_of(
        f"The samples over training, {next(iter(paths))} to {list(paths)[-1]}",
        "Kernel PCA of each checkpoint, turned to the one before (Procrustes) and divided by the kernel's size; a dot "
        "is where a sample ends. Long paths: the network builds its own geometry.",
        xaxis={"tickformat": "~g", "title": {"text": "component 1 (relative)"}},
        yaxis={"title": {"text": "component 2 (relative)"}, "scaleanchor": "x"},
        showlegend=len(data) > 2,
    )
    return {"data": data, "layout": layout}
