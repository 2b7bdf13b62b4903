"""Kinds of operations, each able to turn its output gradients into the per-sample gradients of its parameters.

`jacobian` is exact for every kind and layout of samples; a weight that enters as one matrix also has a fast form.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.engines.structured.contraction import per_sample
from ntk_monitor.engines.structured.samples import Axis, Owners
from ntk_monitor.engines.structured.tap import Operation, Out, Source


def summed(out: Out, g: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the gradient of a tensor broadcast from `shape` to the output: g (C, *out.shape) summed, per sample."""
    rank = len(out.shape)
    padded = (1,) * (rank - len(shape)) + tuple(shape)
    layout = out.layout
    assert layout is not None
    positions = [d for d in range(rank) if d not in out.channels]
    if isinstance(layout, Axis) and padded[positions[layout.axis]] == 1:
        axis = positions[layout.axis]
        folded = out.shape[axis] // layout.count
        g = g.unflatten(1 + axis, (folded, layout.count) if layout.strided else (layout.count, folded))
        g = g.movedim(1 + axis + layout.strided, 0)
        over = [2 + d for d in range(rank) if padded[d] == 1 and (out.shape[d] != 1 or d == axis)]
        return (g.sum(over) if over else g).reshape(layout.count, len(g[0]), -1)
    owner = owners_of(out, g.device)
    place = torch.arange(math.prod(shape), device=g.device).view(padded).expand(out.shape)
    count, size = layout.count, math.prod(shape)
    found = g.new_zeros(g.shape[0], (count + 1) * size)
    found.index_add_(1, (owner * size + place).flatten(), g.flatten(1))
    return found.view(g.shape[0], count + 1, size)[:, :count].transpose(0, 1)


def owners_of(out: Out, device: torch.device) -> Tensor:
    """Return the sample that each element of the output belongs to, N where it belongs to nobody."""
    layout = out.layout
    assert layout is not None
    positions = [d for d in range(len(out.shape)) if d not in out.channels]
    sizes = [out.shape[d] for d in positions]
    if isinstance(layout, Axis):
        length = sizes[layout.axis]
        index = torch.arange(length, device=device)
        index = index % layout.count if layout.strided else index // (length // layout.count)
        owner = index.view([length if i == layout.axis else 1 for i in range(len(sizes))]).expand(sizes)
    else:
        owner = torch.full((max(1, math.prod(sizes)),), layout.count, device=device)
        rows = torch.arange(layout.count, device=device)[:, None].expand_as(layout.index)
        owner[layout.index[layout.real]] = rows[layout.real]
        owner = owner.view(sizes)
    full = [out.shape[d] if d in positions else 1 for d in range(len(out.shape))]
    return owner.reshape(full).expand(out.shape)


@dataclass(frozen=True, slots=True)
class Shifts:
    """A convolution of stride 1 as one product per kernel element, on shifted views of the padded input: no patches.

    Attributes:
        padded: () → input with zeros around it, (N, at least L + the largest offset, channels), rows behind each other.
        offsets: where the view of each kernel element starts.
        height, width: rows of the output, and the length of a padded row; L = height · width.
        channels: of the input.
    """

    padded: Callable[[], Tensor]
    offsets: tuple[int, ...]
    height: int
    width: int
    channels: int

    @property
    def length(self) -> int:
        """L."""
        return self.height * self.width

    def gradient(self, g: Tensor) -> Tensor:
        """Return g (C, N, R, height, columns) as (N, C, L, R), zero where a row is only padding."""
        turned = F.pad(g.permute(1, 0, 3, 4, 2), (0, 0, 0, self.width - g.shape[-1]))
        return turned.flatten(2, 3)


