"""What an application found, as a section of a page and as a page of its own."""

import html
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor.figures import Figure
from ntk_monitor.report.frame import framed, head, place, saved

if TYPE_CHECKING:
    from ntk_monitor.applications.report import Report, Table

_CLASSES = {True: "fine", False: "warning", None: ""}


def section(report: "Report", key: str | None = None) -> tuple[str, dict[str, Figure]]:
    """Return the section of one application, and its figures by the keys under which the section places them.

    Args:
        report: what it found.
        key: of the section, which its figures' keys begin with; default: the application's name.
    """
    key = key or report.name
    specs = {f"{key}-{name}": figure for name, figure in report.figures.items()}
    drawn = [place(one, spec["layout"].get("meta", {}).get("tooltip", "")) for one, spec in specs.items()]
    body = "".join(
        (
            f'<section class="run" id="{html.escape(key)}"><h2>{html.escape(report.title)}</h2>',
            f"<p>{html.escape(report.summary)}</p>",
            *_verdicts(report),
            f'<div class="grid">{"".join(drawn)}</div>' if drawn else "",
            _numbers(report),
            *(_table(title, table) for title, table in report.tables.items()),
            *(f'<p class="note">{html.escape(caveat)}</p>' for caveat in report.caveats),
            "</section>\n",
        )
    )
    return body, specs


def application_page(report: "Report") -> str:
    """Return the section as HTML that needs no other file.

    Raises:
        InputError: no plotly package to take plotly.js from.
    """
    body, specs = section(report)
    return framed(report.title, head(html.escape(report.name)) + body, specs)


def write_application(report: "Report", path: str | os.PathLike[str]) -> Path:
    """Write the page to a file and return its path; see `application_page`.

    Raises:
        InputError: see `application_page`.
        OSError: the file cannot be written.
    """
    return saved(application_page(report), path)


def _verdicts(report: "Report") -> Iterator[str]:
    for one in report.verdicts:
        words = f"<strong>{html.escape(one.word)}:</strong> {html.escape(one.claim)} ({html.escape(one.evidence)})"
        yield f'<p class="finding {_CLASSES[one.holds]}">{words}</p>'


def _numbers(report: "Report") -> str:
    cells = "".join(
        f"<tr><th>{html.escape(one.label)}</th><td>{html.escape(str(one))}</td><td>{html.escape(one.note)}</td></tr>"
        for one in report.numbers
    )
    return f'<table class="summary"><tbody>{cells}</tbody></table>' if cells else ""


def _table(title: str, table: "Table") -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.words)
    return (
        f"<h3>{html.escape(title)}</h3>"
        f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
