"""Layers whose kernel is zero by construction are named; layers that died are not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.dynamics.zeros import BEHIND_ZERO, NOT_CALLED, TAKEN_OUT, structural_zeros
from ntk_monitor.kernel import empirical_ntk
from tests.cases import Lambda

DTYPES = [torch.float32, torch.float64]


class _Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


class _Residual(nn.Module):
    """x + γ branch(x), with γ a parameter (LayerScale) or that of the branch's last norm."""

    def __init__(self, last: nn.Module, gamma: Tensor | None = None) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), last)
        self.gamma = nn.Parameter(torch.ones(4) if gamma is None else gamma)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.gamma * self.branch(x))
        return out


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).flatten(1)
        return out


class _Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        out: Tensor = self.head(h) + self.auxiliary(h) if self.training else self.head(h)
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_a_while_b_is_zero(dtype: torch.dtype) -> None:
    model, x = _Lora().to(dtype), torch.randn(5, 4, dtype=dtype)
    assert structural_zeros(model, x) == {"a": BEHIND_ZERO}
    nn.init.normal_(model.b.weight)
    assert structural_zeros(model, x) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_branches_that_begin_closed(dtype: torch.dtype) -> None:
    x = torch.randn(5, 4, dtype=dtype)
    inside = {"branch.0": BEHIND_ZERO, "branch.2": BEHIND_ZERO}
    assert structural_zeros(_Residual(nn.Identity(), torch.zeros(4)).to(dtype), x) == inside
    norm = nn.LayerNorm(4)
    nn.init.zeros_(norm.weight)
    assert structural_zeros(_Residual(norm).to(dtype), x) == {"gamma": BEHIND_ZERO, **inside}
    opened = _Residual(nn.Identity()).to(dtype)
    assert structural_zeros(opened, x) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_before_a_norm(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.Flatten()
    )
    model.append(nn.Linear(64, 3)).to(dtype)
    x = torch.randn(6, 1, 8, 8, dtype=dtype)
    assert structural_zeros(model, x, mode="train") == {"0.bias": TAKEN_OUT, "3.bias": TAKEN_OUT}
    assert structural_zeros(model, x) == {"3.bias": TAKEN_OUT}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_of_all_keys_cancels_in_the_softmax(dtype: torch.dtype) -> None:
    model, x = _Attention().to(dtype), torch.randn(3, 5, 4, dtype=dtype)
    assert structural_zeros(model, x) == {"k.bias": TAKEN_OUT}
    kernel = empirical_ntk(model, x, params=["k.bias"])
    assert float(kernel.abs().max()) < 1e-10


def test_layers_that_are_not_called() -> None:
    model, x = _Auxiliary(), torch.randn(5, 4)
    assert structural_zeros(model, x) == {"auxiliary": NOT_CALLED}
    assert structural_zeros(model, x, mode="train") == {}


def test_dead_and_detached_layers_are_faults() -> None:
    middle, head = nn.Linear(8, 8), nn.Linear(8, 3)
    dead = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), middle, nn.ReLU(), head)
    nn.init.constant_(middle.bias, -100.0)
    nn.init.zeros_(head.bias)
    x = torch.randn(5, 4)
    assert float(empirical_ntk(dead, x, params="0").abs().max()) == 0
    assert structural_zeros(dead, x) == {}
    cut = nn.Sequential(nn.Linear(4, 4), Lambda(lambda _, h: h.detach()), nn.Linear(4, 3))
    assert structural_zeros(cut, x) == {}


def test_nothing_is_changed() -> None:
    model, x = _Lora(), torch.randn(5, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    structural_zeros(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
