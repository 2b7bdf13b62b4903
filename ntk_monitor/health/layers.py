"""Rules about the network: dead, dominating and scale-free layers, vanishing signals, collapse, parameters left out."""

import numpy as np

from ntk_monitor.health.rule import Sign, Thresholds, listed, rule, short
from ntk_monitor.health.run import Run

_SAME = "The network gives every sample the same answer: what it is fed no longer matters."
_COLLAPSE = (
    "Look for weight decay that eats the head's weights, dead or saturated layers, a learning rate that was too high "
    "early, or inputs that are constant."
)
_EXACT = "a kernel is a sum of squared gradients: zero means that no gradient reaches the layer"


def _structural(run: Run, layer: str) -> bool:
    """True when a layer's kernel may be zero by construction: it is named, or a module it is part of.

    A parameter of it that is named says nothing: a layer whose bias a norm takes out must not die.
    """
    return any(layer == name or layer.startswith(f"{name}.") for name in run.named("structural_zeros"))


@rule(
    "layers",
    ("layer_trace", "layers", "texts.structural_zeros"),
    _EXACT,
    explained_by=("vanishing_signal",),
    zero=1e-30,
    probes=2,
    share=0.3,
)
def dead_layer(run: Run, t: Thresholds) -> Sign | None:
    """No gradient reaches a layer at any of the last probes, after its own parameters could have moved."""
    # At step 0 a layer behind zeros (LoRA's A, a zero gamma) is only waiting for them to move.
    layers, steps, traces = run.layers("layer_trace", since=1)
    if len(steps) < t["probes"] or not traces.max(initial=0.0) > 0:
        return None
    zero = traces <= t["zero"] * traces.max(axis=1, keepdims=True)
    # Dead now, and at every probe since it died.
    dead = [i for i in np.flatnonzero(zero[-int(t["probes"]) :].all(axis=0)) if not _structural(run, layers[i])]
    if not dead:
        return None
    alive = [int(np.flatnonzero(~zero[:, i])[-1]) + 1 if (~zero[:, i]).any() else 0 for i in dead]
    since = int(steps[min(alive)])
    when = f"from step {since} on" if min(alive) else "at every probe after the start"
    return Sign(
        "error" if len(dead) >= max(2, t["share"] * len(layers)) else "warning",
        (since, int(steps[-1])),
        f"the kernel of {listed([layers[i] for i in dead])} was zero {when} ({len(dead)} of {len(layers)} layers)",
        "No gradient of any output of the probe reaches these parameters: every unit behind them is off for every "
        "sample, or the forward pass leaves them out.",
        "For ReLU: lower the learning rate, initialise anew, or use a leaky activation. Else look for a detach(), a "
        "multiplication with zero or a layer that is built but not called.",
    )


@rule(
    "layers", ("layer_update", "layer_share"), "audit: the share of one layer in a healthy update", most=0.97, layers=4
)
def dominating_layer(run: Run, t: Thresholds) -> Sign | None:
    """One layer makes nearly all of the outputs' motion at the last three probes."""
    for name, what in (("layer_update", "change of the outputs"), ("layer_share", "kernel that the optimizer sees")):
        layers, steps, shares = run.layers(name, since=1)
        if len(steps) < 3 or len(layers) < t["layers"]:
            continue
        last = shares[-3:]
        top = int(last.mean(axis=0).argmax())
        if last[:, top].min() <= t["most"]:
            return None
        return Sign(
            "info",
            (int(steps[-3]), int(steps[-1])),
            f"{layers[top]} made {last[:, top].min():.1%} or more of the {what} at the last three probes",
            "The other layers hardly take part: the network is trained as if they were fixed.",
            "Wanted when a head is fitted on fixed features. Else check learning rates by group and initial scales.",
        )
    return None


