"""Contractions. A use of a weight has inputs A (N, T, Q) and output gradients G (N, C, T, R): J[n, c] = Σ_t G_t ⊗ A_t.

Three ways to the same kernel: from the products of inputs and of gradients where T = 1 (Hadamard), from the per-sample
gradients of this one layer in blocks, or from pairs of positions. Sums end in float64. With `work` float32, products
run in float32 over at most `INNER` terms, summed in float64: plain float32 sums of 1e5 terms were wrong by 1e-4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.structured.costs import BLOCK_BYTES, LEAST_CHANNELS, Route, Sizes, route

INNER = 2048
"""Terms of a product in float32; longer sums go on in float64."""
_SLAB = 2**20
"""Elements converted to float64 at a time: 8 MiB stay in cache and in memory that is mapped already."""

_HALVED = 200
"""Rows from which the symmetric half of a product is skipped; smaller blocks lose more speed than they save."""


def product(a: Tensor, b: Tensor | None, work: torch.dtype) -> Tensor:
    """Return a bᵀ (a aᵀ for b None) in float64."""
    if b is None and len(a) >= _HALVED:
        half = (len(a) + 1) // 2
        top, bottom = a[:half], a[half:]
        k = torch.empty(len(a), len(a), dtype=torch.float64, device=a.device)
        k[:half, :half] = product(top, None, work)
        k[half:, half:] = product(bottom, None, work)
        k[half:, :half] = product(bottom, top, work)
        k[:half, half:] = k[half:, :half].T
        return k
    return _split(a, a if b is None else b) if work == torch.float32 else _double(a, a if b is None else b)


def _double(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float64 and b.dtype == torch.float64:
        return a @ b.T
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    width = max(1, _SLAB // max(len(a), len(b)))
    for start in range(0, a.shape[1], width):
        left = a[:, start : start + width].double()
        total.addmm_(left, (left if b is a else b[:, start : start + width].double()).T)
    return total


def _split(a: Tensor, b: Tensor) -> Tensor:
    inner = a.shape[1]
    count = inner // INNER
    if count < 2:
        return (a @ b.T).double()
    whole = count * INNER
    left = a[:, :whole].unflatten(1, (count, INNER)).transpose(0, 1)
    right = left if b is a else b[:, :whole].unflatten(1, (count, INNER)).transpose(0, 1)
    total = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return total if whole == inner else total + (a[:, whole:] @ b[:, whole:].T).double()


class Gram:
    """The kernel of one group of parameters while it is being summed.

    Args:
        shape: (N, C, M).
        symmetric: right is left; only the blocks on and below the diagonal of samples need to be given.
        work: dtype of products.
    """

    def __init__(
        self, layout: Layout, shape: tuple[int, int, int], *, symmetric: bool, work: torch.dtype, device: torch.device
    ) -> None:
        n, c, m = shape
        self.layout, self.symmetric, self.work = layout, symmetric, work
        self.samples, self.columns, self.outputs = n, m, c
        sizes = {"full": (n, c, m, c), "trace": (n, m), "per_output": (c, n, m)}[layout]
        self.values = torch.zeros(sizes, dtype=torch.float64, device=device)
        self._memory: Tensor | None = None
        # Rows of samples treated at a time where a temporary as large as the kernel would be made.
        self.step = max(1, -(-n // 8)) if layout == "full" else n

    def buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory of this shape, the same each time; what was in it is lost."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != like.dtype:
            self._memory = like.new_empty(size)
        return self._memory[:size].view(shape)

    def rows(self, a: Float[Tensor, "n c p"], b: Float[Tensor, "m c p"] | None, classes: slice) -> None:
        """Add the products of Jacobian rows of these outputs; `b` None: of `a` with itself."""
        if self.layout == "trace":
            self.values += product(a.flatten(1), None if b is None else b.flatten(1), self.work)
        elif self.layout == "per_output":
            for i, c in enumerate(range(*classes.indices(self.outputs))):
                self.values[c] += product(a[:, i], None if b is None else b[:, i], self.work)
        else:
            for rows, cols in self._tiles():
                left, right = a[rows].flatten(0, 1), (a if b is None else b)[cols].flatten(0, 1)
                self._tile(rows, cols, product(left, right, self.work))

    def hadamard(
        self, w: Float[Tensor, "n m"], a: Float[Tensor, "n c r"], b: Float[Tensor, "m c r"] | None, classes: slice
    ) -> None:
        """Add the products of rows, weighted by pairs of samples."""
        if self.layout == "trace":
            self.values += w * product(a.flatten(1), None if b is None else b.flatten(1), self.work)
        elif self.layout == "per_output":
            for i, c in enumerate(range(*classes.indices(self.outputs))):
                self.values[c] += w * product(a[:, i], None if b is None else b[:, i], self.work)
        else:
            for rows, cols in self._tiles():
                left, right = a[rows].flatten(0, 1), (a if b is None else b)[cols].flatten(0, 1)
                found = product(left, right, self.work).view(-1, self.outputs, len(w[0, cols]), self.outputs)
                self._tile(rows, cols, found.mul_(w[rows, cols][:, None, :, None]))

    def block(self, rows: slice, cols: slice, classes: slice, found: Tensor) -> None:
        """Add a finished block of row and column samples, (n, m), (c, n, m) or (n, C, m, C) by layout."""
        if self.layout == "trace":
            self.values[rows, cols] += found
        elif self.layout == "per_output":
            self.values[classes, rows, cols] += found
        else:
            self.values[rows, :, cols] += found

    def finished(self) -> Tensor:
        """Return the kernel; of a symmetric one the upper half is copied from the lower."""
        if self.symmetric and self.layout == "full":
            for n in range(self.samples):
                self.values[:n, :, n] = self.values[n, :, :n].permute(1, 2, 0)
                own = self.values[n, :, n]
                self.values[n, :, n] = (own + own.T) / 2
        elif self.symmetric:
            lower = self.values.tril()
            self.values = lower + lower.tril(-1).transpose(-1, -2)
        return self.values

    def _tiles(self) -> list[tuple[slice, slice]]:
        steps = [slice(s, min(s + self.step, self.samples)) for s in range(0, self.samples, self.step)]
        return [(rows, slice(0, rows.stop) if self.symmetric else slice(0, self.columns)) for rows in steps]

    def _tile(self, rows: slice, cols: slice, found: Tensor) -> None:
        view = self.values[rows, :, cols]
        view += found.view(view.shape)


@dataclass(slots=True)
class Factors:
    """One side of a weight: gradients G (N, C, T, R), and inputs A (N, T, Q) made when they are needed.

    `offsets`: G is padded to L rows, and J is one product for each of these shifted views of `padded` (N, ·, channels).
    """

    sizes: tuple[int, int, int]
    """N, T, Q"""
    channels: int
    """R"""
    classes: int
    gradient: Callable[[], Tensor]
    inputs: Callable[[], Tensor]
    padded: Callable[[], Tensor] | None = None
    padded_gradient: Callable[[], Tensor] | None = None
    offsets: tuple[int, ...] = ()
    uses: tuple[int, ...] = ()
    """Which recorded operations are in it."""


def contract(  # noqa: PLR0913 - one weight
    gram: Gram,
    left: Factors,
    right: Factors | None,
    classes: slice,
    *,
    ones: bool = False,
    weight: Tensor | None = None,
    made: dict[int, Tensor] | None = None,
) -> Route:
    """Add the kernel of one weight.

    Args:
        gram: where to.
        left: of the row samples.
        right: of the column samples; None: the same samples.
        classes: which outputs the gradients are about.
        ones: the bias of the same operation is part of it (T = 1 only): A has one more column of ones.
        weight: (R, Q), square root of a diagonal preconditioner.
        made: A Aᵀ kept between calls for other outputs, by first row sample.

    Returns the way that was taken.
    """
    other = right or left
    (n, t, q), (m, s, _) = left.sizes, other.sizes
    sizes = Sizes(n, m, left.classes, t, s, q, left.channels, gram.outputs)
    way = "gradients" if weight is not None else route(sizes, gram.layout, gram.work, right is None)
    made = {} if made is None else made
    if way == "hadamard":
        g = left.gradient()[:, :, 0]
        if 0 not in made:
            a = left.inputs()[:, 0]
            made[0] = product(a, None if right is None else right.inputs()[:, 0], gram.work)
        h = None if right is None else right.gradient()[:, :, 0]
        gram.hadamard(made[0] + 1 if ones else made[0], g, h, classes)
    elif way == "pairs":
        function = _pairs_full if gram.layout == "full" else _pairs
        first = left.inputs(), left.gradient()
        function(gram, first, first if right is None else (right.inputs(), right.gradient()), classes, made)
    elif left.offsets and other.offsets:
        _shifted(gram, left, right, classes, weight)
    else:
        second = None if right is None else (right.inputs(), right.gradient())
        _gradients(gram, (left.inputs(), left.gradient()), second, classes, weight)
    return way


def _gradients(
    gram: Gram, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor] | None, classes: slice, weight: Tensor | None
) -> None:
    """Form this layer's per-sample gradients, some output channels at a time so that they stay in cache."""
    (a, g), q = left, left[0].shape[2]
    n, c, _, r = g.shape
    for block in _channels(r, a.element_size() * n * c * q):
        scale = None if weight is None else weight[block]
        mine = per_sample(a, g[..., block], scale, gram.buffer).flatten(2)
        gram.rows(
            mine, None if right is None else per_sample(right[0], right[1][..., block], scale).flatten(2), classes
        )


