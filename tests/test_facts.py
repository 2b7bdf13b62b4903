"""Facts about a probe: what they are called is what they are."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ntk_monitor import facts
from ntk_monitor.probe import Probe
from ntk_monitor.snapshot import FACTS


def data(x: Any, y: Any = None) -> dict[str, float]:
    found = facts.of_data(Probe(x, y))
    assert set(found) <= set(FACTS)
    return found


def test_scales_of_inputs() -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [1.0, 30.0], [3.0, 30.0]])
    found = data(x)
    assert found["input_rms"] == pytest.approx(np.sqrt((1 + 9 + 100 + 900) * 2 / 8))
    assert found["input_offset"] == pytest.approx(np.hypot(2, 20) / np.sqrt(101))
    assert found["input_range"] == pytest.approx(9.1 / 1.9)  # between the percentiles 10 and 90 of 1 and 10
    assert found["duplicates"] == 0


@settings(max_examples=20)
@given(st.floats(1e-3, 1e3), st.integers(2, 20), st.integers(1, 6))
def test_ratios_do_not_depend_on_units(scale: float, samples: int, features: int) -> None:
    x = torch.randn(samples, features).double() + 0.5
    one, other = data(x), data(scale * x)
    assert other["input_rms"] == pytest.approx(scale * one["input_rms"])
    for name in ("input_offset", "input_range"):
        assert other[name] == pytest.approx(one[name], rel=1e-6)


def test_a_constant_feature_has_no_range_and_none_is_no_fact() -> None:
    x = torch.randn(9, 3)
    x[:, 1] = 7.3
    assert data(x)["input_range"] == pytest.approx(data(x[:, [0, 2]])["input_range"])
    assert "input_range" not in data(torch.ones(4, 3))
    assert "input_offset" not in data(torch.ones(1, 3))


def test_all_floating_parts_of_a_batch_count_and_tokens_do_not() -> None:
    a, b = torch.randn(6, 2), torch.randn(6, 3, 2)
    whole = data({"a": a, "b": b, "ids": torch.arange(6), "flag": True})
    assert whole["input_rms"] == pytest.approx(data(torch.cat([a, b.reshape(6, -1)], 1))["input_rms"])
    assert set(data(torch.arange(12).reshape(6, 2))) == {"duplicates"}


def test_targets_have_a_scale_and_classes_none() -> None:
    x = torch.randn(4, 2)
    found = data(x, torch.tensor([9.0, 11.0, 9.0, 11.0]))
    assert found["target_rms"] == pytest.approx(np.sqrt(101))
    assert found["target_offset"] == pytest.approx(10)
    assert "target_rms" not in data(x, torch.tensor([0, 1, 0, 1]))
    assert "target_rms" not in data(x, torch.tensor([0.0, 1, 0, 1]))  # of binary cross-entropy
    assert "target_offset" not in data(x, torch.full((4,), 3.5))


def test_copies_are_counted_and_contradictions_too() -> None:
    x = torch.randn(6, 3)
    x[1] = x[0]
    x[5] = x[4]
    assert data(x)["duplicates"] == 4
    found = data(x, torch.tensor([0, 0, 1, 1, 0, 1]))
    assert (found["duplicates"], found["duplicate_labels"]) == (4, 1)
    assert "duplicate_labels" not in data(torch.randn(4, 3), torch.arange(4))


def test_what_is_not_finite_is_left_out() -> None:
    x = torch.randn(4, 3)
    x[0, 0] = float("nan")
    assert set(data(x, torch.tensor([1.0, float("inf"), 2.0, 3.0]))) == {"duplicates"}


def test_outputs_that_are_all_alike_have_no_spread() -> None:
    same = facts.of_outputs(np.full((5, 3), 2.0), None)
    assert same == {"output_rms": 2.0, "output_spread": 0.0}
    f = np.random.default_rng(0).normal(size=(500, 3))
    assert facts.of_outputs(f, None)["output_spread"] == pytest.approx(1, abs=0.05)
    assert facts.of_outputs(np.zeros((5, 3)), None) == {"output_rms": 0.0}
    assert facts.of_outputs(np.full((5, 3), np.nan), None) == {}


def test_accuracy_needs_an_output_for_each_class() -> None:
    f = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert facts.of_outputs(f, np.array([0, 1, 1, 0]))["accuracy"] == 0.75
    assert "accuracy" not in facts.of_outputs(f, np.array([0, 1, 2, 0]))
    assert "accuracy" not in facts.of_outputs(f[:, :1], np.array([0, 0, 0, 0]))  # one logit says nothing by argmax


def test_parameters_are_counted_behind_wrappers() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    for live in (module, nn.DataParallel(module)):
        assert facts.of_parameters(live, ("2.weight", "2.bias")) == {"frozen": 4.0, "uncovered": 10.0}
        norms = facts.norms(live, lambda name: name.partition(".")[0])
        assert norms["0"] == pytest.approx(float(module[0].weight.detach().norm()))  # type: ignore[operator]
        both = module[2].weight.square().sum() + module[2].bias.square().sum()  # type: ignore[operator]
        assert norms["2"] == pytest.approx(float(both.detach().sqrt()))