@rule(
    "layers",
    ("layer_trace", "layers"),
    "audit: in healthy networks the traces of layers lie within four decades",
    small=1e-6,
    share=0.4,
    tiny=1e-8,
)
def vanishing_signal(run: Run, t: Thresholds) -> Sign | None:
    """A gradient reaches many layers, but a million times weaker than another: scales at initialisation are off."""
    layers, steps, traces = run.layers("layer_trace")
    later = traces[1:] if len(steps) > 1 else traces
    if len(steps) < 2 or not later.max(initial=0.0) > 0:
        return None
    relative = later / np.maximum(later.max(axis=1, keepdims=True), 1e-300)
    kept = np.array([not _structural(run, name) for name in layers])
    weak = ((relative[:2] > 0) & (relative[:2] < t["small"])).all(axis=0) & kept
    rows = run.last.samples * max(run.last.outputs, 1)
    total = float(np.median(later.sum(axis=1))) / max(rows, 1)
    starved = weak.sum() >= max(2, t["share"] * len(layers))
    if not starved and total > t["tiny"]:
        return None
    where = [name for name, flag in zip(layers, weak, strict=True) if flag]
    numbers = (
        f"{listed(where)} had at most {relative[:2][:, weak].max():.0e} of the largest layer's kernel"
        if starved
        else f"the squared gradient of one output was {total:.0e} on average"
    )
    return Sign(
        "warning",
        (int(steps[0]), int(steps[-1])),
        f"{numbers} at steps {steps[1]} to {steps[min(2, len(steps) - 1)]}",
        "The signal vanishes on its way through the network, so those layers cannot learn at any usable learning rate.",
        "Initialise with a variance of 2 / fan-in before ReLU (1 / fan-in else), or add normalisation or skips.",
    )


@rule(
    "outputs",
    ("facts.output_spread", "facts.output_rms", "loss_value"),
    "audit: outputs of healthy networks differ between samples, and by more than at the start",
    spread=0.02,
    shrunk=0.2,
    loss=0.85,
)
def collapsed_outputs(run: Run, t: Thresholds) -> Sign | None:
    """The outputs are the same for every sample, at the last three probes."""
    spread = run.fact("output_spread").since(1)
    last = spread.last(3)
    # Where the mean is near zero as well, only the size that the differences once had can tell.
    size = run.series(lambda s: s.facts.get("output_spread", np.nan) * s.facts.get("output_rms", np.nan))
    shrunk = float(size.last(3).values.max() / size.values[0]) if len(size) > 3 and size.values[0] > 0 else 1.0
    if len(last) == 3 and shrunk < t["shrunk"] and run.loss_ratio() > t["loss"]:
        return Sign(
            "error",
            (size.span()[0], last.span()[1]),
            f"differences of outputs between samples have shrunk to {shrunk:.0%} of those at the start or less",
            _SAME,
            _COLLAPSE,
        )
    targets, mean = run.latest("target_rms"), run.latest("target_offset")
    # Outputs far from zero vary little next to their size where the targets do.
    expected = 1 / mean if targets > 0 and mean > 1 else 1.0
    if len(last) < 3 or last.values.max() > t["spread"] * expected or run.loss_ratio() < 0.3:
        return None
    accuracy = run.latest("accuracy")
    hit = f"; accuracy on the probe {accuracy:.0%}" if np.isfinite(accuracy) else ""
    return Sign(
        "error",
        last.span(),
        f"outputs varied over samples by {last.values.max():.1%} of their size at most, at the last three probes{hit}",
        _SAME,
        _COLLAPSE,
    )


@rule(
    "kernel", ("metrics.effective_rank",), "Kumar et al. 2021 (rank collapse); own start", part=0.1, info=0.3, rank=3.0
)
def rank_collapse(run: Run, t: Thresholds) -> Sign | None:
    """The effective rank has fallen to a small part of this run's own start."""
    ranks = run.metric("effective_rank")
    if len(ranks) < 4:
        return None
    start, last = float(ranks.values[:2].max()), ranks.last(2)
    part = float(last.values.max()) / start
    if part > t["info"]:
        return None
    outputs = run.last.outputs if run.last.kernel == "full" else 1
    # Late in a good run the kernel aligns with the classes and loses rank: only an unlearned residual makes it a fault.
    stuck = run.loss_ratio() > 0.5 and part < t["part"] and last.values.max() < t["rank"] * max(outputs, 1)
    return Sign(
        "warning" if stuck else "info",
        (int(ranks.steps[0]), int(last.steps[-1])),
        f"effective rank {short(start)} at the start, {short(float(last.values[-1]))} at step {last.steps[-1]}",
        "Few directions can still be learned at a useful speed."
        + (
            " The loss is far from learned: capacity to learn is being lost."
            if stuck
            else " Usual as classes separate."
        ),
        "Lower the learning rate or weight decay, or reset the last layers."
        if stuck
        else "Nothing, if the loss falls.",
    )


