"""A run's last probe in plain words: one row per quantity, with its value and what that value means.

n is the number of kernel rows (N·C for the full kernel). A row appears only when its quantity was measured. Sentences
say what a number means, never whether the run is good or bad: one probe cannot know that.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ntk_monitor.bands import NAMES, REACH, band_energy, reach_energy, remaining_steps
from ntk_monitor.snapshot import ARRAYS, Snapshot


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the summary: quantity, value with its unit, and one plain sentence about it."""

    quantity: str
    value: str
    meaning: str


def _short(value: float) -> str:
    """Return three significant digits, without an exponent between 0.0001 and 10 million."""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{float(f'{value:.3g}'):,.10f}".rstrip("0").rstrip(".")
    return f"{value:.2e}"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _probes(snapshots: Sequence[Snapshot], measured: Sequence[Snapshot]) -> Iterator[Row]:
    if measured:
        last = measured[-1]
        epoch = "" if last.epoch is None else f" (epoch {last.epoch})"
        value = f"{_plural(len(measured), 'probe')}, last at step {last.step}{epoch}"
        source = f" Samples: {last.probe_source}." if last.probe_source else ""
        light = sum(snapshot.status == "light" for snapshot in snapshots)
        between = f" {_plural(light, 'light probe')} in between kept the learning-rate bounds fresh." if light else ""
        yield Row("measured", value, f"The rows below describe the last of these probes.{between}{source}")
    else:
        yield Row("measured", "0 probes", "There is nothing to describe yet.")
    skipped = [snapshot for snapshot in snapshots if snapshot.status == "skipped"]
    if skipped:
        reasons = list(dict.fromkeys(snapshot.reason for snapshot in skipped if snapshot.reason))
        why = "; ".join(reasons[:3]) or "no reason was recorded"
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        yield Row("skipped", _plural(len(skipped), "probe"), f"Not taken: {why}{more}.")


def _kernel(last: Snapshot) -> Iterator[Row]:
    rows = last.eigenvalues.size
    size = f"{_plural(last.samples, 'sample')} x {_plural(last.outputs, 'output')}"
    state = {
        "eval": "in evaluation mode (BatchNorm statistics fixed, dropout off)",
        "train": "in training mode (BatchNorm over the probe, dropout off)",
    }.get(last.mode, f"in {last.mode} mode")
    meaning = (
        f"K = J J^T, {rows} x {rows}, {state}: how far a gradient step on one probe output moves each other one. "
        "No learning rate, batch size or loss is inside."
    )
    yield Row("kernel", f"{last.kernel or 'unnamed'}, {size}", meaning)
    how = last.engine_reason.rstrip(".") or "the engine gave no reason"
    count = f"{_plural(last.parameters, 'parameter')}" if last.parameters else "an unknown number of parameters"
    value = ", ".join(part for part in (last.engine, last.precision) if part) or "unknown"
    yield Row("computed by", value, f"Exact gradients of {count}. Why this engine: {how}.")
    yield from _covered(last)


_LEFT_OUT = {
    "unselected": "left out by params=",
    "unused": "not used by the outputs",
    "detached": "cut off from the outputs' gradients (no_grad, detach, another output)",
}


def _covered(last: Snapshot) -> Iterator[Row]:
    """Say which share of the trainable parameters the kernel holds, and where the rest is."""
    share = last.facts.get("coverage", math.nan)
    if not math.isfinite(share):
        return
    trainable = last.parameters + last.facts.get("unselected", 0.0)
    parts = ["" if share < 1 else "The kernel holds all of them."]
    for kind, why in _LEFT_OUT.items():
        if count := last.facts.get(kind, 0.0):
            parts.append(f"{count:,.0f} {why}: {last.texts.get(kind) or 'not named'}.")
    if frozen := last.facts.get("frozen", 0.0):
        parts.append(f"Beside them {frozen:,.0f} frozen ones, which are constants.")
    # Rounded down: not everything is never 100 %.
    value = f"{math.floor(1000 * share) / 10:g} % of {trainable:,.0f} trainable"
    yield Row("parameters measured", value, " ".join(part for part in parts if part))


