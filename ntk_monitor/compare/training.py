"""Differences between two sides that need no common samples: loss, learning rate, layers, time to learn, cost."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ntk_monitor.compare.difference import Difference, apart, difference, factor, number, times
from ntk_monitor.snapshot import Snapshot

_SETUP = ("optimizer", "lr", "batch size", "loss", "parameters", "samples", "outputs", "kernel", "mode", "precision")


def setup_row(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    """Yield what the two runs were given differently, if anything."""
    ours, theirs = _setup(left), _setup(right)
    unlike = [name for name in _SETUP if ours[name] != theirs[name]]
    if unlike:
        values = ["; ".join(f"{name} {side[name] or 'not recorded'}" for name in unlike) for side in (ours, theirs)]
        yield difference("set-up", values, "What the two were given differently, as far as it is recorded.", True)


def _setup(side: Snapshot) -> dict[str, str]:
    facts = {name: side.facts.get(name, math.nan) for name in ("lr", "batch_size")}
    return {
        "optimizer": side.texts.get("optimizer", ""),
        "lr": number(facts["lr"]) if math.isfinite(facts["lr"]) else "",
        "batch size": number(facts["batch_size"]) if math.isfinite(facts["batch_size"]) else "",
        "loss": side.loss,
        "parameters": f"{side.parameters:,}",
        "samples": f"{side.samples:,}",
        "outputs": f"{side.outputs:,}",
        "kernel": side.kernel,
        "mode": side.mode,
        "precision": side.precision,
    }


def loss_row(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    """Yield the loss on the probe at the two probes."""
    values = left.loss_value, right.loss_value
    if not all(map(math.isfinite, values)):
        return
    said = [f"{number(value)} (step {side.step})" for value, side in zip(values, (left, right), strict=True)]
    ratio = factor(*values)
    if left.loss != right.loss:
        yield difference("loss on the probe", said, "Two kinds of loss, which are not comparable.", True)
        return
    own = "" if left.probe == right.probe else " Each on its own samples."
    high = times(ratio, "higher than", "lower than", "about as high as")
    meaning = f"The loss on the right is {high} on the left.{own}"
    yield difference("loss on the probe", said, meaning, apart(ratio))


def accuracy_row(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    """Yield the share of probe samples that are classified correctly."""
    values = [side.facts.get("accuracy", math.nan) for side in (left, right)]
    if all(map(math.isfinite, values)):
        # One standard error of a share of so many samples.
        error = 0.5 / math.sqrt(max(min(left.samples, right.samples), 1))
        meaning = f"Of the probe's own samples; a probe of this size knows it to about {error:.0%}."
        matters = abs(values[1] - values[0]) > 2 * error
        yield difference("accuracy", (f"{value:.1%}" for value in values), meaning, matters)


def speed_row(left: Sequence[Snapshot], right: Sequence[Snapshot]) -> Iterator[Difference]:
    """Yield when each run first came to the lowest loss that both reached."""
    sides = [[one for one in side if math.isfinite(one.loss_value)] for side in (left, right)]
    if not all(sides) or sides[0][0].loss != sides[1][0].loss:
        return
    target = max(min(one.loss_value for one in side) for side in sides)
    # The first probe at or under it; the crossing lies between that probe and the one before.
    at = [next(i for i, one in enumerate(side) if one.loss_value <= target) for side in sides]
    steps = [side[i].step for side, i in zip(sides, at, strict=True)]
    width = max(side[i].step - side[max(i - 1, 0)].step for side, i in zip(sides, at, strict=True))
    meaning = f"First probe with a loss of {number(target)} or less, the lowest that both reached; "
    meaning += f"known to the distance of probes, {width} steps."
    matters = abs(steps[1] - steps[0]) > width
    yield difference("steps to a common loss", (f"step {step}" for step in steps), meaning, matters)


def learning_rate_row(left: Sequence[Snapshot], right: Sequence[Snapshot]) -> Iterator[Difference]:
    """Yield how far the learning rate was from its bounds where it was tightest."""
    tight = [_tightest(side) for side in (left, right)]
    if tight[0] is None or tight[1] is None:
        return
    values, highs = [], []
    for one in (tight[0], tight[1]):
        low, high = one.metrics["lr_headroom_low"], one.metrics["lr_headroom_high"]
        values.append(f"{number(low)} to {number(high)} times (step {one.step})")
        highs.append(high)
    over = [name for name, high in zip(("left", "right"), highs, strict=True) if high < 1]
    meaning = (
        "Factors that the learning rate could be multiplied by, noise of batches to full batch, where it was tightest."
    )
    if over:
        meaning += f" Above the bound of full-batch steps: {' and '.join(over)}."
    # A probe of 64 samples reads the bound about 24 % too strict; half as much again lies outside that.
    yield difference("learning rate", values, meaning, apart(factor(*highs), 1.5))


def _tightest(side: Sequence[Snapshot]) -> Snapshot | None:
    names = ("lr_headroom_low", "lr_headroom_high")
    known = [one for one in side if all(math.isfinite(one.metrics.get(name, math.nan)) for name in names)]
    return min(known, key=lambda one: one.metrics["lr_headroom_high"]) if known else None


def half_life(side: Snapshot) -> float:
    """Return the simulated steps until modes with half of the residual's energy are learned; inf: not in reach.

    A mode is learned when its energy is a tenth. NaN without a simulation.
    """
    energy, when = side.residual_energy, side.time_to_learn
    if not energy.size or energy.size != when.size or not energy.sum() > 0 or np.isnan(when).all():
        return math.nan
    order = np.argsort(when)
    held = np.cumsum(energy[order])
    return float(when[order[min(int(np.searchsorted(held, 0.5 * held[-1])), order.size - 1)]])


def time_row(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    """Yield how many more steps half of the residual takes."""
    values = half_life(left), half_life(right)
    if any(map(math.isnan, values)):
        return
    said = [f"{number(value)} steps" if math.isfinite(value) else "not in reach" for value in values]
    meaning = "Until modes with half of the residual's energy fall to a tenth, simulated from each kernel."
    matters = apart(factor(*values), 1.5) or math.isinf(values[0]) != math.isinf(values[1])
    yield difference("time to learn", said, meaning, matters)


def layer_rows(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    """Yield which layers moved the outputs, and which would by kernel and optimizer."""
    for field, quantity, meaning in (
        (
            "layer_update",
            "who moved the outputs",
            "Share of each layer in what moved the outputs since the probe before",
        ),
        ("layer_share", "share per layer", "Share of each layer in the trace of lr J D J^T, D the preconditioner"),
    ):
        shares = [layer_shares(side, field) for side in (left, right)]
        names = [name for name in shares[0] if name in shares[1]]
        if not names:
            continue
        change = {name: shares[1][name] - shares[0][name] for name in names}
        shown = sorted(names, key=lambda name: -abs(change[name]))[:3]
        values = [", ".join(f"{name or 'the module'} {share[name]:.0%}" for name in shown) for share in shares]
        points = 100 * change[shown[0]]
        most = f"Largest difference: {shown[0] or 'the module'}, {points:+.0f} percentage points."
        yield difference(quantity, values, f"{meaning}. {most}", abs(points) >= 5)


def layer_shares(side: Snapshot, field: str) -> dict[str, float]:
    """Return the finite shares of the layers by name; empty when they were not measured."""
    values = getattr(side, field)
    if values.size != len(side.layers):
        return {}
    return {name: float(value) for name, value in zip(side.layers, values, strict=True) if math.isfinite(value)}


def cost_row(left: Sequence[Snapshot], right: Sequence[Snapshot]) -> Iterator[Difference]:
    """Yield what the probes cost."""
    spent = [[sum(v for v in one.seconds.values() if math.isfinite(v)) for one in side] for side in (left, right)]
    middle = [float(np.median([value for value in side if value > 0] or [math.nan])) for side in spent]
    if any(map(math.isnan, middle)):
        return
    values = []
    for side, seconds in zip((left, right), middle, strict=True):
        share = next((one.metrics["overhead"] for one in reversed(side) if "overhead" in one.metrics), math.nan)
        values.append(f"{number(seconds)} s a probe" + (f", {share:.1%} of the run" if math.isfinite(share) else ""))
    meaning = "Median time of a probe. Clocks of two machines, or of a busy one, are not comparable."
    yield difference("cost", values, meaning, apart(factor(*middle), 2.0))
