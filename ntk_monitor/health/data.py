"""Rules about what the network is fed: samples, inputs, targets, loss reduction, tasks."""

import numpy as np

from ntk_monitor.health.rule import Sign, Thresholds, listed, rule, short
from ntk_monitor.health.run import Run

_AUDIT = "audit: real data sets, prepared and not"


@rule("data", ("facts.duplicates", "samples"), _AUDIT, share=0.05, least=4)
def duplicate_samples(run: Run, t: Thresholds) -> Sign | None:
    """Samples of the probe occur more than once."""
    count, samples = run.latest("duplicates"), run.last.samples
    if not count >= 1 or not samples:
        return None
    share = count / samples
    return Sign(
        "warning" if share >= t["share"] and count >= t["least"] else "info",
        (run.first.step, run.last.step),
        f"{count:.0f} of {samples} probe samples ({share:.0%}) have the same input as another one",
        "The probe is a draw from the training set, which then holds at least as large a share of copies. Copies "
        "weigh double, and leak where they fall into the held-out part as well.",
        "Remove copies before splitting the data; where inputs take few values by nature, nothing.",
    )


@rule("data", ("facts.duplicate_labels", "samples"), _AUDIT, share=0.05)
def contradictory_targets(run: Run, t: Thresholds) -> Sign | None:
    """Equal inputs with different targets: no network can fit both."""
    pairs, samples = run.latest("duplicate_labels"), run.last.samples
    if not pairs >= 1 or not samples:
        return None
    return Sign(
        "warning" if pairs >= t["share"] * samples else "info",
        (run.first.step, run.last.step),
        f"{pairs:.0f} times equal inputs among {samples} probe samples have different targets",
        "The loss cannot fall below what these contradictions cost.",
        "Check labels and the join that made the data.",
    )


@rule(
    "data", ("facts.outlier",), "median of a healthy probe's largest over median entry: below 10", info=20.0, high=1e3
)
def outlier_sample(run: Run, t: Thresholds) -> Sign | None:
    """One sample's gradient is far larger than the median."""
    outlier = run.fact("outlier")
    if len(outlier) < 2 or outlier.values[-2:].min() < t["info"]:
        return None
    worst = float(outlier.values[-2:].min())
    return Sign(
        "warning" if worst >= t["high"] else "info",
        outlier.last(2).span(),
        f"the largest diagonal entry of the kernel was {short(worst)} times the median or more at the last two probes",
        "That sample moves the outputs far more than others and owns the largest eigenvalue, the trace and the bound.",
        "Look at it: a corrupted record or an unscaled feature? Clip gradients or scale the feature.",
    )


@rule("data", ("facts.target_rms", "facts.target_offset", "facts.output_rms", "loss"), _AUDIT, large=20.0, offset=5.0)
def unscaled_target(run: Run, t: Thresholds) -> Sign | None:
    """Regression targets are far larger than what a network gives at the start."""
    rms, offset = run.latest("target_rms"), run.latest("target_offset")
    if run.loss.startswith(("cross_entropy", "bce")) or not (rms > t["large"] or (rms > 1 and offset > t["offset"])):
        return None
    outputs = run.fact("output_rms").values
    start = f"; the outputs began at {short(float(outputs[0]))}" if len(outputs) else ""
    about = f", their mean {short(offset)} times their standard deviation" if np.isfinite(offset) else ""
    return Sign(
        "warning",
        (run.first.step, run.last.step),
        f"the targets have root mean square {short(rms)}{about}{start}",
        "The first part of the run is spent on reaching their scale, with gradients as large as the targets; learning "
        "rates and clipping that suit other networks do not suit this one.",
        "Subtract the mean of the training targets and divide by their standard deviation; undo it when predicting.",
    )


@rule(
    "data",
    ("facts.input_rms", "facts.input_offset", "facts.input_range"),
    _AUDIT,
    large=20.0,
    small=0.005,
    offset=5.0,
    spread=1e3,
)
def unnormalised_input(run: Run, t: Thresholds) -> Sign | None:
    """Inputs are far from zero mean and unit spread."""
    rms, offset, spread = (run.latest(name) for name in ("input_rms", "input_offset", "input_range"))
    off = []
    if rms > t["large"] or 0 < rms < t["small"]:
        off.append(f"their root mean square is {short(rms)}")
    if offset > t["offset"]:
        off.append(f"their mean lies {short(offset)} times their spread away from zero")
    if spread > t["spread"] and (rms > 3 or offset > 1):
        off.append(f"the standard deviations of features differ by a factor of {short(spread)}")
    if not off:
        return None
    return Sign(
        "warning",
        (run.first.step, run.last.step),
        "; ".join(off),
        "Large features and the constant direction then rule the kernel: the rest of the residual is learned "
        "slower by the square of such factors.",
        "Scale each feature to zero mean and unit variance on the training set (pixels: divide by 255).",
    )


