"""How seconds and memory grow with N, C, depth, width and T: each is doubled from a base, the others stay.

The exponent is the slope of log seconds over log size, by least squares on the last three points.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.cases import Case, Result, Setting, measured
from tests.benchmarks.workloads import parsed

FITTED = 3
MAIN = "structured"


@dataclass(frozen=True, slots=True)
class Sweep:
    """One size that grows; `axis` is "samples" or an option of the network."""

    network: str
    samples: int
    axis: str
    sizes: tuple[int, ...]

    def cases(self) -> list[tuple[int, Case]]:
        """Return the case of every size."""
        base, options = parsed(self.network)
        found = []
        for size in self.sizes:
            own = options if self.axis == "samples" else {**options, self.axis: size}
            name = base + ":" + ",".join(f"{key}={value}" for key, value in own.items())
            samples = size if self.axis == "samples" else self.samples
            found.append((size, Case(name, samples, ("trace",), ("backwards", MAIN))))
        return found


MLP = "mlp:width=512,depth=4,classes=8"
GPT = "gpt:width=128,depth=2,heads=2,tokens=64,classes=4"
SWEEPS = (
    Sweep(MLP, 128, "samples", (64, 128, 256, 512)),
    Sweep(MLP, 128, "classes", (8, 16, 32, 64)),
    Sweep(MLP, 128, "depth", (4, 8, 16, 32)),
    Sweep(MLP, 128, "width", (256, 512, 1024, 2048)),
    Sweep(GPT, 8, "samples", (4, 8, 16, 32)),
    Sweep(GPT, 8, "classes", (4, 8, 16, 32)),
    Sweep(GPT, 8, "depth", (2, 4, 8, 16)),
    Sweep(GPT, 8, "width", (64, 128, 256, 512)),
    Sweep(GPT, 8, "tokens", (32, 64, 128, 256)),
)
QUICK = tuple(replace(sweep, sizes=sweep.sizes[:FITTED]) for sweep in (SWEEPS[0], SWEEPS[8]))


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Return the slope of log value over log size on the last three points; None with fewer known."""
    known = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v is not None and v > 0]
    if len(known) < FITTED:
        return None
    return statistics.linear_regression(*zip(*known[-FITTED:], strict=True)).slope


def measure(sweeps: Sequence[Sweep], setting: Setting, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Run the sweeps, say one line each; return all samples and the exponents."""
    say(
        "\nscaling of the trace kernel: exponents on the last three sizes\n"
        "network  axis     sizes                     backwards  structured  planner    MB  planner"
    )
    found = []
    # The twin of a wide network takes longer than all the rest, and the other cases check the engine already.
    setting = replace(setting, check=False)
    for sweep in sweeps:
        rows: list[list[Result]] = [measured(case, setting) for _, case in sweep.cases()]
        record = _record(sweep, [row[0] for row in rows], [row[1] for row in rows])
        found.append(record)
        say(_line(sweep, record))
    return found


def _record(sweep: Sweep, yardstick: list[Result], own: list[Result]) -> dict[str, Any]:
    curves: dict[str, list[float | None]] = {
        "backwards": [_median(row.seconds) for row in yardstick],
        "structured": [_median(row.seconds) for row in own],
        "structured_mb": [row.peak_mb or None for row in own],
        "planned": [row.planned_seconds for row in own],
        "planned_mb": [row.planned_mb for row in own],
    }
    return {
        "network": sweep.network,
        "samples": sweep.samples,
        "axis": sweep.axis,
        "sizes": sweep.sizes,
        "exponents": {name: exponent(sweep.sizes, curve) for name, curve in curves.items()},
        "seconds": {"backwards": [row.seconds for row in yardstick], "structured": [row.seconds for row in own]},
        "curves": curves,
        "missed": [row.missed for row in own],
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _line(sweep: Sweep, record: dict[str, Any]) -> str:
    sizes = " ".join(str(size) for size in sweep.sizes)
    names = ("backwards", "structured", "planned", "structured_mb", "planned_mb")
    a, b, c, d, e = ("-" if (x := record["exponents"][name]) is None else f"{x:.2f}" for name in names)
    missed = next((reason for reason in record["missed"] if reason), "")
    head = f"{parsed(sweep.network)[0]:<8} {sweep.axis:<8} {sizes:<25}"
    return f"{head} {a:>9}  {b:>10}  {c:>7}  {d:>4}  {e:>7}  {missed}".rstrip()
