"""The page: runs side by side, then each run in its section; as one string of HTML."""

import html
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor import figures
from ntk_monitor.compare import Comparison
from ntk_monitor.errors import InputError
from ntk_monitor.history import History
from ntk_monitor.report.applied import section
from ntk_monitor.report.frame import framed, head, place, saved
from ntk_monitor.report.panels import STOPS, choices, panels, several
from ntk_monitor.report.run import panel_place, run_section

if TYPE_CHECKING:
    from ntk_monitor.applications.report import Report

_ABOUT = (
    "K = J Jᵀ is the empirical neural tangent kernel of the network on the probe, unnormalised; every learning rate, "
    "batch size and loss factor is applied where it is used and named there. The numbers describe these probe samples."
)


def page(
    runs: Mapping[str, History],
    comparison: Comparison | None = None,
    applied: "Mapping[str, Sequence[Report]] | None" = None,
) -> str:
    """Return the report of these runs, name → history, as HTML that needs no other file.

    Args:
        runs: in the order they are shown.
        comparison: what stands above them, in words and figures.
        applied: what applications say of a run, by its name; a section of each follows the run's own.

    Raises:
        InputError: no run, or no plotly package to take plotly.js from.
    """
    if not runs:
        raise InputError("a report needs at least one run, got none")
    # Every run has a whole of choices to itself when it is alone; many share the room in the file.
    most = max(2, STOPS // len(runs))
    drawn = {name: panels(history, most) for name, history in runs.items()}
    placed = {f"{k}-{panel.name}": panel for k, shown in enumerate(drawn.values()) for panel in shown}
    specs = {key: panel.figure for key, panel in placed.items()}
    body = [_head(runs)]
    if comparison is not None:
        specs |= comparison.figures
        body.append(_compared(comparison))
    if len(runs) > 1:
        text, more = _side_by_side(runs)
        body.append(text)
        specs |= more
    for k, (name, history) in enumerate(runs.items()):
        answers = (applied or {}).get(name, ())
        body.append(run_section(k, name, history, drawn[name], choices(history, most), answers))
        for n, report in enumerate(answers):
            text, more = section(report, key=f"{k}-app-{n}")
            body.append(text)
            specs |= more
    return framed(
        " and ".join(list(runs)[:3]),
        "".join(body),
        specs,
        {key: one.others for key, one in placed.items() if one.others},
    )


def write(
    runs: Mapping[str, History],
    path: str | os.PathLike[str],
    comparison: Comparison | None = None,
    applied: "Mapping[str, Sequence[Report]] | None" = None,
) -> Path:
    """Write the report to a file and return its path; see `page`.

    Raises:
        InputError: see `page`.
        OSError: the file cannot be written.
    """
    return saved(page(runs, comparison, applied), path)


def _head(runs: Mapping[str, History]) -> str:
    links = "".join(f'<a href="#run-{k}">{html.escape(name)}</a>' for k, name in enumerate(runs))
    return head(links, f"{_ABOUT} Written {time.strftime('%Y-%m-%d %H:%M')}.")


def _side_by_side(runs: Mapping[str, History]) -> tuple[str, dict[str, figures.Figure]]:
    """Return the section in which every figure draws all runs, and its figures by their keys."""
    whole = figures.runs_compared({name: run.snapshots for name, run in runs.items()})
    shared = {f"all-{panel.name}": panel for panel in several(runs)}
    body = "".join(
        (
            '<section class="run" id="all"><h2>Runs side by side</h2><div class="grid">',
            place("all-runs", whole["layout"]["meta"]["tooltip"], wide=True),
            *(panel_place(key, panel) for key, panel in shared.items()),
            "</div></section>\n",
        )
    )
    return body, {"all-runs": whole} | {key: panel.figure for key, panel in shared.items()}


def _compared(comparison: Comparison) -> str:
    def cells() -> Iterator[str]:
        for row in comparison.rows:
            kind = ' class="differs"' if row.matters else ""
            words = "".join(f"<td>{html.escape(word)}</td>" for word in (row.left, row.right, row.meaning))
            yield f"<tr{kind}><th>{html.escape(row.quantity)}</th>{words}</tr>"

    names = "".join(f"<th>{html.escape(name)}</th>" for name in comparison.names)
    head = f"<thead><tr><th>quantity</th>{names}<th>what it means</th></tr></thead>"
    drawn = [
        place(name, figure["layout"]["meta"]["tooltip"], wide=False) for name, figure in comparison.figures.items()
    ]
    return "".join(
        (
            f'<section class="run" id="compared"><h2>{html.escape(comparison.title)}</h2>',
            f"<p>{html.escape(comparison.verdict)}</p>",
            f'<table class="summary compared">{head}<tbody>{"".join(cells())}</tbody></table>',
            *(f'<p class="note">{html.escape(note)}</p>' for note in comparison.notes),
            f'<div class="grid">{"".join(drawn)}</div></section>\n',
        )
    )
