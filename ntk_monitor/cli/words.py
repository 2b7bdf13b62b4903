"""What the terminal says about a run: the summary as a table, then what health found."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ntk_monitor.health import Finding
    from ntk_monitor.history import History


def print_summary(history: "History", console: "Console") -> None:
    """Print the summary of a run, what its record lost, and its findings."""
    from rich import box
    from rich.table import Table

    from ntk_monitor.health import findings, text
    from ntk_monitor.summary import rows

    table = Table(box=box.SIMPLE_HEAD, show_lines=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("quantity", style="bold", max_width=18)
    table.add_column("at the last probe", max_width=24)
    table.add_column("what it means")
    for row in rows(history.snapshots):
        table.add_row(row.quantity, row.value, row.meaning)
    console.print(table)
    for note in history.notes:
        console.print(note, markup=False)
    found = findings(history.snapshots)
    console.print(f"Health: {counted(found)}", markup=False)
    if shown := text([one for one in found if one.severity != "info"]):
        console.print(shown, markup=False, soft_wrap=True)


def counted(found: "Sequence[Finding]") -> str:
    """Return how many findings there are, in words."""
    errors, warnings, notes = (sum(one.severity == kind for one in found) for kind in ("error", "warning", "info"))
    if not errors and not warnings:
        rest = f", {notes} remarks (ntk_monitor.health.findings)" if notes else ""
        return f"no error and no warning{rest}."
    return f"{errors} errors, {warnings} warnings, {notes} remarks."
