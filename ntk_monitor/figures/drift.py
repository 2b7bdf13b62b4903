"""Is the kernel still moving, and does it move towards the targets?"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.style import (
    BLUE,
    ORANGE,
    Figure,
    drawn,
    empty,
    layout_of,
    looked,
    run_colours,
    series,
    value_axis,
    word,
)
from ntk_monitor.snapshot import Snapshot

Runs = Mapping[str, Sequence[Snapshot]]
Read = Callable[[Snapshot], float]

_BELOW = {"orientation": "h", "y": -0.22}


def _alignment(snapshot: Snapshot) -> float:
    return snapshot.metrics.get("alignment", np.nan)


def _since_previous(snapshot: Snapshot) -> float:
    return snapshot.metrics.get("kernel_change", np.nan)


def _since_first(snapshot: Snapshot) -> float:
    return 1 - snapshot.facts.get("cka_first", np.nan)


def alignment(runs: Runs, unit: Unit = "step") -> Figure:
    """Return the centred kernel-target alignment over training, one colour per run."""
    data, title = _traces(runs, {"": _alignment}, unit, log=False)
    if not data:
        return empty("Alignment with the targets", "No alignment has been measured yet.")
    few = any(s.samples < 100 for snapshots in runs.values() for s in snapshots if s.status == "measured")
    layout = layout_of(
        "Alignment with the targets",
        "Cosine between the centred kernel and the targets' own, unbiased: 0 is chance, 1 is a kernel that ties only "
        f"samples of equal target. It rises while features are learned.{' Noisy below 100 samples.' if few else ''}",
        xaxis={"title": {"text": title}},
        yaxis={"title": {"text": "alignment (cosine)"}},
        showlegend=len(runs) > 1,
        legend=_BELOW,
    )
    return {"data": data, "layout": layout}


def kernel_drift(runs: Runs, unit: Unit = "step", *, log: bool = True) -> Figure:
    """Return how far the kernel turned since the previous probe (solid) and since the first (dotted), per run."""
    parts = {"since the previous probe": _since_previous, "since the first probe": _since_first}
    data, title = _traces(runs, parts, unit, log=log)
    if not data:
        return empty("Drift of the kernel", "No second probe has been measured yet.")
    heights = [y for trace in data for y in trace["y"]]
    kept = [y for y in heights if y is not None and y > 0]
    # Below a millionth the kernel stands still; a last probe a step after another would stretch the axis to that.
    low = {"range": [max(float(np.log10(min(kept))) - 0.1, -6.0), float(np.log10(max(kept))) + 0.1]} if kept else {}
    several = " Solid: since the previous probe; dotted: since the first." if len(runs) > 1 else ""
    layout = layout_of(
        "Drift of the kernel",
        "1 - cosine between kernels since the previous probe, 1 - CKA (centred cosine) since the first. 0 is a frozen "
        f"(lazy) kernel; growth alone does not count, see the trace.{several}",
        xaxis={"title": {"text": title}},
        yaxis=value_axis("turned by (1 - cosine)", heights, log=log, **(low if log else {})),
        showlegend=True,
        legend=_BELOW,
    )
    return {"data": data, "layout": layout}


def _traces(runs: Runs, parts: Mapping[str, Read], unit: Unit, *, log: bool) -> tuple[list[Figure], str]:
    """Return a line per run and part, and the title of the horizontal axis."""
    data: list[Figure] = []
    title = ""
    alone = len(runs) == 1
    colours = run_colours(runs)
    for name, snapshots in runs.items():
        at = abscissa(snapshots, unit)
        title = title or at.title
        probes = looked(snapshots)
        for k, (part, read) in enumerate(parts.items()):
            points = drawn(at, [s.step for s in probes], [read(s) for s in probes], log=log)
            if not points["x"]:
                continue
            shade = (BLUE, ORANGE)[k] if alone else colours[name]
            look = {"color": shade, "dash": "solid" if k == 0 else "dot"}
            label = (part or "alignment") if alone else word(name)
            group = {"legendgroup": part if alone else word(name), "showlegend": alone or k == 0}
            data.append(series(label, shade, points, at.word, line=look, **group))
    return data, title
