"""Puts the structured kernel together: record, ask whose position is whose, then contract layer by layer.

Memory: the activations of one forward pass, their gradients for one output (all outputs for the full kernel, or for
networks without positions), and one layer's blocks. Never a Jacobian of the whole network.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size, take, tensors
from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.structured import samples
from ntk_monitor.engines.structured.operations import Matrix, Table, Value, scattered
from ntk_monitor.engines.structured.contraction import Factors, Gram, contract
from ntk_monitor.engines.structured.rules import RULES, otherwise
from ntk_monitor.engines.structured.tap import Operation, Source, Tap, UnfollowedError, reached
from ntk_monitor.network import Network

_KEPT_BYTES = 256 * 2**20
"""Inputs of convolutions, laid out as matrices, that are kept from one output to the next."""

_STACKED_BYTES = 2**20
"""Gradients of all outputs are treated together below this size."""


class CoupledError(UnfollowedError):
    """Samples of the batch depend on each other, so there is no per-sample gradient inside an operation."""


@dataclass(frozen=True, slots=True)
class Line:
    """How one parameter was treated: the operations it enters, and the way its kernel was contracted."""

    parameter: str
    operations: tuple[str, ...]
    route: str


@dataclass(slots=True)
class Side:
    """One batch: its outputs, what was recorded, and which parameters were missed."""

    y: Tensor
    operations: list[Operation]
    attached: list[str]
    kept: dict[int, Any] = field(default_factory=dict)
    gradients: list[list[Tensor | None]] = field(default_factory=list)


def recorded(network: Network, inputs: Batch, *, values: bool = True) -> Side:
    """Run the network once under the tap.

    Raises:
        UnfollowedError: the forward pass does what interception cannot see through.
    """
    tap = Tap(network.parameters, RULES, otherwise)
    tap.moves = values
    tap.mark(tensors(inputs))
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), tap:
        y = network.outputs(inputs)
    tap.check()
    if any(p.is_complex() for p in network.parameters.values()):
        raise UnfollowedError("complex parameters")
    attached = reached(y, network.parameters) if y.requires_grad else []
    return Side(y, tap.operations, attached)


def located(side: Side) -> None:
    """Find the samples in every operation's output; forget operations that the outputs do not depend on.

    The first of the two backward passes is that of the first output, whose gradients are kept for the kernel. Where
    that output does not reach an operation, two passes with a random combination of all outputs follow.

    Raises:
        CoupledError: samples depend on each other.
    """
    y = side.y
    if not y.requires_grad:
        side.operations = []
        return
    u = torch.zeros_like(y)
    u[:, 0] = 1
    first = _backward(side, u)
    if len(y) == 1:
        for operation in side.operations:
            for out in operation.outs:
                out.layout = samples.everything([s for d, s in enumerate(out.shape) if d not in out.channels], y.device)
    else:
        _lay_out(side, u, first)
    side.gradients = first


def _lay_out(side: Side, u: Tensor, first: list[list[Tensor | None]]) -> None:
    scale = _scale(side, first)
    second = _backward(side, scale[:, None] * u)
    missing = []
    for k, operation in enumerate(side.operations):
        for j, out in enumerate(operation.outs):
            a, b = first[k][j], second[k][j]
            if a is not None and b is not None and a.numel() and bool(a.any()):
                out.layout = samples.axis_layout(a, b, out.channels, scale)
            if out.layout is None:
                missing.append((k, j))
        second[k] = []
    if missing:
        _search(side, missing)


def _scale(side: Side, gradients: list[list[Tensor | None]], digit: int | None = None) -> Tensor:
    # The narrowest dtype inside decides how many powers of two there are.
    half = any(g is not None and g.dtype == torch.float16 for part in gradients for g in part)
    return samples.scales(len(side.y), torch.float16 if half else side.y.dtype, side.y.device, digit).to(side.y.dtype)


def _search(side: Side, missing: list[tuple[int, int]]) -> None:
    """Find the samples where the first output did not tell, or where they do not lie along an axis."""
    y = side.y
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    first = _backward(side, u)
    scale = _scale(side, first)
    second = _backward(side, scale[:, None] * u)
    base = 8 if bool(scale.max() < 2**8) and len(y) > 8 else 16
    passes: list[list[list[Tensor | None]]] = []
    for k, j in missing:
        operation, a, b = side.operations[k], first[k][j], second[k][j]
        out = operation.outs[j]
        if a is None or b is None or not a.numel():
            continue
        out.layout = samples.axis_layout(a, b, out.channels, scale)
        if out.layout is None:
            if not passes:
                count = samples.digits(len(y), base)
                passes = [_backward(side, _scale(side, first, digit)[:, None] * u) for digit in range(count)]
            one = [found for p in passes if (found := p[k][j]) is not None]
            out.layout = samples.owners(a, one, out.channels, len(y), base)
        if out.layout is None:
            name = ", ".join(dict.fromkeys(p for s in operation.sources for p in s.parameters))
            kind = _SharedValueError if isinstance(operation, Value) else CoupledError
            raise kind(f"samples of the batch depend on each other in {operation.name} ({name})")


class _SharedValueError(UnfollowedError):
    """A tapped source is shared by the samples; its parameters have to stay attached."""


def _backward(side: Side, cotangent: Tensor) -> list[list[Tensor | None]]:
    """Return the gradient of every output of every operation for one cotangent (N, C)."""
    edges = [out.edge for operation in side.operations for out in operation.outs]
    if not edges:
        return []
    found = iter(torch.autograd.grad(side.y, edges, cotangent, retain_graph=True, allow_unused=True))
    return [
        [None if (g := next(found)) is None else g.reshape(out.shape) for out in operation.outs]
        for operation in side.operations
    ]


def _stacked(side: Side, classes: range) -> list[list[Tensor | None]]:
    """Return gradients (C', *shape) for these outputs; operations without samples have none."""
    result: list[list[Tensor | None]] = [[None] * len(o.outs) for o in side.operations]
    for i, c in enumerate(classes):
        cotangent = torch.zeros_like(side.y)
        cotangent[:, c] = 1
        ready, side.gradients = (side.gradients, []) if c == 0 else ([], side.gradients)
        for k, part in enumerate(ready or _backward(side, cotangent)):
            for j, g in enumerate(part):
                if g is None or side.operations[k].outs[j].layout is None:
                    continue
                if len(classes) == 1:
                    result[k][j] = g[None]
                    continue
                stack = result[k][j]
                if stack is None:
                    stack = result[k][j] = g.new_zeros(len(classes), *g.shape)
                stack[i] = g
    return result


class TooLargeError(UnfollowedError):
    """The gradients of these samples do not fit into the memory limit; fewer samples at a time may."""


def structured_gram(
    network: Network,
    inputs: Batch,
    other: Batch | None,
    layout: Layout,
    *,
    group: Callable[[str], str],
    scale: Mapping[str, Tensor],
    work: torch.dtype = torch.float64,
    memory_limit: int | None = None,
) -> tuple[dict[str, Tensor], list[Line]]:
    """Return the kernel of each parameter group in float64, and how each parameter was treated.

    Args:
        network: what to differentiate.
        inputs: the N row samples.
        other: the M column samples; None: the same, and half of the work is skipped.
        layout: "full" → (N, C, M, C), "trace" → (N, M), "per_output" → (C, N, M).
        group: parameter name → name of the kernel it is summed into.
        scale: square root of a diagonal preconditioner by parameter, flat; empty: none.
        work: dtype of products; float32: sums of more than 4096 terms are still float64.
        memory_limit: bytes for gradients of activations; None: no limit.

    Raises:
        UnfollowedError: the engine cannot be exact here; TooLargeError: not with this memory.
    """
    sides = []
    for batch in [inputs] if other is None else [inputs, other]:
        side = recorded(network, batch)
        if memory_limit is not None and (needed := _needed(side, layout)) > memory_limit:
            raise TooLargeError(f"gradients of activations take {needed / 2**20:.0f} MiB")
        try:
            located(side)
        except _SharedValueError:
            side = recorded(network, batch, values=False)
            located(side)
        sides.append(side)
    for side in sides[1:]:
        if [o.name for o in side.operations] != [o.name for o in sides[0].operations]:
            raise UnfollowedError("the two batches take different paths through the network")
    job = _Job(network, sides, layout, group, scale, work, (size(inputs), size(inputs if other is None else other)))
    return job.run()


def _needed(side: Side, layout: Layout) -> int:
    """Return the bytes of the gradients that are held at a time."""
    one = sum(math.prod(out.shape) for operation in side.operations for out in operation.outs) * side.y.element_size()
    return one * (side.y.shape[1] + 1 if layout == "full" else 2)


def structured_blocks(
    network: Network,
    inputs: Batch,
    other: Batch | None,
    layout: Layout,
    *,
    group: Callable[[str], str],
    scale: Mapping[str, Tensor],
    work: torch.dtype = torch.float64,
    memory_limit: int,
) -> tuple[dict[str, Tensor], list[Line]]:
    """Return what `structured_gram` does, in blocks of samples where the whole does not fit into memory.

    Twice as many blocks each time that one does not fit the limit, or that memory runs out all the same. Blocks that
    are not on the diagonal repeat the backward passes of both of their sides.
    """
    n, m = size(inputs), size(inputs if other is None else other)
    count = 1
    while True:
        try:
            return _blocks(network, inputs, other, layout, (n, m, count), group, scale, work, memory_limit)
        except (TooLargeError, MemoryError, RuntimeError) as error:
            if count >= max(n, m) or not (isinstance(error, TooLargeError) or _out_of_memory(error)):
                raise
            count *= 2


def _out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error) or "out of memory" in str(error).lower()


