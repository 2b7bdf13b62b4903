"""What the results say: the table, the planner beside the clock, and the goals."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.cases import LARGE, Result, ratio

HEAD = (
    "network      N  what     method             seconds   cpu s  yardstick   peak MB    error  turns\n"
    "--------------------------------------------------------------------------------------------------"
)


def line(row: Result) -> str:
    """Return one line of the table."""
    name = f"{row.workload:<9} {row.samples:>4}  {row.quantity:<7}  {row.method:<15}"
    if not row.seconds:
        return f"{name}  {row.missed}"
    error = f"{row.error:.0e}" if row.error is not None else "-"
    times = f"{statistics.median(row.seconds):9.4f} {statistics.median(row.cpu_seconds):7.2f}"
    return (
        f"{name}  {times}  {_number(row.ratio):>9}  {row.peak_mb:8.0f}  {error:>7}  {len(row.seconds):>5}  {row.missed}"
    ).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def planner(results: Sequence[Result]) -> list[str]:
    """Return what the planner expected beside what was measured; empty where there is no planner."""
    rows = [row for row in results if row.planned_seconds is not None and row.planned_mb is not None and row.seconds]
    if not rows:
        return []
    lines = ["network      N  what     engine       planned s   took s  ratio   planned MB  took MB  ratio"]
    for row in rows:
        seconds, memory = statistics.median(row.seconds), row.peak_mb
        assert row.planned_seconds is not None
        assert row.planned_mb is not None
        lines.append(
            f"{row.workload:<9} {row.samples:>4}  {row.quantity:<7}  {row.method:<11}"
            f"  {row.planned_seconds:9.4f} {seconds:8.4f} {row.planned_seconds / seconds:6.2f}"
            f"   {row.planned_mb:9.0f} {memory:9.0f} {row.planned_mb / max(memory, 1):6.2f}"
        )
    return lines


@dataclass(frozen=True, slots=True)
class Goal:
    """A quotient of two methods on the trace kernel of a workload, and where it should be."""

    workload: str
    over: str
    under: str
    what: str
    """"seconds" or "memory"."""
    bound: float
    at_least: bool


def _goals() -> tuple[Goal, ...]:
    yardstick = {"mlp": 0.85, "cnn": 1.05, "resnet18": 1.3, "vit": 1.3, "gpt": 1.3}
    once = {"mlp": 250, "cnn": 1.5, "resnet18": 10, "vit": 2.6, "gpt": 2.2}
    jax = {"mlp": 2.5, "cnn": 2, "resnet18": 2}
    memory = {"mlp": 80, "cnn": 1.8, "resnet18": 20, "vit": 10, "gpt": 13}
    return (
        *(Goal(name, "structured", "backwards", "seconds", bound, False) for name, bound in yardstick.items()),
        *(Goal(name, "jacrev", "structured", "seconds", bound, True) for name, bound in once.items()),
        *(Goal(name, "neural-tangents", "structured", "seconds", bound, True) for name, bound in jax.items()),
        *(Goal(name, "jacrev", "structured", "memory", bound, True) for name, bound in memory.items()),
    )


GOALS = _goals()
EXACT = 1e-6
"""The error that both kernels of the structured engine should stay below."""


def quotient(goal: Goal, over: Result, under: Result) -> tuple[float | None, bool]:
    """Return the quotient, and whether it is only a lower bound, because a limit ended the run of `over`."""
    if not under.seconds:
        return None, False
    if over.seconds:
        if goal.what == "seconds":
            return ratio(over.seconds, under.seconds), False
        return over.peak_mb / max(under.peak_mb, 1), False
    floor, own = over.floor_seconds, statistics.median(under.seconds)
    if goal.what == "memory":
        floor, own = over.floor_mb, max(under.peak_mb, 1)
    return (floor / own, True) if floor else (None, False)


def goals(results: Sequence[Result]) -> list[str]:
    """Return a line for every goal that these results can speak about: those on the large batches."""
    traces = {
        (row.workload, row.method): row
        for row in results
        if row.quantity == "trace" and row.samples == LARGE.get(row.workload)
    }
    lines = []
    for goal in GOALS:
        over, under = traces.get((goal.workload, goal.over)), traces.get((goal.workload, goal.under))
        if over is not None and under is not None:
            lines.append(verdict(goal, *quotient(goal, over, under)))
    for row in results:
        if row.method == "structured" and row.samples == LARGE.get(row.workload) and row.error is not None:
            mark = "met   " if row.error <= EXACT else "MISSED"
            lines.append(
                f"{mark}  {row.workload:<9} error of the {row.quantity} kernel: {row.error:.1e} (<= {EXACT:.0e})"
            )
    return lines


def verdict(goal: Goal, value: float | None, bound_only: bool) -> str:
    """Return one line: met, missed or unknown. A lower bound can meet a goal; it cannot miss one."""
    sign = ">=" if goal.at_least else "<="
    name = f"{goal.workload:<9} {goal.what:<7} {goal.over} / {goal.under}"
    if value is None:
        return f"?       {name}: no number ({sign} {goal.bound:g})"
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    if bound_only and not (met and goal.at_least):
        return f"?       {name}: at least {value:.2f}, then a limit ended it ({sign} {goal.bound:g})"
    mark, least = "met   " if met else "MISSED", "at least " if bound_only else ""
    return f"{mark}  {name}: {least}{value:.2f} ({sign} {goal.bound:g})"
