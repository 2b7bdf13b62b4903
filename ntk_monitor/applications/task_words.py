"""What the study of tasks says: its words, tables and figures."""

from collections.abc import Mapping

import numpy as np

from ntk_monitor.applications.heat import heat
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.applications.tasks import Array, Forgetting, Tasks
from ntk_monitor.figures.style import BLUE, DIVERGING, GREY, VIRIDIS, Figure, layout_of, line, numbers

AGREES = 0.25
"""Relative error of the predicted change of outputs up to which the kernel is said to predict it."""


def told(seen: Tasks, after: Forgetting, steps: int) -> Report:
    """Return the report of tasks and of training on one of them."""
    overlaps, cosines, names = seen.overlaps(), seen.cosines(), seen.names
    upper = np.triu_indices(len(names), 1)
    worst = int(cosines[upper].argmin())
    a, b = names[upper[0][worst]], names[upper[1][worst]]
    error = after.error
    low, high = seen.trace_range()
    large = overlaps[upper] >= np.median(overlaps[upper])
    harmful = int((cosines[upper][large] < 0).sum())
    others = [k for k in range(len(names)) if k != after.task]
    return Report(
        name="task_overlap",
        title="Which tasks share directions of learning, and which hurt each other?",
        summary=(
            f"{len(names)} tasks, {len(seen.f)} samples. Overlap of the kernels runs from {overlaps[upper].min():.2f} "
            f"to {overlaps[upper].max():.2f}. The pair that disagrees most is {a} and {b}: cosine of their loss "
            f"gradients {cosines[upper][worst]:+.2f}. {steps} steps on {names[after.task]} alone raise the loss of "
            f"{int((after.losses[2] > after.losses[0])[others].sum())} of the {len(others)} other tasks."
        ),
        numbers=(
            Number("largest overlap", float(overlaps[upper].max()), note="0: orthogonal gradients, 1: the same task"),
            Number("smallest cosine", float(cosines[upper].min()), note="of loss gradients; negative: they hurt"),
            Number("largest cosine", float(cosines[upper].max())),
            Number("error of prediction", error, note=f"of the change of all outputs after {steps} steps, relative"),
        ),
        verdicts=(
            Verdict(
                "a large overlap means that tasks help each other",
                harmful == 0,
                f"{harmful} of the {int(large.sum())} pairs with the larger overlaps have opposed gradients",
            ),
            Verdict(
                "the kernel predicts what training on one task does to the others",
                None if np.isnan(error) else bool(error <= AGREES),
                "the outputs do not move"
                if np.isnan(error)
                else f"predicted outputs are {100 * error:.1f} % off the change that a copy of the network took"
                if np.isfinite(error)
                else "a copy of the network diverged at a learning rate that is stable for the kernel",
            ),
            Verdict(
                "Tr(K_A K_B) measures interference between tasks with different samples",
                bool(high - low <= 1e-6 * abs(high)),
                f"for {names[0]} and {names[1]} the order of the samples moves it from {short(low)} to {short(high)}",
            ),
        ),
        tables={"pairs": _pair_table(seen, overlaps, cosines), "after training": _loss_table(names, after, steps)},
        figures=_figures(names, overlaps, cosines, after, seen),
        caveats=(
            "Signed interference is of first order: one small step of plain SGD at these weights.",
            "Predicted forgetting keeps the kernel as it is now; the further the weights move, the less it holds.",
        ),
    )


def _pair_table(seen: Tasks, overlaps: Array, cosines: Array) -> Table:
    columns = ("tasks", "overlap", "smallest angle, degrees", "median angle, degrees", "cosine of loss gradients")
    rows = []
    for a in range(len(seen.names)):
        for b in range(a + 1, len(seen.names)):
            angles = np.degrees(seen.between(a, b).angles)
            pair = f"{seen.names[a]} | {seen.names[b]}"
            row = (float(overlaps[a, b]), float(angles.min()), float(np.median(angles)), float(cosines[a, b]))
            rows.append((pair, *row))
    return Table(columns, tuple(sorted(rows, key=lambda row: row[-1])[:20]))


def _loss_table(names: list[str], after: Forgetting, steps: int) -> Table:
    columns = ("task", "loss before", "loss predicted", f"loss after {steps} steps on {names[after.task]}")
    return Table(columns, tuple((name, *map(float, row)) for name, row in zip(names, after.losses.T, strict=True)))


def _figures(names: list[str], overlaps: Array, cosines: Array, after: Forgetting, seen: Tasks) -> Mapping[str, Figure]:
    return {
        "overlap": heat(
            names, overlaps, "Overlap of tasks", "normalised overlap", (0.0, 1.0, VIRIDIS),
            "||K_AB||² / (||K_AA|| ||K_BB||): how much of the parameter space two tasks share. Bright: a step on one "
            "moves the outputs of the other, for better or worse.",
        ),
        "interference": heat(
            names, cosines, "Do tasks help or hurt each other?", "cosine of loss gradients", (-1.0, 1.0, DIVERGING),
            "g_A' K_AB g_B, normalised: red, a step on one task lowers the loss of the other; blue, it raises it.",
        ),
        "forgetting": _scatter(names, after, seen),
    }  # fmt: skip


def _scatter(names: list[str], after: Forgetting, seen: Tasks) -> Figure:
    c = len(after.actual) // len(seen.f)
    span = seen.spans[after.task]
    inside = np.zeros(len(after.actual), dtype=bool)
    inside[span.start * c : span.stop * c] = True
    ends = [
        float(min(after.actual.min(), after.predicted.min())),
        float(max(after.actual.max(), after.predicted.max())),
    ]
    data = [line(ends, ends, "as predicted", GREY, line={"color": GREY, "dash": "dash", "width": 1})]
    parts = ((~inside, "other tasks", BLUE), (inside, f"trained: {names[after.task]}", "#e07b00"))
    for mask, name, colour in parts:
        kept = {"mode": "markers", "marker": {"color": colour, "size": 4}}
        data.append(line(numbers(after.predicted[mask]), numbers(after.actual[mask]), name, colour, **kept))
    layout = layout_of(
        f"Outputs after training on {names[after.task]} alone",
        "Change of each output, predicted by the frozen kernel and found in a copy of the network that took the steps. "
        "On the dashed line the kernel is right.",
        xaxis={"tickformat": "~g", "title": {"text": "predicted change (units of the output)"}},
        yaxis={"title": {"text": "actual change (units of the output)"}},
        showlegend=True,
    )
    return {"data": data, "layout": layout}
