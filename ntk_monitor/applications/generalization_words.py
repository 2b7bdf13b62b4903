"""What the study of generalisation says: its words, table, verdicts and figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.applications.estimates import POINTS, TOLERANCE, Estimate, agrees, shares_agree, squares, wrong
from ntk_monitor.applications.problem import Problem
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.figures.style import BLUE, GREY, ORANGE, STEPS, Figure, layout_of, line, log_axis, numbers

Array = NDArray[np.float64]

_GREEN = "#2e9e55"
_LEGEND = {"x": 0.02, "y": 0.98, "xanchor": "left", "yanchor": "top", "font": {"size": 10}}


@dataclass(frozen=True, slots=True)
class Point:
    """One moment: what its kernel promises and keeps, and what the network does.

    Attributes:
        step: of training, or the place of a checkpoint.
        name: in words.
        estimate: of kernel regression with the kernel of that moment.
        train: (N, C) residuals y - f of the network on training samples.
        test: (M, C) on held-out samples.
    """

    step: int
    name: str
    estimate: Estimate
    train: Array
    test: Array


@dataclass(frozen=True, slots=True)
class Losses:
    """Errors of single samples at one moment: wrong classes (0 or 1) where there are classes, else squared errors."""

    name: str
    step: int
    promised: Array
    kept: Array
    train: Array
    test: Array

    @staticmethod
    def of(point: Point, task: Problem) -> "Losses":
        """Return them for one moment."""
        parts = (point.estimate.left, point.estimate.left_test, point.train, point.test)
        targets = (task.y, task.y_test, task.y, task.y_test)
        found = [wrong(r, y) if task.classes else squares(r) for r, y in zip(parts, targets, strict=True)]
        return Losses(point.name, point.step, *found)


def told(points: Sequence[Point], name: str, task: Problem, *, trained: bool) -> Report:
    """Return the report over moments of training, or over checkpoints."""
    first, last = points[0], points[-1]
    losses = [Losses.of(one, task) for one in points]
    verdicts = (_start(first), _kept(points, trained), *_network(losses, task.classes), _order(losses))
    ratio = agrees(last.estimate.promised, last.estimate.kept)[1]
    word = {True: "agrees", False: "does not agree", None: "cannot be told from noise"}[verdicts[0].holds]
    unit = "of samples wrong" if task.classes else "mean square"
    axis = "share of samples wrong" if task.classes else "mean square error"
    ends = float(losses[-1].test.mean())
    single = (Number("GCV at the start", first.estimate.gcv, "mean square"),) if task.y.shape[1] == 1 else ()
    return Report(
        name="generalization",
        title=f"Test error of {name}, told from training samples by its kernel",
        summary=(
            f"At {first.name} the kernel promises a mean square error of {short(first.estimate.loo)} by leave-one-out; "
            f"kernel regression keeps {short(first.estimate.error)} on {len(first.test)} held-out samples, which "
            f"{word}. At {last.name} the promise is {short(last.estimate.loo)}, {ratio:.2f} times what is kept. The "
            f"network itself ends with {f'{ends:.1%}' if task.classes else short(ends)} {unit} among held-out samples."
        ),
        numbers=(
            Number("promised at the start", first.estimate.loo, "mean square", *_interval(first.estimate.promised)),
            Number("kept at the start", first.estimate.error, "mean square", *_interval(first.estimate.kept)),
            Number("promised at the end", last.estimate.loo, "mean square", *_interval(last.estimate.promised)),
            Number("kept at the end", last.estimate.error, "mean square", *_interval(last.estimate.kept)),
            Number("held-out error of the network", ends, unit, *_interval(losses[-1].test), note="at the end"),
            Number("ridge at the start", first.estimate.ridge, "squared output units"),
            Number("error of the mean target", _of_mean(task), "mean square", note="held-out: what is worth nothing"),
            *single,
        ),
        verdicts=verdicts,
        tables={"Over training" if trained else "Over checkpoints": _table(points, losses, task)},
        figures={
            "errors": errors(losses, [one.estimate.gcv for one in points], axis, trained=trained),
            "agreement": agreement(losses, axis),
        },
        caveats=_caveats(task, trained),
    )


def _table(points: Sequence[Point], losses: Sequence[Losses], task: Problem) -> Table:
    """Return one row a moment: squared errors of the kernel's regression, and errors of the network."""
    word = "wrong" if task.classes else "error"
    columns = ["moment", "promised", "kept", "dof", f"held-out {word}, network", f"training {word}, network"]
    more = ["wrong, promised", "wrong, kept"] if task.classes else ["GCV"] if task.y.shape[1] == 1 else []
    rows = []
    for one, loss in zip(points, losses, strict=True):
        extra = [loss.promised.mean(), loss.kept.mean()] if task.classes else [one.estimate.gcv][: len(more)]
        cells = (one.estimate.loo, one.estimate.error, one.estimate.dof, loss.test.mean(), loss.train.mean(), *extra)
        rows.append((one.name, *map(float, cells)))
    return Table((*columns, *more), tuple(rows))


