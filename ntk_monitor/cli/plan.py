"""Say what a probe of a checkpoint will cost in bytes and seconds, before it is paid.

Takes the options of analyze. Nothing is measured but one forward pass.
"""

from typing import TYPE_CHECKING, Any

from ntk_monitor.cli.analyze import WORDS, add_source, lookout, requested
from ntk_monitor.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["EXAMPLE", "WORDS", "add", "run"]

EXAMPLE = "ntk-monitor plan last.ckpt --model shop.Net --data shop.Data --probe 128"


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files or directories")
    add_source(parser)


def run(**options: Any) -> int:
    """Print the plan of one probe and of the whole analysis; returns the exit code."""
    import tempfile
    from pathlib import Path

    from rich.console import Console

    from ntk_monitor.analysis import Analysis

    request = requested(options)
    found = lookout(options, request).look()
    if not found.entries:
        raise InputError("; ".join(sentence for _, sentence in found.failures) or "no checkpoint can be read")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        analysis = Analysis(found, request, Path(scratch))
        plan = analysis.plan()
    console.print(str(plan), markup=False, soft_wrap=True)
    count = len(found.entries)
    console.print(
        f"\n{count} checkpoints x {plan.seconds():.2g} s = {count * plan.seconds():.2g} s for the kernels; bounds, "
        "layers and forecasts come on top, up to five times that on small networks.",
        markup=False,
        soft_wrap=True,
    )
    for note in analysis.outcome.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return 0