def _size(measured: Sequence[Snapshot]) -> Iterator[Row]:
    last = measured[-1]
    trace = last.metrics.get("trace", math.nan)
    if math.isfinite(trace):
        first = next(snapshot for snapshot in measured if snapshot.probe == last.probe)
        before = first.metrics.get("trace", math.nan)
        meaning = "Sum of squared gradient norms of all probe outputs."
        if first is not last and math.isfinite(before) and before > 0:
            ratio = trace / before
            word = "about as" if 0.9 <= ratio <= 1.1 else f"{_short(ratio)} times as"
            meaning = f"At the same learning rate the outputs can move {word} fast as at step {first.step}."
            if first.step == 0 and last.mode == "eval" and ratio > 2:
                # They start at 0 and 1; in the demo that alone makes the first trace six times too small.
                meaning += " If there is BatchNorm, part of that is its running statistics settling."
        yield Row("trace", f"{_short(trace)} squared output units", meaning)
    if last.eigenvalues.size and math.isfinite(top := float(last.eigenvalues[0])):
        share = top / trace if math.isfinite(trace) and trace > 0 else math.nan
        part = f" It holds {share:.0%} of the trace." if 0 <= share <= 1.001 else ""
        meaning = f"Strength of the direction that gradient descent learns fastest.{part}"
        yield Row("largest eigenvalue", f"{_short(top)} {ARRAYS['eigenvalues'].unit}", meaning)


def _shape(last: Snapshot) -> Iterator[Row]:
    n = last.eigenvalues.size
    if math.isfinite(last.condition_number):
        bound = "at least " if last.condition_is_lower_bound else ""
        ratio = _short(last.condition_number)
        meaning = f"Plain gradient descent moves the slowest resolved direction {ratio} times slower than the fastest"
        tail = "; some are lost in rounding noise and slower still." if last.condition_is_lower_bound else "."
        yield Row("condition number", f"{bound}{ratio}", meaning + tail)
    if n:
        lost = n - last.rank
        meaning = (
            f"{_plural(lost, 'direction')} cannot be told from rounding noise: as far as this kernel shows, "
            "training moves nothing along them."
            if lost > 0
            else "Every direction stands above rounding noise, so all of them can be learned, at different speeds."
        )
        yield Row("resolved rank", f"{last.rank} of {n} modes", meaning)
    effective = last.metrics.get("effective_rank", math.nan)
    if math.isfinite(effective):
        meaning = f"The kernel spreads its strength as {_short(effective)} equal directions would."
        yield Row("effective rank", f"{_short(effective)} of {n} modes", meaning)
    if last.negative > 0:
        meaning = "K has none in exact arithmetic: the kernel was disturbed, by low precision or by random layers."
        yield Row("negative eigenvalues", f"{last.negative} of {n}", meaning)


def _alignment(value: float) -> str:
    if value >= 0.5:
        return "Samples that learn together mostly share their target."
    if value >= 0.1:
        return "Samples that learn together share their target more often than by chance."
    if value > -0.1:
        return "Which samples learn together says little about their targets."
    return "Samples that learn together tend to have different targets."


def _change(value: float, since: str) -> str:
    if value < 0.01:
        return f"The kernel kept its shape since {since}: the features hardly move. Growth does not count, see trace."
    if value < 0.2:
        return f"The kernel turned a little since {since}: the features are moving."
    return f"The kernel turned far since {since}, as it does when new features are learned."


