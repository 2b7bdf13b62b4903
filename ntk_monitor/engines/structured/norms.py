"""Normalisation layers: elementwise scale and bias of a standardised input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.engines.structured.operations import Elementwise, normalised
from ntk_monitor.engines.structured.tap import Rule, Tap, needs_leaf, sources_of

_KEPT_BYTES = 4 * 2**20
"""Standardised inputs up to this size are kept from one output to the next."""


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
    sources = sources_of(tap, weight, bias)
    shapes = [(s.value.shape[0], *[1] * (y.dim() - 2)) if per_channel else s.value.shape for s in sources]
    scaled = tap.source(weight) is not None

    made: list[Tensor] = []

    def slope(index: int, g: Tensor) -> Tensor:
        if not scaled or index > 0:
            return g
        found = made[0] if made else standard()
        if not made and found.numel() * found.element_size() <= _KEPT_BYTES:
            made.append(found)
        return g * found.to(g.dtype)

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
    leaf, x = needs_leaf(input), input.detach()
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
    leaf, x, shape = needs_leaf(input), input.detach(), list(normalized_shape)
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
    leaf, x = needs_leaf(input), input.detach()
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
    leaf, x = needs_leaf(input), input.detach()
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
    leaf = needs_leaf(input)
    scale = s if weight is None else s * tap.alias(weight, leaf)
    shift = -mean * scale if bias is None else tap.alias(bias, leaf) - mean * scale
    if not leaf:
        y = torch.addcmul(shift.view(view).to(input.dtype), input, scale.view(view).to(input.dtype))
    else:
        y = torch.addcmul(shift.view(view), input.to(shift.dtype), scale.view(view))

    def standard() -> Tensor:
        return (x - mean.view(view)) * s.view(view)

    return _affine(tap, "batch_norm", y, x, (weight, bias), standard, True)


NORMALISATIONS: dict[Any, Rule] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
}
