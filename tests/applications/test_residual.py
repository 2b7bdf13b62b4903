"""Residual connections: parts of the kernel against networks written without them, laws, and networks that say no."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.residual import Decomposition, decompose_residual, depth_scan, example, study
from ntk_monitor.applications.residual_words import told
from ntk_monitor.applications.skips import residual_connections
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.render import png

Array = NDArray[np.float64]
D, N, H = 5, 12, 32


def samples(n: int = N, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """a·(x + F(x)), F = V relu(W x); or u·x + b·F(x) with readouts of their own. He weights, a ~ N(0, 1/d)."""

    def __init__(self, seed: int = 0, *, shared: bool = True, zero: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(100 + seed)

        def drawn(rows: int, columns: int, variance: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=g, dtype=torch.float64) * math.sqrt(variance))

        self.w, self.v, self.a = drawn(H, D, 2 / D), drawn(D, H, 0.0 if zero else 2 / H), drawn(1, D, 1 / D)
        self.b = self.a if shared else drawn(1, D, 1 / D)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.relu(x @ self.w.T) @ self.v.T
        total: Tensor = (x + branch) @ self.a.T if self.shared else x @ self.a.T + branch @ self.b.T
        return total

    def parts(self, x: Tensor) -> tuple[Array, Array, Array, Array]:
        """K, K_skip, K_branch and the cross term X Fᵀ + F Xᵀ, written out."""
        w, v, b = (p.detach().numpy() for p in (self.w, self.v, self.b))
        X = x.numpy()
        P = np.maximum(X @ w.T, 0)
        F, gate = P @ v.T, (X @ w.T > 0) * (b @ v)
        skip, cross = X @ X.T, X @ F.T + F @ X.T if self.shared else np.zeros((len(X), len(X)))
        branch = F @ F.T + P @ P.T * (b @ b.T) + gate @ gate.T * (X @ X.T)
        return skip + branch + cross, skip, branch, cross


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"zero": True}])
def test_the_parts_are_those_written_out(options: dict[str, bool]) -> None:
    model, x = Net(**options), samples()
    found = decompose_residual(model, x)
    for part, expected in zip((found.full, found.skip, found.branch, found.cross), model.parts(x), strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-10)
    assert (found.cross_ratio < 1e-10) is bool(options)
    assert found.floor_holds


def test_a_readout_of_its_own_or_a_branch_of_zeros_lifts_every_eigenvalue() -> None:
    for model in (Net(shared=False), Net(zero=True)):
        report = study(model, samples(), levels=2)
        assert [verdict.holds for verdict in report.verdicts[:3]] == [True, True, True]
        assert report.number("cross term") < 1e-10


def test_a_shared_readout_is_no_sum_and_eigenvalues_fall() -> None:
    """The claims "the kernel is a sum" and "eigenvalues never fall", on their counter-example."""
    x = samples()
    found = [decompose_residual(Net(seed), x) for seed in range(6)]
    assert sum(not one.lifted for one in found) >= 5
    assert all(one.floor_holds for one in found)
    report = study(Net(1), x, levels=2)
    assert [verdict.holds for verdict in report.verdicts[:3]] == [False, False, True]
    assert "DOES NOT HOLD: skip connections never lower" in report.text()


def test_the_cross_term_vanishes_in_the_mean_over_draws() -> None:
    """As 1/√draws: 300 against 20 is a factor of 0.26."""
    x = samples()
    draws = [Net(seed).parts(x) for seed in range(300)]
    found = [Decomposition(*parts[:3]) for parts in draws]
    assert np.mean([one.cross_ratio for one in found]) == pytest.approx(0.20, abs=0.03)
    assert np.mean([not one.lifted for one in found]) > 0.8
    assert min(one.worst for one in found) < -0.1
    skip = np.linalg.norm(found[0].skip)
    few = np.mean([np.linalg.norm(np.mean([d[3] for d in draws[k : k + 20]], 0)) for k in range(0, 300, 20)]) / skip
    assert np.linalg.norm(np.mean([d[3] for d in draws], 0)) / skip < 0.5 * few


def test_the_skip_lifts_no_more_eigenvalues_than_it_has() -> None:
    found = decompose_residual(Net(shared=False), samples())
    assert found.skip_rank == D
    assert found.floor_holds


class Block(nn.Module):
    """h + F(h), written in one of the ways in which networks write it."""

    def __init__(self, how: str, width: int = 6, into: int = 6) -> None:
        super().__init__()
        self.how = how
        self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, into)
        self.short = nn.Linear(width, into, bias=False) if how == "projection" else nn.Identity()

    def branch(self, h: Tensor) -> Tensor:
        total: Tensor = self.two(torch.tanh(self.one(self.norm(h))))
        return total

    def forward(self, h: Tensor) -> Tensor:
        b = self.branch(h)
        match self.how:
            case "inplace":
                b += h
                return b
            case "add_":
                return b.add_(h)
            case "alpha":
                return torch.add(h, b / 3, alpha=3)
            case "keywords":
                return torch.add(input=b, other=h)
        total: Tensor = self.short(h) + b
        return total


class Stack(nn.Module):
    """Two blocks between two layers, with positions and a cubic that are no residual connections."""

    def __init__(self, how: str, mode: str = "both") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(D, 6), nn.ModuleList([Block(how) for _ in range(2)])
        self.last, self.mode = nn.Linear(6, 2), mode
        self.position = nn.Parameter(torch.randn(6))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.position.expand_as(h)
        h = h + 0.04 * h**3
        for block in self.blocks:
            assert isinstance(block, Block)
            ways = {"both": block, "skip": block.short, "branch": block.branch}
            h = ways[self.mode](h)
        total: Tensor = self.last(torch.tanh(h))
        return total


def by_hand(model: nn.Module, x: Tensor) -> Array:
    """The kernel summed over outputs, gradient by gradient."""
    weights, total = list(model.parameters()), np.zeros((len(x), len(x)))
    for one in model(x).T:
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(f, weights, **options)]) for f in one]
        total += np.array([[float(a @ b) for b in rows] for a in rows])
    return total


@pytest.mark.parametrize("how", ["plain", "projection", "inplace", "add_", "alpha", "keywords"])
def test_networks_without_skips_or_branches_are_those_written_without_them(how: str) -> None:
    model, x = Stack(how), samples(4)
    connections = residual_connections(model, x)
    assert [skip.name for skip in connections.found] == ["blocks.0", "blocks.1"]
    assert connections.additions == 4
    assert {skip.identity for skip in connections.found} == {how != "projection"}
    found = decompose_residual(model, x)
    for part, mode in ((found.full, "both"), (found.skip, "skip"), (found.branch, "branch")):
        np.testing.assert_allclose(part, by_hand(Stack(how, mode), x), rtol=1e-9, atol=1e-9)
    weights = connections.found[1].parameters
    assert {name.split(".", 2)[2] for name in weights} == {
        f"{m}.{p}" for m in ("norm", "one", "two") for p in ("weight", "bias")
    }
    assert found.floor_holds


def test_all_pairs_of_outputs_hold_the_kernel_summed_over_them() -> None:
    model, x = Stack("plain"), samples(3)
    whole, summed = decompose_residual(model, x, outputs="full"), decompose_residual(model, x)
    for part, expected in ((whole.full, summed.full), (whole.skip, summed.skip), (whole.branch, summed.branch)):
        np.testing.assert_allclose(np.einsum("ncmc->nm", part.reshape(3, 2, 3, 2)), expected, rtol=1e-9, atol=1e-9)


def test_gates_weigh_both_ways() -> None:
    model, x = Stack("plain"), samples(4)
    connections = residual_connections(model, x, modules=["blocks.1"])
    (skip,) = connections.found
    output = connections.gated(None, {skip: (0.5, 2.0)})(model, x)
    h = model.first(x) + model.position
    h = model.blocks[0](h + 0.04 * h**3)
    block = model.blocks[1]
    assert isinstance(block, Block)
    torch.testing.assert_close(output, model.last(torch.tanh(0.5 * h + 2 * block.branch(h))))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_sums_of_kernels_never_lower_an_eigenvalue(n: int, rank: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, two = (a @ a.T for a in draw.normal(size=(2, n, rank)))
    found = Decomposition(one + two, one, two, two)
    assert found.lifted
    assert found.fallen == 0
    assert found.floor_holds
    assert found.cross_ratio < 1e-12
    assert found.skip_rank == min(n, rank)
    broken = Decomposition(one + two - 0.5 * np.eye(n) * np.linalg.eigvalsh(two)[-1], one, two, one + two)
    assert not broken.floor_holds


class Tower(nn.Module):
    """A h_L, h ← h + W relu(V h), V ~ N(0, 2/n), W ~ N(0, 1/n), A ~ N(0, 1/n) of eight rows."""

    def __init__(self, depth: int, width: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(100 + seed)

        def drawn(rows: int, variance: float) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(rows, width, generator=g, dtype=torch.float64) * math.sqrt(variance / width)
            )

        self.v = nn.ParameterList([drawn(width, 2.0) for _ in range(depth)])
        self.w = nn.ParameterList([drawn(width, 1.0) for _ in range(depth)])
        self.a = drawn(8, 1.0)

    def forward(self, h: Tensor) -> Tensor:
        for v, w in zip(self.v, self.w, strict=True):
            h = h + torch.relu(h @ v.T) @ w.T
        return h @ self.a.T


@pytest.mark.slow
def test_depth_explodes_unless_branches_are_scaled() -> None:
    """tr K(x, x) = 8 |x|² (1 + β²)^(l-1) (1 + β² + 3/2 l β²): lengths and gradients grow by 1 + β² at every block."""
    x = nn.functional.normalize(samples(2, 64))
    found: dict[tuple[str, int], list[float]] = {}
    for seed in range(8):
        model = Tower(4, 64, seed)
        scan = depth_scan(model, x, residual_connections(model, x), levels=3)
        for name, levels in scan.items():
            for level in levels:
                found.setdefault((name, level.branches), []).append(level.mean_diagonal)
    for count in (0, 2, 4):
        for name, beta in (("as built", 1.0), ("branches / √l", 1 / max(count, 1))):
            expected = (1 + beta) ** (count - 1) * (1 + beta + 1.5 * count * beta) if count else 1
            values = np.array(found[name, count]) / 8
            assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / math.sqrt(8) + 1e-9
            assert values.std(ddof=1) / math.sqrt(8) < 0.15 * expected
    assert np.mean(found["as built", 4]) > 4 * np.mean(found["as built", 2])
    assert np.mean(found["branches / √l", 4]) < 1.5 * np.mean(found["branches / √l", 2])


def test_the_report_says_no_to_depth_and_yes_to_scaled_branches() -> None:
    x = nn.functional.normalize(samples(2, 64))
    tower = Tower(4, 64, 0)
    verdicts = []
    for scale in (1.0, 2.0):
        with torch.no_grad():
            for weight in tower.w:
                weight.div_(scale)
        scan = depth_scan(tower, x, residual_connections(tower, x), levels=3)
        parts = decompose_residual(tower, x)
        verdicts.append(told(parts, {}, scan, 4).verdicts[4].holds)
    assert verdicts == [False, True]


@pytest.mark.slow
def test_transformers_and_their_attention_are_read() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model, tokens = transformers.GPT2LMHeadModel(config), {"input_ids": torch.arange(12).reshape(3, 4)}
    found = residual_connections(model, tokens)
    # Not the cubic of its activation, nor its positions.
    assert [skip.name for skip in found.found] == [f"transformer.h.{k} #{j}" for k in (0, 1) for j in (1, 2)]
    assert all(skip.identity for skip in found.found)


class Moody(nn.Module):
    """Adds once more for larger batches."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.one(x)
        return h + h if x.shape[0] > 4 else h


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: study(nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, 1)), samples()), NetworkError, "no residual"),
    (lambda: study(Net(), samples(1)), InputError, "two samples"),
    (lambda: study(Net(), samples(), levels=1), InputError, "two levels"),
    (lambda: residual_connections(Stack("plain"), samples(), modules=["first"]), InputError, "some in blocks.0"),
    (lambda: residual_connections(Stack("plain"), samples(), modules="bloks"), InputError, "in bloks"),
    (lambda: decompose_residual(Moody(), samples(6)), NetworkError, "equally often"),
    (lambda: Decomposition(np.eye(2), np.eye(3), np.eye(2)), InputError, "one shape"),
    (lambda: Decomposition(np.eye(2), np.full((2, 2), np.nan), np.eye(2)), InputError, "finite"),
]


@pytest.mark.parametrize(("ask", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(ask: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask()


def test_modules_are_chosen_by_name_or_pattern() -> None:
    model, x = Stack("plain"), samples()
    one = decompose_residual(model, x, ["blocks.1"])
    other = decompose_residual(model, x, r"s\.1$")
    np.testing.assert_array_equal(one.branch, other.branch)
    every, all_of_them = residual_connections(model, x), residual_connections(model, x, modules=[""])
    assert every == all_of_them
    assert [skip.name for skip in residual_connections(model, x, modules=["blocks.1"]).found] == ["blocks.1"]


def test_the_network_is_left_alone() -> None:
    model = Stack("inplace").train()
    model.first.weight.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    found = residual_connections(model, samples())
    decompose_residual(model, samples(4))
    assert model.training
    assert not model.first.weight.requires_grad
    assert "first.weight" not in set().union(*(skip.parameters for skip in found.found))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.slow
def test_the_example_draws_its_figures() -> None:
    report = example(quick=True)
    assert set(report.figures) == {"spectra", "depth", "connections"}
    for figure in report.figures.values():
        assert png(figure).startswith(b"\x89PNG")
    assert "DOES NOT HOLD: the kernel is the sum" in report.text()
