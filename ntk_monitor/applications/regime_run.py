"""Lazy or rich, of a run that was recorded: how far and how fast its kernel moved, without the network.

Every probe holds 1 - cosine with the one before (`kernel_change`), the trace, and the alignment with the targets. From
neighbours alone the whole way is known within bounds: angles add up to at most their sum. With the distance from the
first probe (`kernel_distance`) it is known exactly.
Source: Fort et al. 2020 (kernel velocity); Chizat, Oyallon and Bach 2019.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.regime import LAZY
from ntk_monitor.applications.report import Number, Report, Verdict, short
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import BLUE, ORANGE, STEPS, Figure, layout_of, line, log_axis, numbers
from ntk_monitor.history import History
from ntk_monitor.snapshot import Snapshot

Array = NDArray[np.float64]

_ALIGNED = 0.05
"""Change of an alignment that is more than the noise of a probe of some hundred samples."""


def movement_bounds(probes: Sequence[Snapshot]) -> tuple[float, float]:
    """Return the least and the largest |K - K₀| / |K₀| that the last of these probes can have, K₀ at the first.

    |K| is taken from the metric "frobenius" where both ends hold it, else from the trace, which grows nearly alike.

    Raises:
        InputError: a probe without `kernel_change`, or ends without a trace.
    """
    first, last = probes[0].metrics, probes[-1].metrics
    name = "frobenius" if "frobenius" in first and "frobenius" in last else "trace"
    changes = [one.metrics.get("kernel_change", math.nan) for one in probes[1:]]
    if not first.get(name, 0) > 0 or name not in last or not np.isfinite(changes).all():
        raise InputError(
            "every probe must hold kernel_change, and the first and the last trace; this history lacks them"
        )
    growth = last[name] / first[name]
    cosine = 1 - last["kernel_distance"] if "kernel_distance" in last else None
    if cosine is None:
        # Kernels have no negative eigenvalues, so that no two are more than a right angle apart.
        angle = sum(math.acos(min(max(1 - one, 0.0), 1.0)) for one in changes)
        return abs(growth - 1), _apart(growth, math.cos(min(angle, math.pi / 2)))
    return (_apart(growth, cosine),) * 2


def _apart(growth: float, cosine: float) -> float:
    return math.sqrt(max(growth**2 + 1 - 2 * growth * cosine, 0.0))


def from_history(history: History) -> Report:
    """Return how far and how fast the kernel of a recorded run moved.

    Raises:
        InputError: fewer than three probes of one probe set with `kernel_change` and `trace`.
    """
    probes = [one for one in history.measured if math.isfinite(one.metrics.get("trace", math.nan))]
    probes = [one for one in probes if one.probe == probes[-1].probe]
    if len(probes) < 3:
        raise InputError(f"three probes with kernel_change and trace are needed, got {len(probes)}")
    low, high = movement_bounds(probes)
    steps = np.array([one.step for one in probes])
    speed = np.array([one.metrics["kernel_change"] for one in probes[1:]]) / np.diff(steps).clip(min=1)
    aligned = [one.metrics.get("alignment", math.nan) for one in probes]
    half = len(speed) // 2
    early, late = float(speed[:half].mean()), float(speed[-half:].mean())
    tangent = [one.metrics["linearisation_error"] for one in probes if "linearisation_error" in one.metrics]
    way = f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
    return Report(
        name="lazy_or_rich",
        title="Lazy or rich: how far the kernel of this run moved",
        summary=(
            f"From step {steps[0]} to {steps[-1]} the kernel moved by {way} of itself; its velocity went from "
            f"{short(early)} to {short(late)} per step (means over the first and the last half of the probes). Its "
            f"alignment with the targets went from {aligned[0]:.3f} to {aligned[-1]:.3f}."
        ),
        numbers=(
            Number("kernel movement, at least", low, "of |K₀|", note=f"lazy up to {LAZY:g}"),
            Number("kernel movement, at most", high, "of |K₀|"),
            Number("growth of the trace", probes[-1].metrics["trace"] / probes[0].metrics["trace"], "times"),
            Number("kernel velocity, early", early, "per step", note="of 1 - cosine"),
            Number("kernel velocity, late", late, "per step", note="of 1 - cosine"),
            Number(
                "error of the tangent model, largest",
                max(tangent, default=math.nan),
                "of the change",
                note="between neighbouring probes; over the whole run it may be larger",
            ),
        ),
        verdicts=(
            Verdict(
                "this run kept the kernel of its start: it was lazy",
                True if high <= LAZY else False if low > LAZY else None,
                f"moved by {way} of itself, {LAZY:.0%} allowed",
            ),
            _aligned(aligned),
            Verdict(
                "features were learned early: the kernel moved more slowly later on",
                bool(late < early) if early > 0 or late > 0 else None,
                f"velocity {short(early)} early, {short(late)} late",
            ),
        ),
        figures={"velocity": _figure(steps, speed, aligned)},
        caveats=(
            "Where the history holds no kernel_distance the movement is known within bounds only.",
            "A learning rate that falls slows the kernel as well.",
            "Probes of training samples: the kernel has been fitted to their targets.",
        ),
    )


def _aligned(aligned: Sequence[float]) -> Verdict:
    gain = aligned[-1] - aligned[0]
    holds = None if not abs(gain) > _ALIGNED else gain > 0
    return Verdict(
        "training turned the kernel towards the targets", holds, f"alignment {gain:+.3f}; more than {_ALIGNED:g} counts"
    )


def _figure(steps: NDArray[np.int64], speed: Array, aligned: Sequence[float]) -> Figure:
    middles = [(a + b) / 2 for a, b in pairwise(steps.tolist())]
    dots = {"mode": "lines+markers", "marker": {"size": 5}}
    right = {"xaxis": "x2", "yaxis": "y2"}
    data = [
        line(middles, numbers(speed, positive=True), "kernel velocity", BLUE, **dots),
        line(steps.tolist(), numbers(aligned), "alignment", ORANGE, **dots, **right),
    ]
    layout = layout_of(
        "How fast the kernel turned, and where to",
        "Left: 1 - cosine of neighbouring probes per step; falling: features were learned early. Right: how much "
        "samples that the kernel ties together share their targets.",
        xaxis={"title": {"text": STEPS}, "domain": [0, 0.45]},
        yaxis=log_axis("1 - cosine per step"),
        xaxis2={"title": {"text": STEPS}, "domain": [0.57, 1], "anchor": "y2"},
        yaxis2={"title": {"text": "alignment with the targets"}, "anchor": "x2"},
    )
    return {"data": data, "layout": layout}
