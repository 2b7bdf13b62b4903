"""Rules about the learning rate and the loss: too high, too low, spent, diverging, not moving.

The ratio of stability is 1 / lr_headroom_high, sharpness over the full-batch bound of the optimizer: above 1 a
quadratic loss diverges at full batch. lr_headroom_low is the factor up to which batches of the run's size are stable.
"""

import numpy as np

from ntk_monitor.health.rule import Sign, Thresholds, rule, short
from ntk_monitor.health.run import Run, Series

_LEAST = 1e-12
_COHEN = "Cohen et al. 2021 (edge of stability); intervals measured in mid-training states"


def _ratio(run: Run) -> Series:
    """Return sharpness over the full-batch bound, reduced by what a small probe over-estimates."""
    bias = run.fact("sharpness_bias").values
    factor = 1 + max(float(np.median(bias)), 0.0) if len(bias) else 1.0
    return run.series(lambda s: 1 / max(s.metrics.get("lr_headroom_high", np.nan) * factor, _LEAST))


def _falls(losses: Series, since: int, by: float) -> bool:
    """True when the loss after a step went below its value there by a fraction; False without two values."""
    later = losses.since(since).values
    return len(later) > 1 and bool(later[1:].min() < (1 - by) * later[0])


@rule(
    "learning rate",
    ("metrics.lr_headroom_high", "loss_value"),
    _COHEN,
    over=1.0,
    spike=1.5,
    far=2.0,
    probes=3,
    fall=0.05,
)
def lr_too_high(run: Run, t: Thresholds) -> Sign | None:
    """Above the full-batch bound for several probes while the loss does not fall, or far above it before a wreck."""
    ratio, losses = _ratio(run), run.losses()
    wreck = _wreck(run, ratio, t["far"])
    if wreck is not None:
        return wreck
    last = ratio.last(int(t["probes"]))
    if len(last) < int(t["probes"]):
        return None
    numbers = ", ".join(short(value) for value in last.values)
    evidence = f"sharpness was {numbers} times the bound at steps {', '.join(str(step) for step in last.steps)}"
    advice = f"Divide the learning rate by about {short(2 * float(last.values.max()))}, or warm it up longer."
    meaning = "Steps overshoot along the sharpest direction: at this learning rate they grow instead of shrink."
    known = len(losses.since(int(last.steps[0]))) > 1
    falls = _falls(losses, int(last.steps[0]), t["fall"])
    if last.values.min() > t["over"] and known and not falls:
        evidence += "; the loss did not fall meanwhile"
        return Sign("error", last.span(), evidence, meaning, advice)
    recent, rising = last.last(2), bool((np.diff(last.values) > 0).all())
    if recent.values.min() > t["spike"] and (rising or not falls):
        return Sign("warning", recent.span(), evidence, f"A spike of the loss is near. {meaning}", advice)
    return None


def _wreck(run: Run, ratio: Series, far: float) -> Sign | None:
    """Far above the bound once, and nothing learned since: a network that broke early can look stable later."""
    over = np.flatnonzero(ratio.values > far)
    if not over.size:
        return None
    step, worst = int(ratio.steps[over[0]]), float(ratio.values[over[0]])
    nan = [bad for bad in run.non_finite() if bad > step]
    if not nan and not (run.loss_ratio() > 0.9 and run.progress() > 0.3):
        return None
    after = "outputs were not finite later" if nan else f"the loss is still {run.loss_ratio():.0%} of its first value"
    return Sign(
        "error",
        (step, max([*nan, run.last.step])),
        f"at step {step} sharpness was {short(worst)} times the bound; {after}",
        "Steps were so long that they threw the network out of the region where it could learn. Dead units, and a loss "
        "that no longer moves, are what this leaves behind.",
        f"Start again with the learning rate divided by about {short(2 * worst)}, or with a warm-up.",
    )


@rule("learning rate", ("metrics.lr_headroom_high", "loss_value"), _COHEN, low=0.8, high=1.3, probes=3, fall=0.05)
def edge_of_stability(run: Run, t: Thresholds) -> Sign | None:
    """Sharpness hovers at the bound while the loss still falls: usual for full batches and high learning rates."""
    ratio = _ratio(run)
    inside = (ratio.values > t["low"]) & (ratio.values < t["high"])
    if len(ratio) < t["probes"] or inside[-int(t["probes"]) :].sum() < t["probes"]:
        return None
    last = ratio.last(int(t["probes"]))
    if not _falls(run.losses(), int(last.steps[0]), t["fall"]):
        return None  # a run that merely converged can sit anywhere
    return Sign(
        "info",
        last.span(),
        f"sharpness was {short(last.values.min())} to {short(last.values.max())} times the bound, and the loss fell",
        "The run trains at the edge of stability: curvature adapts to the learning rate. It is no fault.",
        "Nothing to do; a higher learning rate would not be quicker.",
    )


