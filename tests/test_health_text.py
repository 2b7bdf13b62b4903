"""Findings as text, and rules on histories that lack anything, hold NaN anywhere or make no sense."""

import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ntk_monitor.health import RULES, SEVERITIES, Finding, Run, findings, rule, text
from ntk_monitor.health.rule import Sign, Thresholds, short
from ntk_monitor.snapshot import ARRAYS, FACTS, TEXTS, Snapshot
from tests.histories import HEALTHY, facts, metrics, plateau, texts
from tests.histories import edit as edited
from tests.snapshots import broken, skipped, training, without_modes

NUMBERS = st.one_of(
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-300, 1e300]), st.floats(-1e3, 1e3)
)
KNOWN = {field.name for field in fields(Snapshot)}


def _finding(severity: Any = "warning", **changes: Any) -> Finding:
    finding = Finding(
        rule="dead_layer",
        severity=severity,
        steps=(25, 75),
        evidence="the kernel of head was zero",
        meaning="No gradient reaches it.",
        advice="Use another activation.",
        panel="layers",
    )
    return replace(finding, **changes)


def test_text_says_what_was_seen_what_it_means_and_what_to_try() -> None:
    assert text([_finding(), _finding("info", steps=(5, 5), advice="Nothing.")], width=200) == (
        "WARNING dead layer (steps 25 to 75): the kernel of head was zero.\n"
        "  No gradient reaches it. Try: Use another activation.\n"
        "INFO dead layer (step 5): the kernel of head was zero.\n"
        "  No gradient reaches it. Nothing."
    )
    assert text([]) == ""


@pytest.mark.parametrize("width", [10, 40, 73, 200])
def test_text_is_wrapped(width: int) -> None:
    found = findings(edited(loss=plateau(1.0), samples=5)(HEALTHY))
    assert found
    shown = text(found, width)
    assert max(len(line) for line in shown.splitlines()) <= max(width, 40)
    assert all(word in shown for finding in found for word in finding.advice.split())


def test_findings_come_by_severity_and_are_stable() -> None:
    found = findings(
        texts(structural_zeros="x")(
            facts(duplicates=1, uncovered=4000, outlier=1e6)(metrics(kernel_change=0.9)(HEALTHY))
        )
    )
    assert [f.severity for f in found] == ["error", "warning", "info", "info"]
    assert [f.rule for f in found] == ["uncovered_parameters", "outlier_sample", "duplicate_samples", "sparse_probes"]


def test_sentences_are_whole() -> None:
    for one in RULES:
        assert one.source
        assert one.panel in {"learning rate", "loss", "residual", "kernel", "layers", "data", "forecast", "outputs"}
        assert isinstance(one.check.__doc__, str)


def test_what_rules_need_exists_in_a_snapshot() -> None:
    for one in RULES:
        for need in one.needs:
            kind, _, name = need.partition(".")
            if kind == "facts":
                assert name in FACTS, need
            elif kind == "texts":
                assert name in TEXTS, need
            else:
                assert kind in KNOWN, need


def test_a_user_adds_a_rule() -> None:
    @rule("outputs", ("facts.accuracy",), "my own", least=0.999)
    def too_modest(run: Run, t: Thresholds) -> Sign | None:
        value = run.latest("accuracy")
        return Sign("info", (0, 1), f"{short(value)}", "", "") if value < t["least"] else None

    (finding,) = findings(HEALTHY, rules=(too_modest,))
    assert (finding.rule, finding.evidence, finding.panel) == ("too_modest", "0.99", "outputs")


def test_empty_and_old_histories() -> None:
    assert findings([]) == ()
    assert findings([skipped(0), skipped(10)]) == ()
    for history in (training(), training(outputs=1), training(probes=1)):
        for change in (lambda s: s, without_modes, broken):
            assert [f for f in findings([change(s) for s in history]) if f.severity == "error"] == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.0, "1"), (0.01234, "0.0123"), (12345.6, "12,300"), (3e-9, "3.0e-09"), (2e7, "2.0e+07")],
)
def test_short(value: float, shown: str) -> None:
    assert short(value) == shown


@st.composite
def _damaged(draw: st.DrawFn) -> list[Snapshot]:
    """Draw a history of which anything may be missing, NaN, infinite or of another shape."""
    history: list[Snapshot] = []
    for k in range(draw(st.integers(0, 6))):
        snapshot = HEALTHY[k]
        for kind in ("facts", "metrics"):
            numbers = dict(getattr(snapshot, kind))
            for name in draw(st.lists(st.sampled_from(sorted(numbers)), max_size=6)):
                numbers[name] = draw(NUMBERS)
            for name in draw(st.lists(st.sampled_from(sorted(numbers)), max_size=6)):
                numbers.pop(name, None)
            changed: Any = {kind: numbers}
            snapshot = replace(snapshot, **changed)
        arrays: dict[str, Any] = {}
        for name in draw(st.lists(st.sampled_from(sorted(ARRAYS)), max_size=5)):
            shape = draw(st.sampled_from([(0,), (1,), (3,), (4,), (10,), (3, 3), (4, 3)]))
            arrays[name] = np.full(shape, draw(NUMBERS))
        scalars: Any = {name: draw(NUMBERS) for name in draw(st.sets(st.sampled_from(["loss_value", "noise_floor"])))}
        counts: Any = {
            name: draw(st.integers(0, 3)) for name in draw(st.sets(st.sampled_from(["samples", "outputs", "negative"])))
        }
        if draw(st.booleans()):
            arrays["layers"] = draw(st.sampled_from([(), ("a",), ("a", "b", "c", "d")]))
            arrays["directions"] = draw(st.sampled_from([(), ("a", "b", "c"), ("a",)]))
            arrays["texts"] = draw(
                st.sampled_from([{}, {"optimizer": "Adam"}, {"scale_free": "a, b", "optimizer": "SGD"}])
            )
        if draw(st.integers(0, 5)) == 0:
            snapshot = skipped(snapshot.step, draw(st.sampled_from(["memory", "NaN in the kernel"])))
        history.append(replace(snapshot, **arrays, **scalars, **counts))
    return history


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_damaged())
def test_rules_survive_anything_without_a_warning(history: list[Snapshot]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = findings(history)
    assert [SEVERITIES.index(f.severity) for f in found] == sorted(SEVERITIES.index(f.severity) for f in found)
    for finding in found:
        assert "nan" not in f"{finding.evidence} {finding.advice}".lower().replace("or hold nan", "")
    assert isinstance(text(found), str)