def _blocks(  # noqa: PLR0913 - one call, taken apart
    network: Network,
    inputs: Batch,
    other: Batch | None,
    layout: Layout,
    sizes: tuple[int, int, int],
    group: Callable[[str], str],
    scale: Mapping[str, Tensor],
    work: torch.dtype,
    memory_limit: int,
) -> tuple[dict[str, Tensor], list[Line]]:
    n, m, count = sizes

    def gram(a: Batch, b: Batch | None) -> tuple[dict[str, Tensor], list[Line]]:
        # A single sample has to be done whatever it takes.
        limit = memory_limit if count < max(n, m) else None
        return structured_gram(network, a, b, layout, group=group, scale=scale, work=work, memory_limit=limit)

    if count == 1:
        return gram(inputs, other)
    whole: dict[str, Tensor] = {}
    lines: list[Line] = []
    rows, cols = _parts(n, count), _parts(m, count)
    sample = {"full": 2, "trace": 1, "per_output": 2}[layout]
    for i, r in enumerate(rows):
        for c in cols[: i + 1] if other is None else cols:
            same = other is None and r == c
            found, lines = gram(take(inputs, r), None if same else take(inputs if other is None else other, c))
            for key, block in found.items():
                if key not in whole:
                    outputs = block.shape[0 if layout == "per_output" else 1]
                    shape = {"full": (n, outputs, m, outputs), "trace": (n, m), "per_output": (outputs, n, m)}[layout]
                    whole[key] = block.new_zeros(shape)
                view = whole[key].movedim(1, 0) if layout == "per_output" else whole[key]
                turned = block.movedim(1, 0) if layout == "per_output" else block
                index: list[Any] = [slice(None)] * view.dim()
                index[0], index[sample] = r, c
                view[tuple(index)] = turned
                if other is None and not same:
                    index[0], index[sample] = c, r
                    view[tuple(index)] = turned.permute(2, 3, 0, 1) if layout == "full" else turned.transpose(0, sample)
    return whole, lines


