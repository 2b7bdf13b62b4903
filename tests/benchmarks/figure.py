"""The results as a picture: seconds over the yardstick's, and peak memory, for the trace kernel of each workload."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import METHODS, SLOW, Result

COLOURS = {
    "backwards": "#9a9a9a",
    "activations": "#d0d0d0",
    "structured": "#c1272d",
    "structured64": "#e58a8d",
    "reference": "#e8a33d",
    "rows": "#f2d0a0",
    "operator": "#c9b037",
    "jacrev": "#1f5fa8",
    "tutorial": "#6ea6dc",
    "loop": "#2e8b57",
    "nngeometry": "#7d5ba6",
    "neural-tangents": "#222222",
}


def drawn(results: Sequence[Result], title: str, path: Path) -> None:
    """Write the figure. Where a limit ended a method, its bar is hatched and reaches what it had taken until then."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = _largest(results)
    if not rows:
        return
    figure, axes = plt.subplots(2, 1, figsize=(12, 8), sharex=True, layout="constrained")
    _bars(axes[0], rows, _time)
    axes[0].set_ylabel("seconds / C backward passes")
    axes[0].axhline(1, color="#9a9a9a", linewidth=1, zorder=0)
    _bars(axes[1], rows, _memory)
    axes[1].set_ylabel("peak memory above start, MB")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=5, frameon=False, title=title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _largest(results: Sequence[Result]) -> list[Result]:
    """Return the trace rows of the largest batch of each workload."""
    traces = [row for row in results if row.quantity == "trace"]
    batch: dict[str, int] = {}
    for row in traces:
        batch[row.workload] = max(batch.get(row.workload, 0), row.samples)
    return [row for row in traces if row.samples == batch[row.workload]]


def _time(row: Result, yardstick: Result | None) -> float | None:
    """Return seconds over the yardstick's, or what is known of them."""
    if row.seconds:
        return row.ratio
    if yardstick is None or not yardstick.seconds or not row.floor_seconds:
        return None
    return row.floor_seconds / statistics.median(yardstick.seconds)


def _memory(row: Result, _: Result | None) -> float | None:
    """Return megabytes, at least 1, or what is known of them."""
    return max(row.peak_mb if row.seconds else row.floor_mb, 1.0) if row.seconds or row.floor_mb else None


def _bars(axes: Any, rows: list[Result], height: Callable[[Result, Result | None], float | None]) -> None:
    groups = list(dict.fromkeys(row.workload for row in rows))
    order = [*METHODS, *SLOW]
    place = 0.0
    ticks = []
    for name in groups:
        members = sorted((row for row in rows if row.workload == name), key=lambda row: order.index(row.method))
        yardstick = next((row for row in members if row.method == "backwards"), None)
        known = [(row, value) for row in members if (value := height(row, yardstick)) is not None]
        # Both panels keep the same places, so a bar without a value leaves a gap.
        for row, value in known:
            x = place + members.index(row)
            hatch = "" if row.seconds else "//"
            axes.bar(x, value, 0.9, color=COLOURS[row.method], hatch=hatch, edgecolor="white", label=row.method)
            axes.text(x, value, _short(value, bool(row.seconds)), ha="center", va="bottom", fontsize=7)
        ticks.append((place + (len(members) - 1) / 2, f"{name}, N = {members[0].samples}"))
        place += len(members) + 1.5
    axes.set_yscale("log")
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float, whole: bool) -> str:
    text = f"{value:.0f}" if value >= 100 else f"{value:.2g}"
    return text if whole else f">{text}"
