"""The section of one run: what it is at a glance, what its health rules find, its numbers in words, its panels."""

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ntk_monitor.cards import cards
from ntk_monitor.health import Finding, findings
from ntk_monitor.history import History
from ntk_monitor.mode_table import mode_table
from ntk_monitor.panels import GROUPS
from ntk_monitor.report.frame import place
from ntk_monitor.report.panels import Choice, Panel
from ntk_monitor.summary import rows

if TYPE_CHECKING:
    from ntk_monitor.applications.report import Report

_ROWS = 32
"""Modes that are listed."""

# What a panel shows before anything is chosen.
_FIRST = {
    "step": "last",
    "launch": "the last one that can be judged",
    "mode": "a few",
    "sample": "those that lag behind",
}


def run_section(
    k: int,
    name: str,
    history: History,
    shown: Sequence[Panel],
    found: Sequence[Choice],
    answers: "Sequence[Report]",
) -> str:
    """Return the section of run k in HTML: its panels' places have the keys "k-name"."""
    parts = [f'<section class="run" id="run-{k}"><h2>{html.escape(name)}</h2>']
    parts += [_cards(k, history), _health(k, history), _summary(history)]
    if answers:
        links = (f'<a href="#{k}-app-{n}">{html.escape(one.title)}</a>' for n, one in enumerate(answers))
        parts.append(f'<p class="question">Asked of this run: {", ".join(links)}.</p>')
    parts.append(_controls(found))
    for group, question in GROUPS.items():
        members = [panel for panel in shown if panel.group == group]
        if members:
            parts.append(f'<section class="group" id="run-{k}-{group.replace(" ", "-")}"><h3>{group}</h3>')
            parts.append(f'<p class="question">{html.escape(question)}</p><div class="grid">')
            parts += [panel_place(f"{k}-{panel.name}", panel) for panel in members]
            parts.append(f"</div>{_modes(history) if group == 'residual' else ''}</section>")
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in history.notes]
    return "".join((*parts, "</section>\n"))


def panel_place(key: str, panel: Panel) -> str:
    """Return the place of a panel, with its words."""
    return place(key, panel.tells, wide=panel.wide, about=panel.about, kernel=panel.kernel, axis=panel.axis)


def _cards(k: int, history: History) -> str:
    def one() -> Iterator[str]:
        for card in cards(history):
            where = f"#run-{k}-{card.group.replace(' ', '-')}"
            yield (
                f'<a class="card {card.light}" href="{where}"><b>{html.escape(card.name)}</b>'
                f"<strong>{html.escape(card.value)}</strong><span>{html.escape(card.sentence)}</span></a>"
            )

    return f'<div class="cards">{"".join(one())}</div>'


def _controls(found: Sequence[Choice]) -> str:
    """Return what a reader can choose: a slider for the step, lists for the rest."""

    def one() -> Iterator[str]:
        for choice in found:
            names = [*map(str, choice.stops), _FIRST[choice.axis]]
            if choice.axis == "step":
                last = len(choice.stops)
                yield (
                    f'<label>step <button class="play" title="play">▶</button><input type="range" data-axis="step" '
                    f'min="0" max="{last}" value="{last}" data-names="{html.escape("|".join(names))}">'
                    f"<output>{html.escape(names[-1])}</output></label>"
                )
            else:
                listed = "".join(f'<option value="{i}">{html.escape(one)}</option>' for i, one in enumerate(names[:-1]))
                first = f'<option value="{len(choice.stops)}" selected>{html.escape(names[-1])}</option>'
                yield f'<label>{choice.word} <select data-axis="{choice.axis}">{first}{listed}</select></label>'

    return f'<div class="controls">{"".join(one())}</div>' if found else ""


def _modes(history: History) -> str:
    """Return the table of the fastest modes of the last probe that has some."""
    held = [s for s in history.measured if s.rates.size]
    if not held:
        return ""
    table = mode_table(held[-1], held[-2] if len(held) > 1 else None, history)
    head = "".join(
        f'<th title="{html.escape(one.tells)}">{html.escape(one.name)}<br><small>{html.escape(one.unit)}</small></th>'
        for one in table.columns
    )
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in table.rows[:_ROWS])
    count = min(len(table.rows), _ROWS)
    return (
        f"<details><summary>The {count} fastest modes, one by one</summary>"
        f'<p class="note">{html.escape(table.note)}</p>'
        f'<table class="modes"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>'
    )


def _cell(cell: object) -> str:
    if cell is None:
        return "·"
    return f"{cell:.3g}" if isinstance(cell, float) else html.escape(str(cell))


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
    table = f'<table class="summary">{head}<tbody>{"".join(cells())}</tbody></table>'
    return f"<details><summary>The last probe in words</summary>{table}</details>"