def _caveats(task: Problem, trained: bool) -> tuple[str, ...]:
    notes = ["Leave-one-out supposes that samples are independent of each other; the ridge is chosen by it as well."]
    if task.classes:
        notes.append("Class labels are regressed as one-hot targets; the network is judged by its wrong classes.")
    if task.y.shape[1] > 1:
        notes.append("GCV is left out: with several outputs it is 1 to 20 % too small.")
    notes.append(
        "A copy was trained on squared error by full batches, not with the run's own loss and optimizer."
        if trained
        else "Held-out samples are such only if the run of these checkpoints has not seen them: pass validation data."
    )
    return tuple(notes)


def _interval(squares: Array) -> tuple[float, float]:
    wide = 1.96 * float(squares.std(ddof=1)) / math.sqrt(len(squares)) if len(squares) > 1 else math.inf
    return float(squares.mean()) - wide, float(squares.mean()) + wide


def _of_mean(task: Problem) -> float:
    return float(((task.y_test - task.y.mean(axis=0)) ** 2).mean())


def _start(first: Point) -> Verdict:
    claim = "leave-one-out with the first kernel predicts the held-out error of kernel regression with it"
    return Verdict(claim, *_compared(first.estimate.promised, first.estimate.kept))


def _compared(promised: Array, kept: Array) -> tuple[bool | None, str]:
    holds, ratio, wide = agrees(promised, kept)
    words = (
        f"promised {short(float(promised.mean()))}, kept {short(float(kept.mean()))}: {ratio:.2f} times, 95 % interval "
        f"{ratio * math.exp(-wide):.2f} to {ratio * math.exp(wide):.2f}; {TOLERANCE:.0%} allowed"
    )
    return holds, words


def _kept(points: Sequence[Point], trained: bool) -> Verdict:
    """Return whether later kernels keep their promises as well as the first, on the same samples."""
    claim = f"the kernel of every later {'step' if trained else 'checkpoint'} keeps its promise as well as the first"
    seen = [agrees(one.estimate.promised, one.estimate.kept) for one in points]
    # All moments share their samples, so that the luck of the split divides out.
    later = [(one.name, ratio / seen[0][1]) for one, (_, ratio, _) in zip(points[1:], seen[1:], strict=True)]
    if not later:
        return Verdict(claim, None, "there is none")
    wrong_ = [(name, ratio) for name, ratio in later if ratio < 1 / (1 + TOLERANCE)]
    evidence = f"promised over kept, relative to the first: {min(r for _, r in later):.2f} at least"
    if wrong_:
        evidence += (
            f"; below {1 / (1 + TOLERANCE):g} first at {wrong_[0][0]}: the kernel was fitted to the same targets"
        )
        return Verdict(claim, False, evidence)
    noisy = seen[-1][2] > 2 * math.log1p(TOLERANCE)
    return Verdict(claim, None if noisy else True, evidence + ("; too few samples to be sure" if noisy else ""))


def _network(losses: Sequence[Losses], classes: bool) -> tuple[Verdict, ...]:
    """Return whether the first promise is what the network comes to: at its best moment, and at the end."""
    best = min(losses, key=lambda one: float(one.test.mean()))
    what = "share of held-out samples that the network gets wrong" if classes else "held-out error of the network"
    compared = _shares if classes else _compared
    return tuple(
        Verdict(
            f"leave-one-out with the first kernel predicts the {what}, {words}", *compared(losses[0].promised, one.test)
        )
        for one, words in ((best, f"at its best, {best.name}"), (losses[-1], "at the end"))
    )


def _shares(promised: Array, kept: Array) -> tuple[bool | None, str]:
    holds, off, wide = shares_agree(promised, kept)
    words = (
        f"promised {promised.mean():.1%}, found {kept.mean():.1%}: difference {100 * off:+.1f} ± {100 * wide:.1f} "
        f"points, {100 * POINTS:.0f} allowed"
    )
    return holds, words


