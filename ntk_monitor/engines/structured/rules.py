"""Which torch function is which kind of operation. A rule runs the function on aliases of its sources and records it.

Rules return NotImplemented when the call is of a form they do not know; `otherwise` then treats the function as
elementwise, as moving data, or as a black box to be computed again, and in the last resort leaves its sources attached.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.engines.structured.convolution import CONVOLUTIONS
from ntk_monitor.engines.structured.operations import Contraction, Elementwise, Local, Matrix, Table, Value, normalised
from ntk_monitor.engines.structured.tap import Rule, Source, Tap, _tensors


def _same(t: Tensor) -> Tensor:
    return t


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2)


def _sources(tap: Tap, *tensors: Any) -> list[Source]:
    return [s for t in tensors if (s := tap.source(t)) is not None]


def _needs_leaf(*tensors: Any) -> bool:
    """True when nothing else in a call requires a gradient, so that an alias must, or there is no graph to tap."""
    return not any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _linear(tap: Tap, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002 - torch's name
    if not tap.is_data(input) or tap.is_data(weight) or input.is_complex() or weight.dim() != 2:
        return NotImplemented
    leaf = _needs_leaf(input)
    y = F.linear(input, tap.alias(weight, leaf), tap.alias(bias, leaf))
    if not tap.is_data(bias):
        x = input.detach()
        known = tap.source(weight) is not None
        _record_matrix(tap, "linear", y, x, _sources(tap, weight, bias), (-1,), lambda: x, (_same, _same), known)
        return y
    return NotImplemented


def _record_matrix(
    tap: Tap,
    name: str,
    y: Tensor,
    x: Tensor,
    sources: list[Source],
    channels: tuple[int, ...],
    activations: Callable[[], Tensor],
    turns: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    weight: bool = True,
) -> None:
    matrix, back = turns
    operation = Matrix(
        name, sources, tap.out(y, channels), [x], activations=activations, matrix=matrix, back=back, weight=weight
    )
    tap.operations.append(operation)


def _matmul(tap: Tap, input: Tensor, other: Tensor) -> Any:  # noqa: A002 - torch's name
    if input.is_complex() or other.is_complex():
        return NotImplemented
    if tap.source(other) is not None and other.dim() == 2 and input.dim() >= 1:
        leaf = _needs_leaf(input)
        y, x = torch.matmul(input, tap.alias(other, leaf)), input.detach()
        _record_matrix(tap, "matmul", y, x, _sources(tap, other), (-1,), lambda: x, (_transposed, _transposed))
        return y
    if tap.source(input) is not None and input.dim() == 2 and other.dim() >= 2:
        leaf = _needs_leaf(other)
        y, x = torch.matmul(tap.alias(input, leaf), other), other.detach()
        _record_matrix(tap, "matmul", y, x, _sources(tap, input), (-2,), lambda: x.mT, (_same, _same))
        return y
    return NotImplemented


def _mm(tap: Tap, input: Tensor, mat2: Tensor, **options: Any) -> Any:  # noqa: A002 - torch's name
    return NotImplemented if options else _matmul(tap, input, mat2)


def _addmm(tap: Tap, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:  # noqa: A002
    plain = beta == 1 and alpha == 1 and tap.is_data(mat1) and tap.source(mat2) is not None
    if not plain or tap.is_data(input) or input.dim() != 1 or mat1.is_complex():
        return NotImplemented
    leaf = _needs_leaf(mat1)
    y, x = torch.addmm(tap.alias(input, leaf), mat1, tap.alias(mat2, leaf)), mat1.detach()
    turns = (_transposed, _transposed)
    _record_matrix(tap, "addmm", y, x, _sources(tap, mat2, input), (-1,), lambda: x, turns)
    return y


def _embedding(
    tap: Tap,
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or tap.source(weight) is None:
        return NotImplemented
    y = F.embedding(input, tap.alias(weight, leaf=True))
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    tap.operations.append(Table("embedding", _sources(tap, weight)[0], tap.out(y, (-1,)), input.detach(), padding_idx))
    return y


def _affine(
    tap: Tap,
    name: str,
    y: Tensor,
    x: Tensor,
    pair: tuple[Tensor | None, Tensor | None],
    standard: Callable[[], Tensor],
    per_channel: bool,
) -> Tensor:
    """Record y = standard · weight + bias, either of which may be missing."""
    weight, bias = pair
    sources = _sources(tap, weight, bias)
    shapes = [(s.value.shape[0], *[1] * (y.dim() - 2)) if per_channel else s.value.shape for s in sources]
    scaled = tap.source(weight) is not None

    made: list[Tensor] = []

    def slope(index: int, g: Tensor) -> Tensor:
        if not scaled or index > 0:
            return g
        if not made:
            made.append(standard())
        return g * made[0].to(g.dtype)

    tap.operations.append(Elementwise(name, sources, tap.out(y), [x], slope=slope, shapes=shapes))
    return y


def _layer_norm(
    tap: Tap,
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if not tap.is_data(input) or tap.is_data(weight) or tap.is_data(bias):
        return NotImplemented
    leaf, x = _needs_leaf(input), input.detach()
    shape = list(normalized_shape)
    y = F.layer_norm(input, shape, tap.alias(weight, leaf), tap.alias(bias, leaf), eps)
    options = (shape, None, None, eps)
    return _affine(tap, "layer_norm", y, x, (weight, bias), lambda: normalised(x, "layer_norm", options), False)


def _rms_norm(
    tap: Tap,
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if not tap.is_data(input) or tap.is_data(weight):
        return NotImplemented
    leaf, x, shape = _needs_leaf(input), input.detach(), list(normalized_shape)
    y = F.rms_norm(input, shape, tap.alias(weight, leaf), eps)
    return _affine(tap, "rms_norm", y, x, (weight, None), lambda: normalised(x, "rms_norm", (shape, eps)), False)


def _group_norm(
    tap: Tap,
    input: Tensor,  # noqa: A002 - torch's name
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not tap.is_data(input) or tap.is_data(weight) or tap.is_data(bias):
        return NotImplemented
    leaf, x = _needs_leaf(input), input.detach()
    y = F.group_norm(input, num_groups, tap.alias(weight, leaf), tap.alias(bias, leaf), eps)
    options = (num_groups, eps)
    return _affine(tap, "group_norm", y, x, (weight, bias), lambda: normalised(x, "group_norm", options), True)


def _instance_norm(
    tap: Tap,
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not tap.is_data(input) or tap.is_data(weight) or tap.is_data(bias):
        return NotImplemented
    if not use_input_stats:
        return _batch_norm(tap, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        return NotImplemented
    leaf, x = _needs_leaf(input), input.detach()
    y = F.instance_norm(input, None, None, tap.alias(weight, leaf), tap.alias(bias, leaf), True, momentum, eps)
    return _affine(tap, "instance_norm", y, x, (weight, bias), lambda: normalised(x, "instance_norm", (eps,)), True)


def _batch_norm(
    tap: Tap,
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None or not tap.is_data(input):
        return NotImplemented
    if tap.is_data(weight) or tap.is_data(bias):
        return NotImplemented
    # With fixed statistics it is x · s + t, whose backward pass is cheaper than that of the fused function.
    view, x = (1, -1, *[1] * (input.dim() - 2)), input.detach()
    mean, s = running_mean.detach().clone(), (running_var.detach() + eps).rsqrt()
    leaf = _needs_leaf(input)
    scale = s if weight is None else s * tap.alias(weight, leaf)
    shift = -mean * scale if bias is None else tap.alias(bias, leaf) - mean * scale
    if not leaf:
        y = torch.addcmul(shift.view(view).to(input.dtype), input, scale.view(view).to(input.dtype))
    else:
        y = torch.addcmul(shift.view(view), input.to(shift.dtype), scale.view(view))

    def standard() -> Tensor:
        return (x - mean.view(view)) * s.view(view)

    return _affine(tap, "batch_norm", y, x, (weight, bias), standard, True)


def _einsum(tap: Tap, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    plain = isinstance(equation, str) and "..." not in equation and "->" in equation and len(operands) == 2
    if not plain:
        return NotImplemented
    terms, result = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    which = 0 if tap.source(operands[0]) is not None else 1
    weight, data = operands[which], operands[1 - which]
    if tap.source(weight) is None or not tap.is_data(data) or weight.is_complex() or data.is_complex():
        return NotImplemented
    if any(len(set(part)) != len(part) for part in (*letters, result)):
        return NotImplemented
    aliases = [tap.alias(o, _needs_leaf(data)) for o in operands]
    y, x = torch.einsum(equation, *aliases), data.detach()

    def again(leaves: list[Tensor]) -> list[Tensor]:
        return [torch.einsum(equation, leaves[0], x) if which == 0 else torch.einsum(equation, x, leaves[0])]

    source, out = _sources(tap, weight)[0], tap.out(y)
    local = Local("einsum", [source], [out], [x], again=again)
    parts = (letters[1 - which], letters[which], result)
    tap.operations.append(Contraction("einsum", source, out, x, letters=parts, local=local))
    return y


def _prelu(tap: Tap, input: Tensor, weight: Tensor) -> Any:  # noqa: A002 - torch's name
    if tap.source(weight) is None or not tap.is_data(input):
        return NotImplemented
    x = input.detach()
    y = F.prelu(input, tap.alias(weight, _needs_leaf(input)))
    shape = (weight.numel(), *[1] * (x.dim() - 2)) if weight.numel() > 1 and x.dim() > 1 else (weight.numel(),)
    tap.operations.append(
        Elementwise(
            "prelu", _sources(tap, weight), tap.out(y), [x], slope=lambda _, g: g * x.clamp_max(0), shapes=[shape]
        )
    )
    return y


def _picked(tap: Tap, table: Tensor, ids: Any) -> Any:
    """Record `table[ids]`, an embedding by hand."""
    integers = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.dtype in (torch.bool, torch.uint8))
    if not integers or tap.source(table) is None or table.dim() != 2 or bool((ids < 0).any()):
        return NotImplemented
    y = tap.alias(table, leaf=True)[ids]
    tap.operations.append(Table("index", _sources(tap, table)[0], tap.out(y, (-1,)), ids.detach(), None))
    return y


RULES: dict[Any, Rule] = {
    Tensor.__getitem__: _picked,
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda tap, a, b: _matmul(tap, b, a),
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.einsum: _einsum,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    **CONVOLUTIONS,
}

_BROADCASTING = (
    "add sub subtract rsub mul multiply div divide true_divide pow maximum minimum where lerp addcmul addcdiv hypot "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ xlogy atan2 "
    "__div__ __rdiv__ float_power logaddexp copysign fmod remainder clamp clip clamp_min clamp_max"
).split()
_IN_PLACE = "add_ sub_ mul_ div_ pow_ lerp_ addcmul_ addcdiv_ __iadd__ __isub__ __imul__ __itruediv__".split()
_MOVING = "cat concat concatenate stack hstack vstack dstack column_stack row_stack".split()


def _named(names: Sequence[str]) -> frozenset[Any]:
    return frozenset(
        function
        for owner in (torch, Tensor, F)
        for name in names
        if (function := getattr(owner, name, None)) is not None
    )


_ELEMENTWISE, _ELEMENTWISE_IN_PLACE, _MOVES = _named(_BROADCASTING), _named(_IN_PLACE), _named(_MOVING)


def otherwise(tap: Tap, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a function without a rule, or run it with its sources attached."""
    tensors = list(_tensors((args, kwargs)))
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
    if not tap.moves or any(_tied_to_samples(s.value) is False for s in _sources(tap, *_tensors((args, kwargs)))):
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
    wanted = [i for i, t in enumerate(_tensors(results)) if t.requires_grad]

    def again(leaves: list[Tensor]) -> list[Tensor]:
        fa, fk = _filled(frozen, leaves)
        found = list(_tensors(func(*fa, **fk)))
        return [found[i] for i in wanted]

    if wanted:
        # Copies: one output may be computed from another (a cell's hidden state from its cell state), and the gradient
        # of the original would then count that path again.
        results = _replaced(results, lambda t: t.clone() if t.requires_grad else t)
        found = list(_tensors(results))
        outs = [tap.out(found[i]) for i in wanted]
        tap.operations.append(Local(getattr(func, "__name__", str(func)), sources, outs, kept, again=again))
    return results