def _learning(measured: Sequence[Snapshot]) -> Iterator[Row]:
    last = measured[-1]
    alignment = last.metrics.get("alignment", math.nan)
    if math.isfinite(alignment):
        few = " With under 100 samples this number is noisy." if last.samples < 100 else ""
        yield Row("alignment", f"{_short(alignment)} (cosine)", _alignment(alignment) + few)
    change = last.metrics.get("kernel_change", math.nan)
    if math.isfinite(change):
        since = f"step {measured[-2].step}" if len(measured) > 1 else "the previous probe"
        yield Row("kernel change", f"{_short(change)} (1 - cosine)", _change(change, since))
    if math.isfinite(last.loss_value):
        how = {
            "matched": "It was identified by reproducing the value the Trainer computed.",
            "given": "It is the loss that was passed in.",
        }.get(last.loss_status, f"How it was identified: {last.loss_status or 'not recorded'}.")
        yield Row("loss on the probe", f"{_short(last.loss_value)} {last.loss}".strip(), f"In evaluation mode. {how}")
    elif last.loss_status:
        yield Row("loss on the probe", "not known", f"How it was sought: {last.loss_status.rstrip('.')}.")


def _residual(last: Snapshot) -> Iterator[Row]:
    energy = band_energy(last)
    total = sum(energy.values())
    if energy and total > 0:
        # The hundred-fold line splits the eight bands into what training reaches early and what it reaches late.
        fast, unresolved = energy[NAMES[0]] + energy[NAMES[1]], energy[NAMES[-1]]
        most = max(NAMES, key=lambda name: energy[name])
        place = f"{most} than the fastest" if most.endswith("slower") else most
        meaning = f"The largest part ({energy[most]:.0%}) lies in modes {place}."
        if unresolved >= 0.005:
            meaning += f" {unresolved:.0%} lies in modes that gradient descent cannot move."
        yield Row("residual by speed", f"{fast:.0%} in fast modes (within 100x)", meaning)
    elif energy:
        yield Row("residual by speed", "no residual", "The probe is fitted exactly.")
    elif last.modes_reason:
        yield Row("residual by speed", "off", f"Modes are off: {last.modes_reason.rstrip('.')}.")


def _stability(measured: Sequence[Snapshot], looked: Sequence[Snapshot]) -> Iterator[Row]:
    """Say what the learning rate could have been multiplied by where it was tightest, and what it could be now."""
    known = [snapshot for snapshot in looked if _finite(snapshot.metrics, "lr_headroom_low", "lr_headroom_high")]
    if not known:
        if reason := measured[-1].texts.get("stability", ""):
            yield Row("learning rate", "no bound known", f"{_sentence(reason)}.")
        return
    at = min(known, key=lambda snapshot: snapshot.metrics["lr_headroom_high"])
    low, high = at.metrics["lr_headroom_low"], at.metrics["lr_headroom_high"]
    optimizer, batch = at.texts.get("optimizer", "the optimizer"), at.facts.get("batch_size", math.nan)
    batches = f"batches of {batch:.0f}" if math.isfinite(batch) else "small batches"
    if high < 1:
        meaning = f"Above the bound of {optimizer} even for full-batch steps there: the loss should rise or jump."
    elif low >= high:
        meaning = f"The tightest moment: full-batch steps of {optimizer} become unstable at that factor."
    elif low < 1:
        meaning = (
            f"The tightest moment. Noise of {batches} may unsettle steps there, full-batch steps would be stable: many "
            "healthy runs train between the two. If the loss jumped, this is why."
        )
    else:
        meaning = (
            f"The tightest moment. Steps of {optimizer} become unstable somewhere between the two: the lower end is "
            f"for noise of {batches}, the upper for full-batch steps."
        )
    if at is not known[-1]:
        last = known[-1]
        ends = dict.fromkeys(_short(last.metrics[f"lr_headroom_{end}"]) for end in ("low", "high"))
        meaning += f" At step {last.step}, with the learning rate of then: {' to '.join(ends)}."
    bias = at.facts.get("sharpness_bias", math.nan)
    small = f" With {_plural(at.samples, 'probe sample')} it reads about {bias:.0%} too strict." if bias >= 0.05 else ""
    factor = f"{_short(low)} to {_short(high)}" if low < high else _short(high)
    value = f"could be multiplied by {factor} at step {at.step}"
    yield Row("learning rate", value, meaning + small)