@rule("loss", ("loss", "texts.optimizer"), "gradients of a summed loss grow with the batch", ratio=0.5)
def summed_loss(run: Run, t: Thresholds) -> Sign | None:
    """The loss sums over samples, so that the step grows with the batch size."""
    if "(sum" not in run.loss.replace(" ", ""):
        return None
    batch = run.latest("batch_size")
    factor = f"{short(batch)} times" if batch > 1 else "as many times as the batch has samples"
    fine = run.family() == "adam" and run.loss_ratio() < t["ratio"]
    return Sign(
        "info" if fine else "warning",
        (run.first.step, run.last.step),
        f"the loss is {run.loss}",
        f"Its gradient is {factor} that of a mean: learning rate, clipping and weight decay mean something else, and "
        "change with the batch size. The last, smaller batch of an epoch makes a smaller step.",
        'Use reduction="mean".',
    )


@rule(
    "data",
    ("metrics.alignment", "facts.label_energy", "facts.label_energy_chance", "facts.sample_loo", "samples"),
    "Arora et al. 2019: random labels lie outside the fast modes; audit: real labels never at chance by all measures",
    alignment=0.06,
    energy=1.25,
    loo=0.97,
    samples=48,
)
def labels_look_random(run: Run, t: Thresholds) -> Sign | None:
    """Before training, nothing in the kernel tells the targets apart: shuffled labels, or a task of another kind."""
    early = run.measured[:3]
    if run.last.samples < t["samples"] or len(run.measured) < 2:
        return None
    at = {snapshot.step for snapshot in early}
    seen: dict[str, tuple[float, bool]] = {}
    alignment, loo = run.metric("alignment"), run.fact("sample_loo")
    energy, chance = run.fact("label_energy"), run.fact("label_energy_chance")
    early_alignment = [v for s, v in zip(alignment.steps.tolist(), alignment.values, strict=True) if s in at]
    early_loo = [v for s, v in zip(loo.steps.tolist(), loo.values, strict=True) if s in at]
    if early_alignment:
        # The kernel adapts even to random labels of the samples it is trained on: only the start is evidence.
        value = float(early_alignment[0])
        seen[f"alignment {short(value)}"] = (value, value < t["alignment"])
    if early_loo:
        value = float(np.median(early_loo))
        seen[f"leave-one-out error {short(value)} of predicting the mean"] = (value, value > t["loo"])
    if len(energy) and len(chance) and energy.steps[0] in at and chance.values[0] > 0:
        value = float(energy.values[0] / chance.values[0])
        seen[f"{short(value)} times chance in the fast modes"] = (value, value < t["energy"])
    if len(seen) < 2 or not all(random for _, random in seen.values()):
        return None
    falls = run.loss_ratio() < 0.7
    return Sign(
        "warning",
        (early[0].step, early[-1].step),
        f"{'; '.join(seen)}, on {run.last.samples} samples"
        + (f"; the training loss has fallen to {run.loss_ratio():.0%} all the same" if falls else ""),
        "To this network similar inputs have unrelated targets. "
        + ("It is memorising: held-out error will not follow." if falls else "It has nothing to generalise from."),
        "Check that inputs and targets are still paired (a shuffle of one of them, a join, an index). Tasks such as "
        "parity look the same before their features are learned.",
    )


@rule(
    "residual",
    ("interference", "directions", "direction_residual"),
    "Yu et al. 2020 (conflicting gradients); audit",
    cosine=-0.5,
    probes=3,
    left=0.5,
)
def conflicting_tasks(run: Run, t: Thresholds) -> Sign | None:
    """A step for one output or task undoes another, probe after probe, and neither is learned."""
    names = run.last.directions
    # Classes compete by construction: softmax pushes down one logit to raise another.
    tasks = [i for i, name in enumerate(names) if not name.lower().startswith("class ")]
    if len(tasks) < 2:
        return None
    rows = [s for s in run.measured if s.directions == names and s.interference.shape == (len(names),) * 2][1:]
    if len(rows) < t["probes"]:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.array(
            [s.interference / np.sqrt(np.outer(np.diag(s.interference), np.diag(s.interference))) for s in rows]
        )
    cosines = np.nan_to_num(cosines, nan=0.0, posinf=0.0, neginf=0.0)
    pairs = [(a, b) for a in tasks for b in tasks if a < b]
    (a, b), worst = min(((p, float(np.median(cosines[:, p[0], p[1]]))) for p in pairs), key=lambda found: found[1])
    first, last = (np.abs(s.direction_residual) for s in (run.measured[0], rows[-1]))
    if worst > t["cosine"] or cosines[-int(t["probes"]) :, a, b].max() >= 0:
        return None
    known = first.shape == last.shape == (len(names),) and first[[a, b]].min() > 0
    if known and (last[[a, b]] / first[[a, b]]).max() < t["left"]:
        return None  # both are learned: what is left of them is noise
    return Sign(
        "warning",
        (rows[0].step, rows[-1].step),
        f"the gradients of {listed([names[a], names[b]])} had cosine {short(worst)} (median of {len(rows)} probes)",
        "A step that helps one undoes the other: their losses bargain through shared parameters.",
        "Give them more parameters of their own, weigh their losses, or project conflicting gradients.",
    )


RULES = (
    unscaled_target,
    unnormalised_input,
    summed_loss,
    labels_look_random,
    duplicate_samples,
    contradictory_targets,
    conflicting_tasks,
    outlier_sample,
)
