"""What the full kernel holds until the gradients of all outputs are there, since each meets each: the least there is.

N samples, C outputs. Of an operation these are the gradients of its results, or the per-sample gradients (N, C, p) of
its parameters, which are far smaller where few parameters act at many positions: the first convolutions of a network,
scales and biases. Decided from shapes alone, so that the limit on memory is known before a backward pass.
"""

import math
from collections.abc import Sequence

import torch

from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.structured.costs import Sizes, route
from ntk_monitor.engines.structured.operations import Matrix
from ntk_monitor.engines.structured.recording import Side
from ntk_monitor.engines.structured.units import Unit
from ntk_monitor.network import Network

STACKED_BYTES = 2**20
"""Gradients of all outputs are treated together below this size."""


def parted(units: Sequence[Unit], side: Side, network: Network, work: torch.dtype) -> tuple[list[Unit], list[Unit]]:
    """Return the units whose per-sample gradients are formed output by output and held, and the others."""
    lean = [_lean(unit, side, network, work) for unit in units]
    kept = places([unit for unit, few in zip(units, lean, strict=True) if not few])
    formed: list[Unit] = []
    others: list[Unit] = []
    for unit, few in zip(units, lean, strict=True):
        # What is held for another unit anyway can as well serve this one, in fewer calls.
        (formed if few and not places([unit]) <= kept else others).append(unit)
    return formed, others


def places(units: Sequence[Unit]) -> set[int]:
    """Return the operations that units enter."""
    return {k for unit in units for k, _ in unit.uses}


def needed(side: Side, layout: Layout, units: Sequence[Unit], network: Network, work: torch.dtype) -> int:
    """Return the bytes of gradients that are held at a time."""
    one = of_one_output(side)
    if layout != "full":
        return 2 * one
    formed, others = parted(units, side, network, work)
    samples, outputs = side.y.shape
    rows = samples * sum(_width(unit, side, network) for unit in formed)
    elements = rows + sum(_results(side, k) for k in places(others))
    # The sample map compares the gradients of two passes before anything is held.
    return max(2 * one, one + outputs * elements * side.y.element_size())


def of_one_output(side: Side) -> int:
    """Return the bytes of the gradients of all operations for one output."""
    return side.y.element_size() * sum(_results(side, k) for k in range(len(side.operations)))


def small(side: Side) -> bool:
    """Whether gradients of all outputs are so small that they are treated together, for the sake of few calls."""
    return of_one_output(side) * (side.y.shape[1] + 1) <= STACKED_BYTES


def _lean(unit: Unit, side: Side, network: Network, work: torch.dtype) -> bool:
    if unit.kind == "table" or unit.bias is not None or not unit.uses:
        return False
    results = sum(_results(side, k) for k in places([unit]))
    if len(side.y) * _width(unit, side, network) >= results:
        return False
    return unit.kind != "factors" or _by_rows(unit, side, results, work)


def _by_rows(unit: Unit, side: Side, results: int, work: torch.dtype) -> bool:
    """Whether per-sample gradients are also what the weight is best contracted from."""
    k, i = unit.uses[0]
    operation = side.operations[k]
    assert isinstance(operation, Matrix)
    (r, q), (n, c) = operation.matrix(i, operation.sources[i].value.detach()).shape, side.y.shape
    t = max(1, results // (n * r))
    return route(Sizes(n, n, c, t, t, q, r, c), "full", work, True) == "gradients"


def _width(unit: Unit, side: Side, network: Network) -> int:
    """Return the parameters of a unit."""
    if unit.kind != "factors":
        return network.parameters[unit.parameter].numel()
    k, i = unit.uses[0]
    return side.operations[k].sources[i].value.numel()


def _results(side: Side, k: int) -> int:
    return sum(math.prod(out.shape) for out in side.operations[k].outs)
