"""Two probes in one figure: their spectra, their layers, their leading eigenvectors."""

from collections.abc import Mapping

import numpy as np

from ntk_monitor.figures.style import (
    GREY,
    MODE_COLOURS,
    VIRIDIS,
    Figure,
    empty,
    layout_of,
    line,
    log_axis,
    numbers,
)
from ntk_monitor.snapshot import ARRAYS, Floats, Snapshot

_LAYERS = 12


def spectra_compared(probes: Mapping[str, Snapshot]) -> Figure:
    """Return the eigenvalues of several probes of the same samples over each other.

    Dashed: where noise begins, when the spectrum comes near to it.
    """
    title = "Spectra compared"
    drawn = {name: one for name, one in probes.items() if one.eigenvalues.size}
    if not drawn:
        return empty(title, "Neither probe has a spectrum.")
    data: list[Figure] = []
    lowest: list[float] = []
    for (name, one), colour in zip(drawn.items(), MODE_COLOURS, strict=False):
        values = numbers(one.eigenvalues, positive=True)
        mode = "lines+markers" if len(values) <= 24 else "lines"
        hover = "mode %{x}: %{y:.4g}<extra>%{fullData.name}</extra>"
        ranks = list(range(1, len(values) + 1))
        label = name if name == f"step {one.step}" else f"{name}, step {one.step}"
        data.append(line(ranks, values, label, colour, mode=mode, hovertemplate=hover))
        above = one.eigenvalues[one.eigenvalues > max(np.nan_to_num(one.noise_floor), 0.0)]
        lowest += above[-1:].tolist()
        if np.isfinite(one.noise_floor) and 100 * one.noise_floor > above[-1:].sum() > 0:
            floor = numbers([one.noise_floor] * 2)
            look = {"color": colour, "dash": "dash", "width": 1}
            data.append(line([1, max(len(values), 2)], floor, f"noise floor of {name}", colour, line=look))
    yaxis = log_axis(f"eigenvalue ({ARRAYS['eigenvalues'].unit})")
    if lowest:
        # What lies below the last resolved eigenvalue is noise; half a decade of it is enough.
        top = max(float(np.nanmax(one.eigenvalues)) for one in drawn.values())
        yaxis["range"] = [float(np.log10(min(lowest))) - 0.5, float(np.log10(top)) + 0.5]
    layout = layout_of(
        title,
        "Eigenvalues of both kernels K on the same samples. A vertical shift is growth; a change of slope is a change "
        "of shape: which directions are learned fast, and how many.",
        xaxis=log_axis("mode index", exponentformat="none"),
        yaxis=yaxis,
        showlegend=True,
        legend={"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "font": {"size": 10}},
    )
    return {"data": data, "layout": layout}


def layers_compared(probes: Mapping[str, Snapshot]) -> Figure:
    """Return the share of each layer at several probes as bars: what moved the outputs, else what the kernel says.

    The twelve layers with the largest share are shown, in the order of the network.
    """
    title = "Layers compared"
    held: dict[str, Snapshot] = {}
    words = ""
    for field, words in (  # noqa: B007 - the last ones are used below
        ("layer_update", "Share of each layer in the change of the outputs since the probe before"),
        ("layer_share", "Share of each layer in the trace of lr J D J^T, D the optimizer's preconditioner"),
    ):
        held = {name: one for name, one in probes.items() if getattr(one, field).size == len(one.layers) > 0}
        if held and len(held) == len(probes):
            break
    else:
        return empty(title, "Shares of layers were not measured at both probes.")
    shares = {name: dict(zip(one.layers, getattr(one, field).tolist(), strict=True)) for name, one in held.items()}
    names = list(dict.fromkeys(layer for share in shares.values() for layer in share))
    largest = sorted(names, key=lambda layer: -max(np.nan_to_num(s.get(layer, 0.0)) for s in shares.values()))[:_LAYERS]
    shown = sorted(largest, key=names.index)
    data = [
        {
            "type": "bar",
            "name": name,
            "x": [layer or "the module" for layer in shown],
            "y": numbers([share.get(layer, np.nan) for layer in shown]),
            "marker": {"color": colour},
            "hovertemplate": "%{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
        }
        for (name, share), colour in zip(shares.items(), MODE_COLOURS, strict=False)
    ]
    rest = f" {len(names) - len(shown)} layers with less are left out." if len(names) > len(shown) else ""
    layout = layout_of(
        title,
        f"{words}.{rest}",
        xaxis={"type": "category", "tickangle": -30},
        yaxis={"title": {"text": "share (fraction)"}, "rangemode": "tozero"},
        barmode="group",
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
    )
    return {"data": data, "layout": layout}


def overlaps(cosines: Floats, names: tuple[str, str], dimension: int) -> Figure:
    """Return the squared cosines between leading eigenvectors of two kernels as a heat map.

    Args:
        cosines: (k, k), rows the first kernel's modes, descending, columns the second's.
        names: of the two.
        dimension: modes that are compared as one space, framed.
    """
    count = len(cosines)
    ticks = list(range(1, count + 1))
    heat = {
        "type": "heatmap",
        "x": ticks,
        "y": ticks,
        "z": [numbers(row) for row in cosines],
        "zmin": 0,
        "zmax": 1,
        "colorscale": VIRIDIS,
        "colorbar": {"title": {"text": "squared cosine", "side": "right"}},
        "hovertemplate": "mode %{y} and mode %{x}: %{z:.3f}<extra></extra>",
    }
    edge = min(dimension, count) + 0.5
    frame = {"type": "rect", "x0": 0.5, "y0": 0.5, "x1": edge, "y1": edge, "line": {"color": GREY, "width": 2}}
    axis: Figure = {"constrain": "domain", "showgrid": False, "nticks": 12}
    layout = layout_of(
        "Eigenvectors compared",
        "Squared cosines between the leading eigenvectors of both centred mean Gram matrices. A bright diagonal: the "
        "modes kept their identity. A bright block: they turned within one space. Framed: the top eigenspace.",
        xaxis=axis | {"title": {"text": f"mode, {names[1]}"}, "range": [0.5, count + 0.5]},
        yaxis=axis | {"title": {"text": f"mode, {names[0]}"}, "range": [count + 0.5, 0.5], "scaleanchor": "x"},
        shapes=[frame],
    )
    return {"data": [heat], "layout": layout}