@rule(
    "learning rate",
    ("metrics.lr_headroom_low", "metrics.lr_headroom_high", "loss_value"),
    _COHEN,
    low=1.0,
    far=0.25,
    loss=0.67,
    probes=3,
)
def lr_in_noise(run: Run, t: Thresholds) -> Sign | None:
    """Between the small-batch bound and the full-batch bound: amber, worth knowing."""
    headroom = run.metric("lr_headroom_low")
    low, ratio = headroom.last(int(t["probes"])), _ratio(run).last(int(t["probes"]))
    later = headroom.values[len(headroom) // 3 :]
    if len(later) > t["probes"] and np.median(later) < t["far"]:
        factor = short(1 / max(float(np.median(later)), _LEAST))
        return Sign(
            "info" if run.loss_ratio() < t["loss"] else "warning",  # what learns well is not to be disturbed
            headroom.span(),
            f"the learning rate was {factor} times the small-batch bound (median of the last two thirds of probes)",
            "Noise of the batches is amplified at every step: the loss stays above what it could reach.",
            f"Divide the learning rate by about {factor}, let it decay to zero, or enlarge the batch.",
        )
    if len(low) < t["probes"] or not len(ratio) or low.values.max() >= t["low"] or ratio.values.max() >= 1:
        return None
    batch = run.latest("batch_size")
    size = f" of {short(batch)} samples" if batch > 0 else ""
    return Sign(
        "info",
        low.span(),
        f"the learning rate is at least {short(1 / max(low.values.max(), 1e-12))} times the small-batch bound, and "
        "below the full-batch one",
        f"Batches{size} add noise that such steps amplify along the sharpest directions. Many good runs live here.",
        "If the loss is noisy late in training, lower the learning rate or enlarge the batch.",
    )


@rule(
    "learning rate",
    ("metrics.lr_headroom_low", "metrics.residual_out_of_reach", "loss_value", "facts.lr"),
    "audit: a healthy run is within 10x of its bound while its loss is still above two thirds of the first",
    explained_by=("vanishing_signal", "dead_layer", "uncovered_parameters", "non_finite", "lr_too_high"),
    headroom=10.0,
    loss=0.67,
    reach=0.3,
    progress=0.25,
    accuracy=0.95,
)
def lr_too_low(run: Run, t: Thresholds) -> Sign | None:
    """Far below the bound while the residual stays: the steps are too small for the run's length."""
    low, rates = run.metric("lr_headroom_low"), run.fact("lr")
    if len(low) < 3 or run.progress() < t["progress"] or run.latest("accuracy") > t["accuracy"]:
        return None
    # Warm-up and the end of a schedule have small learning rates by plan: judge where it is within half of its highest.
    peak = rates.values.max(initial=0.0)
    planned = set(rates.steps[rates.values >= peak / 2].tolist()) if peak > 0 else set(low.steps.tolist())
    kept = np.array([step in planned for step in low.steps.tolist()])
    low = Series(low.steps[kept], low.values[kept])
    reach = run.metric("residual_out_of_reach").values
    ratio = run.loss_ratio()
    in_reach = len(reach) > 0 and float(np.median(reach)) < t["reach"]
    if len(low) < 3 or in_reach or not ratio > t["loss"] or np.median(low.values[1:]) < t["headroom"]:
        return None
    out = f"; {np.median(reach):.0%} of the residual was out of reach" if len(reach) else ""
    factor = float(np.median(low.values[1:]))
    return Sign(
        "warning",
        low.span(),
        f"the learning rate could have been {short(factor)} times larger (median over {len(low)} probes), and the loss "
        f"is still {ratio:.0%} of its first value{out}",
        "Steps are far smaller than stability demands, so the run ends before it has learned what it could.",
        f"Try a learning rate {short(min(factor / 3, 100))} times larger, or train much longer.",
    )


@rule("learning rate", ("facts.lr", "facts.total_steps"), "schedules that end early by mistake", left=0.2, part=1e-3)
def lr_spent(run: Run, t: Thresholds) -> Sign | None:
    """The learning rate is zero from the start, or has decayed to nothing long before the planned end."""
    rates = run.fact("lr")
    if len(rates) < 2:
        return None
    peak = float(rates.values.max())
    if peak <= 0:
        return Sign(
            "error",
            rates.span(),
            f"the learning rate was 0 at all {len(rates)} probes",
            "No parameter moves.",
            "Set a learning rate; if a scheduler is in charge, check its warm-up and its factor.",
        )
    last = rates.last(2)
    if last.values.max() > t["part"] * peak or not run.progress() < 1 - t["left"]:
        return None
    return Sign(
        "warning",
        last.span(),
        f"the learning rate fell from {short(peak)} to {short(float(last.values[-1]))} with {1 - run.progress():.0%} "
        "of the planned steps to go",
        "The rest of the run changes next to nothing.",
        "Check the scheduler's length: is it counted in steps or in epochs?",
    )


@rule("loss", ("status", "reason", "predictions", "loss_value"), "IEEE 754: infinities and NaN never recover")
def non_finite(run: Run, _: Thresholds) -> Sign | None:
    """NaN or infinity in outputs, loss or kernel."""
    bad = run.non_finite()
    if not bad:
        return None
    ratio = _ratio(run)
    before = Series(ratio.steps[ratio.steps < min(bad)], ratio.values[ratio.steps < min(bad)])
    cause = ""
    if len(before) and before.values[-1] > 1:
        cause = f" Before that, at step {before.steps[-1]}, sharpness was {short(before.values[-1])} times the bound."
    return Sign(
        "error",
        (min(bad), max(bad)),
        f"outputs, loss or kernel were not finite at {len(bad)} of {len(run.snapshots)} probes from step {min(bad)} on",
        f"The weights have overflowed or hold NaN; what follows is noise.{cause}",
        "Go back to a checkpoint before that step with a lower learning rate, clip gradients, look for a logarithm or "
        "a root of zero, and for overflow in half precision.",
    )


@rule(
    "loss", ("loss_value", "facts.train_loss"), "audit: a healthy loss may bounce, its last third stays below", up=1.3
)
def loss_diverging(run: Run, t: Thresholds) -> Sign | None:
    """The last three losses are all above the first one, and not on their way down."""
    losses, probed = run.losses(), run.probe_losses()
    if len(losses) < 4 or losses.values[0] <= 0:
        return None
    first, last = float(min(losses.values[0], *probed.values[:1])), losses.last(3)
    down = last.values[-1] < 0.8 * last.values[0]
    if last.values.min() <= t["up"] * first or down:
        return None
    if len(probed) >= 3 and probed.values[-1] <= probed.values[0]:
        return None  # the trainer's loss has other terms or noise; on the probe it has fallen
    times = short(float(last.values.min()) / first)
    return Sign(
        "error" if run.loss else "warning",
        last.span(),
        f"the loss was {short(first)} at step {losses.steps[0]} and {short(float(last.values[-1]))} at step "
        f"{last.steps[-1]}, at the last three probes at least {times} times the first",
        "The run is worse than where it began: it diverges, or jumped away and did not come back.",
        "Lower the learning rate (a tenth is a good first try), warm it up, clip gradients.",
    )


@rule(
    "loss",
    ("loss_value", "facts.train_loss", "facts.total_steps"),
    "audit: every healthy run has lost 5 % of its loss by half of its steps",
    explained_by=("*",),
    fall=0.03,
    progress=0.5,
    accuracy=0.9,
)
def no_progress(run: Run, t: Thresholds) -> Sign | None:
    """Half of the run is over and the loss is where it was."""
    losses = run.losses()
    if len(losses) < 4 or losses.values.min() <= 0 or run.latest("accuracy") > t["accuracy"]:
        return None
    best = float(np.minimum(losses.values[-1], np.median(losses.values[-3:])))
    first = float(max(losses.values[0], *run.probe_losses().values[:1]))
    if not run.progress() >= t["progress"] or best < (1 - t["fall"]) * first or best > 1.3 * first:
        return None
    return Sign(
        "warning",
        losses.span(),
        f"the loss was {short(first)} at the start and {short(best)} after {run.progress():.0%} of the planned steps",
        "What this network can learn with this optimizer from these targets, it has not begun to learn.",
        "Look at the other findings first. Then: are the targets those of these inputs, does every layer get a "
        "gradient, is the learning rate far from what it could be?",
    )


RULES = (non_finite, loss_diverging, lr_too_high, lr_too_low, lr_spent, no_progress, edge_of_stability, lr_in_noise)
