"""Convolutions as matrices: patches of the input (Q = kernel × input channels) against output channels (R)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.engines.structured.operations import Matrix, Shifts
from ntk_monitor.engines.structured.tap import Rule, Tap


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(v) for v in value) * (rank // len(value))


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Tensor:
    """Return (N, *output, kernel... × channels) of x (N, channels, *input); channels run fastest."""
    rank = len(kernel)
    x = x.movedim(1, -1)
    if any(p != (0, 0) for p in pads):
        x = F.pad(x, [0, 0, *(p for pair in reversed(pads) for p in pair)])
    if all(k == 1 for k in kernel):
        return x[(slice(None), *(slice(None, None, s) for s in stride))]
    x = x.contiguous()
    size = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[1:-1], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()[1:-1]
    shape = (len(x), *size, *kernel, x.shape[-1])
    strides = (
        x.stride(0),
        *(a * b for a, b in zip(steps, stride, strict=True)),
        *(a * b for a, b in zip(steps, dilation, strict=True)),
        1,
    )
    # Taking the whole last window at once lets the copy run over contiguous stretches.
    return x.as_strided(shape, strides, x.storage_offset()).reshape(len(x), *size, -1) if rank else x


def _shifts(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Shifts | None:
    """Return how to convolve by shifted views, for stride 1 in two dimensions and a kernel of more than one element."""
    if len(kernel) != 2 or tuple(stride) != (1, 1) or tuple(kernel) == (1, 1):
        return None
    (top, bottom), (left, right) = pads
    width = x.shape[3] + left + right
    height = x.shape[2] + top + bottom - dilation[0] * (kernel[0] - 1)
    offsets = tuple(i * dilation[0] * width + j * dilation[1] for i in range(kernel[0]) for j in range(kernel[1]))

    def padded() -> Tensor:
        # One more row: the views of the last kernel columns reach a little further than the input.
        return F.pad(x.movedim(1, -1), (0, 0, left, right, top, bottom + 1)).flatten(1, 2)

    return Shifts(padded, offsets, height, width, x.shape[1])


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in _tuple(padding, len(kernel))]


def _forward(function: Callable[..., Tensor], rank: int) -> Rule:
    def rule(
        tap: Tap,
        input: Tensor,  # noqa: A002 - torch's name
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not tap.is_data(input) or tap.is_data(weight) or tap.is_data(bias) or input.dim() != rank + 2:
            return NotImplemented
        if input.is_complex():
            return NotImplemented
        kernel = weight.shape[2:]
        strides, dilations = _tuple(stride, rank), _tuple(dilation, rank)
        pads = _pads(padding, kernel, dilations)
        leaf = not input.requires_grad
        y: Tensor = function(input, tap.alias(weight, leaf), tap.alias(bias, leaf), stride, padding, dilation, groups)
        x, channels = input.detach(), weight.shape[1]

        def activations() -> Tensor:
            found = patches(x, kernel, strides, pads, dilations)
            if groups > 1:  # (kernel, groups, channels) → (groups, kernel, channels)
                found = found.unflatten(-1, (-1, groups, channels)).transpose(-2, -3).flatten(-3)
            return found

        def matrix(w: Tensor) -> Tensor:
            found: Tensor = w.movedim(1, -1).flatten(1)
            return found

        def back(found: Tensor) -> Tensor:
            gradient: Tensor = found.unflatten(-1, (*kernel, channels)).movedim(-1, 3)
            return gradient

        sources = [s for t in (weight, bias) if (s := tap.source(t)) is not None]
        operation = Matrix(
            f"conv{rank}d",
            sources,
            tap.out(y, (1,)),
            [x],
            activations=activations,
            matrix=matrix,
            back=back,
            groups=groups,
            weight=tap.source(weight) is not None,
            shifts=_shifts(x, kernel, strides, pads, dilations) if groups == 1 else None,
        )
        tap.operations.append(operation)
        return y

    return rule


def _transposed(function: Callable[..., Tensor], rank: int) -> Rule:
    def rule(
        tap: Tap,
        input: Tensor,  # noqa: A002 - torch's name
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not tap.is_data(input) or tap.is_data(weight) or tap.is_data(bias) or input.dim() != rank + 2:
            return NotImplemented
        if groups != 1 or input.is_complex():
            return NotImplemented
        kernel = weight.shape[2:]
        strides, dilations = _tuple(stride, rank), _tuple(dilation, rank)
        pads = [(p, p) for p in _tuple(padding, rank)]
        leaf = not input.requires_grad
        aliases = tap.alias(weight, leaf), tap.alias(bias, leaf)
        y: Tensor = function(input, *aliases, stride, padding, output_padding, groups, dilation)
        x, size = input.detach(), input.shape[2:]

        def turned(g: Tensor) -> Tensor:
            # The weight (Ci, Co, kernel) multiplies the patches of the output gradient by the input at each place.
            found = patches(g.flatten(0, 1), kernel, strides, pads, dilations)
            found = found[(slice(None), *(slice(0, s) for s in size))]
            result: Tensor = found.unflatten(0, g.shape[:2])
            return result

        def matrix(w: Tensor) -> Tensor:
            found: Tensor = w.movedim(1, -1).flatten(1).T
            return found

        def back(found: Tensor) -> Tensor:  # (N, C, R = kernel × Co, Q = Ci)
            gradient: Tensor = found.transpose(2, 3).unflatten(-1, (*kernel, weight.shape[1])).movedim(-1, 3)
            return gradient

        sources = [s for t in (weight, bias) if (s := tap.source(t)) is not None]
        operation = Matrix(
            f"conv_transpose{rank}d",
            sources,
            tap.out(y, (1,)),
            [x],
            activations=lambda: x.movedim(1, -1),
            matrix=matrix,
            back=back,
            turned=turned,
            weight=tap.source(weight) is not None,
            places=(len(x), *size),
        )
        tap.operations.append(operation)
        return y

    return rule


CONVOLUTIONS: dict[Any, Rule] = {}
for _rank, _convolve, _transpose in (
    (1, (F.conv1d, torch.conv1d), (F.conv_transpose1d, torch.conv_transpose1d)),
    (2, (F.conv2d, torch.conv2d), (F.conv_transpose2d, torch.conv_transpose2d)),
    (3, (F.conv3d, torch.conv3d), (F.conv_transpose3d, torch.conv_transpose3d)),
):
    CONVOLUTIONS |= {function: _forward(_convolve[0], _rank) for function in _convolve}
    CONVOLUTIONS |= {function: _transposed(_transpose[0], _rank) for function in _transpose}
