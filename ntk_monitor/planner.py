"""plan: what a kernel will cost, before it is paid. Seconds and bytes for every engine, and layer by layer.

One forward pass is watched, operation by operation, and the sample map tells how many positions of each operation
belong to a sample (`engines.watched`). Everything else is arithmetic on shapes (`engines.estimates`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ntk_monitor.batch import Batch, size
from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.estimates import Line, estimates
from ntk_monitor.engines.watched import Watched, watched
from ntk_monitor.errors import InputError
from ntk_monitor.guard import undisturbed
from ntk_monitor.kernel import MEMORY_LIMIT, Outputs, _check, _headed
from ntk_monitor.network import Forward, Mode, Network, Selection

ENGINES = ("structured", "batched", "rows", "reference", "operator")
"""In the order of the table; the first three are the ladder of `engine="auto"`."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one engine would cost."""

    engine: str
    seconds: float
    """Infinite where the engine refuses."""
    bytes: int
    """The most that is held at a time, the kernel included, beside the model and its inputs."""
    chosen: bool
    why: str
    limited: int = 0
    """The part of `bytes` that `memory_limit` bounds: gradients of activations, or blocks of a Jacobian."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a kernel costs by each engine. `print(plan)` shows it as a table.

    Attributes:
        rows: one for each of `ENGINES`.
        lines: one for each parameter, by the chosen engine.
        passes: seconds that are in no line: passes over the network by the chosen engine, and preparations.
        kernel: bytes of the kernel in float64.
        blocks: of samples, in which the chosen engine has to work to stay within `memory_limit`.
        samples, outputs, parameters: N, C and P.
        layout: `outputs` as asked for.
    """

    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    passes: float
    kernel: int
    blocks: int
    samples: int
    outputs: int
    parameters: int
    layout: str

    @property
    def chosen(self) -> str:
        """The engine that `engine="auto"` would take."""
        return next(row.engine for row in self.rows if row.chosen)

    def seconds(self, engine: str | None = None) -> float:
        """Return the seconds of an engine, of the chosen one for None; infinite where it refuses."""
        return self._row(engine).seconds

    def bytes(self, engine: str | None = None) -> int:
        """Return the bytes that an engine holds at a time, the chosen one for None."""
        return self._row(engine).bytes

    def _row(self, engine: str | None) -> Row:
        for row in self.rows:
            if row.engine == (engine or self.chosen):
                return row
        raise InputError(f"engine must be one of {ENGINES}, got {engine!r}")

    def __str__(self) -> str:
        return "\n".join(_report(self))


def plan(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    *,
    outputs: Outputs = "full",
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "eval",
    dtype: torch.dtype = torch.float64,
    memory_limit: int | None = None,
    device: torch.device | str | None = None,
    targets: Any = None,
    loss: Any = None,
) -> Plan:
    """Return what `empirical_ntk` with the same arguments would cost: seconds, bytes, the engine, and each layer.

    Seconds are those of the documented machine (two CPU cores, AVX-512, torch 2.13; one data-centre GPU for CUDA) and
    never measured here, so that the same model has the same plan everywhere. Bytes are peaks beside model and inputs.

    Cost: one forward pass over the batch and two backward passes. One more forward pass where the structured engine
    stops in the middle of the first, or where gradients of all operations exceed `memory_limit`.

    Accuracy: meant to be within 30 % on five workloads of the benchmark, with two cores; elsewhere an order of
    magnitude. Not included: the comparison with autograd when an engine first meets a model, which takes a few passes
    more and may overrule the choice. "reference" and "operator" are only taken when asked for; whether they refuse is
    not tried.

    Raises:
        InputError: as `empirical_ntk`: empty or inconsistent batches, no single floating output, unknown options.
        NetworkError: nothing trainable, or a module that cannot be followed exactly.
    """
    _check(outputs, "auto", targets, loss)
    size(x)
    batch: Batch = (x, targets) if outputs == "loss" else x
    head = _headed(forward, outputs, loss, targets)
    with undisturbed(seed=0):
        network = Network.careful(model, batch, params=params, forward=head, mode=mode, device=device)
        layout: Layout = outputs if outputs in ("trace", "per_output") else "full"
        work = torch.float32 if dtype == torch.float32 and network.dtype != torch.float64 else torch.float64
        seen = watched(network, network.prepared(batch), layout, work, memory_limit or MEMORY_LIMIT, mode)
        return _planned(seen, outputs)


def _planned(seen: Watched, outputs: Outputs) -> Plan:
    """Return the plan for what was seen, and the engine that `engine="auto"` takes."""
    chosen = "structured" if seen.side is not None else "rows" if seen.problem else "batched"
    costs, whys = estimates(seen), _whys(seen)
    rows = tuple(
        Row(engine, cost.seconds, cost.bytes, engine == chosen, whys[engine], cost.limited)
        for engine, cost in costs.items()
    )
    cost, parameters = costs[chosen], seen.network.parameter_count
    return Plan(
        rows, cost.lines, cost.passes, seen.kernel, cost.blocks, seen.samples, seen.outputs, parameters, outputs
    )


def _whys(seen: Watched) -> dict[str, str]:
    followed = seen.side is not None
    return {
        "structured": "exact by layers, the first of the ladder" if followed else seen.refusal,
        "batched": "where the structured engine refuses" if followed else seen.problem or "vectorised backward passes",
        "rows": "plain autograd, the last resort",
        "reference": "only when asked for: torch.func, not tried here",
        "operator": "only when asked for: two passes for each column, not tried here",
    }


def _report(p: Plan) -> Iterator[str]:
    size_ = f"{p.samples} samples, {p.outputs} outputs, {p.parameters:,} parameters"
    blocks = "" if p.blocks == 1 else f"; in blocks of {-(-p.samples // p.blocks)} samples"
    yield f"{p.layout} kernel of {size_}: {_memory(p.kernel)}{blocks}"
    yield ""
    yield f"{'engine':<12}{'seconds':>10}{'memory':>12}  {'chosen':<8}why"
    for row in p.rows:
        memory = _memory(row.bytes) if math.isfinite(row.seconds) else "-"
        chosen = "yes" if row.chosen else ""
        yield f"{row.engine:<12}{_time(row.seconds):>10}{memory:>12}  {chosen:<8}{row.why}"
    yield ""
    yield f"{_time(p.passes)} for passes over the network and preparations; the most expensive parameters:"
    missed = [line for line in p.lines if line.route == "rows"] if p.chosen == "structured" else []
    for line in sorted(p.lines, key=lambda line: -line.seconds)[:_SHOWN]:
        yield _described(line)
    if missed:
        yield "not recognised, hence a backward pass for each output of each sample:"
        yield from map(_described, missed)


_SHOWN = 8
"""Lines of the report; unrecognised parameters are always shown."""


def _described(line: Line) -> str:
    return f"  {_time(line.seconds):>10}  {line.parameter}  ({', '.join([*line.operations, line.route])})"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def _memory(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("kiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"
