"""Write one self-contained HTML file from the records of one run or of several, and print the summary.

RUN is a directory with event files, such as lightning_logs/version_0. Opens in any browser, without a network. What
ntk-monitor app has found about a run (RUN/ntk_apps) follows, and what applications can say from the history alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

EXAMPLE = "ntk-monitor report lightning_logs/version_0 --out report.html"


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument(
        "--out", type=str, default=None, metavar="FILE", help="file to write; default: report.html in the first run"
    )
    parser.add_argument("--prefix", type=str, default=None, help="of the tags, where a run has several monitors")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when health finds an error")


def run(runs: list[str], out: str | None, prefix: str | None, strict: bool) -> int:
    """Write the report; returns the exit code."""
    from rich.console import Console

    from ntk_monitor.applications.recorded import answers
    from ntk_monitor.cli.words import print_summary
    from ntk_monitor.health import findings
    from ntk_monitor.history import load_history
    from ntk_monitor.report import write

    histories = {name: load_history(path, prefix=prefix) for name, path in named(runs).items()}
    console = Console()
    for name, history in histories.items():
        if len(histories) > 1:
            console.print(f"\n{name}", style="bold", markup=False, highlight=False)
        print_summary(history, console)
    applied = {}
    for name, run_path in named(runs).items():
        applied[name], damaged = answers(Path(run_path), histories[name])
        for note in damaged:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    path = write(histories, out or Path(runs[0]) / "report.html", applied=applied)
    console.print(f"report  {path}", soft_wrap=True, markup=False, highlight=False)
    errors = any(one.severity == "error" for h in histories.values() for one in findings(h.snapshots))
    return 1 if strict and errors else 0


def named(runs: list[str]) -> dict[str, str]:
    """Return a short name for every run: the end of its path, as long as it takes to tell them apart."""
    paths = [Path(run).resolve().parts for run in dict.fromkeys(runs)]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    else:
        names = ["/".join(parts) for parts in paths]
    return dict(zip(names, dict.fromkeys(runs), strict=True))
