"""Write the record of a run as json, csv, parquet, netcdf or npz.

json and parquet hold every probe with all arrays, csv one row per probe with
its numbers and words, netcdf and npz the arrays of the full probes with units
and meanings. parquet needs pyarrow, netcdf needs xarray.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

EXAMPLE = "ntk-monitor export runs/demo --to csv --out demo.csv"


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("run_dir", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--to",
        type=str,
        default=None,
        metavar="FORMAT",
        help="json, csv, parquet, netcdf or npz; default: as --out ends",
    )
    parser.add_argument("--out", type=str, default=None, metavar="FILE", help="default: history.json, ... in the run")
    parser.add_argument("--prefix", type=str, default=None, help="of the tags, where a run has several monitors")


def run(run_dir: str, to: str | None, out: str | None, prefix: str | None) -> int:
    """Write the file; returns the exit code."""
    import sys

    from ntk_monitor.export import SUFFIXES, export
    from ntk_monitor.history import load_history

    kind = to or next((name for name, suffix in SUFFIXES.items() if out and out.lower().endswith(suffix)), None)
    if kind not in SUFFIXES:
        wanted = f"--to must be one of {', '.join(SUFFIXES)}"
        raise InputError(f"{wanted}, got {kind}" if kind else f"{wanted}, got nothing, and --out does not end in one")
    history = load_history(run_dir, prefix=prefix)
    first = Path(run_dir)
    place = first.parent if first.is_file() else first
    path = export(history, out or place / f"history{SUFFIXES[kind]}", kind)
    # To stderr: what is written to /dev/stdout must stay what it is.
    sys.stderr.write(f"{len(history)} probes written to {path}\n")
    return 0
