"""Health: rules over a run's history that say what is wrong, how it was seen, what it means and what to try.

They read nothing but Snapshots, and are meant to be quiet: a healthy run gives no error and next to no warning.
"""

import textwrap
from collections.abc import Sequence

from ntk_monitor.health import data, layers, learning, trust
from ntk_monitor.health.rule import SEVERITIES as SEVERITIES
from ntk_monitor.health.rule import Finding as Finding
from ntk_monitor.health.rule import Rule as Rule
from ntk_monitor.health.rule import Severity as Severity
from ntk_monitor.health.rule import Sign as Sign
from ntk_monitor.health.rule import rule as rule
from ntk_monitor.health.run import Run as Run
from ntk_monitor.snapshot import Snapshot

__all__ = ["RULES", "SEVERITIES", "Finding", "Rule", "Run", "Severity", "Sign", "findings", "rule", "text"]

RULES: tuple[Rule, ...] = (*learning.RULES, *layers.RULES, *data.RULES, *trust.RULES)
"""Every rule, those that end a run first."""


def findings(snapshots: Sequence[Snapshot], *, rules: Sequence[Rule] = RULES) -> tuple[Finding, ...]:
    """Return what the rules find in the history of a run, errors first, then in the order of the rules.

    Args:
        snapshots: all probes in order of steps, skipped ones included. What an early version did not record is missing,
            and the rules that need it say nothing.
        rules: which rules to ask.

    Cost: microseconds per rule and probe.
    """
    run = Run(snapshots)
    said = {one.name: finding for one in rules if (finding := one(run)) is not None}
    grave = {name for name, finding in said.items() if finding.severity != "info"}
    # One cause, one finding: a symptom yields to what explains it.
    known = {one.name: one.explained_by for one in rules}
    found = [
        finding
        for name, finding in said.items()
        if not (grave - {name} if "*" in known[name] else grave & set(known[name]))
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def text(found: Sequence[Finding], width: int = 100) -> str:
    """Return findings as wrapped paragraphs, one each: what was seen, what it means, what to try.

    Empty when there are none; no line is wider than `width` (at least 40).
    """
    width = max(width, 40)
    paragraphs = []
    for one in found:
        first, last = one.steps
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        head = f"{one.severity.upper()} {one.rule.replace('_', ' ')} ({steps}): {one.evidence}."
        body = f"{one.meaning} Try: {one.advice}" if one.severity != "info" else f"{one.meaning} {one.advice}"
        lines = textwrap.wrap(head, width) + textwrap.wrap(body, width, initial_indent="  ", subsequent_indent="  ")
        paragraphs.append("\n".join(lines))
    return "\n".join(paragraphs)
