"""Which torch function is which kind of operation. A rule runs the function on aliases of its sources and records it.

Rules return NotImplemented when the call is of a form they do not know; module `otherwise` then takes over.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.engines.structured.convolution import CONVOLUTIONS
from ntk_monitor.engines.structured.norms import NORMALISATIONS
from ntk_monitor.engines.structured.operations import Contraction, Elementwise, Local, Matrix, Table
from ntk_monitor.engines.structured.tap import Rule, Source, Tap, needs_leaf, sources_of


def _same(t: Tensor) -> Tensor:
    return t


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2)


def _linear(tap: Tap, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002 - torch's name
    if not tap.is_data(input) or tap.is_data(weight) or input.is_complex() or weight.dim() != 2:
        return NotImplemented
    if tap.is_data(bias) or (bias is not None and bias.shape != weight.shape[:1]):
        return NotImplemented
    leaf = needs_leaf(input)
    y = F.linear(input, tap.alias(weight, leaf), tap.alias(bias, leaf))
    x, known = input.detach(), tap.source(weight) is not None
    _record_matrix(tap, "linear", y, x, sources_of(tap, weight, bias), (-1,), lambda: x, (_same, _same), known)
    return y


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
        leaf = needs_leaf(input)
        y, x = torch.matmul(input, tap.alias(other, leaf)), input.detach()
        _record_matrix(tap, "matmul", y, x, sources_of(tap, other), (-1,), lambda: x, (_transposed, _transposed))
        return y
    if tap.source(input) is not None and input.dim() == 2 and other.dim() >= 2:
        leaf = needs_leaf(other)
        y, x = torch.matmul(tap.alias(input, leaf), other), other.detach()
        _record_matrix(tap, "matmul", y, x, sources_of(tap, input), (-2,), lambda: x.mT, (_same, _same))
        return y
    return NotImplemented


def _mm(tap: Tap, input: Tensor, mat2: Tensor, **options: Any) -> Any:  # noqa: A002 - torch's name
    return NotImplemented if options else _matmul(tap, input, mat2)


def _addmm(tap: Tap, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:  # noqa: A002
    plain = beta == 1 and alpha == 1 and tap.is_data(mat1) and tap.source(mat2) is not None
    if not plain or tap.is_data(input) or input.shape != mat2.shape[1:] or mat1.is_complex():
        return NotImplemented
    leaf = needs_leaf(mat1)
    y, x = torch.addmm(tap.alias(input, leaf), mat1, tap.alias(mat2, leaf)), mat1.detach()
    turns = (_transposed, _transposed)
    _record_matrix(tap, "addmm", y, x, sources_of(tap, mat2, input), (-1,), lambda: x, turns)
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
    tap.operations.append(
        Table("embedding", sources_of(tap, weight)[0], tap.out(y, (-1,)), input.detach(), padding_idx)
    )
    return y


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
    aliases = [tap.alias(o, needs_leaf(data)) for o in operands]
    y, x = torch.einsum(equation, *aliases), data.detach()

    def again(leaves: list[Tensor]) -> list[Tensor]:
        return [torch.einsum(equation, leaves[0], x) if which == 0 else torch.einsum(equation, x, leaves[0])]

    source, out = sources_of(tap, weight)[0], tap.out(y)
    local = Local("einsum", [source], [out], [x], again=again)
    parts = (letters[1 - which], letters[which], result)
    tap.operations.append(Contraction("einsum", source, out, x, letters=parts, local=local))
    return y


def _prelu(tap: Tap, input: Tensor, weight: Tensor) -> Any:  # noqa: A002 - torch's name
    if tap.source(weight) is None or not tap.is_data(input):
        return NotImplemented
    x = input.detach()
    y = F.prelu(input, tap.alias(weight, needs_leaf(input)))
    shape = (weight.numel(), *[1] * (x.dim() - 2)) if weight.numel() > 1 and x.dim() > 1 else (weight.numel(),)
    tap.operations.append(
        Elementwise(
            "prelu", sources_of(tap, weight), tap.out(y), [x], slope=lambda _, g: g * x.clamp_max(0), shapes=[shape]
        )
    )
    return y


def _picked(tap: Tap, table: Tensor, ids: Any) -> Any:
    """Record `table[ids]`, an embedding by hand."""
    integers = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.dtype in (torch.bool, torch.uint8))
    if not integers or tap.source(table) is None or table.dim() != 2 or bool((ids < 0).any()):
        return NotImplemented
    y = tap.alias(table, leaf=True)[ids]
    tap.operations.append(Table("index", sources_of(tap, table)[0], tap.out(y, (-1,)), ids.detach(), None))
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
    torch.einsum: _einsum,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    **NORMALISATIONS,
    **CONVOLUTIONS,
}
