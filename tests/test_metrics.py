"""The registry: what each metric says about itself, what is left out, and metrics of one's own."""

import dataclasses
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_monitor.errors import InputError
from ntk_monitor.metrics import METRICS, NAMES, Measured, evaluate, metric
from ntk_monitor.metrics.registry import Metric
from ntk_monitor.snapshot import FACTS


def measured(samples: int = 12, outputs: int = 2, seed: int = 0, **other: Any) -> Measured:
    """A probe with everything a metric may ask for."""
    generator = np.random.default_rng(seed)
    n = samples * outputs
    j = generator.normal(size=(n, n + 3))
    labels = np.arange(samples) % max(outputs, 2)
    half = np.arange(n).reshape(samples, outputs) < n // 2
    fields: dict[str, Any] = {
        "kernel": j @ j.T,
        "samples": samples,
        "targets": np.eye(max(outputs, 2))[labels] if outputs > 1 else labels[:, None].astype(float),
        "labels": labels,
        "gradient": generator.normal(size=(samples, outputs)) + 1,
        "loss": "mse",
        "rates": np.sort(generator.uniform(0.1, 5, size=n))[::-1].copy(),
        "coordinates": generator.normal(size=n),
        "lr": 0.01,
        "previous": j @ j.T + np.diag(generator.uniform(0, 3, size=n)),
        "first": j[:, :-5] @ j[:, :-5].T,
        "layer_trace": {"a": 1.0, "b": 3.0},
        "layer_speed": {"a": 2.0, "b": 1.0},
        "terms": {"u": half, "v": ~half},
        "given": {
            name: 0.5
            for name in (*NAMES, "loss_remaining", "explained_error")
            if name not in ("alignment", "trace", "noise_scale")
        },
    }
    return Measured(**(fields | other))


@pytest.mark.parametrize("entry", METRICS.values(), ids=lambda m: m.name)
def test_every_metric_says_what_it_is(entry: Metric) -> None:
    assert entry.meaning.endswith(".") or entry.name in NAMES or entry.name in ("loss_remaining", "explained_error")
    assert entry.formula
    assert entry.unit
    assert entry.tier in ("S", "A", "B")
    assert re.fullmatch(r"[a-z0-9_]+", entry.name)
    assert entry.range[0] < entry.range[1]
    if entry.name in FACTS and entry.name != "sample_loo":
        assert FACTS[entry.name].endswith(f", {entry.unit}")


def test_every_logged_scalar_is_in_the_registry_and_on_by_default() -> None:
    assert [name for name in NAMES if not METRICS[name].default] == []


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 14), st.integers(1, 3), st.integers(0, 99), st.floats(-4, 4))
def test_every_metric_can_be_computed_and_keeps_to_its_range(n: int, c: int, seed: int, decades: float) -> None:
    plain = measured(n, c, seed)
    scaled = dataclasses.replace(plain, kernel=plain.kernel * 10**decades)
    found = evaluate(scaled, METRICS)
    for name, value in found.items():
        low, high = METRICS[name].range
        slack = 1e-9 * max(abs(value), 1)
        assert low - slack <= value <= high + slack, name


def test_with_everything_there_only_what_does_not_exist_is_missing() -> None:
    found = evaluate(measured(24, 2), METRICS)
    # Not resolved, or not there for two outputs.
    assert set(METRICS) - set(found) <= {"noise_scale", "gcv_error"}
    assert "gcv_error" in evaluate(measured(24, 1), METRICS)


def test_what_was_not_measured_is_left_out_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(Measured(kernel=np.eye(4), samples=4))
        assert set(found) == {
            *("trace", "lambda_max", "mean_diagonal", "frobenius", "condition_log10", "condition_regularised_log10"),
            *("effective_rank", "centred_effective_rank", "participation_ratio", "intrinsic_dimension", "top_share"),
            *("spectral_gap", "outlier"),
        }
        assert evaluate(Measured(kernel=np.full((4, 4), np.nan), samples=4), ["lambda_max", "trace"]) == {}
        assert "effective_rank" not in evaluate(Measured(kernel=np.zeros((4, 4)), samples=4))


def test_the_kernel_of_losses_has_no_label_metrics() -> None:
    found = evaluate(measured(12, 1, layout="loss"), METRICS)
    assert not {"alignment", "label_energy", "label_energy_chance", "k90", "sample_loo", "gcv_error"} & set(found)
    assert {"trace", "noise_scale_bound"} <= set(found)


@pytest.fixture
def own() -> Any:
    @metric(formula="K_11", unit="squared output units")
    def first_entry(measured: Measured) -> float:
        """The first entry."""
        return float(measured.kernel[0, 0])

    @metric(name="raises", formula="none", unit="none")
    def fails(measured: Measured) -> float:
        raise RuntimeError(str(measured))

    @metric(formula="none", unit="none", default=False)
    def off(measured: Measured) -> float:
        return float("inf") if measured.samples else float("nan")

    yield first_entry
    for name in ("first_entry", "raises", "off"):
        del METRICS[name]


def test_ones_own_metrics_are_computed_and_cost_nothing_when_they_fail(own: Any) -> None:
    probe = Measured(kernel=2 * np.eye(3), samples=3)
    found = evaluate(probe)
    assert found["first_entry"] == own(probe) == 2
    assert "raises" not in found
    assert "off" not in found
    assert evaluate(probe, ["off", "raises"]) == {"off": math.inf}
    assert METRICS["first_entry"].tier == "own"
    assert METRICS["first_entry"].meaning == "The first entry."


def test_names_are_taken_once() -> None:
    with pytest.raises(InputError, match="another name="):

        @metric(name="trace", formula="", unit="")
        def mine(measured: Measured) -> float:
            return measured.samples

    with pytest.raises(InputError, match="registered"):
        evaluate(measured(), ["no such metric"])


def test_given_numbers_are_passed_on() -> None:
    probe = Measured(kernel=np.eye(3), samples=3, given={"sharpness": 1.5})
    assert evaluate(probe, ["sharpness", "overhead"]) == {"sharpness": 1.5}
