"""Bounds of stability against torch's optimizers and plain recursions, by bisection on one quadratic direction."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk_monitor.dynamics.bounds import Bounds, bounds, parts, smallest
from ntk_monitor.errors import InputError
from ntk_monitor.optimizers import Group
from tests.twins_stability import diverges, frozen_adam_diverges, threshold


def group(lr: float = 0.1, **options: Any) -> Group:
    return Group(names=("w",), lr=lr, **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 3.8),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
        ({"momentum": 0.9, "dampening": 0.5}, 7.6),
        ({"momentum": 0.5, "dampening": 0.2}, 3.75),
        ({"weight_decay": 0.5}, 1.95),
        ({"momentum": 0.9, "weight_decay": 0.5}, 3.75),
        ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.5}, 3.8 / 2.8 - 0.05),
    ],
    ids=str,
)
def test_the_upper_bound_of_sgd_is_where_torch_diverges(options: dict[str, Any], wanted: float) -> None:
    found = threshold(
        lambda a: diverges(lambda x: torch.optim.SGD(x, lr=0.1, **options), a / 0.1), 0.8 * wanted, 1.3 * wanted
    )
    assert bounds(group(**options), "sgd")[1] == pytest.approx(wanted)
    assert found == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize(
    ("beta", "omega", "wanted"), [(0.9, 0.0, 38.0), (0.5, 0.0, 6.0), (0.9, 0.2, 34.2), (0.0, 0.1, 1.9)]
)
def test_the_upper_bound_of_adam_is_where_its_frozen_form_diverges(beta: float, omega: float, wanted: float) -> None:
    found = threshold(lambda a: frozen_adam_diverges(a, beta, omega), 0.8 * wanted, 1.3 * wanted)
    adam = group(0.1, betas=(beta, 0.999), weight_decay=omega / 0.1, decoupled=omega > 0)
    assert bounds(adam, "adam")[1] == pytest.approx(wanted)
    assert found == pytest.approx(wanted, rel=0.005)


def test_lower_bounds() -> None:
    for options, wanted in [
        ({}, 2.0),
        ({"dampening": 0.5}, 2.0),  # which torch ignores without momentum
        ({"momentum": 0.9}, 0.2),
        ({"momentum": 0.9, "dampening": 0.9}, 2.0),
        ({"momentum": 0.9, "nesterov": True}, 0.2),
        ({"weight_decay": 0.5}, 1.95),
    ]:
        assert bounds(group(**options), "sgd")[0] == pytest.approx(wanted)
    assert bounds(group(), "adam")[0] == 2.0
    assert bounds(group(weight_decay=0.5, decoupled=True), "adam")[0] == pytest.approx(1.95)
    # Decay inside Adam's gradient is preconditioned: no fixed number can stand for it.
    assert bounds(group(weight_decay=0.5), "adam") == bounds(group(), "adam")


@given(
    momentum=st.floats(0, 0.99),
    dampening=st.floats(0, 0.99),
    nesterov=st.booleans(),
    decay=st.floats(0, 1),
    adam=st.booleans(),
)
def test_low_is_never_above_high(momentum: float, dampening: float, nesterov: bool, decay: float, adam: bool) -> None:
    held = group(
        momentum=momentum,
        dampening=0.0 if nesterov else dampening,
        nesterov=nesterov,
        weight_decay=decay,
        betas=(momentum, 0.999),
        decoupled=adam,
    )
    low, high = bounds(held, "adam" if adam else "sgd")
    assert low <= high * (1 + 1e-12)


@given(factor=st.floats(0.1, 10), sharpness=st.floats(0.01, 100), decay=st.floats(0, 0.5), adam=st.booleans())
def test_the_headroom_is_the_factor_that_reaches_the_bound(
    factor: float, sharpness: float, decay: float, adam: bool
) -> None:
    family: Any = "adam" if adam else "sgd"
    options: dict[str, Any] = {"momentum": 0.0 if adam else 0.9, "weight_decay": decay, "decoupled": adam}
    low, high = parts(group(factor, **options), family).headroom(sharpness * factor)
    assert low <= high * (1 + 1e-12)
    # At lr·high, sharpness and decay have grown alike and meet the bound.
    assert bounds(group(factor * high, **options), family)[1] == pytest.approx(sharpness * factor * high, rel=1e-9)


def test_noise_counts_at_the_low_end_only() -> None:
    assert Bounds(2.0, 4.0).headroom(0.5, 0.5) == (2.0, 8.0)
    assert Bounds(2.0, 4.0, 0.5, 1.0).headroom(1.0, 0.5) == (1.0, 2.0)
    assert Bounds(2.0, 4.0).headroom(0.0) == (math.inf, math.inf)


def test_the_strictest_of_several_groups_counts() -> None:
    groups = (group(0.1, momentum=0.5), group(0.5, weight_decay=0.1))
    assert smallest(groups, "sgd") == Bounds(1.0, 2.0, 0.05, 0.05)
    with pytest.raises(InputError, match="at least one parameter group"):
        smallest((), "sgd")
    with pytest.raises(InputError, match="known for SGD, Adam and AdamW, got family 'other'"):
        bounds(group(), "other")
