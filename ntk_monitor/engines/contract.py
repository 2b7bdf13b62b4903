"""Kernels from blocks of a Jacobian. J is (N, C, P), K[n, c, m, d] = Σ_p J[n, c, p] J[m, d, p].

Blocks come in the dtype of the network; products are accumulated in float64. A float32 Gram loses every eigenvalue
below 1e-7 of the largest and turns some negative; a float64 Gram of a float32 Jacobian keeps them.
"""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Layout: TypeAlias = Literal["full", "trace", "per_output"]

# Float64 copies of a Jacobian block are made this many elements at a time (8 MiB): small beside it, and taken from
# memory that is in use already. At 64 MiB each copy is mapped anew, which doubled the time of an MLP.
_SLAB = 2**20


@runtime_checkable
class Jacobian(Protocol):
    """Where blocks of a Jacobian come from."""

    samples: int
    outputs: int
    bytes_per_sample: int

    def block(self, rows: slice) -> dict[str, Float[Tensor, "n c p"]]:
        """Return the Jacobian rows of these samples, by parameter name."""
        ...


def gram(
    left: Jacobian,
    right: Jacobian | None,
    layout: Layout,
    *,
    group: Callable[[str], str],
    memory_limit: int,
) -> dict[str, Tensor]:
    """Return the kernel of each parameter group, in float64.

    Args:
        left: Jacobian of the N row samples.
        right: Jacobian of the M column samples; None: the same as `left`, and only half of the blocks are computed.
        layout: "full" → (N, C, M, C), "trace" → (N, M), "per_output" → (C, N, M).
        group: parameter name → name of the kernel it is summed into.
        memory_limit: bytes that Jacobian blocks may take. Above it blocks are recomputed for each pair of blocks.

    Cost: N M C² P multiply-adds for "full", N M C P otherwise.
    """
    columns = right or left
    kernels: dict[str, Tensor] = {}
    for rows, a in _blocks(left, memory_limit):
        for cols, b in _blocks(columns, memory_limit, upto=rows if right is None else None, known=(rows, a)):
            for name, block in a.items():
                tile = _tile(block, b[name], layout)
                key = group(name)
                if key not in kernels:
                    kernels[key] = _empty(left, columns, layout, tile.device)
                _add(kernels[key], tile, rows, cols, layout)
                if right is None and rows != cols:
                    _add(kernels[key], _transposed(tile, layout), cols, rows, layout)
    if right is None:
        kernels = {key: (kernel + _transposed(kernel, layout)) / 2 for key, kernel in kernels.items()}
    return kernels


def _blocks(
    source: Jacobian,
    memory_limit: int,
    *,
    upto: slice | None = None,
    known: tuple[slice, dict[str, Tensor]] | None = None,
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    # Two blocks are alive at a time, and a third while the next one is made.
    width = max(1, min(source.samples, memory_limit // (3 * source.bytes_per_sample)))
    for start in range(0, source.samples, width):
        rows = slice(start, min(start + width, source.samples))
        if upto is not None and rows.start > upto.start:
            return
        same = upto is not None and known is not None and rows == known[0]
        yield rows, known[1] if same and known is not None else source.block(rows)


def _tile(a: Float[Tensor, "n c p"], b: Float[Tensor, "m c p"], layout: Layout) -> Tensor:
    n, c, p = a.shape
    m = b.shape[0]
    if layout == "full":
        return _product(a.reshape(n * c, p), b.reshape(m * c, p)).reshape(n, c, m, c)
    if layout == "trace":
        return _product(a.reshape(n, c * p), b.reshape(m, c * p))
    return torch.stack([_product(a[:, i], b[:, i]) for i in range(c)])


def _product(a: Float[Tensor, "r p"], b: Float[Tensor, "s p"]) -> Float[Tensor, "r s"]:
    """Return a bᵀ accumulated in float64, on the CPU where the device has no float64."""
    device = torch.device("cpu") if a.device.type == "mps" else a.device
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=device)
    width = max(1, _SLAB // max(a.shape[0], b.shape[0]))
    for start in range(0, a.shape[1], width):
        left = a[:, start : start + width].to(device, torch.float64)
        right = left if b is a else b[:, start : start + width].to(device, torch.float64)
        total.addmm_(left, right.T)
    return total


def _empty(left: Jacobian, right: Jacobian, layout: Layout, device: torch.device) -> Tensor:
    n, m, c = left.samples, right.samples, left.outputs
    shape = {"full": (n, c, m, c), "trace": (n, m), "per_output": (c, n, m)}[layout]
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _add(kernel: Tensor, tile: Tensor, rows: slice, cols: slice, layout: Layout) -> None:
    if layout == "full":
        kernel[rows, :, cols] += tile
    elif layout == "trace":
        kernel[rows, cols] += tile
    else:
        kernel[:, rows, cols] += tile


def _transposed(kernel: Tensor, layout: Layout) -> Tensor:
    if layout == "full":
        return kernel.permute(2, 3, 0, 1)
    return kernel.transpose(-1, -2)
