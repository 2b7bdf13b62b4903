"""What the study of a loss's terms says: its words, tables and figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ntk_monitor.applications.loss_terms import Array, Record
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.figures.style import BLUE, GREY, MODE_COLOURS, ORANGE, Figure, layout_of, line, log_axis, numbers

STARVES = 10.0
"""Ratio of mean traces from which the slower term is said to starve."""

BETTER = 1.25
"""Factor between two trainings below which they are said to be alike: one run cannot tell more."""

KEEPS = 2.0
"""Factor by which weights may change in training and still be said to last."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What was found: by term, counts, mean traces, weights now and after training; and both trainings."""

    counts: Mapping[str, int]
    traces: Mapping[str, float]
    weights: Mapping[str, float]
    later: Mapping[str, float] | None
    growth: float
    cosines: Array
    plain: Record
    weighted: Record
    lr: float

    @property
    def names(self) -> list[str]:
        """Of the terms."""
        return list(self.traces)

    def judged(self, run: Record) -> float:
        """Return the error of a training; without a solution, what is left of the term that is left most."""
        return run.error if not math.isnan(run.errors[0]) else float(run.left.max())

    @property
    def measure(self) -> str:
        """What `judged` is, in words."""
        known = not math.isnan(self.plain.errors[0])
        return "relative error of the solution" if known else "share left of the term that lags most"


def told(found: Balance) -> Report:
    """Return the report."""
    names, steps = found.names, found.plain.steps[-1]
    slow = min(found.traces, key=lambda name: found.traces[name])
    ratio = max(found.traces.values()) / min(found.traces.values())
    before, after = found.judged(found.plain), found.judged(found.weighted)
    weights = ", ".join(f"{name} {short(w)}" for name, w in found.weights.items())
    return Report(
        name="pinn_balance",
        title="Which term of the loss starves, and do the kernel's weights help?",
        summary=(
            f"{len(names)} terms, {sum(found.counts.values())} residuals. By its kernel {slow} learns slowest, "
            f"{short(ratio)} times slower than the fastest. Suggested weights: {weights}. After {steps} steps of Adam "
            f"the {found.measure} is {short(before)} without and {short(after)} with them."
        ),
        numbers=(
            Number("imbalance", ratio, "", note="largest over smallest tr K_jj / N_j"),
            Number("without weights", before, "", note=f"{found.measure}; {steps} steps, median of the last tenth"),
            Number("with weights", after, "", note=f"{found.measure}; {steps} steps, median of the last tenth"),
            Number(
                "curvature", found.growth, "times", note="largest eigenvalue of the whole loss with weights / without"
            ),
            Number(
                "smallest cosine", float(found.cosines.min()), "", note="of two terms' gradients; negative: conflict"
            ),
        ),
        verdicts=(
            Verdict(
                "a term starves: its kernel is ten times smaller per residual than another's",
                ratio >= STARVES,
                f"mean traces differ by a factor of {short(ratio)}; the smallest is that of {slow}",
            ),
            _evener(found),
            _better(before, after, found.measure),
            _lasting(found),
        ),
        tables={"terms": _terms(found)},
        figures={"losses": _losses(found), "judged": _judged(found), "weights": _weights(found)},
        caveats=(
            "One training each from the same start, with Adam and all points at once: another start, rate or number of "
            "steps may decide otherwise. Try --set steps= and lr= of your own training.",
            f"With these weights plain descent is stable up to a learning rate {short(found.growth)} times smaller. "
            "Adam does not see a common factor of the loss.",
            "Terms are taken as mean squares of their residuals; the trace says how fast a term could learn alone, not "
            "how its slowest part does.",
        ),
    )


def _evener(found: Balance) -> Verdict:
    claim = "with the weights the terms advance more evenly"
    spreads = []
    for run in (found.plain, found.weighted):
        left = run.left
        if not np.isfinite(left).all() or not (left > 0).all():
            return Verdict(claim, None, "a term started or ended at zero, or training diverged")
        spreads.append(float(left.max() / left.min()))
    alike = max(spreads) < BETTER * min(spreads)
    evidence = (
        f"between the terms, what is left differs {short(spreads[0])}-fold without and {short(spreads[1])}-fold with"
    )
    return Verdict(claim, None if alike else spreads[1] < spreads[0], evidence)


