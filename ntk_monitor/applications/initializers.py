"""Initialisations by name, applied in place to any module: normal weights of a variance, orthogonal ones, torch's own.

A weight of shape (out, in, ...) has fan_in = in · kernel size, fan_out = out · kernel size. Named rules other than
"pytorch" set biases to zero; norms and embeddings always get their module's own start.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn

Init: TypeAlias = Callable[[nn.Module], None]
"""Draws all parameters of a module anew, in place, from torch's global generator."""

_KEPT = (nn.Embedding, nn.EmbeddingBag)


def fans(weight: Tensor) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight with at least two axes, as torch counts them."""
    field = math.prod(weight.shape[2:])
    return weight.shape[1] * field, weight.shape[0] * field


def xavier_variance(fan_in: int, fan_out: int) -> float:
    """Return 2 / (fan_in + fan_out). Source: Glorot and Bengio 2010."""
    return 2 / (fan_in + fan_out)


def he_variance(fan_in: int, fan_out: int) -> float:
    """Return 2 / fan_in. Source: He et al. 2015."""
    return 2 / fan_in


def lecun_variance(fan_in: int, fan_out: int) -> float:
    """Return 1 / fan_in. Source: LeCun et al. 1998."""
    return 1 / fan_in


VARIANCES: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {"xavier": xavier_variance, "he": he_variance, "lecun": lecun_variance}
)
"""Variance of a weight's entries by the name of the rule, from its fans."""


@torch.no_grad()
def pytorch(module: nn.Module) -> None:
    """Call the `reset_parameters` of every submodule: what building it would draw. Bare parameters stay."""
    for part in module.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            reset = getattr(part, name, None)
            if callable(reset):
                reset()
                break


def _filled(module: nn.Module, fill: Callable[[Tensor], object]) -> None:
    pytorch(module)
    with torch.no_grad():
        for part in module.modules():
            own = dict(part.named_parameters(recurse=False))
            weights = [p for p in own.values() if p.dim() >= 2]
            if isinstance(part, _KEPT) or not weights:
                continue
            for weight in weights:
                fill(weight)
            for name, parameter in own.items():
                if "bias" in name and parameter.dim() < 2:
                    parameter.zero_()


def xavier(module: nn.Module) -> None:
    """Draw weights from N(0, 2 / (fan_in + fan_out)), biases 0."""
    _filled(module, lambda weight: weight.normal_(0, math.sqrt(xavier_variance(*fans(weight)))))


def he(module: nn.Module) -> None:
    """Draw weights from N(0, 2 / fan_in), biases 0."""
    _filled(module, lambda weight: weight.normal_(0, math.sqrt(he_variance(*fans(weight)))))


def lecun(module: nn.Module) -> None:
    """Draw weights from N(0, 1 / fan_in), biases 0."""
    _filled(module, lambda weight: weight.normal_(0, math.sqrt(lecun_variance(*fans(weight)))))


def orthogonal(module: nn.Module) -> None:
    """Draw weights with orthonormal rows or columns times √2 (the gain of ReLU), biases 0. Source: Saxe et al. 2014."""
    _filled(module, lambda weight: nn.init.orthogonal_(weight, gain=math.sqrt(2)))


INITS: Mapping[str, Init] = MappingProxyType(
    {"xavier": xavier, "he": he, "lecun": lecun, "orthogonal": orthogonal, "pytorch": pytorch}
)
"""The named initialisations. All draws are normal; only variances matter to the expected kernel of a ReLU network."""