def _order(losses: Sequence[Losses]) -> Verdict:
    claim = "moments with a smaller promise are moments with a smaller held-out error of the network"
    promised = np.array([one.promised.mean() for one in losses])
    network = np.array([one.test.mean() for one in losses])
    if len(losses) < 5 or np.ptp(promised) <= 0.02 * promised.max() or np.ptp(network) <= 0.02 * network.max():
        return Verdict(claim, None, f"{len(losses)} moments, among which too little differs")
    rank = rank_correlation(promised, network)
    best = int(promised.argmin())
    evidence = (
        f"rank correlation {rank:.2f}, 0.7 wanted; the smallest promise is at {losses[best].name}, where the network "
        f"has {short(float(network[best]))}, its smallest error is {short(float(network.min()))}"
    )
    return Verdict(claim, rank >= 0.7, evidence)


def rank_correlation(a: Array, b: Array) -> float:
    """Return Spearman's correlation, equal values in the order they stand in; NaN for fewer than two."""
    if len(a) < 2:
        return math.nan
    ranks = [np.argsort(np.argsort(one, kind="stable"), kind="stable").astype(float) for one in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def errors(losses: Sequence[Losses], gcv: Sequence[float], unit: str, *, trained: bool) -> Figure:
    """Return promise, what is kept, and the network's errors over training or checkpoints."""
    # A logarithmic axis has no 0: the start stands at half a step.
    x = [max(one.step, 0.5) if trained else one.step for one in losses]
    series = [
        ("promised: leave-one-out", ORANGE, "solid", [one.promised.mean() for one in losses]),
        ("kept: kernel regression, held-out", BLUE, "solid", [one.kept.mean() for one in losses]),
        ("network, held-out", _GREEN, "solid", [one.test.mean() for one in losses]),
        ("network, samples of leave-one-out", GREY, "dash", [one.train.mean() for one in losses]),
    ]
    if np.isfinite(gcv).all():
        series.insert(1, ("promised: GCV", ORANGE, "dot", list(gcv)))
    data = []
    for name, colour, dash, values in series:
        look = {"mode": "lines+markers", "marker": {"size": 6}, "line": {"color": colour, "dash": dash}}
        hover = {"hovertemplate": "%{text}: %{y:.4g}<extra>%{fullData.name}</extra>"}
        data.append(line(x, numbers(values), name, colour, text=[one.name for one in losses], **look, **hover))
    shown = [one.name if len(one.name) <= 14 else f"…{one.name[-13:]}" for one in losses]
    axis = {"tickvals": x, "ticktext": shown, "title": {"text": "checkpoint"}, "showgrid": False}
    top = max(max(values) for *_, values in series)
    layout = layout_of(
        "Errors promised and kept",
        "Orange: what the kernel of a moment promises for new samples, from training samples alone. Blue: what "
        "regression with it keeps. Where orange falls below blue the kernel has been fitted to its targets.",
        xaxis=log_axis(f"{STEPS} (start at 0.5)", exponentformat="none") if trained else axis,
        yaxis={"title": {"text": unit}, "range": [0, 1.45 * top]},
        showlegend=True,
        legend=_LEGEND,
    )
    return {"data": data, "layout": layout}


def agreement(losses: Sequence[Losses], unit: str) -> Figure:
    """Return held-out against promised errors, one point a moment, for kernel regression and for the network."""
    promised = [float(one.promised.mean()) for one in losses]
    sets = (
        ("kernel regression", BLUE, [float(one.kept.mean()) for one in losses]),
        ("network", _GREEN, [float(one.test.mean()) for one in losses]),
    )
    top = 1.05 * max(*promised, *sets[0][2], *sets[1][2])
    ends, grey = numbers([0, top]), {"color": GREY, "dash": "dash", "width": 1}
    data = [line(ends, ends, "kept as promised", GREY, line=grey, hoverinfo="skip")]
    for name, colour, values in sets:
        look = {
            "mode": "lines+markers",
            "marker": {"size": 7, "color": colour},
            "line": {"color": colour, "width": 0.7},
        }
        hover = {"hovertemplate": "%{text}: promised %{x:.4g}, held-out %{y:.4g}<extra>%{fullData.name}</extra>"}
        text = [one.name for one in losses]
        data.append(line(numbers(promised), numbers(values), name, colour, text=text, **look, **hover))
    layout = layout_of(
        "Held-out error against the promise",
        "On the dashed line cross-validation tells the truth. Above it, new samples are predicted worse than promised. "
        "Lines join moments in their order.",
        xaxis={"title": {"text": f"promised by leave-one-out, {unit}"}, "range": ends, "tickformat": "~g"},
        yaxis={"title": {"text": f"held-out, {unit}"}, "range": ends},
        showlegend=True,
        legend=_LEGEND,
    )
    return {"data": data, "layout": layout}
