"""Which positions of an operation's output belong to which sample? Asked of autograd, not guessed from shapes.

Two backward passes, the second with the cotangent of sample n multiplied by sₙ = 2^kₙ. Powers of two are exact in every
floating dtype, so at each position the ratio of the two gradients is the sₙ of the sample it belongs to, and a ratio
that is none says that samples are coupled. Works for any layout: sequence first, windows folded into the batch,
routed tokens. With N = T a guess from shapes would be wrong without an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# Atomic additions on a GPU change the order of summation between two passes: a few units in the last place are no
# coupling. Batch statistics couple samples by 1/N of a gradient, orders of magnitude more.
_ULPS = 64


@dataclass(frozen=True, slots=True)
class Axis:
    """Samples lie along one axis of the positions, each with its own run of `size / count` entries.

    Attributes:
        axis: which of the position axes.
        count: N.
        strided: the entries of one sample are N apart (copies of the batch behind each other), not adjacent.
    """

    axis: int
    count: int
    strided: bool = False

    def arranged(self, t: Tensor, lead: int, positions: int) -> Tensor:
        """Return (lead..., positions..., rest...) as (N, lead..., T, rest...); a view where strides allow it."""
        axis = lead + self.axis
        folded = t.shape[axis] // self.count
        if folded > 1:
            t = t.unflatten(axis, (folded, self.count) if self.strided else (self.count, folded))
        t = t.movedim(axis + 1 if folded > 1 and self.strided else axis, 0)
        remaining = positions - 1 + (folded > 1)
        return t.unsqueeze(1 + lead) if remaining == 0 else t.flatten(1 + lead, lead + remaining)


@dataclass(frozen=True, slots=True)
class Owners:
    """Any other arrangement: the positions of each sample by index, padded to the longest with zeros.

    Attributes:
        index: (N, T) into the flattened positions.
        real: (N, T), False where padded.
    """

    index: Tensor
    real: Tensor

    @property
    def count(self) -> int:
        """N."""
        return self.index.shape[0]

    def arranged(self, t: Tensor, lead: int, positions: int) -> Tensor:
        """Return (lead..., positions..., rest...) as (N, lead..., T, rest...), zero where padded."""
        t = t.flatten(lead, lead + positions - 1) if positions else t.unsqueeze(lead)
        t = t.index_select(lead, self.index.reshape(-1)).unflatten(lead, tuple(self.index.shape)).movedim(lead, 0)
        real = self.real.reshape(len(self.real), *[1] * lead, -1, *[1] * (t.dim() - lead - 2))
        return t * real.to(t.dtype)


Layout: TypeAlias = Axis | Owners


# How many powers of two the exponents of a dtype leave room for, gradients of any size allowed for.
_POWERS = {torch.float16: 8, torch.float64: 512}


def scales(samples: int, dtype: torch.dtype, device: torch.device, digit: int | None = None) -> Tensor:
    """Return sₙ = 2^kₙ, (N,): distinct where N allows it, else drawn; with `digit`, k is that digit of n."""
    if digit is not None:
        exponents = torch.arange(samples) // base(dtype) ** digit % base(dtype)
    else:
        powers, generator = _POWERS.get(dtype, 64), torch.Generator().manual_seed(0)
        drawn = [torch.randperm(min(powers, samples), generator=generator) for _ in range(-(-samples // powers))]
        exponents = torch.cat(drawn)[:samples] if samples > powers else drawn[0]
    return torch.exp2(exponents.double()).to(device, dtype)


def base(dtype: torch.dtype) -> int:
    """Return the base in which sample indices are written for this dtype."""
    return 8 if dtype == torch.float16 else 16


def digits(samples: int, base: int) -> int:
    """Return how many digits the sample index has."""
    count = 1
    while base**count < samples:
        count += 1
    return count


def axis_layout(first: Tensor, second: Tensor, channels: Sequence[int], scale: Tensor) -> Axis | None:
    """Return the axis that holds the samples, or None when no single axis explains the two gradients.

    `first` and `second` are gradients of one output for cotangents u and s u; `channels` are the axes that are not
    positions. A hypothesis is accepted only when it explains every element.
    """
    samples = len(scale)
    positions = [d for d in range(first.dim()) if d not in channels]
    for index, d in enumerate(positions):
        length = first.shape[d]
        if length % samples:
            continue
        for strided in (False, True)[: 1 + (length > samples)]:
            along = scale.repeat(length // samples) if strided else scale.repeat_interleave(length // samples)
            along = along.to(first.dtype).view(*(length if k == d else 1 for k in range(first.dim())))
            scaled = first * along
            if torch.equal(scaled, second) or _close(scaled, second, along, channels):
                return Axis(index, samples, strided)
    return None


def _close(scaled: Tensor, second: Tensor, along: Tensor, channels: Sequence[int]) -> bool:
    """True when two gradients agree up to rounding, measured by the largest channel at each position."""
    peak, eps = scaled.abs(), torch.finfo(scaled.dtype).eps
    if channels:
        peak = peak.amax(tuple(channels), keepdim=True)
    # Below ε² of the largest gradient nothing is resolved: products with a softmax that has underflowed, say.
    bound = peak * (_ULPS * eps) + along * ((peak / along).max() * eps**2)
    return bool(((second - scaled).abs_() <= bound).all())


def owners(first: Tensor, passes: Sequence[Tensor], channels: Sequence[int], samples: int, base: int) -> Owners | None:
    """Return the owner of every position from one pass per digit, or None when some position has several.

    `passes[d]` is the gradient for the cotangent scaled by 2 to the d-th digit of the sample index.
    """
    last = [d for d in range(first.dim()) if d not in channels] + list(channels)

    def flat(t: Tensor) -> Tensor:
        t = t.permute(last)
        count = first.dim() - len(channels)
        t = t.reshape(*t.shape[:count], -1)
        return t.reshape(-1, t.shape[-1])

    reference = flat(first)
    peak, place = reference.abs().max(1, keepdim=True)
    alive = peak[:, 0] > peak.max() * torch.finfo(first.dtype).eps ** 2
    owner = torch.zeros(len(reference), dtype=torch.long, device=first.device)
    tolerance = _ULPS * torch.finfo(first.dtype).eps
    for digit, gradient in enumerate(passes):
        scaled = flat(gradient)
        ratio = scaled.gather(1, place) / torch.where(peak > 0, reference.gather(1, place), 1)
        exponent = torch.log2(ratio.clamp_min(0.5)).round()
        exact = ((scaled - reference * torch.exp2(exponent)).abs() <= tolerance * peak * torch.exp2(exponent)).all(1)
        if not bool((exact | ~alive).all()) or bool((exponent[alive] > base - 1).any()):
            return None
        owner += exponent[:, 0].long() * base**digit
    if bool((owner[alive] >= samples).any()):
        return None
    return _grouped(owner, alive, samples)


def _grouped(owner: Tensor, alive: Tensor, samples: int) -> Owners:
    where = alive.nonzero()[:, 0]
    order = where[torch.argsort(owner[where], stable=True)]
    counts = torch.bincount(owner[where], minlength=samples)
    longest = max(1, int(counts.max())) if len(where) else 1
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    column = torch.arange(longest, device=owner.device)
    real = column[None] < counts[:, None]
    index = (starts[:, None] + column[None]).clamp_max(max(0, len(order) - 1))
    index = order[index] if len(order) else torch.zeros_like(index)
    return Owners(index, real)


def everything(shape: Sequence[int], device: torch.device) -> Owners:
    """Return the layout of a batch of one sample, which owns every position."""
    count = 1
    for length in shape:
        count *= length
    index = torch.arange(count, device=device)[None]
    return Owners(index, torch.ones_like(index, dtype=torch.bool))
