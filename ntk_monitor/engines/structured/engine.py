"""Puts the structured kernel together: record, ask whose position is whose, then contract layer by layer.

Memory: the activations of one forward pass, their gradients for one output, and one layer's blocks; for the full kernel
the gradients for all outputs, or the Jacobian of a layer where that is smaller.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size
from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.structured.contraction import INNER, Factors, Gram, contract, jacobian
from ntk_monitor.engines.structured.held import needed, parted, places, small
from ntk_monitor.engines.structured.operations import Matrix, Table, scattered
from ntk_monitor.engines.structured.recording import (
    Gradients,
    SharedValueError,
    Side,
    Stack,
    cotangent,
    located,
    recorded,
    single,
    stacked,
)
from ntk_monitor.engines.structured.tap import Operation, UnfollowedError
from ntk_monitor.engines.structured.units import Unit, units_of
from ntk_monitor.engines.structured.waiting import Waiting
from ntk_monitor.network import Network

_KEPT_BYTES = 24 * 2**20
"""Inputs of convolutions, laid out as matrices, that are kept from one output to the next."""


@dataclass(frozen=True, slots=True)
class Line:
    """How one parameter was treated: the operations it enters, and the way its kernel was contracted."""

    parameter: str
    operations: tuple[str, ...]
    route: str


class TooLargeError(UnfollowedError):
    """The gradients of these samples do not fit into the memory limit; fewer samples at a time may."""


def structured_gram(  # noqa: PLR0913 - one kernel
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
        work: dtype of products; float32: sums of more than 2048 terms are still float64.
        memory_limit: bytes for gradients of activations; None: no limit.

    Raises:
        UnfollowedError: the engine cannot be exact here; TooLargeError: not with this memory.
    """
    sides = []
    for batch in [inputs] if other is None else [inputs, other]:
        side = recorded(network, batch)
        if memory_limit is not None:
            units = units_of(network, [side], group, weighted=bool(scale))
            if (wanted := needed(side, layout, units, network, work)) > memory_limit:
                raise TooLargeError(f"gradients take {wanted / 2**20:.0f} MiB")
        # In float64 a trace is taken output by output, so that casts to float32 inside the network round as autograd's.
        rotate = layout == "trace" and network.dtype != torch.float64
        try:
            located(side, rotate=rotate)
        except SharedValueError:
            side = recorded(network, batch, values=False)
            located(side, rotate=rotate)
        sides.append(side)
    for side in sides[1:]:
        if [_trace(o) for o in side.operations] != [_trace(o) for o in sides[0].operations]:
            raise UnfollowedError("the two batches take different paths through the network")
    job = _Job(network, sides, layout, group, scale, work, (size(inputs), size(inputs if other is None else other)))
    return job.run()


