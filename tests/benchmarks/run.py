"""Time all exact routes to the kernel side by side, next to the yardstick of C ordinary backward passes over the batch.

Each method runs in its own process; the methods take turns, so that whatever else the machine does meets all of them.
A ratio is the median over turns of this method's time over the yardstick's time in the same turn.
"""

import argparse
import datetime as dt
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import ntk_monitor
from tests.benchmarks import peers, report, scaling
from tests.benchmarks.cases import CASES, SMALL, Case, Result, Setting, measured
from tests.benchmarks.figure import drawn
from tests.benchmarks.methods import ENGINES
from tests.benchmarks.peers import ROOT
from tests.benchmarks.process import Limits

TOLERANCE = 1e-4
"""An exact engine in float32 stays well below this; above it a time means nothing."""


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return what the times depend on."""
    return {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "ntk_monitor": ntk_monitor.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": threads,
        "cores": os.cpu_count(),
    }


def chosen(cases: Sequence[Case], only: Sequence[str], methods: Sequence[str], quantities: Sequence[str]) -> list[Case]:
    """Return the cases with what was asked for; the yardstick always stays."""
    found = []
    for case in cases:
        own = tuple(m for m in case.methods if not methods or m in methods or m == case.methods[0])
        wanted = tuple(q for q in case.quantities if not quantities or q in quantities)
        if (not only or case.workload in only) and len(own) > 1 and wanted:
            found.append(replace(case, methods=own, quantities=wanted))
    return found


def failed(results: Sequence[Result]) -> list[Result]:
    """Return the results of engines that were wrong, and of processes that ended for no limit of ours."""
    wrong = [row for row in results if row.method in ENGINES and row.error is not None and not row.error < TOLERANCE]
    broken = [
        row
        for row in results
        if not row.seconds and not row.missed.startswith("over ") and row.method not in peers.OPTIONAL
    ]
    return wrong + broken


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when there is one")
    add("--threads", type=int, default=cores(), help="of every process; default: all cores")
    add("--quick", action="store_true", help="small batches, twice")
    add("--only", type=_names, default=(), help="workloads, with commas between")
    add("--methods", type=_names, default=(), help="methods beside the yardstick, with commas between")
    add("--quantities", type=_names, default=(), help="trace, full or both")
    add("--repeats", type=int, help="turns of every method; default: 5, quick: 2")
    add("--limit", type=float, default=30, help="seconds for one run of a method, and for all its turns")
    add(
        "--memory", type=float, default=12, help="GiB that a process may hold; a miss of this or of --limit is a result"
    )
    add("--scaling", action="store_true", help="only the exponents in N, C, depth, width and T")
    add("--jax", action="store_true", help="install neural-tangents in bench/.venv-jax (or NTK_BENCH_JAX=1)")
    add("--nngeometry", action="store_true", help="install nngeometry in bench/nngeometry (or NTK_BENCH_NNGEOMETRY=1)")
    add("--out", type=Path, default=ROOT / "bench", help="directory of the JSON file and the figure")
    return parser.parse_args(argv)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _install(given: argparse.Namespace) -> None:
    """Install the optional peers that were asked for; a failure is said and then only means that one is skipped."""
    if peers.wanted(given.jax, "NTK_BENCH_JAX"):
        _say(f"neural-tangents: {peers.install_jax() or 'installed'}")
    if peers.wanted(given.nngeometry, "NTK_BENCH_NNGEOMETRY"):
        _say(f"nngeometry: {peers.install_nngeometry() or 'installed'}")


def compared(given: argparse.Namespace, setting: Setting) -> list[Result]:
    """Run the cases and say the table, the planner's and the goals."""
    _say(report.HEAD)
    results: list[Result] = []
    for case in chosen(SMALL if given.quick else CASES, given.only, given.methods, given.quantities):
        for row in measured(case, setting):
            results.append(row)
            _say(report.line(row))
    for title, lines in (
        ("planned and measured", report.planner(results)),
        ("goals, for two threads of a quiet machine", report.goals(results)),
    ):
        if lines:
            _say(f"\n{title}\n" + "\n".join(lines))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print tables, write JSON and a figure. Returns 1 when an engine was wrong or a process failed."""
    given = options(argv)
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _install(given)
    about = environment(device, given.threads)
    _say(f"torch {about['torch']}, {device}, {about['threads']} of {about['cores']} threads")
    repeats = given.repeats or (2 if given.quick else 5)
    setting = Setting(device, given.threads, repeats, Limits(given.limit, given.memory * 2**30))
    results: list[Result] = []
    curves: list[dict[str, Any]] = []
    if given.scaling:
        curves = scaling.measure(scaling.QUICK if given.quick else scaling.SWEEPS, setting, _say)
    else:
        results = compared(given, setting)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{about['time'].replace(':', '')[:17]}-{device}.json"
    record = {"environment": about, "results": [asdict(row) for row in results], "scaling": curves}
    path.write_text(json.dumps(record, indent=1) + "\n")
    _say(f"\nwritten to {path}")
    if results:
        title = f"{about['device_name']}, {given.threads} threads, trace kernel"
        drawn(results, title, path.with_suffix(".png"))
    bad = failed(results)
    for row in bad:
        _say(f"failed: {report.line(row)}")
    reasons = [reason for curve in curves for reason in curve["missed"]]
    return 1 if bad or any(reason and not reason.startswith("over ") for reason in reasons) else 0


if __name__ == "__main__":
    sys.exit(main())
