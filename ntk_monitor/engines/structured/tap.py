"""The tap: one ordinary forward pass, watched by a `TorchFunctionMode`, in which every use of a parameter is recorded.

Inside a recognised operation the parameter is replaced by a detached alias, so that no weight gradient is computed;
the operation's inputs and the gradient edge of its output are kept. (An edge survives in-place operations on the
output, the tensor would not.) Tensors computed from parameters alone (transposed, split, normalised weights) are
*derived*: recorded in the place of the parameters that they come from. What is not recognised keeps its parameter
attached, and `reached` finds it in the graph afterwards: a use is either recorded or known to be missed.
"""

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ntk_monitor.engines.structured.samples import Layout
from ntk_monitor.errors import NTKMonitorError


class UnfollowedError(NTKMonitorError):
    """The structured engine cannot be exact on this network; the message says why. Another engine takes over."""


@dataclass(slots=True, eq=False)
class Source:
    """A parameter, or a tensor made from parameters alone, that enters operations.

    Attributes:
        value: the tensor, with its graph back to the parameters.
        parameters: names of the parameters it comes from.
        exact: it is that one parameter, or a view of it in which no element appears twice.
    """

    value: Tensor
    parameters: tuple[str, ...]
    exact: bool

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Which elements of its storage it shows, in which order."""
        v = self.value
        return (v.storage_offset(), tuple(v.shape), tuple(v.stride()))

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last element of its storage that it shows."""
        v = self.value
        reach = sum(stride * (size - 1) for stride, size in zip(v.stride(), v.shape, strict=True))
        return int(v.storage_offset()), int(v.storage_offset() + reach)


@dataclass(slots=True, eq=False)
class Out:
    """One output of an operation: where its gradient arrives, and where the samples are in it."""

    edge: GradientEdge
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    layout: Layout | None = None

    @property
    def positions(self) -> int:
        """How many axes are positions."""
        return len(self.shape) - len(self.channels)

    def arranged(self, g: Tensor, lead: int = 1) -> Tensor:
        """Return a gradient (C, *shape) as (N, C, T, *channels)."""
        assert self.layout is not None
        order = list(range(lead))
        order += [lead + d for d in range(len(self.shape)) if d not in self.channels]
        return self.layout.arranged(g.permute(order + [lead + d for d in self.channels]), lead, self.positions)


class Operation:
    """One recorded operation. Subclasses know how parameters enter it.

    Attributes:
        name: of the function, for the plan.
        sources: what enters it in the place of weights.
        outs: its differentiable outputs.
    """

    def __init__(self, name: str, sources: list[Source], outs: list[Out], kept: Iterable[Tensor] = ()) -> None:
        self.name, self.sources, self.outs = name, sources, outs
        self._kept = [(t, t._version) for t in kept]

    def check(self) -> None:
        """Refuse inputs that were overwritten after they were used."""
        if any(t._version != version for t, version in self._kept):
            raise UnfollowedError(f"an input of {self.name} was overwritten in place after it was used")

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source) from gradients (C, *shape) of the outputs."""
        raise NotImplementedError

    def matrix(self, index: int, value: Tensor) -> Tensor:
        """Return a tensor of the source's shape as the matrix (R, Q) that its inputs are multiplied by."""
        raise NotImplementedError


Rule = Callable[..., Any]
"""(tap, *arguments of the function) → its result after recording, or NotImplemented when it does not apply."""


