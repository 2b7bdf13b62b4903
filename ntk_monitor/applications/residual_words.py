"""What the study of skip connections says: its words, tables and figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ntk_monitor.applications.module_names import axis_names
from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.figures.style import BLUE, GREY, MODE_COLOURS, ORANGE, Figure, layout_of, line, log_axis, numbers

if TYPE_CHECKING:
    from ntk_monitor.applications.residual import Decomposition, Level
    from ntk_monitor.applications.skips import Skip

SUM = 1e-8
"""Cross term relative to K up to which the kernel is a sum: rounding of float64 backward passes."""

STEADY = 4.0
"""Factor by which the largest eigenvalue may grow from half of the connections to all: as depth squared, no faster."""


def told(
    together: "Decomposition",
    single: Mapping["Skip", "Decomposition"],
    scan: Mapping[str, Sequence["Level"]],
    count: int,
) -> Report:
    """Return the report of a network's residual connections, cut together and one by one, and of its depth."""
    parts = [float(np.trace(part)) for part in (together.full, together.skip, together.branch, together.cross)]
    growth = _growth(scan["as built"])
    return Report(
        name="residual",
        title="What do skip connections do to the kernel?",
        summary=(
            f"{count} residual connection(s). The network without branches has {_share(parts[1], parts[0])} of "
            f"the kernel's trace, the network without skips {_share(parts[2], parts[0])}; what is left for the cross "
            f"term is {_share(parts[3], parts[0])}. {together.fallen} of {len(together.full)} eigenvalues lie "
            f"below what one of the two networks has alone."
        ),
        numbers=(
            Number("cross term", together.cross_ratio, note="‖K - K_skip - K_branch‖ / ‖K‖; 0: the kernel is a sum"),
            Number("smallest gap", together.worst, note="λᵢ(K) over its floor, in λ₁ of K_branch; negative: it fell"),
            Number("eigenvalues below the floor", float(together.fallen), f"of {len(together.full)}"),
            Number("rank of K_skip", float(together.skip_rank), note="no more eigenvalues can be lifted by it"),
            Number("growth over the second half", growth, "times", note="of λ₁, all connections against half of them"),
        ),
        verdicts=_verdicts(together, single, scan),
        tables=_tables(single, scan),
        figures=_figures(together, single, scan),
        caveats=(
            "K_skip and K_branch belong to networks cut at these weights: neither has been trained like that.",
            "The identity has no parameters, so no kernel: K_skip is the kernel of what lies before and behind it.",
            "Where a normalisation follows, cutting a way changes what it divides by, and that may raise kernels.",
            *(("Connections beyond the twelve shown are cut together with them only.",) if count > 12 else ()),
        ),
    )


def _verdicts(
    together: "Decomposition", single: Mapping["Skip", "Decomposition"], scan: Mapping[str, Sequence["Level"]]
) -> tuple[Verdict, ...]:
    cross, last, plain = together.cross_ratio, scan["as built"][-1], scan["no skips"][-1]
    growth, scaled = _growth(scan["as built"]), _growth(scan["branches / √l"])
    comparable = not (last.is_bound or plain.is_bound) and bool(
        np.isfinite([last.condition_log10, plain.condition_log10]).all()
    )
    return (
        Verdict(
            "the kernel is the sum of the kernel without branches and the kernel without skips",
            None if np.isnan(cross) else bool(cross <= SUM),
            f"the cross term is {100 * cross:.3g} % of K",
        ),
        _never_lower(together, single),
        Verdict(
            "the kernel is never below that of the branches' own parameters",
            together.floor_holds,
            "kernels of disjoint parameters add, so that this is true of every network",
        ),
        Verdict(
            "the network is better conditioned than without its skips",
            bool(last.condition_log10 < plain.condition_log10) if comparable else None,
            f"condition number 10^{last.condition_log10:.2f} against 10^{plain.condition_log10:.2f}"
            if comparable
            else "a condition number is known as a lower bound only: a kernel is rank-deficient",
        ),
        Verdict(
            "the largest eigenvalue, and so the stable learning rate, does not explode with the number of branches",
            None if np.isnan(growth) else bool(growth <= STEADY),
            "fewer than two connections"
            if np.isnan(growth)
            else f"{growth:.3g} times from half of them to all, {STEADY:.3g} wanted at most; {scaled:.3g} times if "
            "branches were divided by √l",
        ),
    )


def _never_lower(together: "Decomposition", single: Mapping["Skip", "Decomposition"]) -> Verdict:
    evidence = f"{together.fallen} of {len(together.full)} eigenvalues lie below their floor"
    lower = [(one.worst, skip.name) for skip, one in single.items() if not one.lifted]
    if single:
        evidence = f"all cut at once, {evidence}; cut alone, {len(lower)} of {len(single)} connections lower some"
    if lower:
        worst, name = min(lower)
        evidence += f", {name} by {-worst:.3g} of the largest eigenvalue without it"
    elif not together.lifted:
        evidence += f", the worst by {-together.worst:.3g} of the largest eigenvalue without skips"
    return Verdict("skip connections never lower an eigenvalue", together.lifted and not lower, evidence)


def _growth(levels: Sequence["Level"]) -> float:
    """Return λ₁ with all connections over λ₁ with about half of them; NaN where there is no half."""
    total = levels[-1].branches
    half = min(levels, key=lambda level: abs(level.branches - total / 2))
    if not 0 < half.branches < total or not half.lambda_max > 0:
        return float("nan")
    return levels[-1].lambda_max / half.lambda_max


