"""What the study of a neural ODE says: its words, tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.figures.style import DIVERGING, MODE_COLOURS, Figure, layout_of, line, log_axis, numbers

Array = NDArray[np.float64]
Scan = tuple[Sequence[int], Mapping[str, Array]]

ACCURATE = 1e-3
"""Relative change of the kernel under a finer solver up to which the steps are small enough."""
RESTS = 0.05
"""Relative error up to which the kernel is that of a flow at rest."""


def told(
    *, kernel: Array, resting: Array, found: Mapping[str, Any], error: float, scan: Scan, words: Mapping[str, str]
) -> Report:
    """Return the report of one flow.

    Args:
        kernel: of the flow, (n, n).
        resting: T² times the kernel of the field at the start.
        found: rank, condition, eigenvalues and floor.
        error: Frobenius norm of the kernel's change under a finer solver.
        scan: numbers of steps, and method → relative errors.
        words: time, samples and solver as text.
    """
    size = float(np.linalg.norm(kernel)) or float("nan")
    off, coarse = float(np.linalg.norm(resting - kernel)) / size, error / size
    rank, rows = int(found["rank"]), len(kernel)
    return Report(
        name="neural_ode",
        title="What can the flow of this vector field learn?",
        summary=(
            f"{words['samples']} states followed to T = {words['time']} ({words['solver']}). The kernel of the "
            f"end points has rank {rank} of {rows}. Taking the velocity at the start for the whole way would be "
            f"{100 * off:.1f} % off."
        ),
        numbers=(
            Number("rank", float(rank), note=f"of {rows}: eigenvalues above {found['floor']:.2g}"),
            Number("condition", float(found["condition"]), note="infinite: some directions cannot be learned"),
            Number("largest eigenvalue", float(found["eigenvalues"][0]), note="of K"),
            Number("solver error", coarse, note="relative change of K under a solver of twice the steps or finer"),
            Number("distance from rest", off, note="relative error of T² times the kernel of the field at the start"),
        ),
        verdicts=(
            Verdict(
                "more than one direction can be learned",
                rank > 1 if rank else None,
                f"rank {rank}, as far as rounding and the solver let it be known",
            ),
            Verdict(
                "the solver's steps are small enough for the kernel",
                bool(coarse <= ACCURATE) if np.isfinite(coarse) else None,
                f"a finer solver changes K by {coarse:.2g}, relative; wanted {ACCURATE:g}",
            ),
            Verdict(
                "K is T² times the kernel of the vector field at the start",
                bool(off <= RESTS) if np.isfinite(off) else None,
                f"{100 * off:.1f} % off; wanted {100 * RESTS:g} %. It holds for a flow that hardly moves",
            ),
        ),
        tables={"relative error of the kernel by solver": _errors(scan)},
        figures={
            "kernel": heat(kernel, "Kernel of the flow", "K between the end points' coordinates, sample by sample."),
            "resting": heat(
                resting,
                "Kernel of a flow that stands still",
                "T² times the kernel of the vector field at the initial states: what K would be if nothing moved.",
                limit=float(np.abs(kernel).max()),
            ),
            "solver": _orders(scan),
        },
        caveats=(
            "The rank counts eigenvalues above twice the change of K under a finer solver; a finer one may find more.",
            "Autograd differentiates the steps that were taken, the adjoint the flow behind them; they agree to the "
            "solver's error.",
        ),
    )


def heat(kernel: Array, title: str, tooltip: str, at: Array | None = None, limit: float | None = None) -> Figure:
    """Return a kernel as a heat map.

    Args:
        kernel: (n, n).
        title: of the figure.
        tooltip: what it tells.
        at: (n,) initial states, for scalar flows; None: rows are numbered.
        limit: colours end at ±limit; None: at the largest entry.
    """
    extent = limit or float(np.abs(kernel).max()) or 1.0
    places = numbers(np.arange(len(kernel)) if at is None else at)
    word = "row: sample, then coordinate" if at is None else "initial state x"
    trace = {
        "type": "heatmap",
        "x": places,
        "y": places,
        "z": [numbers(row) for row in kernel],
        "zmin": -extent,
        "zmax": extent,
        "colorscale": DIVERGING,
        "colorbar": {"title": {"text": "K (squared output / parameter units)", "side": "right"}},
        "hovertemplate": "%{y:.3g} and %{x:.3g}: %{z:.4g}<extra></extra>",
    }
    axis: Figure = {"title": {"text": word}, "constrain": "domain", "showgrid": False}
    half = 0.5 if at is None or len(at) < 2 else float(at[1] - at[0]) / 2
    span = [-0.5, len(kernel) - 0.5] if at is None else [float(at[0]) - half, float(at[-1]) + half]
    up = span[::-1] if at is None else span
    layout = layout_of(title, tooltip, xaxis=axis | {"range": span}, yaxis=axis | {"range": up, "scaleanchor": "x"})
    return {"data": [trace], "layout": layout}


def _errors(scan: Scan) -> Table:
    steps, errors = scan
    rows = [(method, *map(float, found), _order(steps, found)) for method, found in errors.items()]
    return Table(("solver", *(f"{count} steps" for count in steps), "order found"), tuple(rows))


def _order(steps: Sequence[int], errors: Array) -> float:
    """Return the order of convergence from the last two errors that are not rounding; NaN below two."""
    kept = np.flatnonzero(errors > 1e-12)
    if len(kept) < 2:
        return float("nan")
    a, b = kept[-2], kept[-1]
    return float(np.log(errors[a] / errors[b]) / np.log(steps[b] / steps[a]))


def _orders(scan: Scan) -> Figure:
    steps, errors = scan
    data = [
        line(list(steps), numbers(found, positive=True), method, colour, mode="lines+markers")
        for (method, found), colour in zip(errors.items(), MODE_COLOURS, strict=False)
    ]
    layout = layout_of(
        "Error of the kernel by solver and steps",
        "Relative error against the fourth-order solver at four times the most steps. What a solver gets wrong on the "
        "way, it gets wrong in the kernel: choose the steps where the line is below what you need.",
        xaxis=log_axis("steps", exponentformat="none", tickvals=list(steps), ticktext=[str(n) for n in steps]),
        yaxis=log_axis("relative error of K"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}
