"""What the study of normalisation says: its words, tables and figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ntk_monitor.applications.module_names import axis_names
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.figures.style import BLUE, GREY, MODE_COLOURS, ORANGE, Figure, layout_of, line, log_axis, numbers

if TYPE_CHECKING:
    from ntk_monitor.applications.batch_coupling import Coupling
    from ntk_monitor.applications.norm_layers import Norm
    from ntk_monitor.applications.norm_projection import Projection
    from ntk_monitor.applications.norm_scale import ScaleTest

DEAD = 1e-10
"""Share of a layer's trace up to which a bias is dead: rounding of float64 backward passes."""

FORMULA = 1e-6
"""Departure from the formula up to which a layer is the projection that it says."""

CLOSE = 0.05
"""Relative difference up to which two kernels of BatchNorm are called the same."""

_NINE = "9 tr K(3w) / tr K(w)"

SPREAD = 2.0
"""Factor between effective learning rates up to which they are called one."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Effective learning rates of tested layers, in their order.

    Attributes:
        values: lr/|w|² or lr/|w|.
        lr: of the optimizer.
        optimizer: "sgd", "adam" or "adamw".
        equilibrium: relative step of equilibrium, or None without weight decay.
    """

    values: Sequence[float]
    lr: float
    optimizer: str
    equilibrium: float | None


def told(
    norms: Sequence["Norm"],
    tests: Sequence["ScaleTest"],
    projections: Mapping[tuple["Norm", bool], "Projection"],
    coupling: "Coupling | None",
    rates: Rates,
    notes: tuple[str, ...],
) -> Report:
    """Return the report of a network's normalisation layers."""
    kinds = dict.fromkeys(norm.kind for norm in norms)
    free = [test for test in tests if test.scale_free]
    removed = sum(one.removed for one in projections.values())
    return Report(
        name="normalization",
        title=f"What do normalisation layers do to the kernel? {len(norms)} of them ({', '.join(kinds)})",
        summary=(
            (
                f"Of {len(tests)} test(s) of weights in front of a layer, {len(free)} find them scale-free"
                if tests
                else "No single linear operation feeds a layer, so that no weights can be scale-free on their own"
            )
            + (", so that their learning rate acts as " + _law(rates.optimizer) if free else "")
            + f". The {len(projections)} projection(s) looked at remove {removed} directions."
            + _coupled(coupling)
        ),
        numbers=tuple(_numbers(tests, projections, coupling, rates)),
        verdicts=tuple(_verdicts(tests, projections, coupling, rates)),
        tables=_tables(tests, projections, coupling, rates),
        figures=_figures(tests, projections, coupling),
        caveats=(
            *notes,
            "Weights are scaled together with their bias. ε leaves scale-free weights slightly less than free.",
            "Spectra are of some groups and samples only, and of all trainable parameters but the layer's own.",
        ),
    )


def _law(optimizer: str) -> str:
    return "lr/|w|²" if optimizer == "sgd" else "lr/|w|"


def _coupled(coupling: "Coupling | None") -> str:
    if coupling is None:
        return ""
    return (
        f" BatchNorm: the largest eigenvalue of evaluation is {coupling.top_ratio:.3g} times that which a training "
        f"step feels, and a sample's kernel changes by {100 * coupling.company:.3g} % with its company."
    )


def _numbers(
    tests: Sequence["ScaleTest"],
    projections: Mapping[tuple["Norm", bool], "Projection"],
    coupling: "Coupling | None",
    rates: Rates,
) -> Iterator[Number]:
    if projections:
        kept = [one.kept for one in projections.values()]
        yield Number("smallest share kept", min(kept), note="of the kernel's trace, by a layer's projection alone")
    if free := [rate for test, rate in zip(tests, rates.values, strict=True) if test.scale_free]:
        yield Number("smallest effective rate", min(free), note=f"{_law(rates.optimizer)}, scale-free weights only")
        yield Number("largest effective rate", max(free), note=_law(rates.optimizer))
    if rates.equilibrium is not None:
        yield Number("step of equilibrium", rates.equilibrium, "of |w|", note="√(2 lr wd), scale-free weights only")
    if coupling is not None:
        yield Number("evaluation against training", coupling.evaluation_gap, note="‖K_eval - K_batch‖ / ‖K_batch‖")
        yield Number("largest eigenvalue", coupling.top_ratio, "times", note="of evaluation over training")
        yield Number("company", coupling.company, note="change of half a batch's kernel when the other half joins it")
        yield Number("statistics' gradient", coupling.statistics_gap, note="‖K_frozen - K_batch‖ / ‖K_batch‖")