def _parts(length: int, count: int) -> list[slice]:
    step = -(-length // count)
    return [slice(s, min(s + step, length)) for s in range(0, length, step)]


@dataclass(slots=True)
class _Unit:
    """Parameters contracted together: one weight by its factors, or one parameter by its per-sample gradients."""

    parameter: str
    uses: list[tuple[int, int]]
    """(operation, index of the source in it)"""
    kind: str
    bias: str | None = None


class _Job:
    """One call of `structured_gram`."""

    def __init__(
        self,
        network: Network,
        sides: list[Side],
        layout: Layout,
        group: Callable[[str], str],
        scale: Mapping[str, Tensor],
        work: torch.dtype,
        samples_: tuple[int, int],
    ) -> None:
        self._network, self._sides, self._layout = network, sides, layout
        self._group, self._scale, self._work, self._samples = group, scale, work, samples_
        self._outputs = sides[0].y.shape[1]
        self._grams: dict[str, Gram] = {}
        self._routes: dict[str, str] = {}
        self._keeps: dict[int, bool] = {}
        self._promised: dict[int, int] = {}

    def run(self) -> tuple[dict[str, Tensor], list[Line]]:
        units = self._units()
        side = self._sides[0]
        # Gradients of all outputs at once where they are small, for the sake of few calls.
        stacked = self._layout == "full" or (not side.attached and _needed(side, "full") <= _STACKED_BYTES)
        step = self._outputs if stacked else 1
        for name in self._network.parameters:
            self._gram(name)
        for start in range(0, self._outputs, step):
            classes = range(start, min(start + step, self._outputs))
            gradients = [_stacked(s, classes) for s in self._sides]
            for unit in units:
                self._add(unit, gradients, classes)
        found = {key: gram.finished() for key, gram in self._grams.items()}
        return found, [self._line(name) for name in self._network.parameters]

    def _gram(self, parameter: str) -> Gram:
        key = self._group(parameter)
        if key not in self._grams:
            n, m = self._samples
            self._grams[key] = Gram(
                self._layout,
                (n, self._outputs, m),
                symmetric=len(self._sides) == 1,
                work=self._work,
                device=self._sides[0].y.device,
            )
        return self._grams[key]

    def _line(self, name: str) -> Line:
        names = [o.name for o in self._sides[0].operations if any(name in s.parameters for s in o.sources)]
        if name in self._sides[0].attached:
            names.append("not recognised")
        return Line(name, tuple(dict.fromkeys(names)), self._routes.get(name, "not reached"))

    def _units(self) -> list[_Unit]:
        """Decide, from what was recorded, how each parameter is contracted."""
        uses: dict[str, list[tuple[int, int]]] = {}
        for k, operation in enumerate(self._sides[0].operations):
            for i, source in enumerate(operation.sources):
                for name in source.parameters:
                    uses.setdefault(name, []).append((k, i))
        attached = {name for side in self._sides for name in side.attached}
        units = []
        for name in self._network.parameters:
            if name in attached:
                units.append(_Unit(name, uses.get(name, []), "dense"))
            elif name in uses:
                units += self._split(name, uses[name])
        return self._with_biases(units)

    def _split(self, name: str, uses: list[tuple[int, int]]) -> list[_Unit]:
        """Return what is contracted for one parameter: together, unless its uses are of disjoint parts of it."""
        operations = self._sides[0].operations
        parts = [(operations[k], operations[k].sources[i], i) for k, i in uses]
        if not all(source.exact for _, source, _ in parts):
            return [_Unit(name, uses, "dense")]
        if all(isinstance(o, Matrix) and o.is_weight(i) and o.groups == 1 for o, _, i in parts):
            groups: dict[Any, list[tuple[int, int]]] = {}
            spans = {}
            for use, (operation, source, i) in zip(uses, parts, strict=True):
                key = _key(operation, source, i)
                groups.setdefault(key, []).append(use)
                spans[key] = source.span
            ordered = sorted(spans.values())
            if all(left[1] < right[0] for left, right in pairwise(ordered)):
                return [_Unit(name, group, "factors") for group in groups.values()]
        table, source, _ = parts[0]
        whole = len(parts) == 1 and source.value.numel() == self._network.parameters[name].numel()
        return [_Unit(name, uses, "table" if isinstance(table, Table) and whole and not self._scale else "dense")]

    def _with_biases(self, units: list[_Unit]) -> list[_Unit]:
        """Let a bias share the contraction of its weight where there is one position per sample."""
        by_use = {unit.uses[0]: unit for unit in units if unit.kind == "dense" and len(unit.uses) == 1}
        taken: set[str] = set()
        for unit in units:
            if unit.kind != "factors" or len(unit.uses) != 1 or self._scale:
                continue
            k, i = unit.uses[0]
            operation, out = self._sides[0].operations[k], self._sides[0].operations[k].outs[0]
            bias = by_use.get((k, 1)) if i == 0 else None
            single = all(
                len(s.operations[k].outs[0].shape) == 2 and s.operations[k].outs[0].shape[0] == len(s.y)
                for s in self._sides
            )
            whole = bias is not None and operation.sources[1].exact and operation.sources[1].value.dim() == 1
            if bias is not None and whole and single and out.channels == (1,):
                if self._group(bias.parameter) == self._group(unit.parameter):
                    unit.bias = bias.parameter
                    taken.add(bias.parameter)
        return [unit for unit in units if unit.parameter not in taken]

    def _add(self, unit: _Unit, gradients: list[list[list[Tensor | None]]], classes: range) -> None:
        gram = self._gram(unit.parameter)
        chosen = slice(classes.start, classes.stop)
        if unit.kind == "factors":
            factors = [self._factors(side, g, unit) for side, g in zip(self._sides, gradients, strict=True)]
            if any(f is None for f in factors):
                return
            weight = self._weight(unit)
            made = self._sides[0].kept.setdefault(-1 - unit.uses[0][0], {})
            left, right = factors[0], factors[1] if len(factors) > 1 else None
            assert left is not None
            way: str = contract(gram, left, right, chosen, ones=unit.bias is not None, weight=weight, made=made)
            if unit.bias is not None:
                self._routes[unit.bias] = way
        elif unit.kind == "table":
            way = self._add_table(gram, unit, gradients, chosen)
        else:
            parts = [self._jacobian(s, g, unit, classes) for s, g in zip(self._sides, gradients, strict=True)]
            if any(p is None for p in parts):
                return
            if self._scale:
                parts = [None if p is None else p * self._scale[unit.parameter] for p in parts]
            assert parts[0] is not None
            gram.rows(parts[0], parts[1] if len(parts) > 1 else None, chosen)
            way = "per-sample gradients" if unit.parameter not in self._sides[0].attached else "rows"
        self._routes[unit.parameter] = way

    def _weight(self, unit: _Unit) -> Tensor | None:
        if not self._scale:
            return None
        k, i = unit.uses[0]
        operation = self._sides[0].operations[k]
        source = operation.sources[i].value
        root = self._network.parameters[unit.parameter]
        diagonal = self._scale[unit.parameter].view(root.shape).contiguous()
        offset = source.storage_offset() - root.storage_offset()
        return operation.matrix(i, diagonal.as_strided(source.shape, source.stride(), offset))

    def _factors(self, side: Side, gradients: list[list[Tensor | None]], unit: _Unit) -> Factors | None:
        uses = []
        for k, _ in unit.uses:
            operation, g = side.operations[k], gradients[k][0]
            assert isinstance(operation, Matrix)
            if g is not None:
                uses.append((k, operation, g))
        if not uses:
            return None
        parts = [self._part(side, *use) for use in uses]
        if len(parts) == 1:
            return parts[0]
        n, _, q = parts[0].sizes
        return Factors(
            (n, sum(p.sizes[1] for p in parts), q),
            parts[0].channels,
            parts[0].classes,
            gradient=lambda: torch.cat([p.gradient() for p in parts], 2),
            inputs=lambda: torch.cat([p.inputs() for p in parts], 1),
        )

    def _part(self, side: Side, k: int, operation: Matrix, g: Tensor) -> Factors:
        dtype, (n, t, q, r) = operation.dtype, operation.sizes()
        part = Factors(
            (n, t, q),
            r,
            len(g),
            gradient=lambda: operation.gradient(g).to(dtype),
            inputs=lambda: self._kept(side, k, operation.arranged_inputs),
        )
        shifts = operation.shifts
        # Patches are quicker, but only as long as they need not be made again for each output.
        if shifts is not None and not self._room(side, k, n * t * q * dtype.itemsize):
            part.padded = lambda: self._kept(side, k, shifts.padded)
            part.padded_gradient = lambda: shifts.gradient(g).to(dtype)
            part.offsets = shifts.offsets
        return part

    def _room(self, side: Side, k: int, wanted: int) -> bool:
        """True when inputs of so many bytes are kept already, or may be."""
        if k not in self._keeps:
            self._keeps[k] = self._layout != "full" and sum(self._promised.values()) + wanted <= _KEPT_BYTES
            self._promised[k] = wanted if self._keeps[k] else 0
        return self._keeps[k]

    def _kept(self, side: Side, k: int, make: Callable[[], Tensor]) -> Tensor:
        """Return inputs in the form that products take, kept from one output to the next while memory allows."""
        if k in side.kept:
            found: Tensor = side.kept[k]
            return found
        a = make()
        if self._room(side, k, a.numel() * a.element_size()):
            side.kept[k] = a
        return a

    def _add_table(self, gram: Gram, unit: _Unit, gradients: list[list[list[Tensor | None]]], classes: slice) -> str:
        (k, _), picked = unit.uses[0], []
        for side, g in zip(self._sides, gradients, strict=True):
            operation, own = side.operations[k], g[k][0]
            assert isinstance(operation, Table)
            if own is None:
                return "not reached"
            picked.append(operation.picked(own))
        # Only rows that occur can have a gradient.
        rows, where = torch.unique(torch.cat([ids.flatten() for ids, _ in picked]), return_inverse=True)
        parts = where.split([ids.numel() for ids, _ in picked])
        dense = [
            scattered(w.view(ids.shape), d, len(rows)).flatten(2) for w, (ids, d) in zip(parts, picked, strict=True)
        ]
        gram.rows(dense[0], dense[1] if len(dense) > 1 else None, classes)
        return "rows of the table"

    def _jacobian(self, side: Side, gradients: list[list[Tensor | None]], unit: _Unit, classes: range) -> Tensor | None:
        """Return J (N, C', p) of one parameter: the sum over all its uses, recorded and missed."""
        root = self._network.parameters[unit.parameter]
        total: Tensor | None = None
        for k, i in unit.uses:
            if all(g is None for g in gradients[k]):
                continue
            operation = side.operations[k]
            found = operation.jacobian(i, gradients[k]).to(root.dtype)
            found = _pulled(found, operation.sources[i].value, root)
            total = found if total is None else total + found
        if unit.parameter in side.attached:
            found = self._rows(side, root, classes)
            total = found if total is None else total + found
        return total

    def _rows(self, side: Side, root: Tensor, classes: range) -> Tensor:
        """Return J (N, C', p) by plain backward passes of the whole network, for uses that were not recognised."""
        y = side.y
        found = root.new_zeros(len(y), len(classes), root.numel())
        for n in range(len(y)):
            for i, c in enumerate(classes):
                cotangent = torch.zeros_like(y)
                cotangent[n, c] = 1
                (g,) = torch.autograd.grad(y, root, cotangent, retain_graph=True, allow_unused=True)
                if g is not None:
                    found[n, i] = g.to_dense().flatten()
        return found


def _key(operation: Operation, source: Source, index: int) -> tuple[Any, ...]:
    """Return what two uses of a weight must share for their positions to be put behind each other."""
    value = source.value.detach()
    matrix = operation.matrix(index, value)
    if matrix.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
        return (matrix.storage_offset(), tuple(matrix.shape), tuple(matrix.stride()))
    return (operation.name, *source.geometry)


def _pulled(jacobian: Tensor, value: Tensor, root: Tensor) -> Tensor:
    """Carry gradients (N, C, size) of a derived tensor back to the parameter it was made from."""
    if value is root:
        return jacobian
    n, c, _ = jacobian.shape
    rows = jacobian.reshape(n * c, *value.shape).to(value.dtype)
    try:
        (found,) = torch.autograd.grad(value, root, rows, retain_graph=True, is_grads_batched=True, allow_unused=True)
    except RuntimeError:  # an operation without a batching rule
        grads = [torch.autograd.grad(value, root, row, retain_graph=True, allow_unused=True)[0] for row in rows]
        found = None if grads[0] is None else torch.stack([g for g in grads if g is not None])
    return jacobian.new_zeros(n, c, root.numel()) if found is None else found.reshape(n, c, -1).to(root.dtype)