def _shifted(gram: Gram, left: Factors, right: Factors | None, classes: slice, weight: Tensor | None) -> None:
    """The same for a convolution, one kernel element at a time."""
    sides = [side for side in (left, right) if side is not None]
    inputs, gradients = [_made(side.padded) for side in sides], [_made(side.padded_gradient) for side in sides]
    (n, c, _, r), q = gradients[0].shape, inputs[0].shape[2]
    for block in _channels(r, inputs[0].element_size() * n * c * q):
        turned = [_turned(g[..., block]) for g in gradients]
        for k in range(len(left.offsets)):
            scale = None if weight is None else weight[block, k * q : (k + 1) * q]
            found = []
            for side, x, d, memory in zip(sides, inputs, turned, (gram.buffer, None), strict=False):
                view = x[:, side.offsets[k] : side.offsets[k] + d.shape[2]]
                found.append(_multiplied(view, d, c, scale, memory).flatten(2))
            gram.rows(found[0], found[1] if right is not None else None, classes)


def jacobian(side: Factors, buffer: Callable[[tuple[int, ...], Tensor], Tensor]) -> Float[Tensor, "n c r q"]:
    """Return J (N, C, R, Q) of one weight, whole; `buffer` as in `per_sample`."""
    if not side.offsets:
        return per_sample(side.inputs(), side.gradient(), None, buffer)
    x, d = _made(side.padded), _turned(_made(side.padded_gradient))
    q = x.shape[2]
    found = x.new_empty(len(x), side.classes, side.channels, len(side.offsets) * q)
    for k, offset in enumerate(side.offsets):
        view = x[:, offset : offset + d.shape[2]]
        found[..., k * q : (k + 1) * q] = _multiplied(view, d, side.classes, None, buffer)
    return found


