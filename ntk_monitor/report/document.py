"""The page around the panels: findings, the summary in words, runs side by side; as one string of HTML."""

import html
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from ntk_monitor import figures
from ntk_monitor.atomic import whole
from ntk_monitor.compare import Comparison
from ntk_monitor.errors import InputError
from ntk_monitor.health import Finding, findings
from ntk_monitor.history import History
from ntk_monitor.report.panels import GROUPS, Panel, panels
from ntk_monitor.summary import rows

_ABOUT = (
    "K = J Jᵀ is the empirical neural tangent kernel of the network on the probe, unnormalised; every learning rate, "
    "batch size and loss factor is applied where it is used and named there. The numbers describe these probe samples."
)


def page(runs: Mapping[str, History], comparison: Comparison | None = None) -> str:
    """Return the report of these runs, name → history, as HTML that needs no other file.

    Args:
        runs: in the order they are shown.
        comparison: what stands above them, in words and figures.

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
        body.append(_figure("all-runs", specs["all-runs"]["layout"]["meta"]["tooltip"], wide=True))
    for k, (name, history) in enumerate(runs.items()):
        body.append(_run(k, name, history, drawn[name]))
    title = html.escape(" and ".join(list(runs)[:3]))
    return "".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title} · ntk_monitor</title><style>{_static('page.css')}</style></head>\n<body>",
            *body,
            f'\n<script type="application/json" id="figures">{_json(specs)}</script>',
            f"\n<script>{_plotly()}</script>\n<script>{_static('page.js')}</script></body></html>\n",
        )
    )


def write(runs: Mapping[str, History], path: str | os.PathLike[str], comparison: Comparison | None = None) -> Path:
    """Write the report to a file and return its path; see `page`.

    Raises:
        InputError: see `page`.
        OSError: the file cannot be written.
    """
    target = Path(path)
    text = page(runs, comparison)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def _head(runs: Mapping[str, History]) -> str:
    links = "".join(f'<a href="#run-{k}">{html.escape(name)}</a>' for k, name in enumerate(runs))
    when = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<header><h1>ntk_monitor</h1><nav>{links}</nav><button id="theme" title="light or dark">◐</button>'
        f'<p class="about">{html.escape(_ABOUT)} Written {when}.</p></header>\n'
    )


def _compared(comparison: Comparison) -> str:
    def cells() -> Iterator[str]:
        for row in comparison.rows:
            kind = ' class="differs"' if row.matters else ""
            words = "".join(f"<td>{html.escape(word)}</td>" for word in (row.left, row.right, row.meaning))
            yield f"<tr{kind}><th>{html.escape(row.quantity)}</th>{words}</tr>"

    names = "".join(f"<th>{html.escape(name)}</th>" for name in comparison.names)
    head = f"<thead><tr><th>quantity</th>{names}<th>what it means</th></tr></thead>"
    drawn = [
        _figure(name, figure["layout"]["meta"]["tooltip"], wide=False) for name, figure in comparison.figures.items()
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


def _run(k: int, name: str, history: History, shown: tuple[Panel, ...]) -> str:
    parts = [f'<section class="run" id="run-{k}"><h2>{html.escape(name)}</h2>', _health(k, history), _summary(history)]
    for group, question in GROUPS.items():
        members = [panel for panel in shown if panel.group == group]
        if members:
            parts.append(f'<section class="group" id="run-{k}-{group.replace(" ", "-")}"><h3>{group}</h3>')
            parts.append(f'<p class="question">{html.escape(question)}</p><div class="grid">')
            parts += [_figure(f"{k}-{panel.name}", panel.tells, wide=panel.wide) for panel in members]
            parts.append("</div></section>")
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in history.notes]
    return "".join((*parts, "</section>\n"))


def _figure(key: str, tells: str, *, wide: bool) -> str:
    size = ' class="wide"' if wide else ""
    return (
        f'<figure{size}><div class="plot" id="{html.escape(key)}"></div>'
        f"<figcaption>{html.escape(tells)}</figcaption></figure>"
    )


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


def _json(specs: Mapping[str, figures.Figure]) -> str:
    # A closing tag inside a string would end the script element.
    return json.dumps(specs, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def _static(name: str) -> str:
    return resources.files("ntk_monitor.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Return plotly.js, without importing plotly, which takes a second."""
    spec = importlib.util.find_spec("plotly")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        script = Path(place) / "package_data" / "plotly.min.js"
        if script.is_file():
            return script.read_text(encoding="utf-8").replace("</script", "<\\/script")
    raise InputError("a report needs plotly.js, which the plotly package brings; pip install plotly")
