"""What learning speed looks like: single modes over steps, and how much of the residual is learned by when."""

import math

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.figures.style import BLUE, GREY, STEPS, VIRIDIS, Figure, layout_of, line, log_axis, numbers, thinned

_LINES, _DOTS = 5, 25


def figure(
    predicted: NDArray[np.float64],
    measured: NDArray[np.float64],
    times: NDArray[np.float64],
    energy: NDArray[np.float64],
) -> Figure:
    """Return modes over steps, forecast (lines) and measured (dots), and the energy learned by each time.

    Args:
        predicted: (T + 1, n) coordinates by the first kernel.
        measured: (T + 1, n) coordinates of training.
        times: (n,) forecast steps to a tenth.
        energy: (n,) shares of the first residual.
    """
    data: list[Figure] = []
    steps = len(measured) - 1
    for rank, mode in enumerate(_chosen(times, energy)):
        colour = _colour(rank)
        whole, some = thinned(steps + 1, 200), thinned(steps + 1, _DOTS)
        lines = numbers(np.abs(predicted[whole, mode]), positive=True)
        dots = numbers(np.abs(measured[some, mode]), positive=True)
        data.append(line(whole, lines, f"mode {mode + 1}", colour))
        marker = {"size": 5, "color": colour}
        data.append(line(some, dots, "training", colour, mode="markers", marker=marker, showlegend=False))
    finite = np.isfinite(times)
    order = np.argsort(times[finite], kind="stable")
    at, total = times[finite][order].clip(min=0.1), np.cumsum(energy[finite][order])
    second = {"xaxis": "x2", "yaxis": "y2", "showlegend": False}
    data.append(line(numbers(at), numbers(total), "learned by then", BLUE, **second))
    ends = {"line": {"color": GREY, "dash": "dash"}}
    data.append(line([max(steps, 1)] * 2, [0.0, 1.0], "end of this run", GREY, **ends, **second))
    layout = layout_of(
        "Modes of the residual, and how much of it is learned by when",
        "Left: lines are the forecast of the first kernel, dots what training did; green modes are slow. Right: share "
        "of the first residual in modes that are down to a tenth by then; dashed: the end of this run.",
        xaxis={"title": {"text": STEPS}, "domain": [0, 0.46]},
        yaxis=log_axis("|coordinate of the residual| (target units)") | _floor(measured, predicted),
        xaxis2=log_axis(STEPS) | {"domain": [0.6, 1], "anchor": "y2"},
        yaxis2={"title": {"text": "share of the residual learned"}, "range": [0, 1.02], "anchor": "x2"},
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def _chosen(times: NDArray[np.float64], energy: NDArray[np.float64]) -> list[int]:
    """Return modes spread over the speeds, of those with a visible share of the residual, fastest first."""
    seen = np.flatnonzero((energy > 1e-4) & np.isfinite(times))
    if not seen.size:
        seen = np.arange(min(len(energy), _LINES))
    ranks = np.unique(np.geomspace(1, seen.size, _LINES).round().astype(int)) - 1
    return [int(i) for i in seen[ranks]]


def _colour(rank: int) -> str:
    return str(VIRIDIS[min(rank, _LINES - 1)][1])


def _floor(*paths: NDArray[np.float64]) -> Figure:
    """Return an axis range of at most six decades below the largest coordinate: beneath lies rounding."""
    tops = [float(np.abs(path[0]).max()) for path in paths]
    top = max(tops)
    return {"range": [math.log10(top) - 6, math.log10(top) + 0.5]} if top > 0 else {}
