"""Say what differs between two runs, or between two probes of one run.

RUN is a directory with event files, of a live run or of analyze. Two runs are
compared over all their probes, their kernels at the last step that both
measured. One run with --steps compares two of its probes: two checkpoints.
Kernels of different probe samples are not comparable and are left out.
Prints a table and writes an HTML file with both sides.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from ntk_monitor.compare import Comparison
    from ntk_monitor.history import History

EXAMPLE = "ntk-monitor compare runs/demo --steps 0 400"

# What analyze reads and compare cannot.
_CHECKPOINTS = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one directory of a run, or two")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=None, metavar="STEP", help="probes to compare, of one run or one of each"
    )
    parser.add_argument("--out", type=str, default=None, metavar="FILE", help="default: compare.html in the first run")
    parser.add_argument("--prefix", type=str, default=None, help="of the tags, where a run has several monitors")


def run(runs: list[str], steps: list[int] | None, out: str | None, prefix: str | None) -> int:
    """Compare, print and write; returns the exit code."""
    _checked(runs, steps)
    from rich.console import Console

    from ntk_monitor import compare
    from ntk_monitor.cli.report import named
    from ntk_monitor.history import load_history
    from ntk_monitor.report import write

    histories: dict[str, History] = {name: load_history(path, prefix=prefix) for name, path in named(runs).items()}
    pair = None if steps is None else (steps[0], steps[1])
    if len(histories) == 2:
        left, right = histories
        found = compare.runs(histories[left], histories[right], (left, right), pair)
    else:
        ((name, history),) = histories.items()
        assert pair is not None
        found = compare.probes(history, pair, name)
    console = Console(highlight=False)
    _print(found, console)
    first = Path(runs[0])
    path = write(histories, out or (first.parent if first.is_file() else first) / "compare.html", found)
    console.print(f"\nreport  {path}", soft_wrap=True, markup=False)
    return 0


def _checked(runs: list[str], steps: list[int] | None) -> None:
    for name in runs:
        if name.lower().endswith(_CHECKPOINTS):
            raise InputError(
                f"compare reads the records of runs, got the checkpoint {name}; measure checkpoints first with "
                "ntk-monitor analyze CHECKPOINT... --out DIR, then: ntk-monitor compare DIR --steps STEP STEP"
            )
    different = len({Path(name).resolve() for name in runs})
    if different > 2 or different < len(runs):
        raise InputError(
            "compare takes two different runs, or one with --steps; ntk-monitor report shows any number side by side"
        )
    if len(runs) == 1 and steps is None:
        raise InputError("one run is compared with itself: name two of its probes, such as --steps 0 400")


def _print(found: "Comparison", console: "Console") -> None:
    """Print the table, what differs, and what could not be compared."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("quantity", max_width=14)
    for name in found.names:
        table.add_column(name, max_width=19)
    table.add_column("what it means")
    for row in found.rows:
        # Sentences for what differs; the page has them for the rest.
        meaning = row.meaning if row.matters else "about the same"
        table.add_row(row.quantity, row.left, row.right, meaning, style="bold" if row.matters else "dim")
    console.print(found.title, style="bold", markup=False, soft_wrap=True)
    console.print(table)
    console.print(found.verdict, markup=False)
    for note in found.notes:
        console.print(note, markup=False)