class Matrix(Operation):
    """A weight that enters as a matrix (R, Q): y = Σ_q W[r, q] a[q] at every position, plus an optional bias.

    Args:
        activations: () → a, shaped (positions..., Q).
        turned: output gradient (C, *shape) → (C, positions..., R); None: the output's own channel.
        matrix: tensor of the weight's shape → (R, Q) view of it; `back` undoes it for (N, C, R, Q).
        groups: the weight is this many blocks, each with its own part of inputs and outputs.
        weight: the first source is the matrix; False: it is not among the sources, only the bias is.
        shifts: the form without patches of a convolution.
        places: sizes of the positions, where they are not those of the output.
    """

    def __init__(  # noqa: PLR0913 - what a product can differ in
        self,
        name: str,
        sources: list[Source],
        out: Out,
        kept: Sequence[Tensor],
        *,
        activations: Callable[[], Tensor],
        matrix: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        turned: Callable[[Tensor], Tensor] | None = None,
        groups: int = 1,
        weight: bool = True,
        shifts: Shifts | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(name, sources, [out], kept)
        self._activations, self._matrix, self._back, self._turned = activations, matrix, back, turned
        self.groups, self._weight, self._shifts, self._places = groups, weight, shifts, places
        self._reached = slice(None)

    def narrowed(self, g: Tensor) -> None:
        """Leave out positions at both ends that no gradient reaches: all but one behind a class token or a last token.

        `g` (*shape): gradient for a combination of all outputs, so that what it does not reach, no output does.
        """
        if not self._weight or self._shifts is not None or self.sizes()[1] == 1:
            return
        found = self.gradient(g[None])[:, 0]  # (N, T, R)
        if bool(found[:, 0].any()) and bool(found[:, -1].any()):
            return
        places = found.ne(0).any(2).any(0).nonzero()[:, 0].tolist()
        if places:
            self._reached = slice(places[0], places[-1] + 1)

    def is_weight(self, index: int) -> bool:
        """True for the matrix, False for the bias."""
        return self._weight and index == 0

    def arranged_inputs(self) -> Tensor:
        """Return A (N, T, Q)."""
        a = self._activations()
        layout = self.outs[0].layout
        assert layout is not None
        return layout.arranged(a, 0, a.dim() - 1)[:, self._reached]

    def sizes(self) -> tuple[int, int, int, int]:
        """Return N, T (positions that gradients reach), Q, R."""
        out, value = self.outs[0], self.sources[0].value.detach()
        assert out.layout is not None
        r, q = self._matrix(value).shape
        places = (
            self._places if self._places is not None else [s for d, s in enumerate(out.shape) if d not in out.channels]
        )
        n = out.layout.count
        t = out.layout.index.shape[1] if isinstance(out.layout, Owners) else math.prod(places) // n
        return n, len(range(t)[self._reached]), q, r

    @property
    def dtype(self) -> torch.dtype:
        """What autograd would multiply in: the dtype of the input."""
        return self._kept[0][0].dtype

    @property
    def shifts(self) -> Shifts | None:
        """How to do without patches, where every image is a sample."""
        layout = self.outs[0].layout
        plain = isinstance(layout, Axis) and layout.axis == 0 and layout.count == self.outs[0].shape[0]
        return self._shifts if plain else None

    def gradient(self, g: Tensor) -> Tensor:
        """Return G (N, C, T, R)."""
        out = self.outs[0]
        if self._turned is None:
            return out.arranged(g)[:, :, self._reached]
        turned = self._turned(g)
        assert out.layout is not None
        return out.layout.arranged(turned, 1, turned.dim() - 2)[:, :, self._reached]

    def matrix(self, index: int, value: Tensor) -> Tensor:
        """Return (R, Q)."""
        return self._matrix(value)

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source)."""
        g = gradients[0]
        assert g is not None
        if not self.is_weight(index):
            return self.outs[0].arranged(g).sum(2)
        a, d = self.arranged_inputs(), self.gradient(g)
        a, d = a.to(self.dtype), d.to(self.dtype)
        if self.groups == 1:
            found = per_sample(a, d)
        else:
            n, c, t, _ = d.shape
            split = a.view(n, t, self.groups, -1).permute(0, 2, 1, 3)
            d = d.view(n, c, t, self.groups, -1).permute(0, 3, 1, 4, 2)  # (N, groups, C, R, T)
            found = (d.flatten(2, 3) @ split).unflatten(2, (c, -1)).transpose(1, 2).flatten(2, 3)
        return self._back(found).flatten(2)


class Table(Operation):
    """Rows of a table, picked by indices: an embedding."""

    def __init__(self, name: str, source: Source, out: Out, ids: Tensor, padding: int | None) -> None:
        super().__init__(name, [source], [out], [ids])
        self.ids, self._padding = ids, padding

    def picked(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices (N, T) and gradients (N, C, T, D), zero where the index is the padding one."""
        out = self.outs[0]
        assert out.layout is not None
        ids = out.layout.arranged(self.ids.unsqueeze(-1), 0, self.ids.dim())[..., 0]
        d = out.arranged(g)
        return ids, d if self._padding is None else d * (ids != self._padding)[:, None, :, None].to(d.dtype)

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source)."""
        g = gradients[0]
        assert g is not None
        ids, d = self.picked(g)
        return scattered(ids, d, self.sources[0].value.shape[0]).flatten(2)


def scattered(ids: Tensor, d: Tensor, rows: int) -> Tensor:
    """Return (N, C, rows, D): gradients (N, C, T, D) summed into the rows that indices (N, T) name."""
    n, c, t, width = d.shape
    found = d.new_zeros(n * c * rows, width)
    place = ids.view(n, 1, t) + rows * torch.arange(n * c, device=ids.device).view(n, c, 1)
    found.index_add_(0, place.reshape(-1), d.reshape(-1, width))
    return found.view(n, c, rows, width)


class Elementwise(Operation):
    """y = f(..., p, ...) element by element, with p broadcast: the gradient is taken at every element, then summed.

    `slopes`: (index of the source, g) → gradient of the broadcast source, (C, *shape of y).
    """

    def __init__(
        self,
        name: str,
        sources: list[Source],
        out: Out,
        kept: Sequence[Tensor],
        *,
        slope: Callable[[int, Tensor], Tensor],
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(name, sources, [out], kept)
        self._slope = slope
        self._shapes = shapes or [s.value.shape for s in sources]

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source)."""
        g = gradients[0]
        assert g is not None
        return summed(self.outs[0], self._slope(index, g), self._shapes[index])


