"""Names of modules, short enough to stand side by side below an axis."""

import re
from collections.abc import Sequence

# An axis of a figure as wide as ours has room for so many letters, in all and at least for one name.
_ROOM, _LEAST = 100, 9


def axis_names(names: Sequence[str]) -> list[str]:
    """Return the names without the parts that all share at either end, long words cut to three letters, over lines.

    The full names belong in a table beside the figure.
    """
    split = [name.split(".") for name in names]
    for end in (0, -1):
        while len({parts[end] for parts in split}) == 1 and all(len(parts) > 1 for parts in split) and len(split) > 1:
            for parts in split:
                parts.pop(end)
    width = max(_LEAST, _ROOM // max(1, len(names)))
    return [_lines(parts, width) for parts in split]


def _lines(parts: Sequence[str], width: int) -> str:
    if len(".".join(parts)) > width:
        parts = [re.sub(r"[A-Za-z]{4,}", lambda word: word[0][:3], part) for part in parts]
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < width:
            lines[-1] += f".{part}"
        else:
            lines.append(part)
    return "<br>".join(lines)
