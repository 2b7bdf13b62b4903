"""The page around the panels: findings, the summary in words, runs side by side; as one string of HTML."""

import html
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor import figures
from ntk_monitor.compare import Comparison
from ntk_monitor.errors import InputError
from ntk_monitor.health import Finding, findings
from ntk_monitor.history import History
from ntk_monitor.panels import GROUPS
from ntk_monitor.report.applied import section
from ntk_monitor.report.frame import framed, head, place, saved
from ntk_monitor.report.panels import Panel, panels
from ntk_monitor.summary import rows

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
    drawn = {name: panels(history) for name, history in runs.items()}
    specs = {f"{k}-{panel.name}": panel.figure for k, shown in enumerate(drawn.values()) for panel in shown}
    body = [_head(runs)]
    if comparison is not None:
        specs |= comparison.figures
        body.append(_compared(comparison))
    if len(runs) > 1:
        specs["all-runs"] = figures.runs_compared({name: run.snapshots for name, run in runs.items()})
        body.append(place("all-runs", specs["all-runs"]["layout"]["meta"]["tooltip"], wide=True))
    for k, (name, history) in enumerate(runs.items()):
        answers = (applied or {}).get(name, ())
        body.append(_run(k, name, history, drawn[name], answers))
        for n, report in enumerate(answers):
            text, more = section(report, key=f"{k}-app-{n}")
            body.append(text)
            specs |= more
    return framed(" and ".join(list(runs)[:3]), "".join(body), specs)


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


def _run(k: int, name: str, history: History, shown: tuple[Panel, ...], answers: "Sequence[Report]") -> str:
    parts = [f'<section class="run" id="run-{k}"><h2>{html.escape(name)}</h2>', _health(k, history), _summary(history)]
    if answers:
        links = (f'<a href="#{k}-app-{n}">{html.escape(one.title)}</a>' for n, one in enumerate(answers))
        parts.append(f'<p class="question">Asked of this run: {", ".join(links)}.</p>')
    for group, question in GROUPS.items():
        members = [panel for panel in shown if panel.group == group]
        if members:
            parts.append(f'<section class="group" id="run-{k}-{group.replace(" ", "-")}"><h3>{group}</h3>')
            parts.append(f'<p class="question">{html.escape(question)}</p><div class="grid">')
            parts += [place(f"{k}-{panel.name}", panel.tells, wide=panel.wide) for panel in members]
            parts.append("</div></section>")
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in history.notes]
    return "".join((*parts, "</section>\n"))


def _health(k: int, history: History) -> str:
    found = findings(history.snapshots)
    grave = [one for one in found if one.severity != "info"]
    words = "".join(_finding(k, one) for one in grave)
    if not grave:
        words = '<p class="finding fine">No error and no warning.</p>'
    if remarks := [one for one in found if one.severity == "info"]:
        listed = "".join(_finding(k, one) for one in remarks)
        words += f"<details><summary>{len(remarks)} remarks</summary>{listed}</details>"
    return f'<div class="health">{words}</div>'


def _finding(k: int, one: Finding) -> str:
    first, last = one.steps
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    where = f' <a href="#run-{k}-{one.panel.replace(" ", "-")}">{one.panel}</a>' if one.panel in GROUPS else ""
    advice = f"<em>Try:</em> {html.escape(one.advice)}" if one.severity != "info" else html.escape(one.advice)
    return (
        f'<p class="finding {one.severity}"><strong>{one.severity}: {html.escape(one.rule.replace("_", " "))}</strong> '
        f"({steps}{';' if where else ''}{where}) {html.escape(one.evidence)}. {html.escape(one.meaning)} {advice}</p>"
    )


def _summary(history: History) -> str:
    def cells() -> Iterator[str]:
        for row in rows(history.snapshots):
            yield f"<tr><th>{html.escape(row.quantity)}</th><td>{html.escape(row.value)}</td>"
            yield f"<td>{html.escape(row.meaning)}</td></tr>"

    head = "<thead><tr><th>quantity</th><th>at the last probe</th><th>what it means</th></tr></thead>"
    return f'<table class="summary">{head}<tbody>{"".join(cells())}</tbody></table>'