class _Job:
    """One call of `structured_gram`."""

    def __init__(  # noqa: PLR0913 - what one call consists of
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
        self._made: dict[Any, dict[int, Tensor]] = {}
        self._waiting: dict[Any, Waiting] = {}
        self._keeps: dict[int, bool] = {}
        self._promised: dict[int, int] = {}
        self._repeated: set[int] = set() if layout == "full" else set(range(len(sides[0].operations)))
        """Operations whose inputs are asked for output by output."""

    def run(self) -> tuple[dict[str, Tensor], list[Line]]:
        units = units_of(self._network, self._sides, self._group, weighted=bool(self._scale))
        side = self._sides[0]
        for name in self._network.parameters:
            self._gram(name)
        if self._layout == "full" and not small(side):
            self._full(units)
        else:
            step = self._outputs if self._layout == "full" or (small(side) and not side.attached) else 1
            for start in range(0, self._outputs, step):
                classes = range(start, min(start + step, self._outputs))
                gradients = [stacked(s, classes) for s in self._sides]
                for unit in units:
                    self._add(unit, gradients, classes)
        self._finish()
        found = {key: gram.finished() for key, gram in self._grams.items()}
        return found, [self._line(name) for name in self._network.parameters]

    def _full(self, units: list[Unit]) -> None:
        """Add the units whose every output meets every other: what is smaller is held until all outputs are there."""
        formed, others = parted(units, self._sides[0], self._network, self._work)
        self._repeated, held = places(formed), places(others)
        rows: dict[int, list[Tensor | None]] = {k: [None] * len(self._sides) for k in range(len(formed))}
        stacks = [Stack(side, self._outputs, held) for side in self._sides]
        for c in range(self._outputs):
            for s, (side, stack) in enumerate(zip(self._sides, stacks, strict=True)):
                found = single(side, c)
                for k, unit in enumerate(formed):
                    rows[k][s] = self._formed(side, found, unit, c, rows[k][s])
                stack.add(found, c)
        everything = range(self._outputs)
        for k, unit in enumerate(formed):
            self._add_rows(unit, rows.pop(k), everything)
            self._routes[unit.parameter] = "gradients" if unit.kind == "factors" else self._dense(unit)
        for unit in others:
            self._add(unit, [stack.gradients for stack in stacks], everything)

    def _formed(self, side: Side, found: Gradients, unit: Unit, c: int, rows: Tensor | None) -> Tensor | None:
        """Write the per-sample gradients of output c into rows (N, C, p), which are made where there are none."""
        if unit.kind == "factors":
            factors = self._factors(side, found, unit)
            part = None if factors is None else jacobian(factors, self._gram(unit.parameter).buffer)
        else:
            part = self._jacobian(side, found, unit, range(c, c + 1))
        if part is None:
            return rows
        if rows is None:
            rows = part.new_zeros(len(part), self._outputs, *part.shape[2:])
        rows[:, c] = part[:, 0]
        return rows

    def _add_rows(self, unit: Unit, rows: list[Tensor | None], classes: range) -> None:
        """Contract per-sample gradients, (N, C', p) or (N, C', R, Q)."""
        if any(r is None for r in rows):
            return
        if self._scale:
            root = self._weight(unit) if unit.kind == "factors" else self._scale[unit.parameter]
            rows = [None if r is None or root is None else r * root for r in rows]
        left, *right = (None if r is None else r.flatten(2) for r in rows)
        assert left is not None
        self._gram(unit.parameter).rows(left, right[0] if right else None, slice(classes.start, classes.stop))

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

    def _add(self, unit: Unit, gradients: list[Gradients], classes: range) -> None:
        gram = self._gram(unit.parameter)
        chosen = slice(classes.start, classes.stop)
        if unit.kind == "factors":
            factors = [self._factors(side, g, unit) for side, g in zip(self._sides, gradients, strict=True)]
            if any(f is None for f in factors):
                return
            left, right = factors[0], factors[1] if len(factors) > 1 else None
            assert left is not None
            self._add_factors(unit, left, right, classes)
            return
        if unit.kind == "table":
            way = self._add_table(gram, unit, gradients, chosen)
        else:
            rows = [self._jacobian(s, g, unit, classes) for s, g in zip(self._sides, gradients, strict=True)]
            if any(r is None for r in rows):
                return
            self._add_rows(unit, rows, classes)
            way = self._dense(unit)
        self._routes[unit.parameter] = way

    def _dense(self, unit: Unit) -> str:
        return "per-sample gradients" if unit.parameter not in self._sides[0].attached else "rows"

    def _add_factors(self, unit: Unit, left: Factors, right: Factors | None, classes: range) -> None:
        """Contract a weight now, or with the gradients of several outputs once they are there: one long product."""
        single = left.sizes[1] == 1 and (right is None or right.sizes[1] == 1)
        several = single and self._layout == "trace" and len(classes) < self._outputs and 2 * left.channels <= INNER
        if several and not self._scale:
            key = (unit.parameter, left.uses)
            if key not in self._waiting:
                self._waiting[key] = Waiting(unit, left, right, self._outputs)
            waiting = self._waiting[key]
            waiting.hold(left, right, classes.start)
            if waiting.full:
                self._contract(unit, *waiting.taken())
            return
        self._contract(unit, left, right, slice(classes.start, classes.stop))

    def _contract(self, unit: Unit, left: Factors, right: Factors | None, classes: slice) -> None:
        made = self._made.setdefault((unit.parameter, left.uses, None if right is None else right.uses), {})
        way = contract(
            self._gram(unit.parameter),
            left,
            right,
            classes,
            ones=unit.bias is not None,
            weight=self._weight(unit),
            made=made,
        )
        self._routes[unit.parameter] = way
        if unit.bias is not None:
            self._routes[unit.bias] = way

    def _finish(self) -> None:
        """Contract what still waits for the gradients of further outputs."""
        for waiting in self._waiting.values():
            if waiting.held:
                self._contract(waiting.unit, *waiting.taken())
        self._waiting.clear()

    def _weight(self, unit: Unit) -> Tensor | None:
        if not self._scale:
            return None
        k, i = unit.uses[0]
        operation = self._sides[0].operations[k]
        source = operation.sources[i].value
        root = self._network.parameters[unit.parameter]
        diagonal = torch.empty_like(root, memory_format=torch.preserve_format).detach()
        if diagonal.stride() != root.stride():
            diagonal = torch.empty_strided(root.shape, root.stride(), dtype=root.dtype, device=root.device)
        diagonal.copy_(self._scale[unit.parameter].view(root.shape))
        offset = source.storage_offset() - root.storage_offset()
        return operation.matrix(i, diagonal.as_strided(source.shape, source.stride(), offset))

    def _factors(self, side: Side, gradients: Gradients, unit: Unit) -> Factors | None:
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
            uses=tuple(k for k, *_ in uses),
        )

    def _part(self, side: Side, k: int, operation: Matrix, g: Tensor) -> Factors:
        dtype, (n, t, q, r) = operation.dtype, operation.sizes()
        part = Factors(
            (n, t, q),
            r,
            len(g),
            gradient=lambda: operation.gradient(g).to(dtype),
            inputs=lambda: self._kept(side, k, operation.arranged_inputs),
            uses=(k,),
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
            self._keeps[k] = k in self._repeated and sum(self._promised.values()) + wanted <= _KEPT_BYTES
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

    def _add_table(self, gram: Gram, unit: Unit, gradients: list[Gradients], classes: slice) -> str:
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

    def _jacobian(self, side: Side, gradients: Gradients, unit: Unit, classes: range) -> Tensor | None:
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
                only = torch.zeros_like(y)
                only[n] = cotangent(side, c)[n]
                (g,) = torch.autograd.grad(y, root, only, retain_graph=True, allow_unused=True)
                if g is not None:
                    found[n, i] = g.to_dense().flatten()
        return found


def _trace(operation: Operation) -> tuple[Any, ...]:
    """Return what two batches must agree in to be contracted with each other."""
    views = isinstance(operation, Matrix)
    return (operation.name, *((s.parameters, s.geometry if views and s.exact else None) for s in operation.sources))


def _pulled(jacobian: Tensor, value: Tensor, root: Tensor) -> Tensor:
    """Carry gradients (N, C, size) of a derived tensor back to the parameter it was made from."""
    if value is root:
        return jacobian
    n, c, _ = jacobian.shape
    rows = jacobian.reshape(n * c, *value.shape).to(value.dtype)
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(value, root, rows, retain_graph=True, is_grads_batched=True, allow_unused=True)
    except RuntimeError:  # an operation without a batching rule
        each: list[Any] = [torch.autograd.grad(value, root, row, retain_graph=True, allow_unused=True) for row in rows]
        found = [None if any(part[0] is None for part in each) else torch.stack([part[0] for part in each])]
    if found[0] is None:  # made in one call with a tensor that comes from the parameter, but not from it
        return jacobian.new_zeros(n, c, root.numel())
    return found[0].reshape(n, c, -1).to(root.dtype)
