"""Text as language models take it: token ids (N, T), labels (N, T) that are -100 where nothing is to be predicted.

N sequences of T tokens over a vocabulary of V. A packed row holds several documents one behind the other; position_ids
start anew at each, and attention is meant to stay inside them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ntk_monitor.errors import InputError

Positions: TypeAlias = Literal["last"] | Sequence[int]
"""Places in a sequence: the last token that is no padding, or indices (negative ones count from the end)."""

_NOTHING = -100

FLASH = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
"""Boundaries of packed documents in the form that flash attention wants."""

# Documents of their own need no boundaries.
_BOUNDARIES = FLASH | {"seq_idx", "position_ids"}


def last_tokens(mask: Tensor | None, length: int) -> Tensor | int:
    """Return where each sequence has its last token that is no padding, (N,), whichever side is padded.

    Args:
        mask: attention mask (N, T); None: nothing is padding.
        length: T.
    """
    if mask is None:
        return length - 1
    return (mask.long() * torch.arange(1, length + 1, device=mask.device)).argmax(1)


def at(outputs: Tensor, positions: Positions, mask: Tensor | None = None) -> Tensor:
    """Return the outputs (N, T, V) at the chosen positions: (N, V) for "last", (N, k, V) for k indices.

    Raises:
        InputError: outputs that are no sequences, or an index beyond their end.
    """
    if outputs.dim() != 3:
        raise InputError(f"positions= needs outputs (N, T, V), got shape {tuple(outputs.shape)}; leave positions out")
    n, length, _ = outputs.shape
    if isinstance(positions, str):
        last = last_tokens(mask, length)
        return outputs[:, last] if isinstance(last, int) else outputs[torch.arange(n, device=outputs.device), last]
    if not all(-length <= p < length for p in positions):
        raise InputError(f"positions must lie in a sequence of {length} tokens, got {list(positions)}")
    return outputs[:, list(positions)]


def unpacked(batch: Any) -> dict[str, Any] | None:
    """Return the documents of packed rows as one row each, padded at the end, with an attention mask.

    Args:
        batch: a mapping with input_ids, labels and position_ids (rows, T), as collators for packed text return it.

    Returns:
        The documents, in order; None where the batch is not packed, where it holds an attention mask or anything else
        that cannot be cut, or where a document's first token is predicted from the document before it.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch or batch.get("position_ids") is None:
        return None
    rows, ids = {k: v for k, v in batch.items() if k not in _BOUNDARIES}, batch["position_ids"]
    if "attention_mask" in rows or any(not isinstance(v, Tensor) or v.shape != ids.shape for v in rows.values()):
        return None
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] - ids[:, :-1] != 1
    inner = starts.clone()
    inner[:, 0] = False
    if not inner.any() or ("labels" in rows and bool((rows["labels"][inner] != _NOTHING).any())):
        return None
    cuts = [(row, [*starts[row].nonzero().flatten().tolist(), ids.shape[1]]) for row in range(len(ids))]
    spans = [(row, a, b) for row, places in cuts for a, b in itertools.pairwise(places)]
    longest = max(b - a for _, a, b in spans)
    found: dict[str, Any] = {
        name: torch.stack([_padded(values[r, a:b], longest, _NOTHING if name == "labels" else 0) for r, a, b in spans])
        for name, values in rows.items()
    }
    found["attention_mask"] = torch.stack([_padded(ids.new_ones(b - a), longest, 0) for _, a, b in spans])
    found["position_ids"] = torch.stack([ids[r, a] + torch.arange(longest, device=ids.device) for r, a, _ in spans])
    return found


def _padded(row: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([row, row.new_full((length - len(row),), value)])
