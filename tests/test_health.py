"""Every rule on a history built to trigger it, and on one that comes close and must not."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from ntk_monitor.health import RULES, Finding, Rule, Severity, findings
from tests.histories import (
    HEALTHY,
    LAYERS,
    PROBES,
    Edit,
    both,
    breaks,
    edit,
    facts,
    metrics,
    plateau,
    shortened,
    tasks,
    texts,
)

NAMED: dict[str, Rule] = {rule.name: rule for rule in RULES}
FLAT = edit(loss=plateau(1.0), facts={"accuracy": 0.4})


@dataclass(frozen=True)
class Case:
    """One rule: what triggers it, how severe it then is, what its evidence says, and what does not trigger it."""

    rule: str
    sick: Edit
    severity: Severity
    says: str
    fine: Edit

    def __str__(self) -> str:
        return f"{self.rule}-{self.says.replace(' ', '_')}"


def _zero(layer: int, since: int = 0) -> Edit:
    """Return an edit that takes all gradient from a layer from a probe on."""
    whole = np.array([90.0, 270.0, 360.0, 180.0])
    dead = np.where(np.arange(4) == layer, 0.0, whole)
    return edit(layer_trace=lambda k: dead if k >= since else whole)


def _grown(factor: float) -> Edit:
    return edit(layer_norm=lambda k: np.array([4.0 * factor ** (k / (PROBES - 1)), 5.0, 5.0, 2.0]))


_PEAK = [1.0] * 3 + [0.5] * (PROBES - 3)
_RANDOM = {"label_energy": 0.105, "sample_loo": 1.02}
_EIGEN = np.array([10.0, 1.0, -1e-3])

CASES = [
    # The learning rate
    Case("lr_too_high", both(FLAT, metrics(lr_headroom_high=0.5)), "error", "did not fall",
         metrics(lr_headroom_high=0.85)),
    Case("lr_too_high", both(FLAT, metrics(lr_headroom_high=[0.1, *[9.0] * 11])), "error", "at step 0",
         metrics(lr_headroom_high=[0.1, *[9.0] * 11])),
    Case("lr_too_high", both(breaks(4, "the kernel must be finite, got 9 NaN"), metrics(lr_headroom_high=0.1)),
         "error", "not finite later", breaks(4, "the kernel must be finite, got 9 NaN")),
    Case("lr_too_high", metrics(lr_headroom_high=[5.0] * 9 + [0.7, 0.55, 0.45]), "warning", "at steps 225",
         metrics(lr_headroom_high=[5.0] * 9 + [0.95, 0.95, 0.9])),
    Case("edge_of_stability", metrics(lr_headroom_high=0.9), "info", "the loss fell",
         both(metrics(lr_headroom_high=0.9), edit(loss=plateau(0.3)))),
    Case("lr_in_noise", metrics(lr_headroom_low=0.5), "info", "2 times", metrics(lr_headroom_low=1.1)),
    Case("lr_in_noise", both(FLAT, metrics(lr_headroom_low=[3.0, *[0.15] * 11])), "warning", "6.67 times",
         metrics(lr_headroom_low=[*[0.15] * 4, *[1.2] * 8])),
    Case("lr_too_low",
         both(FLAT, metrics(lr_headroom_low=300.0, residual_out_of_reach=0.9)), "warning", "300 times",
         metrics(lr_headroom_low=300.0, residual_out_of_reach=0.9)),  # room, but the loss fell
    Case("lr_too_low", both(FLAT, metrics(lr_headroom_low=40.0, residual_out_of_reach=np.nan)), "warning",
         "40 times", both(FLAT, metrics(lr_headroom_low=4.0))),
    Case("lr_spent", facts(lr=[0.1] * 5 + [1e-6] * 7, total_steps=600), "warning", "to go",
         facts(lr=[0.1] * 9 + [1e-6] * 3)),
    Case("lr_spent", facts(lr=0.0), "error", "was 0", facts(lr=[0.0, *[0.1] * 11])),
    # The loss
    Case("non_finite", breaks(5, "the kernel must be finite, got 9 of 9 entries NaN or infinite"), "error", "7 of 12",
         breaks(5, "not enough free memory for the Jacobian")),
    Case("non_finite", edit(loss=[1.0] * 11 + [np.inf]), "error", "1 of 12", edit(loss=[1.0] * 11 + [1e30])),
    Case("loss_diverging", edit(loss=np.linspace(1.1, 8, PROBES).tolist()), "error", "times the first",
         edit(loss=[1.1, 30.0, 12.0, 4.0, 2.5, 1.9, 1.5, 1.2, 1.0, 0.9, 0.9, 0.8])),
    Case("no_progress", FLAT, "warning", "92%", both(edit(loss=plateau(1.0)), shortened(4))),
    Case("summed_loss", edit(loss="cross_entropy(sum)"), "warning", "sum",
         edit(loss="cross_entropy(mean, label_smoothing=0.1)")),
    Case("summed_loss", both(texts(optimizer="AdamW"), edit(loss="mse(sum)")), "info", "sum", edit(loss="")),
    # Layers
    Case("dead_layer", _zero(1), "warning", "body.2", both(_zero(1), texts(structural_zeros="body.2, head"))),
    Case("dead_layer", _zero(1, since=6), "warning", "from step 150",
         edit(layer_trace=lambda k: np.array([0.0 if k == 0 else 1e-7 * k, 270.0, 360.0, 180.0]))),  # LoRA's A
    Case("dead_layer", both(_zero(0), edit(layer_trace=np.array([0.0, 0.0, 0.0, 180.0]))), "error", "3 of 4",
         edit(layer_trace=np.zeros(4))),
    Case("dominating_layer", edit(layer_update=np.array([0.0, 0.005, 0.005, 0.99])), "info", "head",
         edit(layer_update=np.array([0.05, 0.05, 0.0, 0.9]))),
    Case("vanishing_signal", edit(layer_trace=np.array([1e-13, 1e-10, 1e-3, 180.0])), "warning", "body.0, body.2",
         edit(layer_trace=np.array([1e-3, 1e-2, 1.0, 180.0]))),
    Case("vanishing_signal", edit(layer_trace=np.full(4, 1e-9)), "warning", "on average",
         edit(layer_trace=np.full(4, 1e-2))),
    Case("collapsed_outputs", both(FLAT, facts(output_spread=0.001)), "error", "0.1%",
         facts(output_spread=[np.nan] * 2 + [0.001] * 2 + [0.5] * 8)),
    Case("collapsed_outputs", both(FLAT, facts(output_rms=(0.4**np.arange(PROBES)).tolist())), "error",
         "have shrunk", both(FLAT, facts(output_rms=0.3))),
    Case("collapsed_outputs", both(FLAT, facts(output_spread=0.01, target_offset=0.1)), "error", "1.0%",
         both(FLAT, facts(output_spread=0.01, target_offset=200.0))),  # targets around 200 ± 1
    Case("rank_collapse", both(FLAT, metrics(effective_rank=[90.0] * 6 + [4.0] * 6)), "warning", "90 at the start",
         metrics(effective_rank=[20.0] * 6 + [8.0] * 6)),
    Case("rank_collapse", metrics(effective_rank=[90.0] * 6 + [4.0] * 6), "info", "90 at the start",
         metrics(effective_rank=[4.0] * 6 + [90.0] * 6)),
    Case("uncovered_parameters", both(facts(uncovered=4000), texts(uncovered="body.0.weight")), "error",
         "body.0.weight", facts(uncovered=0)),
    Case("uncovered_parameters", facts(uncovered=10), "warning", "10 of 5,000", facts(uncovered=np.nan)),
    Case("frozen_parameters", both(FLAT, facts(frozen=900)), "warning", "900", facts(frozen=0)),
    Case("frozen_parameters", facts(frozen=900), "info", "900", FLAT),
    Case("shrinking_rate", _grown(4.0), "info", "16 times", both(_grown(2.0), texts(optimizer="AdamW"))),
    Case("shrinking_rate", both(_grown(40.0), texts(optimizer="AdamW"), FLAT), "warning", "40 times",
         both(_grown(40.0), texts(scale_free="head"))),
    # Data
    Case("duplicate_samples", facts(duplicates=30), "warning", "30 of 64", facts(duplicates=0)),
    Case("duplicate_samples", facts(duplicates=2), "info", "2 of 64", facts(duplicates=np.nan)),
    Case("contradictory_targets", facts(duplicate_labels=5), "warning", "5 times", facts(duplicates=9)),
    Case("outlier_sample", facts(outlier=5e4), "warning", "50,000", facts(outlier=[5e4, *[9.0] * 11])),
    Case("unscaled_target", edit(loss="mse(mean)", facts={"target_rms": 170.0, "target_offset": 2.0}), "warning", "170",
         edit(loss="mse(mean)", facts={"target_rms": 2.3, "target_offset": 1.8})),
    Case("unscaled_target", edit(loss="mse(mean)", facts={"target_rms": 9.0, "target_offset": 30.0}), "warning", "30 ",
         facts(target_rms=9.0, target_offset=30.0)),  # classes
    Case("unnormalised_input", facts(input_rms=200.0), "warning", "200", facts(input_rms=7.8)),
    Case("unnormalised_input", facts(input_range=2e5, input_offset=1.4), "warning", "200,000",
         facts(input_range=2e5, input_offset=0.9)),
    Case("labels_look_random", edit(facts=_RANDOM, metrics={"alignment": [0.0, *[0.3] * 11]}), "warning", "1.05 times",
         edit(facts={**_RANDOM, "sample_loo": 0.8}, metrics={"alignment": 0.0})),
    Case("labels_look_random", both(FLAT, edit(facts=_RANDOM, metrics={"alignment": 0.01})), "warning", "0.01",
         edit(facts={"label_energy": np.nan, "sample_loo": np.nan}, metrics={"alignment": 0.01})),  # one measure
    Case("conflicting_tasks", tasks(-0.9), "warning", "rain, wind", tasks(0.3)),
    Case("conflicting_tasks", tasks(-0.7), "warning", "-0.7", tasks(-0.7, left=0.1)),
    # What the numbers are worth
    Case("mode_stuck", both(FLAT, edit(time_to_learn=np.full(10, np.inf), loss=plateau(0.95)), shortened(7)), "warning",
         "100% of the residual", edit(time_to_learn=np.full(10, 20.0))),
    Case("mode_stuck", both(edit(time_to_learn=np.array([1e4, *[2.0] * 9])), shortened(7)), "info", "51%",
         both(edit(time_to_learn=np.array([1e4, *[2.0] * 9]), facts={"forecast_error": 3.0}), shortened(7))),
    Case("slow_labels", both(FLAT, facts(label_energy=0.11)), "info", "1.1 times",
         both(FLAT, facts(label_energy=0.3))),
    Case("lazy_kernel", metrics(kernel_change=0.001), "info", "0.001", metrics(kernel_change=0.01)),
    Case("sparse_probes", metrics(kernel_change=0.7), "info", "0.7",
         metrics(kernel_change=_PEAK[:3] + [0.1] * 9)),
    Case("unreliable_forecast", facts(forecast_error=0.9), "info", "90%",
         facts(forecast_error=[0.9] * 9 + [0.3] * 3)),
    Case("small_probe", edit(samples=5), "warning", "5 probe samples", edit(samples=40)),
    Case("small_probe", facts(sharpness_bias=0.4), "info", "40%", facts(sharpness_bias=np.nan)),
    Case("negative_eigenvalues", edit(negative=1, eigenvalues=_EIGEN), "warning", "12 probes",
         edit(negative=1, eigenvalues=_EIGEN, noise_floor=1e-3)),
]  # fmt: skip


def _found(history: object, rule: str) -> list[Finding]:
    return [finding for finding in findings(history) if finding.rule == rule]  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule_speaks_when_built_to_and_not_when_it_is_close(case: Case) -> None:
    (finding,) = _found(case.sick(HEALTHY), case.rule)
    assert finding.severity == case.severity
    assert case.says in finding.evidence
    assert finding.panel == NAMED[case.rule].panel
    first, last = finding.steps
    assert 0 <= first <= last <= HEALTHY[-1].step
    assert _found(case.fine(HEALTHY), case.rule) == []


def test_every_rule_has_its_two_runs() -> None:
    assert {case.rule for case in CASES} == set(NAMED)
    assert len(NAMED) == len(RULES)


def test_a_symptom_yields_to_its_cause() -> None:
    low = metrics(lr_headroom_low=40.0, residual_out_of_reach=0.9)
    lost = both(FLAT, low, edit(layer_trace=np.array([1e-13, 1e-10, 1e-3, 180.0])))
    assert [f.rule for f in findings(both(FLAT, low)(HEALTHY)) if f.severity != "info"] == ["lr_too_low"]
    assert [f.rule for f in findings(lost(HEALTHY)) if f.severity != "info"] == ["vanishing_signal"]


def test_a_healthy_run_is_left_alone() -> None:
    assert findings(HEALTHY) == ()


@pytest.mark.parametrize("probes", range(PROBES))
def test_a_healthy_run_is_left_alone_while_it_is_young(probes: int) -> None:
    assert [finding for finding in findings(HEALTHY[:probes]) if finding.severity != "info"] == []


@pytest.mark.parametrize(
    "change",
    [
        edit(loss=[1.1, *[0.06] * 11]),  # learned before the second probe
        edit(loss=plateau(0.62), metrics={"lr_headroom_low": 60.0}),  # noise that no network explains
        metrics(lr_headroom_low=0.4, lr_headroom_high=[0.4, 0.6, 0.8, *[1.1] * 9]),
        metrics(lr_headroom_low=(4.0 * 3.0 ** np.arange(PROBES)).tolist()),  # sharpness falls at the end
        edit(loss=[0.06, *[0.05] * 11], metrics={"lr_headroom_low": 50.0}, facts={"accuracy": 0.98}),  # fine-tuning
        edit(loss=[1.1, 1.2, 1.6, 1.4, 1.0, 0.8, 0.6, 0.4, 0.3, 0.25, 0.2, 0.2]),  # warm-up without a norm
        edit(facts={"frozen": 1e6, "duplicates": 1}, metrics={"effective_rank": [80.0] * 2 + [9.0] * 10}),
    ],
)
def test_ordinary_runs_get_no_warning(change: Edit) -> None:
    assert [(f.rule, f.evidence) for f in findings(change(HEALTHY)) if f.severity != "info"] == []


def test_thresholds_are_data() -> None:
    strict = replace(NAMED["outlier_sample"], thresholds={"info": 2.0, "high": 3.0})
    (finding,) = findings(HEALTHY, rules=(strict,))
    assert (finding.rule, finding.severity) == ("outlier_sample", "warning")


def test_explained_forecasts_name_the_reason() -> None:
    def meaning(explained: float) -> str:
        (finding,) = _found(facts(forecast_error=0.9, explained_error=explained)(HEALTHY), "unreliable_forecast")
        return finding.meaning

    assert "the kernel moved" in meaning(0.1)
    assert "batch noise" in meaning(0.8)
    (finding,) = _found(
        edit(facts={"forecast_error": 0.9}, metrics={"linearisation_error": 0.9})(HEALTHY), "unreliable_forecast"
    )
    assert "tangent itself" in finding.meaning


def test_a_bias_that_is_taken_out_does_not_excuse_its_layer() -> None:
    assert _found(both(_zero(1), texts(structural_zeros="body.2.bias"))(HEALTHY), "dead_layer")
    assert _found(both(_zero(1), texts(structural_zeros="body"))(HEALTHY), "dead_layer") == []


def test_classes_compete_by_construction() -> None:
    rival = edit(interference=np.eye(3) * 2 - np.ones((3, 3)))
    assert _found(rival(HEALTHY), "conflicting_tasks") == []


def test_probes_of_other_samples_are_no_evidence() -> None:
    bad = edit(facts={"duplicates": 30}, probe="other", layers=LAYERS[:2], layer_trace=np.ones(2))(HEALTHY)
    assert findings([*bad[:6], *HEALTHY[6:]]) == ()
