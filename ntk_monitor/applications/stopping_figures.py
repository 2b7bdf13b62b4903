"""Early stopping drawn: the ridge of each mode, and the share of it that is learned."""

import numpy as np

from ntk_monitor.applications.report import short
from ntk_monitor.applications.stopped import EarlyStopping, flow_filter
from ntk_monitor.figures.style import BLUE, GREY, ORANGE, Figure, layout_of, line, log_axis, numbers


def ridges(stopping: EarlyStopping) -> Figure:
    """Return each mode's own ridge against its eigenvalue, with the best single one and 1/τ."""
    kept = (stopping.eigenvalues > 0) & np.isfinite(stopping.ridge) & (stopping.ridge > 1e-12 * stopping.best)
    order = np.argsort(stopping.eigenvalues[kept])
    x, y = stopping.eigenvalues[kept][order], stopping.ridge[kept][order]
    ends = numbers([x.min(), x.max()]) if len(x) else []
    data = [
        line(numbers(x), numbers(y), "ridge of each mode", BLUE, mode="lines+markers")
        | {"hovertemplate": "eigenvalue %{x:.4g}: ridge %{y:.4g}<extra></extra>"},
        line(ends, numbers([1 / stopping.time] * len(ends)), "1 / time", GREY, line={"color": GREY, "dash": "dash"}),
        line(ends, numbers([stopping.best] * len(ends)), "best single ridge", ORANGE),
    ]
    layout = layout_of(
        "The ridge that stopping is, mode by mode",
        "A flat line would be one ridge. Where it falls, fast modes are learned far more completely than by any ridge "
        "that holds back the slow ones as much.",
        xaxis=log_axis("eigenvalue"),
        yaxis=log_axis("equivalent ridge"),
        showlegend=True,
        legend={"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}


def filters(stopping: EarlyStopping) -> Figure:
    """Return the share of each mode that is learned: by the steps, by gradient flow, by the best single ridge."""
    kept = stopping.eigenvalues > 1e-12 * stopping.eigenvalues.max()
    x = np.sort(stopping.eigenvalues[kept])
    order = np.argsort(stopping.eigenvalues[kept])
    data = [
        line(numbers(x), numbers(stopping.filter[kept][order]), "the steps", BLUE, mode="lines+markers"),
        line(
            numbers(x),
            numbers(flow_filter(x, stopping.time)),
            "gradient flow",
            GREY,
            line={"color": GREY, "dash": "dash"},
        ),
        line(numbers(x), numbers(x / (x + stopping.best)), f"ridge {short(stopping.best)}", ORANGE),
    ]
    layout = layout_of(
        "Share of each mode that is learned",
        "Stopping and a ridge both hold back slow modes; they differ most in between.",
        xaxis=log_axis("eigenvalue"),
        yaxis={"title": {"text": "share learned"}},
        showlegend=True,
        legend={"x": 0.02, "y": 0.98, "xanchor": "left", "yanchor": "top", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}
