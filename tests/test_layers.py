"""Traces by layer: as the Jacobian has them, up to what random signs leave open; exactly zero where nothing flows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntk_monitor.dynamics.layers import layer_traces
from ntk_monitor.dynamics.updates import blocks
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.network import layer

PASSES = 200


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def jacobians(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """J by parameter, (N·C, P_l), one backward pass for each output."""
    f = module(x).reshape(-1)
    named = dict(module.named_parameters())
    rows = [torch.autograd.grad(f[i], list(named.values()), retain_graph=True) for i in range(len(f))]
    return {name: torch.stack([row[k].reshape(-1) for row in rows]) for k, name in enumerate(named)}


def exact(module: nn.Module, x: Tensor, scale: dict[str, Tensor] | None = None) -> tuple[dict[str, float], Any]:
    """Trace of J_l D J_lᵀ by layer, and the standard deviation of one estimate of it: 2 (|A|² - |diag A|²)."""
    grams: dict[str, Tensor] = {}
    for name, j in jacobians(module, x).items():
        d = torch.ones(j.shape[1]).double() if scale is None else scale[name].reshape(-1)
        grams[layer(name)] = grams.get(layer(name), 0) + (j * d) @ j.T
    spread = {n: float((2 * (a.square().sum() - a.diagonal().square().sum())).sqrt()) for n, a in grams.items()}
    return {n: float(a.trace()) for n, a in grams.items()}, spread


def test_traces_are_those_of_the_jacobian_within_the_error_of_the_estimate() -> None:
    module, x = mlp(), torch.randn(6, 5).double()
    traces, spread = exact(module, x)
    found = layer_traces(module, x, probes=PASSES, seed=3)
    assert found.names == tuple(traces)
    for name, value in zip(found.names, found.trace, strict=True):
        assert abs(value - traces[name]) < 4 * spread[name] / PASSES**0.5
        assert abs(value - traces[name]) < 0.2 * traces[name]
    assert found.share == pytest.approx(found.trace / found.trace.sum())


def test_shares_weigh_each_parameter_with_its_step() -> None:
    module, x = mlp(), torch.randn(6, 5).double()
    scale = {name: torch.rand(p.shape).double() ** 3 for name, p in module.named_parameters()}
    scale["2.weight"] *= 100
    traces, _ = exact(module, x, scale)
    found = layer_traces(module, x, scale=scale, probes=PASSES)
    wanted = np.array(list(traces.values())) / sum(traces.values())
    assert np.abs(found.share - wanted).max() < 0.05
    assert np.abs(found.share - found.trace / found.trace.sum()).max() > 0.3  # weights count here


def test_one_output_of_one_sample_needs_one_pass() -> None:
    module, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double(), torch.randn(1, 5).double()
    traces, _ = exact(module, x)
    assert layer_traces(module, x, probes=1).trace == pytest.approx(list(traces.values()), rel=1e-12)


def test_a_layer_that_nothing_flows_through_is_exactly_zero() -> None:
    module, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(6, 5)
    with torch.no_grad():
        module[0].bias.fill_(-1e3)  # type: ignore[operator]
    found = layer_traces(module, x)
    assert found.trace[0] == 0
    assert found.trace[1] > 0  # its bias alone
    assert np.isnan(found.radial[0])


def test_a_layer_before_a_norm_is_scale_free() -> None:
    module = nn.Sequential(nn.Linear(5, 7, bias=False), nn.LayerNorm(7, eps=0.0), nn.Tanh(), nn.Linear(7, 3)).double()
    found = layer_traces(module, torch.randn(6, 5).double())
    radial = dict(zip(found.names, found.radial, strict=True))
    assert radial["0"] < 1e-10
    assert radial["3"] > 1e-2
    assert np.isnan(radial["1"])  # no weights of two axes


class Squared(nn.Module):
    """|z|² of complex weights, and a loose parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
        self.v = nn.Parameter(torch.randn(2, 1).double())

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.w).abs() ** 2 @ self.v


def test_imaginary_parts_count() -> None:
    module, x = Squared(), torch.randn(1, 3).double()
    found = layer_traces(module, x, probes=1)
    (g,) = torch.autograd.grad(module(x).sum(), [module.w])
    assert g.imag.abs().sum() > 0
    assert found.names == ("w", "v")
    assert found.trace[0] == pytest.approx(float(g.abs().square().sum()))
    assert np.isnan(found.radial[0])


def test_groups_put_layers_together() -> None:
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]).double()
    x = torch.randn(3, 4).double()
    single = layer_traces(module, x)
    two = layer_traces(module, x, group=lambda name: "early" if int(name[0]) < 3 else "late")
    assert two.names == ("early", "late")
    assert two.trace == pytest.approx([single.trace[:3].sum(), single.trace[3:].sum()])
    deep = nn.ModuleDict({f"block{i}": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for i in range(20)})
    group = blocks([name for name, _ in deep.named_parameters()])
    assert {group(name) for name, _ in deep.named_parameters()} == {f"block{i}" for i in range(20)}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_of_the_module_changes(mode: Any) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3))
    x = torch.randn(6, 5)
    before = Fingerprint.of(module)
    once, twice = (layer_traces(module, x, mode=mode, seed=1) for _ in range(2))
    assert before.changes(Fingerprint.of(module)) == []
    assert np.array_equal(once.trace, twice.trace)
