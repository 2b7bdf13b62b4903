"""Rules about what the numbers themselves are worth: modes stuck, forecasts, cadence, size and health of the probe."""

import numpy as np

from ntk_monitor.health.rule import Sign, Thresholds, rule, short
from ntk_monitor.health.run import Run


def _out_of_reach(run: Run) -> tuple[int, float, float] | None:
    """Return step, share of the residual beyond the remaining steps and the largest share of one such mode.

    Of the last probe with at least a tenth of the planned steps to go and a simulated time to learn.
    """
    for snapshot in reversed(run.measured):
        total, times = snapshot.facts.get("total_steps", np.nan), snapshot.time_to_learn
        remaining = total - snapshot.step
        if not remaining >= 0.1 * total or not times.size or times.shape != snapshot.coordinates.shape:
            continue
        energy = snapshot.residual_energy
        late = times > remaining  # NaN: not simulated, says nothing
        if np.isfinite(energy).all() and late.any():
            return snapshot.step, float(energy[late].sum()), float(energy[late].max())
        return None
    return None


@rule(
    "residual",
    ("time_to_learn", "coordinates", "facts.total_steps"),
    "simulated steps with this run's optimizer and loss; the closed form is wrong by up to 500x on cross-entropy",
    explained_by=(
        "lr_too_low",
        "lr_too_high",
        "vanishing_signal",
        "dead_layer",
        "collapsed_outputs",
        "uncovered_parameters",
        "non_finite",
    ),
    share=0.5,
    loss=0.7,
    error=0.7,
)
def mode_stuck(run: Run, t: Thresholds) -> Sign | None:
    """Most of the residual lies where the remaining steps do not reach, and the loss is still high."""
    found = _out_of_reach(run)
    error = run.fact("forecast_error").last(3).values
    if found is None or found[1] < t["share"] or (len(error) and np.median(error) > t["error"]):
        return None
    step, share, largest = found
    ratio = run.loss_ratio()
    high = run.progress() > 0.3 and ratio > t["loss"] and not run.latest("accuracy") > 0.9
    return Sign(
        "warning" if high else "info",
        (step, step),
        f"{share:.0%} of the residual (one mode: {largest:.0%}) needs more than the steps that remain after step {step}"
        + (f"; the loss is {ratio:.0%} of its first value" if np.isfinite(ratio) else ""),
        "With the present kernel and schedule the run ends before this part is learned. The kernel can still change."
        + ("" if high else " The rest of a good fit looks like this too."),
        "Train longer, raise the learning rate if the stability card has room, or change features (depth, inputs)."
        if high
        else "Nothing, if the loss is low enough.",
    )


@rule(
    "residual",
    ("facts.label_energy", "facts.label_energy_chance", "facts.k90", "samples"),
    "Arora et al. 2019: what lies in fast modes is learned first",
    energy=1.5,
    loss=0.5,
)
def slow_labels(run: Run, t: Thresholds) -> Sign | None:
    """The targets lie outside the fast modes even now."""
    energy, chance = run.fact("label_energy"), run.fact("label_energy_chance")
    if len(energy) < 3 or not len(chance) or chance.values[-1] <= 0 or run.loss_ratio() < t["loss"]:
        return None
    times = float(np.median(energy.values[-2:])) / float(chance.values[-1])
    if times > t["energy"]:
        return None
    k90 = run.latest("k90")
    many = f"; nine tenths take {k90:.0f} modes" if k90 > 0 else ""
    return Sign(
        "info",
        energy.last(2).span(),
        f"the fastest tenth of the modes holds {energy.values[-1]:.0%} of the targets, "
        f"{short(times)} times chance{many}",
        "What this network learns quickly has little to do with the targets.",
        "Other inputs, augmentations or a pretrained start give a kernel that knows the task.",
    )


@rule(
    "kernel", ("metrics.kernel_change", "metrics.trace"), "Fort et al. 2020; Chizat et al. 2019", still=0.005, probes=4
)
def lazy_kernel(run: Run, t: Thresholds) -> Sign | None:
    """The kernel hardly turns while the loss falls: only a linear model around the start is being fitted."""
    change = run.metric("kernel_change")
    if len(change) < t["probes"] or change.values.max() > t["still"] or not run.loss_ratio() < 0.9:
        return None
    return Sign(
        "info",
        change.span(),
        f"the kernel turned by at most {short(float(change.values.max()))} (1 - cosine) between probes",
        "Lazy training: features stay as they are and the network acts as kernel regression with this kernel.",
        "Meant for very wide networks and gentle fine-tuning. Else raise the learning rate or shrink the output scale.",
    )


