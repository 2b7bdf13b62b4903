"""Functions without a rule of their own: elementwise, moving data, or a black box to be computed again.

In the last resort a function runs with its sources attached; their rows take passes of the whole network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.engines.structured.operations import Elementwise, Local, Value
from ntk_monitor.engines.structured.tap import Source, Tap, sources_of, tensors_of

_BROADCASTING = """
    add sub subtract rsub mul multiply div divide true_divide pow maximum minimum where lerp addcmul addcdiv hypot xlogy
    atan2 float_power logaddexp copysign fmod remainder clamp clip clamp_min clamp_max __add__ __radd__ __sub__ __rsub__
    __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __div__ __rdiv__
"""
_IN_PLACE = "add_ sub_ mul_ div_ pow_ lerp_ addcmul_ addcdiv_ __iadd__ __isub__ __imul__ __itruediv__"
_MOVING = "cat concat concatenate stack hstack vstack dstack column_stack row_stack"


def _named(names: str) -> frozenset[Any]:
    """Return the torch functions and methods of these names."""
    found = (getattr(owner, name, None) for owner in (torch, Tensor, F) for name in names.split())
    return frozenset(function for function in found if function is not None)


_ELEMENTWISE, _ELEMENTWISE_IN_PLACE, _MOVES = _named(_BROADCASTING), _named(_IN_PLACE), _named(_MOVING)


def otherwise(tap: Tap, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a function without a rule, or run it with its sources attached."""
    tensors = list(tensors_of((args, kwargs)))
    if any(t.is_complex() or t.is_sparse for t in tensors):
        return func(*args, **kwargs)
    if func in _ELEMENTWISE:
        return _elementwise(tap, func, args, kwargs)
    if func in _ELEMENTWISE_IN_PLACE:
        first = args[0]
        free = tap.is_data(first) and first._base is None and not (first.is_leaf and first.requires_grad)
        return _elementwise(tap, func, args, kwargs) if free else func(*args, **kwargs)
    if func in _MOVES:
        return _moved(tap, func, args, kwargs)
    # What ends in an underscore writes into its arguments.
    writes = getattr(func, "__name__", "_").endswith("_") and func not in (Tensor.__getitem__, Tensor.__rmatmul__)
    return func(*args, **kwargs) if writes or "out" in kwargs else _local(tap, func, args, kwargs)


def _replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _replaced(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_replaced(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _frozen(tap: Tap, args: Any, in_place: bool = False) -> tuple[Any, list[Source], list[Tensor]]:
    """Return the arguments with data detached and sources as placeholders, the sources, and the data kept."""
    sources: list[Source] = []
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Any:
        source = tap.source(t)
        if source is None:
            detached = t.detach().clone() if in_place else t.detach()
            kept.append(detached)
            return detached
        if source not in sources:
            sources.append(source)
        return _Place(sources.index(source))

    return _replaced(args, keep), sources, kept


class _Place:
    """Stands where the alias of a source goes."""

    def __init__(self, index: int) -> None:
        self.index = index


def _filled(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, _Place):
        return leaves[value.index]
    if isinstance(value, dict):
        return {key: _filled(item, leaves) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_filled(item, leaves) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _elementwise(tap: Tap, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    in_place = func in _ELEMENTWISE_IN_PLACE
    frozen, sources, kept = _frozen(tap, (args, kwargs), in_place)
    a, k = _replaced((args, kwargs), lambda t: tap.alias(t, leaf=True))
    y = func(*a, **k)
    if not isinstance(y, Tensor) or not y.requires_grad:
        return y
    shape = y.shape

    def slope(index: int, g: Tensor) -> Tensor:
        leaves = [s.value.detach() for s in sources]
        with torch.enable_grad():
            leaves[index] = leaves[index].expand(shape).clone().requires_grad_()
            fa, fk = _filled(frozen, leaves)
            again = func(fa[0].clone(), *fa[1:], **fk) if in_place else func(*fa, **fk)
            ones = [torch.autograd.grad(again, leaves[index], row, retain_graph=True)[0] for row in g.to(again.dtype)]
        return torch.stack(ones)

    name = getattr(func, "__name__", "elementwise").strip("_")
    tap.operations.append(Elementwise(name, sources, tap.out(y), [] if in_place else kept, slope=slope))
    return y


def _moved(tap: Tap, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tap the sources themselves: each element of one that was expanded over the samples belongs to one of them."""
    sources = sources_of(tap, *tensors_of((args, kwargs)))
    apart = tap.samples == 1 or all(_tied_to_samples(s.value) for s in sources)
    if not tap.moves or not apart:
        return func(*args, **kwargs)

    def tapped(t: Tensor) -> Tensor:
        source = tap.source(t)
        if source is None:
            return t
        alias = t.detach().requires_grad_()
        value = alias.view_as(alias)
        tap.operations.append(Value(getattr(func, "__name__", "value"), source, tap.out(value)))
        return value

    return func(*_replaced(args, tapped), **_replaced(kwargs, tapped))


def _tied_to_samples(t: Tensor) -> bool:
    """False for a tensor that shows no element twice: it was not expanded, so all samples share it."""
    return any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True))


def _local(tap: Tap, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    frozen, sources, kept = _frozen(tap, (args, kwargs))
    versions = [t._version for t in kept]
    # Leaves, because a result may depend on the source alone although data was passed too.
    a, k = _replaced((args, kwargs), lambda t: tap.alias(t, leaf=True))
    results = func(*a, **k)
    if versions != [t._version for t in kept]:
        return results
    wanted = [i for i, t in enumerate(tensors_of(results)) if t.requires_grad]

    def again(leaves: list[Tensor]) -> list[Tensor]:
        fa, fk = _filled(frozen, leaves)
        found = list(tensors_of(func(*fa, **fk)))
        return [found[i] for i in wanted]

    if wanted:
        # Copies: one output may be computed from another (a cell's hidden state from its cell state), and the gradient
        # of the original would then count that path again.
        results = _replaced(results, lambda t: t.clone() if t.requires_grad else t)
        found = list(tensors_of(results))
        outs = [tap.out(found[i]) for i in wanted]
        tap.operations.append(Local(getattr(func, "__name__", str(func)), sources, outs, kept, again=again))
    return results
