"""Answers as JSON that every browser parses: no NaN, no infinity, and no answer without a bound."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntk_monitor.errors import InputError

LARGEST = 16 * 2**20
"""Bytes of the largest answer; a figure of a thousand probes takes a hundredth of it."""


def text(answer: Any) -> str:
    """Return the answer as JSON; what is not finite becomes null.

    Raises:
        InputError: the answer is larger than `LARGEST`.
    """
    try:
        written = json.dumps(answer, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError):
        written = json.dumps(plain(answer), allow_nan=False, separators=(",", ":"))
    if len(written) > LARGEST:
        raise InputError(f"wanted an answer of at most {LARGEST} bytes, got {len(written)}; ask for less of the run")
    return written


def plain(value: Any) -> Any:
    """Return the value out of dicts, lists, text, finite numbers and None alone."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
