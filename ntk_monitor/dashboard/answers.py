"""What the page asks of a run, answered from its History."""

from collections.abc import Sequence
from typing import Any

from ntk_monitor.figures.style import kernel_words
from ntk_monitor.history import History

ABOUT = (
    "K = J Jᵀ is the empirical neural tangent kernel of the network on the probe, unnormalised; every learning rate, "
    "batch size and loss factor is applied where it is used and named there. The numbers describe these probe samples."
)


def manifest(run: str, history: History, version: str, grams: Sequence[int]) -> dict[str, Any]:
    """Return what the controls of the page need: steps, axes, names."""
    measured = history.measured
    last = measured[-1] if measured else None
    labels = next((s.labels for s in reversed(measured) if s.labels.size), ())
    totals = [s.facts["total_steps"] for s in history.snapshots if "total_steps" in s.facts]
    return {
        "run": run,
        "steps": [s.step for s in measured],
        "light_steps": [s.step for s in history.light],
        "launches": [s.step for s in measured if s.forecast_steps.size],
        "gram_steps": list(grams),
        "epochs": [s.epoch for s in measured],
        "times": [s.wall_time for s in measured],
        "total_steps": int(totals[-1]) if totals else None,
        "kernel": kernel_words(last) if last else "",
        "samples": last.samples if last else 0,
        "outputs": last.outputs if last else 0,
        "modes": max((len(s.rates) or len(s.eigenvalues) for s in measured), default=0),
        "labels": [int(label) for label in labels],
        "notes": list(history.notes),
        "error": None,
        "version": version,
    }