def _noise(last: Snapshot) -> Iterator[Row]:
    scale, batch = last.metrics.get("noise_scale", math.nan), last.facts.get("batch_size", math.nan)
    bound = last.facts.get("noise_scale_bound", math.nan)
    known = f"Your batch is {batch:.0f}. " if math.isfinite(batch) else ""
    rule = "Well below this size steps are noisy, well above it each further sample adds little."
    if math.isfinite(scale):
        yield Row("noise scale", f"{_short(scale)} samples", known + rule)
    elif math.isfinite(bound):
        meaning = f"{known}The gradient drowns in its noise on this probe, so that only a lower bound is known. {rule}"
        yield Row("noise scale", f"more than {_short(bound)} samples", meaning)


def _forecast(measured: Sequence[Snapshot]) -> Iterator[Row]:
    """Say where the run will end, and how far recent forecasts could be believed."""
    last = measured[-1]
    made = [
        snapshot for snapshot in measured if _finite(snapshot.facts, "loss_remaining") and snapshot.forecast_steps.size
    ]
    if made:
        at = made[-1]
        target, total = at.facts["loss_remaining"], at.facts.get("total_steps", math.nan)
        end = f"at the end (step {total:.0f})" if math.isfinite(total) else f"at step {at.forecast_steps[-1]:.0f}"
        meaning = f"Simulated from the kernel of step {at.step}, with {at.texts.get('optimizer', 'the optimizer')}"
        meaning += " and the learning rates to come. The kernel will move; take it as a direction."
        yield Row("loss forecast", f"{_short(target)} {end}", meaning)
    elif last.texts.get("forecast", "").startswith("from "):
        yield Row("loss forecast", "none", "No simulation from a kernel of this run reached the run's end.")
    elif reason := last.texts.get("ahead", last.texts.get("forecast", "")):
        yield Row("loss forecast", "none", f"{_sentence(reason.removeprefix('none: '))}.")
    yield from _trust(measured)


def _trust(measured: Sequence[Snapshot]) -> Iterator[Row]:
    errors = [s.facts["forecast_error"] for s in measured if _finite(s.facts, "forecast_error")]
    if not errors:
        return
    middle = _median(errors)
    word = "good" if middle < 0.2 else "fair" if middle < 0.5 else "poor"
    meaning = (
        f"Median miss of {_plural(len(errors), 'forecast')} from one probe to the next, relative to how far the "
        "outputs moved. Forecasting no change misses 100 %."
    )
    recent = _median(errors[-5:])
    if len(errors) > 7 and recent > 1.5 * middle:
        meaning += f" The last five missed {recent:.0%}: what moves the outputs late in a run is mostly batch noise."
    linear = [s.metrics["linearisation_error"] for s in measured if _finite(s.metrics, "linearisation_error")]
    if linear and word != "good":
        part = _median(linear)
        blame = "the kernel moves between probes" if part > 0.5 * middle else "batch noise or the size of the reference"
        meaning += f" The tangent alone missed {part:.0%}: mostly {blame}."
    yield Row("trust in forecasts", f"{word}, {middle:.0%} missed", meaning)


def _finite(values: Mapping[str, float], *names: str) -> bool:
    return all(math.isfinite(values.get(name, math.nan)) for name in names)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _reach(measured: Sequence[Snapshot]) -> Iterator[Row]:
    """Say what the remaining steps will still learn, at the last simulation with a quarter of the run to go."""
    found = [s for s in measured if reach_energy(s) and remaining_steps(s) >= 0.25 * s.facts.get("total_steps", 0.0)]
    if not found:
        return
    at = found[-1]
    energy = reach_energy(at)
    fast, within, late, noise = (energy[name] for name in REACH)
    value = f"{fast + within:.0%} in reach of {remaining_steps(at):.0f} steps"
    meaning = (
        f"At step {at.step}: share of the residual that falls to a tenth of its energy before the run ends "
        f"({fast:.0%} of it within a tenth of the steps left). {late:.0%} lies in modes that need longer"
    )
    meaning += f", {noise:.0%} in modes that nothing moves." if noise >= 0.005 else "."
    yield Row("residual in reach", value, meaning)
    etas = [(eta, name) for eta, name in zip(at.direction_eta, at.directions, strict=False) if not math.isnan(eta)]
    if len(etas) > 1:
        known = sorted((eta, name) for eta, name in etas if math.isfinite(eta))
        never = [name for eta, name in etas if math.isinf(eta)]
        parts = [f"{name} in {eta:.0f} steps" for eta, name in (known[:1] + known[-1:] if len(known) > 1 else known)]
        first = ("first and last: " if len(known) > 1 else "") + ", ".join(parts) if known else "none within the run"
        meaning = "Until the energy of its residual is a tenth of what it was at that step."
        if never:
            meaning += f" Not before the end: {', '.join(never[:6])}{' ...' if len(never) > 6 else ''}."
        yield Row("time to learn", first, meaning)


