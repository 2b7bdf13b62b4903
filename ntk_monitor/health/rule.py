"""Finding, what is said about a run, and Rule, what says it: a name, thresholds, a source and a function of a Run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ntk_monitor.health.run import Run

Severity: TypeAlias = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""From what ruins a run to what is worth knowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing a rule found in a run."""

    rule: str
    severity: Severity
    """"error": the run is being lost. "warning": it is worse than it need be. "info": worth knowing, nothing to fix."""
    steps: tuple[int, int]
    """First and last optimizer step of the evidence."""
    evidence: str
    """The numbers and the steps."""
    meaning: str
    advice: str
    panel: str
    """Where to look: "learning rate", "loss", "residual", "kernel", "layers", "data", "forecast" or "outputs"."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rule's function returns: a finding without what the rule itself knows."""

    severity: Severity
    steps: tuple[int, int]
    evidence: str
    meaning: str
    advice: str


Thresholds: TypeAlias = Mapping[str, float]
Check: TypeAlias = Callable[[Run, Thresholds], Sign | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A condition on a run, as data: thresholds can be replaced (`dataclasses.replace`) without touching the function.

    Attributes:
        name: stable, e.g. "dead_layer".
        panel: where to look (see `Finding.panel`).
        needs: what it reads of a Snapshot; where any of it is missing the rule says nothing or judges by the rest.
        source: where the condition and its thresholds come from.
        thresholds: its numbers by name.
        check: returns a Sign, or None.
    """

    name: str
    panel: str
    needs: tuple[str, ...]
    source: str
    thresholds: Thresholds
    check: Check
    explained_by: tuple[str, ...] = ()
    """Rules whose error or warning explains what this one sees: then it stays silent. ("*",): any other."""

    def __call__(self, run: Run) -> Finding | None:
        """Return what the rule finds. Only rules that need "status" are asked about a run without measured probes."""
        if not run.measured and "status" not in self.needs:
            return None
        with np.errstate(all="ignore"):  # numbers of a run that broke may overflow here too
            sign = self.check(run, self.thresholds)
        if sign is None:
            return None
        return Finding(
            rule=self.name,
            severity=sign.severity,
            steps=sign.steps,
            evidence=sign.evidence,
            meaning=sign.meaning,
            advice=sign.advice,
            panel=self.panel,
        )


def rule(
    panel: str, needs: tuple[str, ...], source: str, *, explained_by: tuple[str, ...] = (), **thresholds: float
) -> Callable[[Check], Rule]:
    """Return a decorator that turns a function into the Rule of its name."""

    def decorate(check: Check) -> Rule:
        name = getattr(check, "__name__", "rule")
        return Rule(
            name=name,
            panel=panel,
            needs=needs,
            source=source,
            thresholds=thresholds,
            check=check,
            explained_by=explained_by,
        )

    return decorate


def short(value: float) -> str:
    """Return three significant digits without trailing zeros, for sentences."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.6f}".rstrip("0").rstrip(".")
    return f"{value:.1e}"


def listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
