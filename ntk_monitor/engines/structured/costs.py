"""What a contraction costs, from shapes alone: the choice of route, and the planner's seconds.

The choice is never timed at run time: a resumed run must take the same route to the last bit. Rates are multiply-adds
per second on the CPU (AVX-512), measured with torch 2.13; only their ratios matter for the choice.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ntk_monitor.engines.contract import Layout

Route: TypeAlias = Literal["hadamard", "gradients", "pairs"]

BLOCK_BYTES = 8 * 2**20
"""Per-sample gradients of one layer are formed and consumed in blocks of this size, which stay in the last cache."""

LEAST_CHANNELS = 64
"""... but of no fewer output channels, since each block reads all inputs of the layer again."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """N row and M column samples, C outputs at a time, T and S positions per sample, weight (R, Q), all C outputs."""

    n: int
    m: int
    c: int
    t: int
    s: int
    q: int
    r: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Multiply-adds per second by kind of product, and elements or bytes per second of what surrounds them."""

    gradients: float = 52e9
    """Per-sample gradients, float32."""
    gram: float = 44e9
    """Products of their rows, float32 ..."""
    gram64: float = 22e9
    """... and float64, apart from the conversion."""
    convert: float = 7.8e9
    """Bytes of float64 written per second when rows are converted."""
    pairs: float = 52e9
    """Products of all pairs of positions, float32 ..."""
    pairs64: float = 15.7e9
    """... and float64."""
    elementwise: float = 0.63e9
    """Pairs of positions per second that are weighted and summed."""


CPU = Rates()
CUDA = Rates(1e13, 1e13, 1e13, 1e12, 1e13, 1e13, 3e11)


def rates(device: torch.device | str) -> Rates:
    """Return the documented rates of a kind of device."""
    return CUDA if torch.device(device).type == "cuda" else CPU


def route(x: Sizes, layout: Layout, work: torch.dtype, symmetric: bool) -> Route:
    """Return the cheapest way for these sizes."""
    if x.t == 1 and x.s == 1:
        return "hadamard"
    return (
        "gradients"
        if gradients_seconds(x, layout, work, symmetric) <= pairs_seconds(x, layout, work, symmetric)
        else "pairs"
    )


def gradients_seconds(x: Sizes, layout: Layout, work: torch.dtype, symmetric: bool, rate: Rates = CPU) -> float:
    """Return the seconds of forming per-sample gradients and multiplying them."""
    samples = x.n * x.t + (0 if symmetric else x.m * x.s)
    form = x.c * samples * x.q * x.r / rate.gradients
    if layout == "full":
        half = 9 / 16 if symmetric else 1.0  # eight bands of row samples, each up to the diagonal
        products = half * x.n * x.m * x.c**2 * x.q * x.r
    else:
        half = 0.75 if symmetric and x.n >= 200 else 1.0
        products = half * x.n * x.m * x.c * x.q * x.r
    if work != torch.float64:
        return form + products / rate.gram
    return form + products / rate.gram64 + 8 * (x.n + (0 if symmetric else x.m)) * x.c * x.q * x.r / rate.convert


def pairs_seconds(x: Sizes, layout: Layout, work: torch.dtype, symmetric: bool, rate: Rates = CPU) -> float:
    """Return the seconds of multiplying inputs and gradients of all pairs of positions."""
    pairs = x.n * x.t * x.m * x.s * (0.6 if symmetric else 1.0)
    speed = rate.pairs64 if work == torch.float64 else rate.pairs
    if layout == "full":
        # Products of a sample's few outputs with another's are small matrices, at a third of the speed.
        carried = pairs / max(1, x.s) * x.c * x.r
        return pairs * (x.q + x.c * x.r) / speed + carried * x.c / (speed / 3)
    inputs = x.q * x.c / x.outputs  # A Aᵀ is kept for all outputs
    return pairs * (inputs + x.c * x.r) / speed + pairs * x.c / rate.elementwise
