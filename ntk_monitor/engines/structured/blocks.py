"""The structured kernel in blocks of samples, where the gradients of all of them do not fit into memory at once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size, take
from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.structured.engine import Line, TooLargeError, structured_gram
from ntk_monitor.network import Network


def structured_blocks(  # noqa: PLR0913 - one kernel
    network: Network,
    inputs: Batch,
    other: Batch | None,
    layout: Layout,
    *,
    group: Callable[[str], str],
    scale: Mapping[str, Tensor],
    work: torch.dtype = torch.float64,
    memory_limit: int,
) -> tuple[dict[str, Tensor], list[Line]]:
    """Return what `structured_gram` does, in blocks of samples where the whole does not fit into memory.

    Twice as many blocks each time that one does not fit the limit, or that memory runs out all the same. Blocks that
    are not on the diagonal repeat the backward passes of both of their sides.
    """
    n, m = size(inputs), size(inputs if other is None else other)
    count = 1
    while True:
        try:
            return _blocks(network, inputs, other, layout, (n, m, count), group, scale, work, memory_limit)
        except (TooLargeError, MemoryError, RuntimeError) as error:
            if count >= max(n, m) or not (isinstance(error, TooLargeError) or _out_of_memory(error)):
                raise
            count *= 2


def _out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error) or "out of memory" in str(error).lower()


def _blocks(  # noqa: PLR0913 - one call, taken apart
    network: Network,
    inputs: Batch,
    other: Batch | None,
    layout: Layout,
    sizes: tuple[int, int, int],
    group: Callable[[str], str],
    scale: Mapping[str, Tensor],
    work: torch.dtype,
    memory_limit: int,
) -> tuple[dict[str, Tensor], list[Line]]:
    n, m, count = sizes

    def gram(a: Batch, b: Batch | None) -> tuple[dict[str, Tensor], list[Line]]:
        # A single sample has to be done whatever it takes.
        limit = memory_limit if count < max(n, m) else None
        return structured_gram(network, a, b, layout, group=group, scale=scale, work=work, memory_limit=limit)

    if count == 1:
        return gram(inputs, other)
    whole: dict[str, Tensor] = {}
    lines: list[Line] = []
    rows, cols = _parts(n, count), _parts(m, count)
    sample = {"full": 2, "trace": 1, "per_output": 2}[layout]
    for i, r in enumerate(rows):
        for c in cols[: i + 1] if other is None else cols:
            same = other is None and r == c
            found, lines = gram(take(inputs, r), None if same else take(inputs if other is None else other, c))
            for key, block in found.items():
                if key not in whole:
                    outputs = block.shape[0 if layout == "per_output" else 1]
                    shape = {"full": (n, outputs, m, outputs), "trace": (n, m), "per_output": (outputs, n, m)}[layout]
                    whole[key] = block.new_zeros(shape)
                view = whole[key].movedim(1, 0) if layout == "per_output" else whole[key]
                turned = block.movedim(1, 0) if layout == "per_output" else block
                index: list[Any] = [slice(None)] * view.dim()
                index[0], index[sample] = r, c
                view[tuple(index)] = turned
                if other is None and not same:
                    index[0], index[sample] = c, r
                    view[tuple(index)] = turned.permute(2, 3, 0, 1) if layout == "full" else turned.transpose(0, sample)
    return whole, lines


def _parts(length: int, count: int) -> list[slice]:
    step = -(-length // count)
    return [slice(s, min(s + step, length)) for s in range(0, length, step)]
