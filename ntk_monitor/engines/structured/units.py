"""Units: which uses of parameters are contracted together, and by which of the ways there are."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ntk_monitor.engines.structured.operations import Matrix, Table
from ntk_monitor.engines.structured.recording import Side
from ntk_monitor.engines.structured.samples import Axis
from ntk_monitor.engines.structured.tap import Operation, Source
from ntk_monitor.network import Network


@dataclass(slots=True)
class Unit:
    """Parameters contracted together: one weight by its factors, or one parameter by its per-sample gradients."""

    parameter: str
    uses: list[tuple[int, int]]
    """(operation, index of the source in it)"""
    kind: str
    bias: str | None = None


def units_of(network: Network, sides: list[Side], group: Callable[[str], str], *, weighted: bool) -> list[Unit]:
    """Decide, from what was recorded, how each parameter is contracted; `weighted`: under a preconditioner."""
    uses: dict[str, list[tuple[int, int]]] = {}
    for k, operation in enumerate(sides[0].operations):
        for i, source in enumerate(operation.sources):
            for name in source.parameters:
                uses.setdefault(name, []).append((k, i))
    attached = {name for side in sides for name in side.attached}
    units = []
    for name in network.parameters:
        if name in attached:
            units.append(Unit(name, uses.get(name, []), "dense"))
        elif name in uses:
            units += _split(network, sides[0], name, uses[name], weighted)
    return units if weighted else _with_biases(units, sides, group)


def _split(network: Network, side: Side, name: str, uses: list[tuple[int, int]], weighted: bool) -> list[Unit]:
    """Return what is contracted for one parameter: together, unless its uses are of disjoint parts of it."""
    operations = side.operations
    parts = [(operations[k], operations[k].sources[i], i) for k, i in uses]
    if not all(source.exact for _, source, _ in parts):
        return [Unit(name, uses, "dense")]
    if all(isinstance(o, Matrix) and o.is_weight(i) and o.groups == 1 for o, _, i in parts):
        groups: dict[Any, list[tuple[int, int]]] = {}
        spans = {}
        for use, (operation, source, i) in zip(uses, parts, strict=True):
            key = _key(operation, source, i)
            groups.setdefault(key, []).append(use)
            spans[key] = source.span
        ordered = sorted(spans.values())
        if all(left[1] < right[0] for left, right in pairwise(ordered)):
            return [Unit(name, group, "factors") for group in groups.values()]
    table, source, _ = parts[0]
    whole = len(parts) == 1 and source.value.numel() == network.parameters[name].numel()
    return [Unit(name, uses, "table" if isinstance(table, Table) and whole and not weighted else "dense")]


def _with_biases(units: list[Unit], sides: list[Side], group: Callable[[str], str]) -> list[Unit]:
    """Let a bias share the contraction of its weight where there is one position per sample."""
    by_use = {unit.uses[0]: unit for unit in units if unit.kind == "dense" and len(unit.uses) == 1}
    taken: set[str] = set()
    for unit in units:
        if unit.kind != "factors" or len(unit.uses) != 1:
            continue
        k, i = unit.uses[0]
        operation, out = sides[0].operations[k], sides[0].operations[k].outs[0]
        bias = by_use.get((k, 1)) if i == 0 else None
        single = all(
            s.operations[k].outs[0].layout == Axis(0, len(s.y)) and s.operations[k].outs[0].shape[:-1] == (len(s.y),)
            for s in sides
        )
        whole = bias is not None and operation.sources[1].exact and operation.sources[1].value.dim() == 1
        if bias is None or not (whole and single and out.channels == (1,)):
            continue
        if group(bias.parameter) == group(unit.parameter):
            unit.bias = bias.parameter
            taken.add(bias.parameter)
    return [unit for unit in units if unit.parameter not in taken]


def _key(operation: Operation, source: Source, index: int) -> tuple[Any, ...]:
    """Return what two uses of a weight must share for their positions to be put behind each other."""
    value = source.value.detach()
    matrix = operation.matrix(index, value)
    if matrix.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
        return (matrix.storage_offset(), tuple(matrix.shape), tuple(matrix.stride()))
    return (operation.name, *source.geometry)
