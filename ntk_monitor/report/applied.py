"""What an application found, as a section of a page and as a page of its own."""

import html
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor import figures
from ntk_monitor.atomic import whole
from ntk_monitor.report.document import _figure, _json, _plotly, _static

if TYPE_CHECKING:
    from ntk_monitor.applications.report import Report, Table

_CLASSES = {True: "fine", False: "warning", None: ""}


def section(report: "Report") -> tuple[str, dict[str, figures.Figure]]:
    """Return the section of one application, and its figures by the keys under which the section places them."""
    specs = {f"{report.name}-{name}": figure for name, figure in report.figures.items()}
    drawn = [_figure(key, spec["layout"].get("meta", {}).get("tooltip", ""), wide=False) for key, spec in specs.items()]
    body = "".join(
        (
            f'<section class="run" id="app-{html.escape(report.name)}"><h2>{html.escape(report.title)}</h2>',
            f"<p>{html.escape(report.summary)}</p>",
            *_verdicts(report),
            _numbers(report),
            f'<div class="grid">{"".join(drawn)}</div>',
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
    return "".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(report.title)} · ntk_monitor</title><style>{_static('page.css')}</style></head>\n",
            f'<body><header><h1>ntk_monitor</h1><nav>{html.escape(report.name)}</nav><button id="theme" ',
            f'title="light or dark">◐</button></header>\n{body}',
            f'\n<script type="application/json" id="figures">{_json(specs)}</script>',
            f"\n<script>{_plotly()}</script>\n<script>{_static('page.js')}</script></body></html>\n",
        )
    )


def write_application(report: "Report", path: str | os.PathLike[str]) -> Path:
    """Write the page to a file and return its path; see `application_page`.

    Raises:
        InputError: see `application_page`.
        OSError: the file cannot be written.
    """
    target = Path(path)
    text = application_page(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def _verdicts(report: "Report") -> Iterator[str]:
    for one in report.verdicts:
        words = f"<strong>{html.escape(one.word)}:</strong> {html.escape(one.claim)} ({html.escape(one.evidence)})"
        yield f'<p class="finding {_CLASSES[one.holds]}">{words}</p>'


def _numbers(report: "Report") -> str:
    cells = "".join(
        f"<tr><th>{html.escape(one.name)}</th><td>{html.escape(str(one))}</td><td>{html.escape(one.note)}</td></tr>"
        for one in report.numbers
    )
    return f'<table class="summary"><tbody>{cells}</tbody></table>' if cells else ""


def _table(title: str, table: "Table") -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in table.rows)
    return (
        f"<h3>{html.escape(title)}</h3>"
        f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))