class Value(Operation):
    """A source that data-moving functions take apart (concatenated tokens, say): its own gradient, split by sample."""

    def __init__(self, name: str, source: Source, out: Out) -> None:
        super().__init__(name, [source], [out])

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source)."""
        g = gradients[0]
        assert g is not None
        return masked(self.outs[0], g).flatten(2)


def masked(out: Out, g: Tensor) -> Tensor:
    """Return (N, C, *shape): the gradient g (C, *shape) with everything but one sample's elements set to zero."""
    assert out.layout is not None
    owner = owners_of(out, g.device)
    samples = torch.arange(out.layout.count, device=g.device).view(-1, *[1] * (g.dim()))
    return torch.where(owner[None, None] == samples, g[None], torch.zeros((), dtype=g.dtype, device=g.device))


class Local(Operation):
    """Any other function: computed again on its own, one backward pass through it per output and sample.

    Args:
        again: [aliases of the sources] → outputs that `outs` are about, computed from kept inputs.
    """

    def __init__(
        self,
        name: str,
        sources: list[Source],
        outs: list[Out],
        kept: Sequence[Tensor],
        *,
        again: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        super().__init__(name, sources, outs, kept)
        self._again = again
        self._made: tuple[list[Tensor | None], list[Tensor]] | None = None

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source)."""
        if self._made is None or self._made[0] is not gradients:
            self._made = (gradients, self._all(gradients))
        found = self._made[1][index]
        if index == len(self.sources) - 1:
            self._made = None
        return found

    def _all(self, gradients: list[Tensor | None]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [s.value.detach().requires_grad_() for s in self.sources]
            results = self._again(leaves)
        pairs = [
            (y, owners_of(out, g.device), g.to(y.dtype), out)
            for y, out, g in zip(results, self.outs, gradients, strict=True)
            if g is not None
        ]
        layout = pairs[0][3].layout
        assert layout is not None
        n, c = layout.count, len(pairs[0][2])
        found = [leaf.new_zeros(n, c, leaf.numel()) for leaf in leaves]
        for i in range(n):
            for k in range(c):
                cotangents = [torch.where(owner == i, g[k], 0.0) for _, owner, g, _ in pairs]
                grads = torch.autograd.grad(
                    [y for y, *_ in pairs], leaves, cotangents, retain_graph=True, allow_unused=True
                )
                for own, grad in zip(found, grads, strict=True):
                    if grad is not None:
                        own[i, k] = grad.to_dense().flatten() if grad.is_sparse else grad.flatten()
        return found


class Contraction(Operation):
    """An einsum of data with one source, where samples lie along one letter: the Jacobian is another einsum."""

    def __init__(
        self, name: str, source: Source, out: Out, data: Tensor, *, letters: tuple[str, str, str], local: Local
    ) -> None:
        super().__init__(name, [source], [out], [data])
        self._data, self._letters, self._local = data, letters, local

    def jacobian(self, index: int, gradients: list[Tensor | None]) -> Tensor:
        """Return J (N, C, size of the source)."""
        data, weight, result = self._letters
        out, g = self.outs[0], gradients[0]
        assert g is not None
        sample = result[out.layout.axis] if isinstance(out.layout, Axis) else ""
        whole = isinstance(out.layout, Axis) and out.shape[out.layout.axis] == out.layout.count
        if not whole or sample not in data or sample in weight:
            return self._local.jacobian(0, gradients)
        extra = next(letter for letter in "zyxwvutsrq" if letter not in data + weight + result)
        missing = [letter for letter in weight if letter not in data + result]
        if missing:  # summed over the weight alone
            return self._local.jacobian(0, gradients)
        return torch.einsum(f"{data},{extra}{result}->{sample}{extra}{weight}", self._data.to(g.dtype), g).flatten(2)


def normalised(x: Tensor, kind: str, options: tuple[Any, ...]) -> Tensor:
    """Return x as the normalisation layer hands it to its scale."""
    if kind == "layer_norm":
        return F.layer_norm(x, *options)
    if kind == "group_norm":
        groups, eps = options
        return F.group_norm(x, groups, None, None, eps)
    if kind == "instance_norm":
        return F.instance_norm(x, None, None, None, None, True, 0.0, options[0])
    shape, eps = options
    return F.rms_norm(x, shape, None, eps)
