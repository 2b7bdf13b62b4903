"""Report: what an application found, in words, numbers, tables and figures; verdicts that can be no."""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ntk_monitor.errors import InputError

SCHEMA = 1
"""Of the JSON; a reader refuses a larger one."""


@dataclass(frozen=True, slots=True)
class Number:
    """One quantity with its unit and, where it was sampled, an interval."""

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """The name as it is shown."""
        return self.name.replace("_", " ")

    def __str__(self) -> str:
        shown = short(self.value)
        # An interval without ends says nothing.
        if self.low is not None and self.high is not None and math.isfinite(self.low + self.high):
            shown += f" [{short(self.low)}, {short(self.high)}]"
        return f"{shown} {self.unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim of theory and whether it holds for this network; None: it cannot be decided from what was measured."""

    claim: str
    holds: bool | None
    evidence: str

    @property
    def word(self) -> str:
        """Return "holds", "does not hold" or "undecided"."""
        return "undecided" if self.holds is None else "holds" if self.holds else "does not hold"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equal length under column names; numbers stay numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"every row must have {len(self.columns)} cells, got {len(wrong[0])}")

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The rows as they are shown."""
        return tuple(tuple(_cell(value) for value in row) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one application says about one network.

    Attributes:
        name: of the application.
        title: what was asked.
        summary: two to four plain sentences.
        numbers: the quantities behind them.
        verdicts: claims and whether they hold here.
        tables: by title.
        figures: plain plotly dicts, by name.
        caveats: when these numbers mislead.
    """

    name: str
    title: str
    summary: str
    numbers: tuple[Number, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()

    def number(self, name: str) -> float:
        """Return the value of a number by name.

        Raises:
            KeyError: there is none of this name.
        """
        return {one.name: one.value for one in self.numbers}[name]

    def text(self, width: int = 88) -> str:
        """Return the report for a terminal, no line of prose wider than `width` (at least 40)."""
        width = max(width, 40)
        return "\n".join(_lines(self, width))

    def json(self) -> str:
        """Return the whole report as strict JSON; a number that is not finite is {"float": "inf"}, "-inf" or "nan"."""
        content = {
            "schema": SCHEMA,
            **{key: getattr(self, key) for key in ("name", "title", "summary", "caveats", "figures")},
            "numbers": [_coded(asdict(one)) for one in self.numbers],
            "verdicts": [asdict(one) for one in self.verdicts],
            "tables": {title: {"columns": t.columns, "rows": _coded(t.rows)} for title, t in self.tables.items()},
        }
        return json.dumps(content, allow_nan=False, ensure_ascii=False, default=_plain)

    @staticmethod
    def from_json(text: str) -> "Report":
        """Return the report that `json` wrote; equal to the first up to tuples in figures, which are lists now.

        Raises:
            InputError: text that is no such report, or one of a newer schema.
        """
        try:
            found = json.loads(text)
            schema = found["schema"]
            if schema > SCHEMA:
                raise InputError(f"wanted a report of schema {SCHEMA} at most, got {schema}; update ntk-monitor")
            return Report(
                **{key: found[key] for key in ("name", "title", "summary", "figures")},
                caveats=tuple(found["caveats"]),
                numbers=tuple(Number(**_decoded(one)) for one in found["numbers"]),
                verdicts=tuple(Verdict(**one) for one in found["verdicts"]),
                tables={
                    title: Table(tuple(one["columns"]), tuple(tuple(row) for row in _decoded(one["rows"])))
                    for title, one in found["tables"].items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"wanted the report of an application as JSON, got {text[:40]!r}: {error!r}") from error


def short(value: float) -> str:
    """Return four significant digits."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{float(f'{value:.4g}'):,.6f}".rstrip("0").rstrip(".")
    return f"{value:.3e}"


def _coded(value: Any) -> Any:
    """Return the value with every float that JSON does not know as {"float": "inf"} and the like."""
    if isinstance(value, Mapping):
        return {key: _coded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_coded(one) for one in value]
    value = _plain(value)
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: _decoded(one) for k, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Return a number of NumPy's as Python's own; what JSON does not know in words."""
    if hasattr(value, "item"):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _lines(report: Report, width: int) -> Iterator[str]:
    yield report.title
    yield ""
    yield from textwrap.wrap(report.summary, width)
    if report.verdicts:
        yield ""
    for verdict in report.verdicts:
        sentence = f"{verdict.word.upper()}: {verdict.claim} ({verdict.evidence})"
        yield from textwrap.wrap(sentence, width, subsequent_indent="  ")
    if report.numbers:
        yield ""
        wide = min(max(len(one.name) for one in report.numbers), width // 2)
        for one in report.numbers:
            note = f"  {one.note}" if one.note else ""
            yield from textwrap.wrap(f"{one.label:<{wide}}  {one}{note}", width, subsequent_indent=" " * (wide + 2))
    for title, table in report.tables.items():
        yield ""
        yield title
        yield from _grid(table)
    if report.caveats:
        yield ""
    for caveat in report.caveats:
        yield from textwrap.wrap(f"Note: {caveat}", width, subsequent_indent="  ")


def _grid(table: Table) -> Iterator[str]:
    rows: list[Sequence[str]] = [table.columns, *table.words]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.columns))]
    for row in rows:
        yield "  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip()


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return short(value) if isinstance(value, float) else str(value)