@rule("layers", ("facts.uncovered", "texts.uncovered"), "the optimizer's own parameter lists", share=0.1)
def uncovered_parameters(run: Run, t: Thresholds) -> Sign | None:
    """Parameters require gradients but no optimizer updates them."""
    left = run.fact("uncovered")
    if not len(left) or left.values[-1] <= 0:
        return None
    count, total = float(left.values[-1]), run.last.parameters
    names = sorted(run.named("uncovered"))
    which = f": {listed(names)}" if names else ""
    part = f" of {total:,}" if total else ""
    return Sign(
        "error" if total and count >= t["share"] * total else "warning",
        left.span(),
        f"{count:,.0f}{part} trainable parameters are in no optimizer{which}",
        "They receive gradients and never move. Most often a layer was added after the optimizer was built, or a "
        "filter dropped it.",
        "Pass them to the optimizer, or set requires_grad=False so that the intent is visible.",
    )


@rule("layers", ("facts.frozen", "parameters"), "parameters without requires_grad are most often meant", loss=0.6)
def frozen_parameters(run: Run, t: Thresholds) -> Sign | None:
    """Parameters without requires_grad: worth knowing, and a suspect where the loss stays."""
    frozen = run.fact("frozen")
    if not len(frozen) or frozen.values[-1] <= 0:
        return None
    count, rest = float(frozen.values[-1]), run.last.parameters
    stays = run.loss_ratio() > t["loss"] and run.progress() > 0.5 and not run.latest("accuracy") > 0.9
    return Sign(
        "warning" if stays else "info",
        frozen.span(),
        f"{count:,.0f} parameters are frozen, {rest:,} train"
        + (f"; the loss is still {run.loss_ratio():.0%} of its first value" if stays else ""),
        "Frozen parameters can be no part of the kernel: the rest must do with the features they give.",
        "Meant for adapters and heads on pretrained features. If the features are random, unfreeze them."
        if stays
        else "Nothing, if it was meant.",
    )


@rule(
    "layers",
    ("layer_norm", "texts.scale_free", "texts.optimizer"),
    "Arora et al. 2019: behind a norm SGD's effective rate is lr / |w|^2, Adam's lr / |w|",
    info=3.0,
    warning=30.0,
)
def shrinking_rate(run: Run, t: Thresholds) -> Sign | None:
    """A layer before a norm grows, so that the same learning rate turns it less and less."""
    layers, steps, norms = run.layers("layer_norm")
    free, family = run.named("scale_free"), run.family()
    known = [i for i, name in enumerate(layers) if name in free or any(f.startswith(f"{name}.") for f in free)]
    if len(steps) < 3 or not known or not family:
        return None
    growth = norms[-1, known] / np.maximum(norms[0, known], 1e-300)
    factors = np.where(norms[0, known] > 0, growth ** (2 if family == "sgd" else 1), 1.0)
    top = int(factors.argmax())
    if factors[top] < t["info"]:
        return None
    return Sign(
        "warning" if factors[top] > t["warning"] and run.loss_ratio() > 0.3 else "info",
        (int(steps[0]), int(steps[-1])),
        f"{layers[known[top]]} grew {short(growth[top])} times; its effective learning rate fell {short(factors[top])} "
        f"times ({'lr / |w|^2, SGD' if family == 'sgd' else 'lr / |w|, Adam'}), apart from the schedule",
        "A norm behind the layer undoes its scale, so only its direction counts, and a longer vector turns slower.",
        "Weight decay on these weights keeps the rate up; or plan the schedule with this decay in mind.",
    )


RULES = (
    dead_layer,
    collapsed_outputs,
    uncovered_parameters,
    vanishing_signal,
    rank_collapse,
    frozen_parameters,
    dominating_layer,
    shrinking_rate,
)
