"""What each engine would cost: passes over the network, contractions of each parameter, and the most that is held.

N samples, C outputs, P parameters. Arithmetic on what `engines.watched` saw; nothing is run here.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from ntk_monitor.engines.layers import Layers
from ntk_monitor.engines.structured import engine as structured
from ntk_monitor.engines.structured.recording import Side
from ntk_monitor.engines.watched import Watched

_KERNEL_READS = 10
"""Times that the full kernel is gone over beside the products: memory mapped anew, its upper half copied."""

_WORKSPACE = 24 * 2**20
"""Bytes that torch's own libraries take at their first use, measured on small networks."""

_VECTORISED = 16
"""Rows at a time of the batched engine."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one parameter costs by the chosen engine, beside the passes over the network that all share."""

    parameter: str
    operations: tuple[str, ...]
    route: str
    """"hadamard", "gradients", "pairs", "per-sample gradients", "rows of the table", "rows", "not reached"."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one engine would cost."""

    seconds: float
    """Infinite where the engine refuses."""
    bytes: int
    """The most that is held at a time, the kernel included, beside the model and its inputs."""
    passes: float
    """Seconds that are in no line."""
    lines: tuple[Line, ...] = ()
    blocks: int = 1
    """Of samples, to stay within the limit."""
    limited: int = 0
    """The part of `bytes` that the limit bounds."""


def estimates(seen: Watched) -> dict[str, Cost]:
    """Return the cost of each engine."""
    refused = Cost(math.inf, 0, math.inf)
    batched = _autograd(seen, "batched")
    return {
        "structured": refused if seen.side is None else _structured(seen, seen.side),
        "batched": replace(batched, seconds=math.inf) if seen.problem else batched,
        "rows": _autograd(seen, "rows"),
        "reference": _autograd(seen, "reference"),
        "operator": _operator(seen),
    }


def _structured(seen: Watched, side: Side) -> Cost:
    job = Layers(seen, side)
    count, n = 1, seen.samples
    held = job.needed() * n // seen.metered
    while count < n and held * -(-n // count) > seen.limit * n:
        count *= 2
    step = -(-n // count)
    widths = [min(step, n - start) for start in range(0, n, step)]
    times = Counter((a, b, i == j) for i, a in enumerate(widths) for j, b in enumerate(widths[: i + 1]))
    passes = sum(k * (job.passes(a) + (0 if same else job.passes(b))) for (a, b, same), k in times.items())
    passes += _assembled(seen)
    spent: dict[str, tuple[str, float]] = {}
    temporary = 0
    for (a, b, same), k in times.items():
        for unit in job.units:
            part = job.part(unit, a, b, same)
            temporary = max(temporary, part.bytes)
            way, before = spent.get(unit.parameter, ("", 0.0))
            way = part.route if part.seconds or not way else way
            spent[unit.parameter] = (way, before + k * job.steps * part.seconds)
            if unit.bias is not None:
                spent.setdefault(unit.bias, (part.route, 0.0))
    lines = tuple(
        Line(name, job.operations(name), *spent.get(name, ("not reached", 0.0))) for name in seen.network.parameters
    )
    sides = 1 if len(widths) == 1 else 2
    limited = int(held * widths[0] / n)
    activations = int(sides * widths[0] / seen.metered * seen.meter.forward().bytes)
    kept = sum(job.part(unit, widths[0], widths[0], True).kept for unit in job.units)
    total = activations + sides * (limited + min(kept, structured._KEPT_BYTES)) + temporary + 2 * seen.kernel
    seconds = passes + sum(line.seconds for line in lines)
    return Cost(seconds, total + _WORKSPACE, passes, lines, count, limited)


def _autograd(seen: Watched, engine: str) -> Cost:
    """Rows of the Jacobian in blocks, and their products."""
    n, c, p = seen.samples, seen.outputs, seen.network.parameter_count
    clock, speeds, item = seen.clock, seen.clock.speeds, seen.network.dtype.itemsize
    one = max(1, c * p * item)
    width = max(1, min(n, seen.limit // (3 * one)))
    blocks = -(-n // width)
    again = (blocks + 1) / 2  # a block is made again for each pair of blocks
    backward, forward = seen.meter.backward(weights=True), seen.meter.forward()
    share = seen.share
    pass_seconds = clock.seconds(backward, share)
    calls = backward.calls * speeds.call
    rows = n * c * again
    written = n * c * again * p * item / speeds.memory
    if engine == "batched":
        passes = rows * ((pass_seconds - calls) / speeds.vectorised + calls / _VECTORISED) + 2 * written
    elif engine == "rows":
        passes = rows * pass_seconds + written
    else:
        # Every sample on its own, as many as fit side by side.
        chunks = -(-n // max(1, min(n, seen.limit // (4 * one))))
        passes = c * again * ((pass_seconds - calls) / speeds.single + calls * chunks) + 4 * written
    passes += clock.seconds(forward, share) + _assembled(seen)
    products = n**2 * (c**2 if seen.layout == "full" else c) * (blocks + 1) / (2 * blocks if blocks > 1 else 2)
    kernel = seen.kernel / 8
    lines = tuple(
        Line(name, (), "rows", clock.product(products * q.numel(), n * c * again * q.numel(), kernel, torch.float64))
        for name, q in seen.network.parameters.items()
    )
    limited = one * (n if blocks == 1 else 3 * width)
    extra = {"batched": _VECTORISED * (backward.bytes * share + p * item), "rows": p * item}
    extra["reference"] = 3.0 * min(n * one, max(one, seen.limit // 4))
    total = limited + extra[engine] + forward.bytes * share + 3 * seen.kernel
    seconds = passes + sum(line.seconds for line in lines)
    return Cost(seconds, int(total) + _WORKSPACE, passes, lines, blocks, limited)


def _operator(seen: Watched) -> Cost:
    share = seen.share
    columns = seen.samples * seen.outputs
    one = seen.clock.seconds(seen.meter.backward(weights=True), share)
    # The derivative of a backward pass is about two of them.
    seconds = seen.clock.seconds(seen.meter.forward(), share) + 3 * columns * one + _assembled(seen)
    total = 4 * seen.meter.forward().bytes * share + 3 * 8 * columns**2
    return Cost(seconds, int(total) + _WORKSPACE, seconds)


def _assembled(seen: Watched) -> float:
    """Return the seconds of what any engine does once: modules made ready, the kernel gone over."""
    ready = seen.clock.speeds.module * sum(1 for _ in seen.network._module.modules())
    return ready + _KERNEL_READS * seen.kernel / seen.clock.speeds.memory
