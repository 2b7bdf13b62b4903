"""The run at a glance: one card per question, a value with its unit, a traffic light where there is a threshold.

A light is lit only where a bound or a baseline says what is good, else it is "none": no effective rank is good or bad.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias

from ntk_monitor.bands import REACH, reach_energy, remaining_steps
from ntk_monitor.health import RULES, Run
from ntk_monitor.health.rule import short
from ntk_monitor.history import History
from ntk_monitor.panels import View
from ntk_monitor.snapshot import Snapshot

Light: TypeAlias = Literal["green", "amber", "red", "none"]

GOOD, USELESS = 0.2, 1.0
"""Median forecast error relative to the motion: up to where it is good, and what forecasting no change misses."""
FREE = 0.03
"""Share of wall time: the default budget is 0.02, and short runs end before early probes are paid back."""

_TO_GO = 0.25
"""Share of the run that must be left for a simulation to say something of it."""
_RELAXED = 0.3
"""Where bounds were below this fraction of the present ones, the tighter ones are told too."""

_TOO_HIGH = next(rule for rule in RULES if rule.name == "lr_too_high")


@dataclass(frozen=True, slots=True)
class Card:
    """One question, answered at one step."""

    name: str
    value: str
    light: Light
    sentence: str
    """What the value is per, what would be good, and what it rests on."""
    group: str
    """Group of panels that shows more (see `ntk_monitor.panels.GROUPS`)."""


def cards(history: History, view: View | None = None) -> tuple[Card, ...]:
    """Return the cards of a run as it stood at the view's step (default: now); what was not measured has none."""
    step = None if view is None else view.step
    shown = [s for s in history.snapshots if step is None or s.step <= step]
    measured = [s for s in shown if s.status == "measured"]
    if not measured:
        return ()
    looked = [s for s in shown if s.status != "skipped"]
    last = measured[-1]
    parts = (
        _rate(shown, looked),
        _reach(measured),
        _loss(measured),
        _forecast(measured),
        _velocity(measured),
        _alignment(last),
        _rank(measured),
        _condition(last),
        _noise(last),
        _overhead(looked),
    )
    return tuple(card for part in parts for card in part)