def _share(part: float, whole: float) -> str:
    if not whole > 0:
        return "nothing"
    return f"{100 * part / whole:.0f} %" if abs(part) <= 2 * whole else f"{part / whole:.3g} times as much"


def _tables(single: Mapping["Skip", "Decomposition"], scan: Mapping[str, Sequence["Level"]]) -> dict[str, Table]:
    columns = ("connection", "skip", "cross term", "smallest gap", "eigenvalues that fell")
    rows = tuple(
        (skip.name, "identity" if skip.identity else "projection", one.cross_ratio, one.worst, one.fallen)
        for skip, one in single.items()
    )
    depth = tuple(
        (name, level.branches, level.mean_diagonal, level.lambda_max, _condition(level))
        for name, levels in scan.items()
        for level in levels
    )
    words = ("network", "branches", "mean diagonal", "largest eigenvalue", "log10 condition")
    return ({"Connections cut one by one": Table(columns, rows)} if rows else {}) | {"Depth": Table(words, depth)}


def _condition(level: "Level") -> str:
    return f"{'≥ ' if level.is_bound else ''}{level.condition_log10:.2f}"


def _figures(
    together: "Decomposition", single: Mapping["Skip", "Decomposition"], scan: Mapping[str, Sequence["Level"]]
) -> dict[str, Figure]:
    return {"spectra": spectra(together), "depth": depth(scan), "connections": connections(together, single)}


def spectra(together: "Decomposition") -> Figure:
    """Return the eigenvalues of the kernel and of its two parts."""
    order = list(range(1, len(together.full) + 1))
    top = float(np.linalg.eigvalsh(together.full)[-1])

    def drawn(kernel: Any, name: str, colour: str, **look: Any) -> Figure:
        values = np.linalg.eigvalsh(kernel)[::-1]
        visible = np.where(values > 1e-12 * max(top, float(values[0])), values, np.nan)
        dots: Figure = {"mode": "lines+markers", "marker": {"size": 5, "color": colour}}
        return line(order, numbers(visible, positive=True), name, colour, **dots | look)

    data = [
        drawn(together.skip, "without branches", ORANGE),
        drawn(together.branch, "without skips", BLUE),
        drawn(together.full, "as it is", "#111111", line={"color": "#111111", "width": 2.5}),
    ]
    layout = layout_of(
        "Eigenvalues with and without skips",
        "If the kernel were a sum, the thick line would lie above both others everywhere. Where it dips below one, an "
        "eigenvalue fell: the cross term of skip and branch took it.",
        xaxis={"title": {"text": "eigenvalue, from the largest"}},
        yaxis=log_axis("eigenvalue"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def depth(scan: Mapping[str, Sequence["Level"]]) -> Figure:
    """Return the mean diagonal against the number of connections in place."""
    data = []
    for (name, levels), colour in zip(scan.items(), ("#111111", MODE_COLOURS[2], BLUE), strict=True):
        at, values = [level.branches for level in levels], [level.mean_diagonal for level in levels]
        look = {"mode": "lines+markers", "marker": {"size": 7, "color": colour}}
        data.append(line(at, numbers(values, positive=True), name, colour, **look))
    layout = layout_of(
        "Scale of the kernel over depth",
        "The first l connections in place, later branches removed. A line that climbs is learning-rate headroom that "
        "depth takes away; dividing branches by √l keeps it.",
        xaxis={"title": {"text": "residual connections in place"}},
        yaxis=log_axis("mean diagonal of K"),
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def connections(together: "Decomposition", single: Mapping["Skip", "Decomposition"]) -> Figure:
    """Return the cross term and the deepest fall of an eigenvalue, of all connections and of each alone."""
    shown = {"all": together} | {skip.name: one for skip, one in single.items()}
    at = list(range(len(shown)))
    cross = [100 * one.cross_ratio for one in shown.values()]
    fall = [100 * min(0.0, one.worst) for one in shown.values()]
    dots: Figure = {"mode": "markers", "marker": {"size": 10, "color": BLUE}}
    data: list[Figure] = [
        {"type": "bar", "x": at, "y": numbers(cross), "name": "cross term, % of K", "marker": {"color": ORANGE}},
        line(at, numbers(fall), "deepest fall, % of λ₁ without skip", BLUE, **dots),
        line([-0.6, len(at) - 0.4], [0.0, 0.0], "", GREY, line={"color": GREY, "width": 1}, showlegend=False),
    ]
    # NaN, of a zero kernel, has no place on an axis.
    low, high = float(np.nanmin([*fall, 0.0])), float(np.nanmax([*cross, 1.0]))
    room = 0.06 * (high - low)
    layout = layout_of(
        "Residual connections cut all at once, and one by one",
        "Bars: how far the kernel is from being the sum of its two parts. Dots: how far an eigenvalue lies below what "
        "one of the parts has alone; at 0 none does, and the lift holds.",
        xaxis={
            "tickvals": at,
            "ticktext": ["all", *axis_names([skip.name for skip in single])],
            "range": [-0.6, len(at) - 0.4],
            "showgrid": False,
        },
        yaxis={"title": {"text": "per cent"}, "range": [low - room, high + room]},
        showlegend=True,
    )
    return {"data": data, "layout": layout}