def _updates(measured: Sequence[Snapshot]) -> Iterator[Row]:
    """Say which layers moved the outputs."""
    found = [s for s in measured if s.layer_update.size and s.layer_update.size == len(s.layers)]
    if not found:
        return
    at = found[-1]
    order = sorted(range(len(at.layers)), key=lambda i: -at.layer_update[i])[:3]
    shares = ", ".join(f"{at.layers[i]} {at.layer_update[i]:.0%}" for i in order)
    since = f"since step {at.previous_step}" if at.previous_step is not None else "since the probe before"
    meaning = f"Which layers' own steps moved the outputs {since}, whatever the optimizer did."
    yield Row("who moved the outputs", shares, meaning)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")


def _cost(last: Snapshot, newest: Snapshot) -> Iterator[Row]:
    overhead, startup = newest.metrics.get("overhead", math.nan), newest.facts.get("startup_seconds", math.nan)
    spent = sum(value for value in last.seconds.values() if math.isfinite(value))
    if math.isfinite(overhead):
        meaning = "Share of the run's time that went into measuring"
        meaning += f", after a start-up of {_short(startup)} s." if math.isfinite(startup) else "."
        if spent > 0:
            slowest = max(last.seconds, key=lambda stage: last.seconds[stage])
            meaning += f" The last probe took {_short(spent)} s, most of it for: {slowest}."
        yield Row("monitor overhead", f"{100 * overhead:.2g} % of wall time", meaning)


def rows(snapshots: Sequence[Snapshot]) -> tuple[Row, ...]:
    """Return the summary of a run from its snapshots in order of steps; quantities that were not measured are left out.

    Always at least one row, which says how many probes there are. Changes are relative to the first probe of the same
    samples (equal probe hash).
    """
    measured = [snapshot for snapshot in snapshots if snapshot.status == "measured"]
    looked = [snapshot for snapshot in snapshots if snapshot.status != "skipped"]
    found = list(_probes(snapshots, measured))
    if measured:
        last = measured[-1]
        for part in (
            _stability(measured, looked),
            _forecast(measured),
            _reach(measured),
            _noise(last),
            _updates(measured),
            _learning(measured),
            _residual(last),
            _kernel(last),
            _size(measured),
            _shape(last),
            _cost(last, looked[-1]),
        ):
            found += part
    return tuple(found)


def text(rows: Sequence[Row], width: int = 100) -> str:
    """Return the rows as a plain-text table of three wrapped columns, no line wider than `width` (at least 60)."""
    width = max(width, 60)
    first = min(max((len(row.quantity) for row in rows), default=0), 22)
    second = min(max((len(row.value) for row in rows), default=0), (width - first - 4) * 2 // 5)
    widths = (first, second, width - first - second - 4)
    lines: list[str] = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, max(wide, 1)) or [""]
            for cell, wide in zip((row.quantity, row.value, row.meaning), widths, strict=True)
        ]
        for i in range(max(len(cell) for cell in cells)):
            parts = [(cell[i] if i < len(cell) else "").ljust(wide) for cell, wide in zip(cells, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