@rule(
    "kernel",
    ("metrics.kernel_change",),
    "between probes that share half of their kernel nothing can be followed",
    far=0.5,
)
def sparse_probes(run: Run, t: Thresholds) -> Sign | None:
    """The kernel turns so far between probes that what lies between them is unseen."""
    # The first intervals hold BatchNorm's statistics settling and the start of feature learning.
    change = run.metric("kernel_change")
    later = change.values[len(change) // 2 :]
    if len(change) < 4 or np.median(later) < t["far"]:
        return None
    return Sign(
        "info",
        (int(change.steps[len(change) // 2]), int(change.steps[-1])),
        f"the kernel turned by {short(float(np.median(later)))} (1 - cosine, median) between probes of the later half",
        "Modes cannot be followed from one probe to the next, and forecasts hold for a part of the interval only.",
        "Probe more often (every_n_steps, max_overhead) if you want to follow modes.",
    )


@rule(
    "forecast",
    ("facts.forecast_error", "facts.explained_error", "metrics.linearisation_error", "texts.forecast"),
    "error relative to the motion; predicting no change has 1",
    error=0.5,
    probes=3,
)
def unreliable_forecast(run: Run, t: Thresholds) -> Sign | None:
    """Recent forecasts were wrong by more than half of the motion, and why."""
    error = run.fact("forecast_error").last(int(t["probes"]))
    if len(error) < t["probes"] or np.median(error.values) < t["error"]:
        return None
    linear = run.metric("linearisation_error").last(len(error)).values
    explained = run.fact("explained_error").last(len(error)).values
    if len(linear) and np.median(linear) > t["error"]:
        why = f"The tangent itself missed {np.median(linear):.0%} of the motion: no kernel forecast holds this long."
        advice = "Probe more often, or read forecasts for fewer steps."
    elif len(explained) and np.median(explained) < t["error"]:
        why = (
            "With the mean of the kernels at both ends it fits: the kernel moved, the model of the optimizer is right."
        )
        advice = "Probe more often; the forecast improves as the kernel settles."
    else:
        why = "Neither tangent nor motion of the kernel explains it: batch noise, the probe's size or the optimizer."
        advice = "Use a larger probe or batch; read trends, not steps."
    return Sign(
        "info",
        error.span(),
        f"the last {len(error)} forecasts missed {', '.join(f'{value:.0%}' for value in error.values)} of the motion",
        f"{why} Do not rely on the loss forecast and the times to learn.",
        advice,
    )


@rule(
    "forecast",
    ("samples", "facts.sharpness_bias", "texts.noise"),
    "measured: alignment needs 100 samples, the largest eigenvalue is 24 % too large at 64",
    bias=0.25,
    samples=32,
    least=8,
)
def small_probe(run: Run, t: Thresholds) -> Sign | None:
    """The probe is too small for some of what is read from it."""
    samples, bias = run.last.samples, run.latest("sharpness_bias")
    if not samples or (samples >= t["samples"] and not bias > t["bias"]):
        return None
    numbers = f"{samples} probe samples" + (f"; sharpness is over-estimated by about {bias:.0%}" if bias > 0 else "")
    return Sign(
        "warning" if samples < t["least"] else "info",
        (run.first.step, run.last.step),
        numbers,
        f"About {max(1, samples // 4)} modes are worth reading; alignment, noise scale and forecasts are rough.",
        "Pass a larger probe (N x C up to about a thousand rows costs seconds).",
    )


@rule(
    "kernel", ("negative", "noise_floor", "eigenvalues"), "K = J J^T has no negative eigenvalues", probes=2, depth=10.0
)
def negative_eigenvalues(run: Run, t: Thresholds) -> Sign | None:
    """The kernel is not positive semidefinite beyond rounding."""
    bad = [
        s
        for s in run.measured
        if s.negative > 0 and s.eigenvalues.size and s.eigenvalues.min() < -t["depth"] * abs(s.noise_floor)
    ]
    if len(bad) < t["probes"]:
        return None
    return Sign(
        "warning",
        (bad[0].step, bad[-1].step),
        f"{bad[-1].negative} negative eigenvalues at step {bad[-1].step}, at {len(bad)} probes in all",
        "Something disturbed the kernel: random layers that stay active, or low precision in the forward pass.",
        "Check layers that draw random numbers in evaluation mode; measure in float32.",
    )


RULES = (
    mode_stuck,
    negative_eigenvalues,
    unreliable_forecast,
    small_probe,
    slow_labels,
    lazy_kernel,
    sparse_probes,
)
