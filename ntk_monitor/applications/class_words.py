"""What the study of classes says: its words, tables and figures."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.class_steps import Array, Classes, Step, doubt, within_and_between
from ntk_monitor.applications.heat import heat
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.figures.style import BLUE, DIVERGING, GREY, ORANGE, Figure, layout_of, line, log_axis, numbers

AGREES = 0.25
"""Relative error up to which the first order is said to foresee what a step does."""

NEGLIGIBLE = 0.05
"""Cosine of gradients below which, either way, classes are said to leave each other alone."""

_SHOWN = 12


def told(names: list[str], seen: Classes, step: Step, scan: Sequence[Step]) -> Report:
    """Return the report of one step on every class, and of the same step at other learning rates."""
    alive = seen.learning()
    pairs = _Pairs.of(seen, alive)
    last = reach(scan)
    a, b = pairs.worst
    return Report(
        name="class_interference",
        title="What does a step on one class do to the others?",
        summary=(
            f"{len(names)} classes, {len(seen.of)} samples, {seen.loss.name}. The classes that disagree most are "
            f"{names[a]} and {names[b]}: cosine of their gradients {pairs.cosines[a, b]:+.2f}. Of the "
            f"{pairs.count} pairs, {pairs.opposed} hurt each other beyond the noise of the sample. One step on each "
            f"class with learning rate {short(step.lr)} raised {_raised(step, alive)} of the other classes' losses."
        ),
        numbers=(
            _cosine("most opposed", pairs, pairs.worst, names),
            _cosine("most helpful", pairs, pairs.best, names),
            Number("learning rate", step.lr, "", note="of one step of plain SGD on the samples of one class"),
            Number("error of first order", step.error, "", note="of the changes between different classes, relative"),
            Number("error, network", step.error_of_network, "", note="part of it: outputs bend in the weights"),
            Number("error, loss", step.error_of_loss, "", note="part of it: losses bend in the outputs"),
            Number("first order holds up to", last, "", note=f"learning rate; within {AGREES:.0%}, of those tried"),
        ),
        verdicts=(_interfere(pairs, names), _foreseen(step, last), _elastic(seen, names)),
        tables={
            "pairs, most harmful first": _pair_table(names, pairs, step),
            "classes": _class_table(names, seen, step),
        },
        figures={
            "foreseen": _changes(names, step, alive, step.predicted, "foreseen by the kernel"),
            "actual": _changes(names, step, alive, step.actual, "after a real step"),
            "steps": _scan_figure(step, scan),
        },
        caveats=(
            "Plain SGD, one step on one class alone, in evaluation mode. A mini-batch holds many classes, and Adam "
            "scales parameters: what training does to a class is the sum over what it sees.",
            "The cosines belong to these samples and weights; intervals say what other samples would give. At random "
            "weights every class hurts every other: softmax takes from all others what it gives to one.",
            *(
                ["Left out of the pairs, for want of a gradient: " + ", ".join(np.array(names)[~alive].tolist())]
                if not alive.all()
                else []
            ),
        ),
    )


class _Pairs:
    """Cosines between the gradients of different classes, and how far other samples could move them."""

    def __init__(self, cosines: Array, margin: Array) -> None:
        self.cosines, self.margin = cosines, margin
        upper = np.triu_indices(len(cosines), 1)
        self.known = [(int(a), int(b)) for a, b in zip(*upper, strict=True) if np.isfinite(cosines[a, b])]
        order = sorted(self.known, key=lambda pair: cosines[pair])
        self.worst, self.best = (order[0], order[-1]) if order else ((0, 1), (0, 1))
        self.count = len(self.known)
        self.opposed = sum(cosines[pair] + margin[pair] < 0 for pair in self.known)

    @staticmethod
    def of(seen: Classes, alive: NDArray[np.bool_]) -> "_Pairs":
        """Return them with simultaneous 95 % margins (Bonferroni, Student's t with the smaller class's freedom)."""
        from scipy.stats import t

        length = np.sqrt(np.where(alive, np.diag(seen.inner), np.nan))
        size = np.bincount(seen.of)
        k = len(size)
        freedom = np.minimum(size[:, None], size[None, :]) - 1
        quantile = t.ppf(1 - 0.025 / (k * (k - 1) / 2), np.maximum(freedom, 1))
        scale = np.outer(length, length)
        return _Pairs(seen.inner / scale, quantile * doubt(seen.gram, seen.of) / scale)


def reach(scan: Sequence[Step]) -> float:
    """Return the largest learning rate, of ascending ones, up to which the first order foresees; 0 if none."""
    last = 0.0
    for step in scan:
        if not step.error <= AGREES:
            break
        last = step.lr
    return last


def _cosine(name: str, pairs: _Pairs, pair: tuple[int, int], names: list[str]) -> Number:
    value, margin = float(pairs.cosines[pair]), float(pairs.margin[pair])
    note = f"{names[pair[0]]} and {names[pair[1]]}; 95 % for all pairs at once"
    return Number(name, value, "", value - margin, value + margin, note)


def _raised(step: Step, alive: NDArray[np.bool_]) -> str:
    between = ~np.eye(len(step.actual), dtype=bool) & alive[:, None]
    return f"{int((step.actual[between] > 0).sum())} of {int(between.sum())}"


def _interfere(pairs: _Pairs, names: list[str]) -> Verdict:
    claim = "classes interfere: a step on one raises the loss of another"
    if not pairs.count:
        return Verdict(claim, None, "fewer than two classes have anything left to learn")
    cosine, margin = float(pairs.cosines[pairs.worst]), float(pairs.margin[pairs.worst])
    who = f"{names[pairs.worst[0]]} and {names[pairs.worst[1]]}"
    if pairs.opposed:
        many = f"{pairs.opposed} of {pairs.count} pairs have opposed gradients beyond the noise of the sample"
        return Verdict(claim, True, f"{many}, most of all {who}: cosine {cosine:+.2f}")
    if cosine > -NEGLIGIBLE:
        return Verdict(claim, False, f"no interference: the smallest cosine is {cosine:+.3f}, of {who}")
    more = f"{cosine:+.2f} ± {margin:.2f}" if math.isfinite(margin) else f"{cosine:+.2f}"
    return Verdict(claim, None, f"the smallest cosine, of {who}, is {more}: more samples would tell")


def _foreseen(step: Step, last: float) -> Verdict:
    claim = f"the first order foresees what a step with learning rate {short(step.lr)} does to the other classes"
    if math.isnan(step.error):
        return Verdict(claim, None, "the step changes no other class, so that there is nothing to foresee")
    parts = "the outputs bend in the weights" if step.error_of_network > step.error_of_loss else "the losses bend"
    why = "" if step.error <= AGREES else f", mostly because {parts}"
    limit = f"it holds up to {short(last)}" if last else "it holds at none of the rates tried"
    return Verdict(claim, bool(step.error <= AGREES), f"{100 * step.error:.1f} % off the real changes{why}; {limit}")


def _elastic(seen: Classes, names: list[str]) -> Verdict:
    claim = "samples of a class agree with one another more than with any other class (local elasticity)"
    within, nearest = within_and_between(seen.gram, seen.of)
    known = np.isfinite(within) & np.isfinite(nearest)
    if not known.any():
        return Verdict(claim, None, "no class has two samples with a gradient")
    gap = np.where(known, within - nearest, np.inf)
    a, held = int(gap.argmin()), int((gap[known] > 0).sum())
    evidence = f"for {held} of {int(known.sum())} classes; closest: {names[a]}, mean cosine {within[a]:+.2f} within"
    return Verdict(claim, held == int(known.sum()), f"{evidence} and {nearest[a]:+.2f} with its nearest class")


def _pair_table(names: list[str], pairs: _Pairs, step: Step) -> Table:
    columns = ("step on", "changes", "cosine", "±", "change foreseen", "actual change")
    both = [pair for a, b in pairs.known for pair in ((a, b), (b, a))]
    rows = sorted(both, key=lambda pair: -float(step.predicted[pair]))[:_SHOWN]
    cells = (pairs.cosines, pairs.margin, step.predicted, step.actual)
    return Table(columns, tuple((names[a], names[b], *(float(c[a, b]) for c in cells)) for a, b in rows))


def _class_table(names: list[str], seen: Classes, step: Step) -> Table:
    columns = ("class", "samples", "loss", "own change foreseen", "actual own change")
    counts = np.bincount(seen.of).tolist()
    own = zip(seen.losses().tolist(), np.diag(step.predicted).tolist(), np.diag(step.actual).tolist(), strict=True)
    return Table(columns, tuple((name, n, *row) for name, n, row in zip(names, counts, own, strict=True)))


def _changes(names: list[str], step: Step, alive: NDArray[np.bool_], changes: Array, when: str) -> Figure:
    own = np.where(alive, -np.diag(step.predicted), np.nan)
    return heat(
        names,
        changes / own[:, None],
        f"One step on a class, {when}",
        "change of loss / gain of the class itself",
        (-1.0, 1.0, DIVERGING),
        "Red: a step on the class of this row raises the loss of the class of this column; blue: it lowers it, as "
        "much as its own at -1. In units of what the kernel promises the class itself.",
        axes=("class whose loss changes", "class that the step is taken on"),
    )


def _width(name: str, colour: str) -> Figure:
    # The loss's part often is nearly all of it; a broad line stays visible behind the other.
    return {"color": colour, "width": 6 if name == "part of the loss" else 2}


def _scan_figure(step: Step, scan: Sequence[Step]) -> Figure:
    rates = numbers([one.lr for one in scan])
    kinds: Mapping[str, tuple[str, list[float]]] = {
        "part of the loss": (GREY, [one.error_of_loss for one in scan]),
        "part of the network": (ORANGE, [one.error_of_network for one in scan]),
        "error of first order": (BLUE, [one.error for one in scan]),
    }
    data = [
        line(rates, numbers(errors, positive=True), name, colour, mode="lines+markers", line=_width(name, colour))
        for name, (colour, errors) in kinds.items()
    ]
    ends = [rates[0], rates[-1]]
    dashed = {"color": GREY, "dash": "dash", "width": 1}
    data.append(line(ends, [AGREES] * 2, f"{AGREES:.0%}: limit of the verdict", GREY, line=dashed))
    here = {"mode": "markers", "marker": {"color": BLUE, "size": 13}, "showlegend": False}
    data.append(line([step.lr], numbers([step.error], positive=True), "this step", BLUE, **here))
    layout = layout_of(
        "How large may a step be?",
        "Relative error of the first-order change between different classes against the learning rate; the large dot "
        "is the step of the other figures. Right of where the blue line crosses the dashed one, ask a real step.",
        xaxis=log_axis("learning rate"),
        yaxis=log_axis("error of the change, relative"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}
