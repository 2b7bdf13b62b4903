"""One batch, recorded: a forward pass under the tap, and the samples found in every operation's output."""

import contextlib
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size, tensors
from ntk_monitor.engines.structured import samples
from ntk_monitor.engines.structured.operations import Matrix, Value
from ntk_monitor.engines.structured.otherwise import otherwise
from ntk_monitor.engines.structured.rules import RULES
from ntk_monitor.engines.structured.tap import Operation, Tap, UnfollowedError, reached
from ntk_monitor.network import Network

Gradients: TypeAlias = list[list[Tensor | None]]
"""By operation and by result of it."""


class CoupledError(UnfollowedError):
    """Samples of the batch depend on each other, so there is no per-sample gradient inside an operation."""


@dataclass(slots=True)
class Side:
    """One batch: its outputs, what was recorded, and which parameters were missed."""

    y: Tensor
    operations: list[Operation]
    attached: list[str]
    kept: dict[int, Any] = field(default_factory=dict)
    basis: Tensor | None = None
    """Orthonormal basis of the outputs that stands in their place, (C, C)."""
    gradients: Gradients = field(default_factory=list)


def recorded(network: Network, inputs: Batch, *, values: bool = True) -> Side:
    """Run the network once under the tap.

    Raises:
        UnfollowedError: the forward pass does what interception cannot see through.
    """
    tap = Tap(network.parameters, RULES, otherwise)
    tap.moves, tap.samples = values, size(inputs)
    tap.mark(tensors(inputs))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # a function compiled by the user would be compiled again under the tap
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(tap)
        y = network.outputs(inputs)
    tap.check()
    if any(p.is_complex() for p in network.parameters.values()):
        raise UnfollowedError("complex parameters")
    attached = reached(y, network.parameters) if y.requires_grad else []
    return Side(y, tap.operations, attached)


def located(side: Side, *, rotate: bool = False) -> None:
    """Find the samples in every operation's output; forget operations that the outputs do not depend on.

    Two backward passes for a combination of all outputs: a single output may not reach every position. With one output
    the first pass is kept for the kernel. With `rotate` it is kept too, as the first vector of an orthonormal basis of
    the outputs, in any of which a trace kernel is the same.

    Raises:
        CoupledError: samples depend on each other.
    """
    y = side.y
    if not y.requires_grad:
        side.operations = []
        return
    basis = _basis(y)
    u = basis[0].expand_as(y)
    first = backward(side, u)
    if len(y) == 1:
        for operation in side.operations:
            for out in operation.outs:
                places = [s for d, s in enumerate(out.shape) if d not in out.channels]
                out.layout = samples.Axis(0, 1) if places else samples.everything(places, y.device)
    else:
        _lay_out(side, u, first)
    if rotate or y.shape[1] == 1:
        side.basis, side.gradients = basis, first


def _basis(y: Tensor) -> Tensor:
    """Return an orthonormal basis (C, C) whose first vector has no zero: a Householder reflection."""
    outputs = y.shape[1]
    if outputs == 1:
        return y.detach().new_ones(1, 1)
    generator = torch.Generator().manual_seed(1)
    v = torch.rand(outputs, generator=generator, dtype=torch.float64) + 0.5
    v = v * torch.where(torch.arange(outputs) % 2 == 0, -1.0, 1.0) / v.norm()
    w = v.clone()
    w[0] -= 1
    w = w / w.norm()
    basis: Tensor = torch.eye(outputs, dtype=torch.float64) - 2 * w[:, None] * w
    return basis.to(y.device, y.dtype)


def _lay_out(side: Side, u: Tensor, first: Gradients) -> None:
    # The narrowest dtype inside decides how many powers of two there are.
    half = any(g is not None and g.dtype == torch.float16 for part in first for g in part)
    dtype = torch.float16 if half else side.y.dtype
    base = samples.base(dtype)

    def scaled(digit: int | None = None) -> Tensor:
        return samples.scales(len(u), dtype, u.device, digit).to(u.dtype)

    scale = scaled()
    second = backward(side, scale[:, None] * u)
    passes: list[Gradients] = []
    for k, operation in enumerate(side.operations):
        for j, out in enumerate(operation.outs):
            a, b = first[k][j], second[k][j]
            if a is None or b is None or not a.numel():
                continue
            out.layout = samples.axis_layout(a, b, out.channels, scale)
            if out.layout is None:
                if not passes:
                    count = samples.digits(len(scale), base)
                    passes = [backward(side, scaled(digit)[:, None] * u) for digit in range(count)]
                one = [found for p in passes if (found := p[k][j]) is not None]
                out.layout = samples.owners(a, one, out.channels, len(scale), base)
            if out.layout is None:
                name = ", ".join(dict.fromkeys(p for s in operation.sources for p in s.parameters))
                kind = SharedValueError if isinstance(operation, Value) else CoupledError
                raise kind(f"samples of the batch depend on each other in {operation.name} ({name})")
            if isinstance(operation, Matrix):
                operation.narrowed(a)
        second[k] = []


class SharedValueError(UnfollowedError):
    """A tapped source is shared by the samples; its parameters have to stay attached."""


def backward(side: Side, cotangent: Tensor) -> Gradients:
    """Return the gradient of every output of every operation for one cotangent (N, C)."""
    edges = [out.edge for operation in side.operations for out in operation.outs]
    if not edges:
        return []
    found: Iterator[Tensor | None] = iter(
        torch.autograd.grad(side.y, edges, cotangent, retain_graph=True, allow_unused=True)
    )
    return [
        [None if (g := next(found)) is None else g.reshape(out.shape) for out in operation.outs]
        for operation in side.operations
    ]


def single(side: Side, c: int) -> Gradients:
    """Return gradients (1, *shape) for output c, or vector c of the basis; empty operations have none."""
    ready, side.gradients = (side.gradients, []) if c == 0 else ([], side.gradients)
    found = ready or backward(side, cotangent(side, c))
    return [
        [
            None if g is None or out.layout is None or not g.numel() else g[None]
            for g, out in zip(part, o.outs, strict=True)
        ]
        for part, o in zip(found, side.operations, strict=True)
    ]


class Stack:
    """Gradients (C', *shape) of several outputs, put behind each other as they come; zero where one has none."""

    def __init__(self, side: Side, outputs: int, places: Collection[int]) -> None:
        self.gradients: Gradients = [[None] * len(operation.outs) for operation in side.operations]
        self._outputs, self._places = outputs, places

    def add(self, found: Gradients, i: int) -> None:
        """Copy the gradients of the i-th output at the chosen operations."""
        for k in self._places:
            for j, g in enumerate(found[k]):
                if g is None:
                    continue
                stack = self.gradients[k][j]
                if stack is None:
                    stack = self.gradients[k][j] = g.new_zeros(self._outputs, *g.shape[1:])
                stack[i] = g[0]


def stacked(side: Side, classes: range) -> Gradients:
    """Return gradients (C', *shape) for these outputs, or vectors of the basis; empty operations have none."""
    if len(classes) == 1:
        return single(side, classes.start)
    stack = Stack(side, len(classes), range(len(side.operations)))
    for i, c in enumerate(classes):
        stack.add(single(side, c), i)
    return stack.gradients


def cotangent(side: Side, c: int) -> Tensor:
    """Return what is propagated for output c, (N, C)."""
    if side.basis is not None:
        return side.basis[c].expand_as(side.y)
    found = torch.zeros_like(side.y)
    found[:, c] = 1
    return found
