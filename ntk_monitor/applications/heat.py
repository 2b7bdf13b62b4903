"""A square heat map with a name at every row and column."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.figures.style import Figure, layout_of, numbers

Array = NDArray[np.float64]


def heat(  # noqa: PLR0913 - one picture
    names: list[str],
    values: Array,
    title: str,
    unit: str,
    scale: tuple[float, float, Any],
    tooltip: str,
    *,
    axes: tuple[str, str] = ("task", "task"),
) -> Figure:
    """Return the heat map of a matrix (n, n); NaN stays empty.

    Args:
        names: of rows and columns.
        values: (n, n), the first index downwards.
        title: of the figure.
        unit: of the values, beside the colour bar.
        scale: (smallest, largest, colours).
        tooltip: what it tells.
        axes: titles of columns and of rows.
    """
    places = list(range(len(names)))
    bar = {
        "type": "heatmap",
        "x": places,
        "y": places,
        "z": [numbers(row) for row in values],
        "zmin": scale[0],
        "zmax": scale[1],
        "colorscale": scale[2],
        "colorbar": {"title": {"text": unit, "side": "right"}},
        "text": [[f"{row}, {column}" for column in names] for row in names],
        "hovertemplate": "%{text}: %{z:.3f}<extra></extra>",
    }
    edge = len(names) - 0.5
    axis: Figure = {"tickvals": places, "ticktext": names, "constrain": "domain", "showgrid": False}
    layout = layout_of(
        title,
        tooltip,
        xaxis=axis | {"title": {"text": axes[0]}, "range": [-0.5, edge]},
        yaxis=axis | {"title": {"text": axes[1]}, "range": [edge, -0.5], "scaleanchor": "x"},
    )
    return {"data": [bar], "layout": layout}