class Tap(TorchFunctionMode):
    """Records where parameters enter. `rules` maps torch functions to what to do; `otherwise` is asked for the rest."""

    def __init__(self, parameters: Mapping[str, Tensor], rules: Mapping[Any, Rule], otherwise: Rule) -> None:
        super().__init__()
        self._rules, self._otherwise = rules, otherwise
        self._sources: dict[int, Source] = {id(p): Source(p, (name,), True) for name, p in parameters.items()}
        self._storages = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self._marked: dict[int, weakref.ref[Tensor]] = {}
        self.operations: list[Operation] = []
        self.moves, self.samples = True, 0
        self._views: list[tuple[Tensor, int]] = []

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that depend on the samples."""
        for t in tensors:
            self._marked[id(t)] = weakref.ref(t)

    def source(self, t: Any) -> Source | None:
        """Return the source behind a tensor, or None."""
        found = self._sources.get(id(t)) if isinstance(t, Tensor) else None
        return found if found is not None and found.value is t else None

    def is_data(self, t: Any) -> bool:
        """True for a tensor that depends on the samples, or on unrecorded parameters."""
        if not isinstance(t, Tensor) or self.source(t) is not None:
            return False
        mark = self._marked.get(id(t))
        return t.requires_grad or (mark is not None and mark() is t)

    def alias(self, t: Any, leaf: bool = False) -> Any:
        """Return a source's values cut off from its graph (with `leaf` requiring a gradient itself); else `t`."""
        if self.source(t) is None:
            return t
        value = t.detach()
        return value.requires_grad_() if leaf else value

    def out(self, y: Tensor, channels: Iterable[int] = ()) -> Out:
        """Return the record of an output tensor.

        An in-place operation on a view would cut the view's own node out of the graph; its base's node stays.
        """
        shape, channels = tuple(y.shape), tuple(c % y.dim() for c in channels)
        base = y._base
        if base is None:
            return Out(get_gradient_edge(y), shape, channels)
        whole = base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous() and not base.is_leaf
        if not whole:
            self._views.append((y, y._version))
        return Out(get_gradient_edge(base if whole else y), shape, channels)

    def check(self) -> None:
        """Refuse inputs and tapped views that were overwritten after they were used."""
        for operation in self.operations:
            operation.check()
        if any(y._version != version for y, version in self._views):
            raise UnfollowedError("a view that parameters enter was overwritten in place")

    def __torch_function__(
        self, func: Any, types_: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(tensors_of((args, kwargs)))
        if func in _SECOND_ORDER:
            raise UnfollowedError("the forward pass takes gradients itself, through which parameters act unseen")
        sources = [t for t in tensors if self.source(t) is not None]
        data = [t for t in tensors if self.is_data(t)]
        if not sources or not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            if data:
                self.mark(tensors_of(result))
            return result
        _refuse(tensors)
        if func is F.multi_head_attention_forward:
            with self:
                return _OPENED_ATTENTION(*args, **kwargs)
        if not data or func in _SHAPED_LIKE or (func is Tensor.__getitem__ and self._selects(args)):
            return self._derived(func(*args, **kwargs), sources)
        result = NotImplemented
        if (rule := self._rules.get(func)) is not None:
            result = rule(self, *args, **kwargs)
        if result is NotImplemented:
            result = self._otherwise(self, func, args, kwargs)
        self.mark(tensors_of(result))
        return result

    def _selects(self, args: tuple[Any, ...]) -> bool:
        """True for table[i] with a single number i that was computed from data: one expert of several, say."""
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return self.source(args[0]) is not None and all(
            i.dim() == 0 and not i.is_floating_point() and i.dtype != torch.bool for i in index if isinstance(i, Tensor)
        )

    def _derived(self, result: Any, sources: list[Tensor]) -> Any:
        names = tuple(dict.fromkeys(n for t in sources for n in self._sources[id(t)].parameters))
        for t in tensors_of(result):
            if t.requires_grad and id(t) not in self._sources:
                self._sources[id(t)] = Source(t, names, self._is_view(t))
        return result

    def _is_view(self, t: Tensor) -> bool:
        """True for a view of one parameter that shows every element at most once."""
        if t.is_sparse or t.is_neg() or t.is_conj() or t.untyped_storage().data_ptr() not in self._storages:
            return False
        reach = 0
        for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
            if size > 1 and stride <= reach:
                return False
            reach += stride * (size - 1)
        return True


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nest of arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)


def sources_of(tap: Tap, *tensors: Any) -> list[Source]:
    """Return the sources among some arguments, in order."""
    return [s for t in tensors if (s := tap.source(t)) is not None]


def needs_leaf(*tensors: Any) -> bool:
    """True when nothing else in a call requires a gradient, so that an alias must, or there is no graph to tap."""
    return not any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _refuse(tensors: list[Tensor]) -> None:
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise UnfollowedError("the forward pass uses torch.func transforms, inside which parameters act unseen")
    if _checkpointing():
        raise UnfollowedError("activation checkpointing computes operations again during the backward pass")


def _checkpointing() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = top(False) if top is not None else None
    return hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")


def _opened(function: Any) -> types.FunctionType:
    """Return the function without its own check for overrides, so that the operations inside it are seen."""
    globals_ = {
        **function.__globals__,
        **{n: lambda *_: False for n in function.__globals__ if n.startswith("has_torch_function")},
    }
    return types.FunctionType(
        function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
    )


_OPENED_ATTENTION = _opened(F.multi_head_attention_forward)
_OPENED_ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
_SHAPED_LIKE = frozenset({Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as})
"""Functions that take only the shape or dtype of their second argument."""

_SECOND_ORDER = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})


def reached(y: Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters that gradients of y still reach: their uses were not (all) recorded."""
    names = {id(p): name for name, p in parameters.items()}
    stack, seen, found = [y.grad_fn], set(), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            found.add(name)
        stack.extend(parent for parent, _ in node.next_functions)
    return [name for name in parameters if name in found]
