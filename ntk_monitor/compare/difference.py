"""Difference, one quantity of two sides in words, and Comparison, all of them with their figures."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ntk_monitor.figures import Figure


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of a comparison."""

    quantity: str
    left: str
    right: str
    meaning: str
    """One plain sentence or two."""
    matters: bool = False
    """Larger than what rounding, the choice of a probe or the clock would do."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two sides."""

    title: str
    names: tuple[str, str]
    rows: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    """Sentences about what cannot be compared, and why."""
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Which quantities differ and which do not, in one line."""
        differ = [row.quantity for row in self.rows if row.matters]
        same = [row.quantity for row in self.rows if not row.matters]
        parts = [f"Differ: {', '.join(differ)}." if differ else "Nothing differs by more than it must."]
        if same and differ:
            parts.append(f"About the same: {', '.join(same)}.")
        return " ".join(parts)


def difference(quantity: str, values: Iterable[str], meaning: str, matters: bool) -> Difference:
    """Return a Difference from the two values in order."""
    left, right = values
    return Difference(quantity, left, right, meaning, matters)


def number(value: float) -> str:
    """Return three significant digits, without an exponent between 0.0001 and 10 million."""
    if not math.isfinite(value):
        return "not known" if math.isnan(value) else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{float(f'{value:.3g}'):,.10f}".rstrip("0").rstrip(".")
    return f"{value:.2e}"


def factor(left: float, right: float) -> float:
    """Return right / left, NaN unless both are positive and finite."""
    both = left > 0 and right > 0 and math.isfinite(left) and math.isfinite(right)
    return right / left if both else math.nan


def times(ratio: float, more: str, less: str, same: str) -> str:
    """Return a ratio in words: "3.2 times `more`", "1.5 times `less`", or `same` within a tenth."""
    if not apart(ratio):
        return same
    return f"{number(ratio)} times {more}" if ratio > 1 else f"{number(1 / ratio)} times {less}"


def apart(ratio: float, tolerance: float = 1.1) -> bool:
    """Whether a ratio lies outside 1/tolerance to tolerance."""
    return not math.isnan(ratio) and not 1 / tolerance < ratio < tolerance
