"""The audit as tables in markdown."""

from collections.abc import Sequence

from tests.audit.runs import Outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one table of the healthy runs and one of the sick ones, each with what it adds up to."""
    healthy = [o for o in outcomes if o.kind == "healthy"]
    sick = [o for o in outcomes if o.kind == "sick"]
    parts = []
    if healthy:
        quiet = sum(o.quiet for o in healthy)
        parts += ["## Healthy runs", f"{quiet} of {len(healthy)} without an error and with at most one warning.", ""]
        parts += ["| run | what it is | result | findings |", "|---|---|---|---|"]
        parts += [f"| {o.name} | {o.about} | {result(o)} | {findings(o) or 'none'} |" for o in healthy]
        parts += [""]
    if sick:
        named = sum(o.named for o in sick)
        parts += ["## Sick runs", f"{named} of {len(sick)} named with the right cause.", ""]
        parts += ["| run | what is wrong | result | findings | named |", "|---|---|---|---|---|"]
        parts += [
            f"| {o.name} | {o.about} | {result(o)} | {findings(o) or 'none'} | {'yes' if o.named else 'no'} |"
            for o in sick
        ]
        parts += [""]
    return "\n".join(parts)


def result(outcome: Outcome) -> str:
    return "broke" if outcome.error else f"{outcome.metric} {outcome.score:.3g}"


def findings(outcome: Outcome) -> str:
    return "; ".join(f"{f['severity']}: {f['rule']}" for f in outcome.findings if f["severity"] != "info")


def line(outcome: Outcome) -> str:
    """Return one run in one line, for the terminal."""
    expected = "" if outcome.as_intended else "  NOT AS INTENDED"
    losses = f"loss {outcome.losses[0]:.3g} to {outcome.losses[-1]:.3g}" if outcome.losses else ""
    return (
        f"{outcome.name:28s} {result(outcome):24s} {outcome.seconds:5.1f} s, {outcome.probes:2d} probes "
        f"({outcome.probe_seconds:.1f} s), {losses}, {outcome.loss_status}{expected}"
    )
