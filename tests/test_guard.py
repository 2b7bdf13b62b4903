"""Global state is borrowed and given back, whatever happens in between."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ntk_monitor.guard import generators, random_state, seeded, undisturbed


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Owner:
    def __init__(self, value: Any) -> None:
        self.value = value


GENERATORS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (lambda: torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))),
    (lambda: np.random.default_rng(1), lambda g: g.random()),
    (lambda: np.random.default_rng(np.random.MT19937(1)), lambda g: g.random()),
    (lambda: np.random.RandomState(1), lambda g: g.rand()),
    (lambda: random.Random(1), lambda g: g.random()),
]
IDS = ["torch", "numpy", "numpy with twister", "legacy numpy", "python"]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_global_generators_are_given_back(error: type[BaseException] | None) -> None:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    try:
        with undisturbed(seed=3):
            draws()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert draws() == expected


@pytest.mark.parametrize(("make", "draw"), GENERATORS, ids=IDS)
def test_generators_that_owners_hold_are_given_back(make: Callable[[], Any], draw: Callable[[Any], Any]) -> None:
    expected = draw(make())
    for wrap in (Owner, lambda g: Owner([Owner({"rng": (g,)})]), lambda g: g, lambda g: [g]):
        generator = make()
        with random_state(wrap(generator)):
            draw(generator)
            draw(generator)
        assert draw(generator) == expected


def test_a_near_generator_is_found_though_a_long_path_leads_to_it_too() -> None:
    holder = Owner(torch.Generator())
    far: Any = holder
    for _ in range(5):
        far = Owner(far)
    outer = Owner(far)
    outer.near = holder  # type: ignore[attr-defined]
    assert generators(outer) == [holder.value]


def test_each_generator_is_found_once_and_cycles_end() -> None:
    loop = Owner(torch.Generator())
    loop.again = [loop, loop.value]  # type: ignore[attr-defined]
    assert generators(loop) == [loop.value]
    assert generators(None) == []


def test_seeding_makes_all_three_generators_repeat() -> None:
    with undisturbed(seed=7):
        first = draws()
    with undisturbed(seed=7):
        assert draws() == first
    with undisturbed(seed=8):
        assert draws() != first


def test_a_device_that_is_not_in_use_is_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.manual_seed would queue the seed, and a CUDA first used after a probe would draw other numbers.
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seen.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    seeded(1)
    assert seen == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seeded(2)
    assert seen == [2]


def modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "outer",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad],
)
def test_the_inside_is_plain_float_with_gradients(outer: Any) -> None:
    with outer():
        before = modes()
        with undisturbed():
            assert modes() == (True, False, False)
            y = torch.nn.Linear(2, 2)(torch.ones(1, 2))
            assert y.dtype == torch.float32
            assert y.requires_grad
        assert modes() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_is_full_inside_and_given_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with undisturbed():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ValueError, match="inside"), undisturbed():
            raise ValueError("inside")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_warnings_of_the_network_are_not_shown_again() -> None:
    with undisturbed():
        warnings.warn("from a forward", UserWarning, stacklevel=1)  # filterwarnings = error would raise it
    with pytest.warns(UserWarning, match="after"):
        warnings.warn("after", UserWarning, stacklevel=1)
