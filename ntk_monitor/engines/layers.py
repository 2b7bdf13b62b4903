"""What the structured engine spends on each parameter: seconds and bytes of its contraction, from shapes.

N row and M column samples, C' outputs at a time, T positions per sample, weights (R, Q). Contractions at the rates of
`engines.structured.costs`, what surrounds them at `engines.speeds`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_monitor.engines.structured import engine as structured
from ntk_monitor.engines.structured.contraction import _HALVED
from ntk_monitor.engines.structured.costs import BLOCK_BYTES, Sizes, gradients_seconds, pairs_seconds, rates, route
from ntk_monitor.engines.structured.held import needed, of_one_output, parted, small
from ntk_monitor.engines.structured.operations import Contraction, Local, Matrix, Table, Value
from ntk_monitor.engines.structured.recording import Side
from ntk_monitor.engines.structured.samples import Axis
from ntk_monitor.engines.structured.tap import Operation
from ntk_monitor.engines.structured.units import Unit, units_of
from ntk_monitor.engines.watched import Watched
from ntk_monitor.engines.work import Work

_MAP_READS = 10
"""Times that the sample map goes over the gradients of all operations."""


@dataclass(frozen=True, slots=True)
class Part:
    """One unit of the contraction for N row and M column samples and the outputs of one step."""

    route: str
    seconds: float
    bytes: int
    """Temporaries of this unit alone."""
    kept: int
    """Inputs kept from one step to the next."""


class Layers:
    """What the structured engine would do with each parameter, from what it recorded."""

    def __init__(self, seen: Watched, side: Side) -> None:
        self._seen, self._side = seen, side
        self._clock, self._speeds, self._rates = seen.clock, seen.clock.speeds, rates(seen.network.device)
        self._item, self._full = seen.network.dtype.itemsize, seen.layout == "full"
        n = len(side.y)
        self._job = structured._Job(seen.network, [side], seen.layout, lambda _: "", {}, seen.work, (n, n))
        self.units = units_of(seen.network, [side], lambda _: "", weighted=False)
        self.steps = 1 if self._full or (small(side) and not side.attached) else seen.outputs
        """Times that all parameters are contracted."""
        self._width = seen.outputs // self.steps
        separate = self._full and not small(side)
        self._early = parted(self.units, side, seen.network, seen.work)[0] if separate else []
        self._results = of_one_output(side)

    def needed(self) -> int:
        """Return the bytes of gradients that are held at a time, for the samples that were recorded."""
        return needed(self._side, self._seen.layout, self.units, self._seen.network, self._seen.work)

    def operations(self, name: str) -> tuple[str, ...]:
        """Return the names of the operations that a parameter enters."""
        return self._job._line(name).operations

    def passes(self, samples: int) -> float:
        """Return the seconds of recording, of the sample map, and of a backward pass for each output."""
        seen, share = self._seen, samples / self._seen.metered
        count = len(self._side.operations)
        backward = self._clock.seconds(seen.meter.backward(weights=False), share)
        looked = _MAP_READS * share * self._results / self._speeds.memory
        tapped = count * self._speeds.tapped
        forward = self._clock.seconds(seen.meter.forward(), share)
        return forward + looked + tapped + (seen.outputs + 1) * (backward + tapped / 2)

    def part(self, unit: Unit, n: int, m: int, symmetric: bool) -> Part:
        """Return what a unit costs in one of the `steps`, for n row and m column samples."""
        uses = [(k, i) for k, i in unit.uses if any(o.layout is not None for o in self._side.operations[k].outs)]
        if not uses and unit.parameter not in self._side.attached:
            return Part("not reached", 0.0, 0, 0)
        if unit.kind == "factors":
            return self._factors(uses, n, m, symmetric, by_output=unit in self._early)
        root = self._seen.network.parameters[unit.parameter]
        width = root.numel()
        if unit.kind == "table":
            operation = self._side.operations[uses[0][0]]
            assert isinstance(operation, Table)
            width = operation.ids.unique().numel() * root.shape[-1]
            formed = self._item * n * self._width * (width + self._positions(operation) * root.shape[-1])
            seconds, way = formed / self._speeds.memory, "rows of the table"
        else:
            seconds = sum(self._formed(k, i, root, n) for k, i in uses)
            attached = unit.parameter in self._side.attached
            way = "rows" if attached else "per-sample gradients"
            if attached:
                one = self._clock.seconds(self._seen.meter.backward(weights=False), n / self._seen.metered)
                seconds += n * self._width * (one + 2 * self._speeds.call)
        sides = 1 if symmetric else 2
        held = sides * n * self._width * width * self._item
        return Part(way, sides * seconds + self._products(n, m, width, symmetric), 2 * held, 0)

    def _products(self, n: int, m: int, width: int, symmetric: bool) -> float:
        """Return the seconds of multiplying rows (n, C', width)."""
        seen, c, full = self._seen, self._width, self._full
        half = 1.0 if not symmetric else _tiled(n) if full else _halved(n)
        pairs = n * m * (c**2 if full else c)
        results = pairs if seen.layout != "trace" else n * m
        return self._clock.product(half * pairs * width, n * c * width, results, seen.work)

    def _factors(self, places: list[tuple[int, int]], n: int, m: int, symmetric: bool, *, by_output: bool) -> Part:
        seen, c, full = self._seen, self._width, self._full
        uses = [(self._side.operations[k], i) for k, i in places]
        operation = uses[0][0]
        assert isinstance(operation, Matrix)
        _, _, q, r = operation.sizes()
        t = sum(self._positions(o) for o, _ in uses)
        sizes = Sizes(n, m, c, t, t, q, r, seen.outputs)
        way = "gradients" if by_output else route(sizes, seen.layout, seen.work, symmetric)
        patches = sum(n * self._positions(o) * q * self._item for o, _ in uses if _unfolds(o))
        if way == "gradients" and operation.shifts and ((full and not by_output) or patches > structured._KEPT_BYTES):
            patches = 0  # taken as shifted views
        # One output's gradients are multiplied as they are, and their products are put behind those of the others.
        turned = n * c * (q if by_output else t) * r * self._item
        seconds = (turned + patches / (1 if full else self.steps)) / self._speeds.memory
        turned = 0 if by_output else turned
        wide = 8 if seen.work == torch.float64 else 4
        if way == "hadamard":
            half = _halved(n) if symmetric else 1.0
            inputs = self._clock.product(half * n * m * q, n * q, n * m, seen.work)
            seconds += inputs / self.steps + self._products(n, m, r, symmetric)
            held = 8 * n * m * 2
        elif way == "gradients":
            seconds += gradients_seconds(sizes, seen.layout, seen.work, symmetric, self._rates)
            seconds += 8 * -(-r * n * c * q * self._item // BLOCK_BYTES) * self._speeds.call
            held = min(max(BLOCK_BYTES, n * c * q * self._item), n * c * q * r * self._item) // (c if by_output else 1)
        else:
            seconds += pairs_seconds(sizes, seen.layout, seen.work, symmetric, self._rates)
            block = min(n * t, max(t, 1024))
            seconds += 4 * (2 * n if full else -(-n * t // block) * c) * self._speeds.call
            held = m * t * (q + c * r) * wide if full else wide * m * t * (n * t + 2 * block)
        sides = 1 if symmetric else 2
        return Part(way, seconds + (sides - 1) * turned / self._speeds.memory, held + sides * turned, patches)

    def _positions(self, operation: Operation) -> int:
        """Return T of one use."""
        out = operation.outs[0]
        if isinstance(operation, Matrix):
            return operation.sizes()[1]
        if out.layout is None or isinstance(out.layout, Axis):
            positions = math.prod(s for d, s in enumerate(out.shape) if d not in out.channels)
            return max(1, positions // len(self._side.y))
        return out.layout.index.shape[1]

    def _formed(self, k: int, index: int, root: Tensor, n: int) -> float:
        """Return the seconds of forming the gradients (n, C', p) of one source for each sample."""
        c, operation = self._width, self._side.operations[k]
        share, source = n / len(self._side.y), operation.sources[index].value
        results = share * sum(math.prod(out.shape) for out in operation.outs)
        gradients = n * c * source.numel()
        derived = 4 * gradients if source is not root else 0  # carried back to the parameter
        if isinstance(operation, Matrix) and operation.is_weight(index):
            made = self._positions(operation) * gradients / self._rates.gradients / self._clock.products
            read = c * results
        elif isinstance(operation, Local):
            made, read = n * c * self._again(operation, share) / len(operation.sources), 0.0
        elif isinstance(operation, Contraction):
            made, read = c * self._again(operation, share), c * results
        elif isinstance(operation, Value):
            made, read = 0.0, n * c * results
        else:
            # A bias is summed, which reads once; else values are computed again and multiplied.
            made, read = 0.0, (0.5 if isinstance(operation, Matrix) else 3) * c * results
        return made + self._item * (read + gradients + derived) / self._speeds.memory + (4 + c) * self._speeds.call

    def _again(self, operation: Operation, share: float) -> float:
        """Return the seconds of one backward pass through an operation that is computed again on its own."""
        steps = self._seen.meter.between([s.value for s in operation.sources])
        work = sum((s.work for s in steps), Work())
        return self._clock.seconds(work, share) + len(operation.outs) * 3 * self._speeds.call


def _halved(rows: int) -> float:
    """Return the part of a symmetric product that is computed when its halves are halved again."""
    return 1.0 if rows < _HALVED else 0.25 + 0.5 * _halved(rows // 2)


def _tiled(rows: int) -> float:
    """Return the part of a symmetric product that is computed in eight bands up to the diagonal."""
    bands = -(-rows // max(1, -(-rows // 8)))
    return (bands + 1) / (2 * bands)


def _unfolds(operation: Operation) -> bool:
    """True when the matrix's inputs are copies, patches of a convolution."""
    kernel = operation.sources[0].value.shape[2:]
    return operation.name.startswith("conv") and math.prod(kernel) > 1