def _made(make: Callable[[], Tensor] | None) -> Tensor:
    assert make is not None
    return make()


def _channels(r: int, bytes_per_channel: int) -> list[slice]:
    """Return output channels in blocks whose gradients stay in cache."""
    width = max(min(r, LEAST_CHANNELS), BLOCK_BYTES // bytes_per_channel)
    width = -(-r // -(-r // min(r, width)))
    return [slice(start, min(start + width, r)) for start in range(0, r, width)]


def per_sample(
    a: Float[Tensor, "n t q"],
    g: Float[Tensor, "n c t r"],
    weight: Tensor | None = None,
    buffer: Callable[[tuple[int, ...], Tensor], Tensor] | None = None,
) -> Float[Tensor, "n c r q"]:
    """Return J (N, C, R, Q), the gradients of the weight for every output of every sample.

    `buffer`: (shape, like) → memory to write to; fresh memory of some MiB would cost as much as the products.
    """
    return _multiplied(a, _turned(g), g.shape[1], weight, buffer)


def _turned(g: Float[Tensor, "n c t r"]) -> Float[Tensor, "n cr t"]:
    return g[:, 0].transpose(1, 2) if g.shape[1] == 1 else g.transpose(2, 3).reshape(len(g), -1, g.shape[2])


def _multiplied(
    a: Float[Tensor, "n t q"],
    turned: Float[Tensor, "n cr t"],
    c: int,
    weight: Tensor | None,
    buffer: Callable[[tuple[int, ...], Tensor], Tensor] | None,
) -> Float[Tensor, "n c r q"]:
    out = None if buffer is None else buffer((len(a), turned.shape[1], a.shape[2]), a)
    found = torch.bmm(turned, a, out=out).view(len(a), c, -1, a.shape[2])
    return found if weight is None else found * weight


def _pairs(
    gram: Gram, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], classes: slice, made: dict[int, Tensor]
) -> None:
    (a, g), (b, h) = left, right
    (n, t, q), (m, s, _) = a.shape, b.shape
    c, r = g.shape[1], g.shape[3]
    work = gram.work
    a, b = a.reshape(n * t, q), b.reshape(m * s, q)
    step = max(1, 1024 // t)
    for start in range(0, n, step):
        stop = min(start + step, n)
        last = stop if gram.symmetric else m
        if start not in made:
            made[start] = a[start * t : stop * t].to(work) @ b[: last * s].to(work).T
        w = made[start]
        blocks = []
        for i in range(c):
            x = g[start:stop, i].reshape(-1, r).to(work) @ h[:last, i].reshape(-1, r).to(work).T
            x = x.mul_(w).view(stop - start, t, last, s)
            blocks.append(x.sum(3).sum(1, dtype=torch.float64))
        found = torch.stack(blocks)
        found = found.sum(0) if gram.layout == "trace" else found
        gram.block(slice(start, stop), slice(0, last), classes, found)


def _pairs_full(
    gram: Gram, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], classes: slice, made: dict[int, Tensor]
) -> None:
    (a, g), (b, h) = left, right
    (n, t, q), (m, s, _) = a.shape, b.shape
    c, r = g.shape[1], g.shape[3]
    work = gram.work
    a, b = a.to(work), b.reshape(m * s, q).to(work)
    # (M, S, R C): gradients of the column samples, to be carried to the positions of a row sample.
    carried = h.permute(0, 2, 3, 1).to(work, memory_format=torch.contiguous_format).reshape(m, s, r * c)
    mine = g.reshape(n, c, t * r).to(work)
    moved = carried.new_empty(m, t, r * c)
    width = INNER if work == torch.float32 else t * r
    for row in range(n):
        last = row + 1 if gram.symmetric else m
        w = (b[: last * s] @ a[row].T).view(last, s, t).transpose(1, 2)
        torch.bmm(w, carried[:last], out=moved[:last])  # Σ_s (a_t · b_s) h_s
        found = torch.zeros(last, c, c, dtype=torch.float64, device=a.device)
        for start in range(0, t * r, width):
            terms = slice(start, start + width)
            found += mine[row, :, terms] @ moved[:last].view(last, t * r, c)[:, terms]
        gram.block(slice(row, row + 1), slice(0, last), classes, found.transpose(0, 1)[None])
