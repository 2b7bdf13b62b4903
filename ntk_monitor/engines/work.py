"""What one forward pass computes, operation by operation below autograd: multiply-adds, bytes of results, calls.

The work of a backward pass follows from it: one product for each factor that a gradient goes to.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds by kind, bytes of results, and calls."""

    matmul: float = 0.0
    convolution: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matmul + other.matmul,
            self.convolution + other.convolution,
            self.bytes + other.bytes,
            self.calls + other.calls,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of the forward pass, below autograd.

    Attributes:
        work: of the operation itself.
        data, weights: how many of its factors are activations, or parameters, that gradients go to.
        follows: it depends on activations that gradients go to.
        storages: of its arguments.
    """

    work: Work
    data: int
    weights: int
    follows: bool
    storages: frozenset[int]


class Meter(TorchDispatchMode):
    """Counts the operations of a forward pass."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {_storage(p) for p in parameters.values()}
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = frozenset(map(_storage, given))
        view = not func._schema.is_mutable and any(_storage(t) in storages for t in made)
        written = 0 if view else sum(t.numel() * t.element_size() for t in made)
        products = _multiply_adds(packet, args, kwargs, result)
        convolution = "conv" in str(packet)
        work = Work(0 if convolution else products, products if convolution else 0, written, 0 if view else 1)
        data = [t for t in given if t.requires_grad and _storage(t) not in self._parameters]
        weights = [t for t in given if _storage(t) in self._parameters]
        self.steps.append(
            Step(work, sum(t.dim() >= 2 for t in data), sum(t.dim() >= 2 for t in weights), bool(data), storages)
        )
        return result

    def forward(self) -> Work:
        """Return the work of the forward pass."""
        return sum((s.work for s in self.steps), Work())

    def backward(self, *, weights: bool, steps: Sequence[Step] | None = None) -> Work:
        """Return the work of one backward pass to the activations, and to the weights."""
        total = Work()
        for s in self.steps if steps is None else steps:
            count = s.data + (s.weights if weights else 0)
            follows = s.follows or (weights and s.weights > 0)
            total += Work(
                count * s.work.matmul,
                count * s.work.convolution,
                s.work.bytes * follows,
                s.work.calls * follows * (1 + (weights and s.weights > 0)),
            )
        return total

    def between(self, tensors: Sequence[Tensor]) -> list[Step]:
        """Return the operations from the first to the last that these tensors enter."""
        storages = {_storage(t) for t in tensors}
        where = [i for i, s in enumerate(self.steps) if s.storages & storages]
        return self.steps[where[0] : where[-1] + 1] if where else []


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or inside a transform
        return id(t)


def _multiply_adds(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result)) / 2
    # Two operations of the CPU that torch does not count.
    if "scaled_dot_product" in str(packet):
        query, key, value = args[:3]
        return float(query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * value.shape[-2:].numel())
    if "mkldnn_rnn_layer" in str(packet):
        return float(math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel()))
    return 0.0