def _verdicts(
    tests: Sequence["ScaleTest"],
    projections: Mapping[tuple["Norm", bool], "Projection"],
    coupling: "Coupling | None",
    rates: Rates,
) -> Iterator[Verdict]:
    for mode, where in (("eval", "in evaluation"), ("train", "with the statistics of the batch")):
        chosen = [test for test in tests if test.mode == mode]
        if chosen or mode == "eval":
            yield _scale_free(chosen, where)
            yield _dead(chosen, where)
    if projections:
        worst, rises = max(one.error for one in projections.values()), [one.risen for one in projections.values()]
        yield Verdict(
            "behind each layer the kernel is A K Aᵀ, A = (γ/σ)(I - 11ᵀ/P - u uᵀ/P)",
            worst < FORMULA,
            f"largest departure {worst:.2g}, relative",
        )
        yield Verdict(
            "a normalisation only removes directions: no eigenvalue rises behind it",
            not any(rises),
            f"{sum(1 for count in rises if count)} of {len(rises)} raise some, since they divide by σ",
        )
    yield _one_rate(tests, rates)
    if coupling is not None:
        yield from _batch(coupling)


def _scale_free(tests: Sequence["ScaleTest"], where: str) -> Verdict:
    bound = [test.norm.name for test in tests if not test.scale_free]
    worst = max((test.error for test in tests), default=math.nan)
    evidence = f"{len(tests) - len(bound)} of {len(tests)} are; largest |9 K(3w) - K(w)| is {worst:.2g} of K(w)"
    return Verdict(
        f"weights in front of a normalisation are scale-free {where}: K(3w) = K(w)/9",
        not bound if tests else None,
        evidence + (f"; not {', '.join(bound[:4])}" if bound else "") if tests else "no single layer feeds one",
    )


def _dead(tests: Sequence["ScaleTest"], where: str) -> Verdict:
    biased = [test for test in tests if test.norm.direct and test.norm.biases]
    alive = [test.norm.name for test in biased if test.dead > DEAD]
    evidence = f"{len(biased) - len(alive)} of {len(biased)} have a kernel of zero"
    return Verdict(
        f"biases in front of a normalisation are dead {where}",
        not alive if biased else None,
        evidence + (f"; not {', '.join(alive[:4])}" if alive else "") if biased else "there are none",
    )


def _one_rate(tests: Sequence["ScaleTest"], rates: Rates) -> Verdict:
    claim = "one learning rate is one effective learning rate for all scale-free weights"
    free = {test.norm.name: rate for test, rate in zip(tests, rates.values, strict=True) if test.scale_free}
    if len(free) < 2:
        return Verdict(claim, None, f"{len(free)} layer(s) with scale-free weights")
    factor = max(free.values()) / min(free.values())
    return Verdict(
        claim,
        factor <= SPREAD,
        f"they differ by a factor of {factor:.3g}, up to {SPREAD:g} wanted; {_law(rates.optimizer)}",
    )


def _batch(coupling: "Coupling") -> Iterator[Verdict]:
    for claim, gap in (
        ("the kernel of evaluation is the one that a training step feels", coupling.evaluation_gap),
        (
            "the kernel of evaluation with the batch's own statistics is the one that a training step feels",
            coupling.statistics_gap,
        ),
        ("a sample's kernel in training does not depend on the others in its batch", coupling.company),
    ):
        yield Verdict(claim, gap <= CLOSE, f"they differ by {100 * gap:.3g} %, {100 * CLOSE:g} % wanted at most")


def _tables(
    tests: Sequence["ScaleTest"],
    projections: Mapping[tuple["Norm", bool], "Projection"],
    coupling: "Coupling | None",
    rates: Rates,
) -> dict[str, Table]:
    found: dict[str, Table] = {}
    if tests:
        columns = (
            "weights in front of",
            "kind",
            "mode",
            "|w|",
            _law(rates.optimizer),
            "K(3w)/K(w)",
            "scale-free",
            "bias",
        )
        rows = (
            (
                *(test.norm.name, test.norm.kind, test.mode, test.length, rate, test.ratio),
                "yes" if test.scale_free else "no",
                "-" if math.isnan(test.dead) else "dead" if test.dead <= DEAD else f"{short(100 * test.dead)} % of K",
            )
            for test, rate in zip(tests, rates.values, strict=True)
        )
        found["Weights that feed a layer"] = Table(columns, tuple(rows))
    if projections:
        columns = ("layer", "mode", "group", "removed", "trace kept", "λ₁ before", "λ₁ projected", "λ₁ behind")
        found["Kernels of a layer's input and output"] = Table(
            columns,
            tuple(
                (
                    norm.name,
                    "train" if batch else "eval",
                    one.group,
                    f"{one.removed} of {len(one.before)}",
                    one.kept,
                    *one.top,
                )
                for (norm, batch), one in projections.items()
            ),
        )
    if coupling is not None:
        kernels = {"evaluation": coupling.evaluation, "batch": coupling.batch, "batch, held fixed": coupling.frozen}
        found["BatchNorm"] = Table(
            ("statistics", "trace", "λ₁", "difference from training"),
            tuple(
                (name, float(np.trace(k)), float(np.linalg.eigvalsh(k)[-1]), _difference(k, coupling.batch))
                for name, k in kernels.items()
            ),
        )
    return found