def _known(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def _rate(shown: Sequence[Snapshot], looked: Sequence[Snapshot]) -> Iterator[Card]:
    ends = [
        (s, s.metrics.get("lr_headroom_low", math.nan), s.metrics.get("lr_headroom_high", math.nan)) for s in looked
    ]
    known = [(s, low, high) for s, low, high in ends if _known((low, high))]
    if not known:
        reason = next((s.texts["stability"] for s in reversed(looked) if s.texts.get("stability")), "not measured yet")
        yield Card("learning rate", "no bound known", "none", f"{_sentence(reason)}.", "learning rate")
        return
    at, low, high = known[-1]
    batch = at.facts.get("batch_size", math.nan)
    noise = f"the noise of batches of {batch:.0f}" if math.isfinite(batch) else "the noise of its batches"
    found = _TOO_HIGH(Run(shown))
    light: Light = "red" if found and found.severity == "error" else "green" if low > 1 else "amber"
    factor = f"{short(low)} to {short(high)}" if low < high else short(high)
    if light == "red" and found:
        words = f"{_sentence(found.evidence)}. {found.advice}"
    elif light == "green":
        words = (
            f"1 is the learning rate in use. Up to {short(low)} times as much, steps stay stable with {noise}; up to "
            f"{short(high)} times, full-batch steps would. It breaks somewhere between the two."
        )
    elif high >= 1:
        words = (
            f"1 is the learning rate in use, which lies between the two bounds: {noise} may unsettle steps, full-batch "
            "steps would be stable. Many healthy runs train here."
        )
    else:
        words = "Above the bound even for full-batch steps. If the loss does not fall, the learning rate is too high."
    when = "" if at is looked[-1] else f" Last measured at step {at.step}."
    tight, least, most = min(known, key=lambda one: one[2])
    if most < _RELAXED * high:
        when += f" At its tightest, step {tight.step}, the factors were {short(least)} and {short(most)}."
    yield Card("learning rate", f"could be multiplied by {factor}", light, words + when, "learning rate")


def _reach(measured: Sequence[Snapshot]) -> Iterator[Card]:
    # With hardly any steps to go nothing is in reach, which says nothing of the run.
    early = (s for s in reversed(measured) if remaining_steps(s) >= _TO_GO * s.facts.get("total_steps", math.inf))
    at = next((s for s in chain(early, reversed(measured)) if reach_energy(s)), None)
    if at is None:
        return
    energy, left = reach_energy(at), remaining_steps(at)
    fast, within, late, noise = (energy[name] for name in REACH)
    words = (
        f"Of what was not learned at step {at.step}, the share whose energy falls to a tenth before the run ends, by "
        f"simulation; {_percent(fast)} of the whole within the first tenth of those steps, "
        f"{_percent(late + noise)} not in time."
    )
    yield Card("in reach", f"{_percent(fast + within)} in {left:.0f} steps", "none", words, "residual")


def _loss(measured: Sequence[Snapshot]) -> Iterator[Card]:
    known = [s for s in measured if math.isfinite(s.loss_value)]
    if not known:
        return
    last, first = known[-1], known[0]
    accuracy = last.facts.get("accuracy", math.nan)
    value = short(last.loss_value) + (f", accuracy {_percent(accuracy)}" if math.isfinite(accuracy) else "")
    words = f"{last.loss or 'The loss'} on the {last.samples} probe samples, in evaluation mode."
    if last is not first:
        words += f" It was {short(first.loss_value)} at step {first.step}."
    made = [s for s in known if math.isfinite(s.facts.get("loss_remaining", math.nan))]
    if made:
        end = made[-1].facts.get("total_steps", math.nan)
        when = f"step {end:.0f}" if math.isfinite(end) else "the end"
        words += f" Forecast from step {made[-1].step}: {short(made[-1].facts['loss_remaining'])} at {when}."
    yield Card("loss on the probe", value, "none", words, "loss")


def _forecast(measured: Sequence[Snapshot]) -> Iterator[Card]:
    errors = [(s, s.facts.get("forecast_error", math.nan)) for s in measured]
    known = [error for _, error in errors if math.isfinite(error)]
    if not known:
        return
    recent = sorted(known[-5:])
    middle = recent[len(recent) // 2]
    light: Light = "green" if middle <= GOOD else "amber" if middle < USELESS else "red"
    count = (
        f"Median miss of the last {len(recent)} forecasts" if len(recent) > 1 else "Miss of the only forecast so far"
    )
    words = (
        f"{count} from one probe to the next, relative to how far the outputs moved. Forecasting no change misses "
        "100 %; 20 % is good."
    )
    if middle >= USELESS:
        words += " Do not believe forecasts of this run now."
    yield Card("forecast error", f"{_percent(middle)} (no change: 100 %)", light, words, "loss")


def _velocity(measured: Sequence[Snapshot]) -> Iterator[Card]:
    last = measured[-1]
    change = last.metrics.get("kernel_change", math.nan)
    if not math.isfinite(change) or len(measured) < 2:
        return
    before = measured[-2].step
    word = "hardly moves" if change < 0.01 else "turns a little" if change < 0.2 else "turns far"
    words = f"1 - cosine between the kernels of steps {before} and {last.step}: it {word}. 0 is a frozen (lazy) kernel."
    if math.isfinite(first := last.facts.get("cka_first", math.nan)):
        words += f" Since the first probe: {short(1 - first)} (1 - CKA)."
    yield Card("kernel velocity", f"{short(change)} in {last.step - before} steps", "none", words, "kernel")


def _alignment(last: Snapshot) -> Iterator[Card]:
    value = last.metrics.get("alignment", math.nan)
    if not math.isfinite(value):
        return
    words = (
        "How far samples that learn together share their target: 0 is chance, 1 is the targets' own kernel. It rises "
        "while features are learned."
    )
    few = " Noisy below 100 samples." if last.samples < 100 else ""
    yield Card("alignment", f"{short(value)} (cosine)", "none", words + few, "kernel")


def _rank(measured: Sequence[Snapshot]) -> Iterator[Card]:
    last = measured[-1]
    value = last.metrics.get("effective_rank", math.nan)
    if not math.isfinite(value):
        return
    words = f"The kernel spreads its strength as {short(value)} equal directions would; no value is good by itself."
    first = next(s for s in measured if s.probe == last.probe)
    before = first.metrics.get("effective_rank", math.nan)
    if first is not last and math.isfinite(before):
        words += f" It was {short(before)} at step {first.step}."
    yield Card("effective rank", f"{short(value)} of {last.eigenvalues.size} modes", "none", words, "kernel")


def _condition(last: Snapshot) -> Iterator[Card]:
    if not math.isfinite(last.condition_number):
        return
    bound = "at least " if last.condition_is_lower_bound else ""
    lost = last.eigenvalues.size - last.rank
    words = (
        f"Largest over smallest of the {last.rank} eigenvalues above the noise floor of {short(last.noise_floor)} "
        "squared output units: by so much plain gradient descent moves the slowest direction more slowly."
    )
    if lost > 0:
        words += f" {lost} directions drown in rounding noise."
    yield Card("condition number", f"{bound}{short(last.condition_number)}", "none", words, "kernel")


def _noise(last: Snapshot) -> Iterator[Card]:
    scale, bound = last.metrics.get("noise_scale", math.nan), last.facts.get("noise_scale_bound", math.nan)
    if not math.isfinite(scale) and not math.isfinite(bound):
        return
    value = f"{short(scale)} samples" if math.isfinite(scale) else f"more than {short(bound)} samples"
    batch = last.facts.get("batch_size", math.nan)
    words = "Batches well below it give noisy steps; well above it each further sample adds little."
    if math.isfinite(batch):
        words += f" Yours is {batch:.0f}."
    yield Card("noise scale", value, "none", words, "learning rate")


def _overhead(looked: Sequence[Snapshot]) -> Iterator[Card]:
    value = looked[-1].metrics.get("overhead", math.nan)
    if not math.isfinite(value):
        return
    light: Light = "green" if value <= FREE else "amber"
    words = "Share of wall time, since its start-up, that the monitor took; max_overhead or every_n_steps change it."
    startup = looked[-1].facts.get("startup_seconds", math.nan)
    if math.isfinite(startup):
        words += f" Start-up took {short(startup)} s."
    yield Card("monitor overhead", f"{100 * value:.2g} % of wall time", light, words, "numbers")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")
