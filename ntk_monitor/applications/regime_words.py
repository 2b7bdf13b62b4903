"""What the study of lazy and rich training says: its words, table and verdicts."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.output_scale import Scaled
from ntk_monitor.applications.problem import Problem
from ntk_monitor.applications.regime import LAZY, RICH, alignment_gain, kernel_velocity
from ntk_monitor.applications.regime_figures import features, scales, velocity
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.similarity import alignment

Array = NDArray[np.float64]

STILL = 1e-3
"""Movement of the kernel below which there is nothing whose fall with the output scale could be seen."""
FACTOR = 2.0
"""Within it a foretold error is called right."""


def told(task: Problem, found: Sequence[Scaled], foretold: Sequence[float], kappa: float, name: str) -> Report:
    """Return the report of a sweep over output scales, 1 among them.

    Args:
        task: network and samples.
        found: by ascending scale.
        foretold: error of the tangent model at each scale, by its own step.
        kappa: relative scale.
        name: of the network.
    """
    at = next(k for k, one in enumerate(found) if one.scale == 1.0)
    own = found[at]
    gain, error = alignment_gain(own.kernels[0], own.kernels[-1], task.y)
    velocities = kernel_velocity(own.kernels, own.steps)
    lazy = [one.scale for one in found if one.regime == "lazy"]
    sure = f"From an output scale of {min(lazy):g} on it is lazy" if lazy else "No output scale here is lazy"
    return Report(
        name="lazy_or_rich",
        title=f"Lazy or rich: {name} at {len(found)} output scales",
        summary=(
            f"Training this network is {own.regime}: its kernel moved by {own.moved:.1%} of itself, and the trained "
            f"network is {own.error:.1%} of its change away from its tangent model at the start. {sure}. The alignment "
            f"of the kernel with the targets went from {alignment(own.kernels[0], task.y):.3f} to "
            f"{alignment(own.kernels[-1], task.y):.3f}."
        ),
        numbers=(
            Number("kernel movement", own.moved, "of |K₀|", note=f"lazy up to {LAZY:g}, rich from {RICH:g}"),
            Number("error of the tangent model", own.error, "of the change", note="the same borders"),
            Number("growth of the trace", own.growth, "times"),
            Number("movement of the weights", own.weights, "of |θ₀|"),
            Number("gain in alignment", gain, "", gain - 1.96 * error, gain + 1.96 * error, "95 % interval"),
            Number("kernel velocity, largest", float(velocities.max()), "per step", note="of 1 - cosine"),
            Number("kernel velocity, last", float(velocities[-1]), "per step", note="of 1 - cosine"),
            Number("foretold error", foretold[at], "of the change", note="of the tangent model, before training"),
            Number("relative scale κ", kappa, "", note="curvature on the way to the targets; lazy well below 0.1"),
            Number(
                "lazy from output scale",
                min(lazy, default=math.inf),
                "times the outputs",
                note="" if lazy else "none of those tried",
            ),
        ),
        verdicts=(
            _lazy(own),
            _scaling(found),
            _aligned(gain, error),
            _pays(found),
            _foretold(foretold[at], own),
        ),
        tables={"By output scale": _table(found, foretold, task.y)},
        figures={
            "scales": scales(found, foretold),
            "velocity": velocity(found),
            "features": features(found, task.y),
        },
        caveats=_caveats(task, found),
    )


def _table(found: Sequence[Scaled], foretold: Sequence[float], targets: Array) -> Table:
    """Return one row for each scale."""
    names = ("scale", "regime", "moved", "tangent error", "foretold", "trace", "weights", "alignment", "held-out")
    rows = tuple(
        (
            one.scale,
            one.regime,
            one.moved,
            one.error,
            ahead,
            one.growth,
            one.weights,
            alignment(one.kernels[-1], targets),
            float(one.squares.mean()),
            one.left,
            one.steps[-1],
        )
        for one, ahead in zip(found, foretold, strict=True)
    )
    return Table((*names, "left", "steps"), rows)


def _lazy(own: Scaled) -> Verdict:
    # A run that is cut short moved less than it would have: only "not lazy" is then sure.
    holds = None if own.regime == "lazy" and not own.arrived else own.regime == "lazy"
    evidence = (
        f"{own.regime}: kernel moved by {own.moved:.3g}, tangent model off by {own.error:.3g}; {LAZY:g} allowed"
        + ("" if own.arrived else f"; training ended early, with {own.left:.0%} left")
    )
    return Verdict(
        "training this network is lazy: it stays its tangent model, with the kernel of the start", holds, evidence
    )


def _scaling(found: Sequence[Scaled]) -> Verdict:
    claim = "a larger output scale makes training lazier, in proportion (Chizat et al. 2019)"
    # A law of large scales: where the kernel moves by more than itself it saturates.
    kept = [one for one in found if one.arrived and one.scale >= 1]
    moved = np.array([one.moved for one in kept])
    if len(kept) < 2 or kept[-1].scale < 3 * kept[0].scale:
        return Verdict(claim, None, f"of the runs at scales from 1 on, {len(kept)} reached the loss")
    if moved.max() <= STILL:
        return Verdict(claim, None, "the kernel does not move at any scale from 1 on")
    slope = float(np.polyfit(np.log([one.scale for one in kept]), np.log(moved.clip(min=1e-12)), 1)[0])
    falls = bool((np.diff(moved) < 0).all())
    word = "falls at every step" if falls else "does not fall at every step"
    evidence = f"from scale 1 on the movement of the kernel {word} and goes as scale^{slope:.2f}; -1 ± 0.5 wanted"
    return Verdict(claim, falls and -1.5 <= slope <= -0.5, evidence)


def _aligned(gain: float, error: float) -> Verdict:
    claim = "training turns the kernel towards the targets"
    if not math.isfinite(error):
        return Verdict(claim, None, "no alignment: fewer than 8 samples, or a kernel that has become constant")
    low, high = gain - 1.96 * error, gain + 1.96 * error
    holds = True if low > 0 else False if high < 0.02 else None
    return Verdict(claim, holds, f"alignment changes by {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


def _pays(found: Sequence[Scaled]) -> Verdict:
    claim = "moving pays: the richest training predicts held-out samples better than the laziest"
    kept = [one for one in found if one.arrived]
    if len(kept) < 2:
        return Verdict(claim, None, f"{len(kept)} of the runs reached the loss")
    rich, lazy = kept[0], kept[-1]
    saved = lazy.squares - rich.squares
    wide = 1.96 * float(saved.std(ddof=1)) / math.sqrt(len(saved))
    mean = float(saved.mean())
    holds = True if mean - wide > 0 else False if mean + wide < 0 else None
    evidence = (
        f"held-out error {short(float(rich.squares.mean()))} at scale {rich.scale:g}, "
        f"{short(float(lazy.squares.mean()))} at {lazy.scale:g}; difference {short(mean)} ± {short(wide)}, "
        f"{len(saved)} samples"
    )
    return Verdict(claim, holds, evidence)


def _foretold(ahead: float, own: Scaled) -> Verdict:
    claim = "the tangent model's own step to the targets tells, before training, how far it will miss"
    both = ahead <= 0.01 and own.error <= 0.01
    near = both or (own.error > 0 and 1 / FACTOR <= ahead / own.error <= FACTOR)
    evidence = f"foretold {short(ahead)}, found {short(own.error)}; a factor {FACTOR:g} allowed"
    return Verdict(claim, near if own.arrived else None, evidence)


def _caveats(task: Problem, found: Sequence[Scaled]) -> tuple[str, ...]:
    notes = ["Copies were trained on squared error by full batches, not with the run's own loss and optimizer."]
    if task.classes:
        notes.append("Class labels are regressed as one-hot targets.")
    if short_ := [f"{one.scale:g} ({one.left:.0%} left)" for one in found if not one.arrived]:
        notes.append(f"Training did not reach the loss at scale {', '.join(short_)}; their movements are lower bounds.")
    if slow := [f"{one.scale:g} (1/{one.slower})" for one in found if one.slower > 1]:
        notes.append(f"The kernel grew so much that the learning rate had to be lowered at scale {', '.join(slow)}.")
    notes.append("The alignment is that of training samples, to which the kernel has been fitted.")
    return tuple(notes)
