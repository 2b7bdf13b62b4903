"""What the samples of a probe say: token ids decoded by the run's own tokenizer, one line each."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MOST = 120
"""Characters of one sample."""

# Tokens that are decoded for them; a token of a byte-level tokenizer may be a single character.
_TOKENS = 160


def tokenizer_of(known: Mapping[str, Any]) -> Any:
    """Return what decodes the run's tokens, from what a Trainer tells its callbacks; None: nothing does.

    That is its `processing_class`, a processor's tokenizer, or that of the data collator.
    """
    given = known.get("processing_class") or known.get("tokenizer")
    collate = getattr(known.get("train_dataloader"), "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # the Trainer may have put its own around it
    for one in (given, collate):
        found = getattr(one, "tokenizer", one)
        if callable(getattr(found, "decode", None)):
            return found
    return None


def texts_of(inputs: Any, tokenizer: Any) -> tuple[str, ...]:
    """Return the beginning of every sample, at most 120 characters without line breaks; empty where nothing says it.

    Args:
        inputs: with `input_ids` (N, T), and what `attention_mask` hides left out.
        tokenizer: whatever has `decode`. What fails in it costs the texts.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if tokenizer is None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return ()
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = ids.new_ones(ids.shape)
    try:
        rows = [row[seen.bool()][:_TOKENS].tolist() for row, seen in zip(ids.cpu(), mask.cpu(), strict=True)]
        return tuple(_line(str(tokenizer.decode(row, skip_special_tokens=True))) for row in rows)
    except Exception:  # noqa: BLE001 - tokenizers are users' code, and samples are shown by number without one
        return ()


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST else f"{line[: MOST - 1]}…"