def _difference(one: "np.ndarray", other: "np.ndarray") -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _figures(
    tests: Sequence["ScaleTest"],
    projections: Mapping[tuple["Norm", bool], "Projection"],
    coupling: "Coupling | None",
) -> dict[str, Figure]:
    found = {}
    if projections:
        found["projection"] = projection_figure(projections)
    if tests:
        found["scale"] = scale_figure(tests)
    if coupling is not None:
        found["batch"] = batch_figure(coupling)
    return found


def projection_figure(projections: Mapping[tuple["Norm", bool], "Projection"]) -> Figure:
    """Return the spectra before (lines) and behind (dashes) of the layers, and of the projection alone (dots)."""
    data: list[Figure] = []
    short_names = [name.replace("<br>", ".") for name in axis_names([norm.name for norm, _ in projections])]
    for k, ((_, batch), one) in enumerate(projections.items()):
        colour, name = MODE_COLOURS[k % len(MODE_COLOURS)], f"{short_names[k]}{', training' if batch else ''}"
        for kernel, dash in ((one.before, "solid"), (one.projected, "dot"), (one.after, "dash")):
            values = np.linalg.eigvalsh(kernel)[::-1]
            shown = numbers(np.where(values > 1e-6 * one.top[0], values, np.nan), positive=True)
            look = {"line": {"color": colour, "dash": dash, "width": 1.5 if dash == "dot" else 2}}
            at = list(range(1, len(values) + 1))
            data.append(line(at, shown, name, colour, showlegend=dash == "solid", **look))
    layout = layout_of(
        "Spectra before and behind normalisation layers",
        "Solid: kernel of a layer's input. Dotted: with the layer's directions projected out, never above solid. "
        "Dashed: behind the layer; above solid where 1/σ raises eigenvalues again.",
        xaxis=log_axis("eigenvalue, from the largest"),
        yaxis=log_axis("eigenvalue"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def scale_figure(tests: Sequence["ScaleTest"]) -> Figure:
    """Return 9 tr K(3w) / tr K(w) of every test: 1 where weights are scale-free."""
    at = list(range(len(tests)))
    data = [
        line([-0.5, len(at) - 0.5], [1.0, 1.0], "scale-free", GREY, line={"color": GREY, "dash": "dash", "width": 1.5})
    ]
    for mode, name, colour in (("eval", "evaluation", BLUE), ("train", "statistics of the batch", ORANGE)):
        chosen = [k for k in at if tests[k].mode == mode]
        if chosen:
            dots: Figure = {"mode": "markers", "marker": {"size": 10, "color": colour}}
            data.append(
                line(chosen, numbers([9 * tests[k].ratio for k in chosen], positive=True), name, colour, **dots)
            )
    # Powers behind the weights may make the largest ratio too large for an axis that shows 1.
    top = max(1.0, *(9 * test.ratio for test in tests))
    axis = log_axis(_NINE) if top > 20 else {"title": {"text": _NINE}, "range": [0, 1.1 * top]}
    layout = layout_of(
        f"Weights three times as long: {_NINE}",
        "On the dashed line weights are scale-free: their kernel falls as 1/|w|², and so does the learning rate that "
        "acts on them. Off it their length means something.",
        xaxis={
            "tickvals": at,
            "ticktext": axis_names([test.norm.name for test in tests]),
            "range": [-0.5, len(at) - 0.5],
            "showgrid": False,
        },
        yaxis=axis,
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def batch_figure(coupling: "Coupling") -> Figure:
    """Return the spectra of the three kernels of BatchNorm."""
    kernels = (
        ("evaluation: running statistics", coupling.evaluation, BLUE),
        ("batch statistics, held fixed", coupling.frozen, MODE_COLOURS[2]),
        ("training: batch statistics", coupling.batch, ORANGE),
    )
    at = list(range(1, len(coupling.batch) + 1))
    dots: Figure = {"mode": "lines+markers"}
    data = [
        line(at, numbers(np.linalg.eigvalsh(kernel)[::-1], positive=True), name, colour, **dots)
        for name, kernel, colour in kernels
    ]
    layout = layout_of(
        "BatchNorm: the kernel of evaluation and that of training",
        "A training step feels the orange spectrum; a learning rate chosen by the blue one suits another network. "
        "Green to orange: the gradient through the statistics.",
        xaxis={"title": {"text": "eigenvalue, from the largest"}},
        yaxis=log_axis("eigenvalue"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}