def _better(before: float, after: float, measure: str) -> Verdict:
    claim = "training with the suggested weights ends better"
    if not math.isfinite(before) and not math.isfinite(after):
        return Verdict(claim, None, "both trainings diverged; pass a smaller lr")
    evidence = f"{measure} {short(after)} with the weights, {short(before)} without"
    alike = max(before, after) < BETTER * min(before, after)
    return Verdict(claim, None if alike else bool(after < before or not math.isfinite(before)), evidence)


def _lasting(found: Balance) -> Verdict:
    claim = "the weights last: the trained network would be given the same"
    if found.later is None:
        return Verdict(claim, None, "training with them diverged")
    change = {name: found.later[name] / w for name, w in found.weights.items()}
    most = max(change, key=lambda name: abs(math.log(change[name])))
    return Verdict(
        claim,
        abs(math.log(change[most])) <= math.log(KEEPS),
        f"the weight of {most} would now be {short(found.later[most])} instead of {short(found.weights[most])}",
    )


def _terms(found: Balance) -> Table:
    columns = (
        "term", "residuals", "loss", "tr K / N", "weight", "weight after training", "left without", "left with",
    )  # fmt: skip
    rows = []
    for k, name in enumerate(found.names):
        later = math.nan if found.later is None else found.later[name]
        left = (float(found.plain.left[k]), float(found.weighted.left[k]))
        start = float(found.plain.losses[0, k])
        rows.append((name, found.counts[name], start, found.traces[name], found.weights[name], later, *left))
    return Table(columns, tuple(rows))


def _losses(found: Balance) -> Figure:
    data = []
    for run, words, dash in ((found.plain, "without weights", "dash"), (found.weighted, "with weights", "solid")):
        for k, name in enumerate(found.names):
            colour = MODE_COLOURS[k % len(MODE_COLOURS)]
            look = {"line": {"color": colour, "dash": dash, "width": 2}}
            values = numbers(run.losses[:, k], positive=True)
            data.append(line(run.steps, values, f"{name}, {words}", colour, **look))
    layout = layout_of(
        "Each term's loss, with and without the suggested weights",
        "Mean square of each term's residuals, never weighted. A term whose dashed line stays high starves; the solid "
        "lines say whether the weights feed it, and what that costs the others.",
        xaxis={"title": {"text": "steps of Adam"}},
        yaxis=log_axis("mean square of the residuals"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def _judged(found: Balance) -> Figure:
    data = []
    for run, words, colour in ((found.plain, "without weights", ORANGE), (found.weighted, "with weights", BLUE)):
        known = not math.isnan(run.errors[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            values = run.errors if known else (run.losses / run.losses[0]).max(axis=1)
        data.append(line(run.steps, numbers(values, positive=True), words, colour))
    layout = layout_of(
        "Does training with the suggested weights end better?",
        f"{found.measure.capitalize()}. The blue line must end below the orange one for the weights to be worth their "
        "place.",
        xaxis={"title": {"text": "steps of Adam"}},
        yaxis=log_axis(found.measure),
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def _weights(found: Balance) -> Figure:
    places = list(range(len(found.names)))
    parts = [("tr K / N", GREY, found.traces), ("suggested weight", BLUE, found.weights)]
    parts += [("weight after training", ORANGE, found.later)] if found.later else []
    data = []
    for k, (name, colour, values) in enumerate(parts):
        look = {"mode": "markers", "marker": {"size": 11, "color": colour}}
        at = [place + 0.12 * (k - 1) for place in places]
        data.append(line(at, numbers([values[term] for term in found.names]), name, colour, **look))
    layout = layout_of(
        "Kernel and weight of each term",
        "The smaller a term's kernel per residual (grey), the larger its weight (blue). Orange: what the trained "
        "network would be given; far from blue, weights must be renewed in training.",
        xaxis={"tickvals": places, "ticktext": found.names, "range": [-0.5, len(places) - 0.5], "showgrid": False},
        yaxis=log_axis("tr K / N; weight"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}
