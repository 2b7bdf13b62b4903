"""Engines yield the same Jacobian block by block; the Gram keeps what a float32 Jacobian knows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntk_monitor.engines import batched, contract
from ntk_monitor.engines.batched import BatchedJacobian
from ntk_monitor.engines.contract import Jacobian, gram
from ntk_monitor.engines.reference import ReferenceJacobian
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.guard import undisturbed
from ntk_monitor.network import Network
from ntk_monitor.selfcheck import disagreement, structured_disagreement
from tests import reference
from tests.cases import CASES, Case, N, answer

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with undisturbed():
        yield


class Given:
    """A Jacobian held in memory, in one block per parameter."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.parts = parts
        self.samples, self.outputs = next(iter(parts.values())).shape[:2]
        self.bytes_per_sample = sum(p[0].numel() * p.element_size() for p in parts.values())
        self.asked: list[slice] = []

    def block(self, rows: slice) -> dict[str, Tensor]:
        self.asked.append(rows)
        return {name: part[rows] for name, part in self.parts.items()}


def given_jacobian(n: int, c: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Given:
    generator = torch.Generator().manual_seed(seed)
    return Given({name: torch.randn(n, c, p, generator=generator).to(dtype) for name, p in (("a.w", 5), ("b.w", 3))})


def jacobians(case: Case) -> list[Jacobian]:
    network, inputs = Network(case.model(), forward=case.forward), case.inputs()
    return [RowsJacobian(network, inputs), BatchedJacobian(network, inputs), ReferenceJacobian(network, inputs, 2**20)]


@pytest.mark.parametrize("rows", [slice(0, N), slice(1, 2), slice(2, N), slice(0, 2)])
@pytest.mark.parametrize("name", ["mlp", "transformer encoder", "dict inputs", "frozen layers", "weight norm"])
def test_blocks_of_every_engine_are_rows_of_the_jacobian(name: str, rows: slice) -> None:
    case = BY_NAME[name]
    model = case.model().eval()
    wanted = reference.rows(model, answer(case, model, case.inputs()))
    for jacobian in jacobians(case):
        assert (jacobian.samples, jacobian.outputs) == (N, 2)
        assert jacobian.bytes_per_sample == 2 * 8 * sum(w.shape[2] for w in wanted.values())
        block = jacobian.block(rows)
        assert block.keys() == wanted.keys()
        for key, value in block.items():
            torch.testing.assert_close(value, wanted[key][rows], rtol=1e-12, atol=1e-13)


def test_chunks_of_the_batched_engine_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["mlp"]
    network = Network(case.model())
    wanted = BatchedJacobian(network, case.inputs()).block(slice(0, N))
    for size in (1, 4, 5):
        monkeypatch.setattr(batched, "_ROWS", size)
        for name, value in BatchedJacobian(network, case.inputs()).block(slice(0, N)).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-14, atol=1e-15)


def test_chunks_of_the_reference_engine_change_nothing() -> None:
    case = BY_NAME["mlp"]
    network = Network(case.model())
    wanted = ReferenceJacobian(network, case.inputs(), 2**20).block(slice(0, N))
    for name, value in ReferenceJacobian(network, case.inputs(), 1).block(slice(0, N)).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-14, atol=1e-15)


def _flat(kernel: Tensor) -> Tensor:
    return kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)


@settings(max_examples=40)
@given(
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    c=st.integers(1, 3),
    width=st.integers(1, 7),
    square=st.booleans(),
    layout=st.sampled_from(["full", "trace", "per_output"]),
)
def test_gram_is_the_product_in_every_layout_and_block_size(
    n: int, m: int, c: int, width: int, square: bool, layout: Any
) -> None:
    left, right = given_jacobian(n, c), given_jacobian(m, c, seed=1)
    full = reference.ntk(left.parts, left.parts if square else right.parts)
    wanted = {
        "full": full,
        "trace": torch.einsum("ncmc->nm", full),
        "per_output": torch.einsum("ncmc->cnm", full),
    }[layout]
    limit = 3 * width * left.bytes_per_sample
    got = gram(left, None if square else right, layout, group=lambda _: "", memory_limit=limit)
    torch.testing.assert_close(got[""], wanted, rtol=1e-13, atol=1e-13)
    if square:
        transposed = got[""].permute(2, 3, 0, 1) if layout == "full" else got[""].transpose(-1, -2)
        assert torch.equal(got[""], transposed)


def test_blocks_stay_within_the_memory_limit_and_half_of_them_are_skipped() -> None:
    left = given_jacobian(6, 2)
    gram(left, None, "full", group=lambda _: "", memory_limit=3 * 2 * left.bytes_per_sample)
    assert {s.stop - s.start for s in left.asked} == {2}
    assert len(left.asked) == 3 + 3  # three diagonal blocks, three below the diagonal


def test_groups_are_summed_by_name() -> None:
    left = given_jacobian(3, 2)
    by_module = gram(left, None, "full", group=lambda name: name[0], memory_limit=2**20)
    assert set(by_module) == {"a", "b"}
    for key in "ab":
        torch.testing.assert_close(by_module[key], reference.ntk({key: left.parts[f"{key}.w"]}), rtol=1e-13, atol=1e-13)


def test_long_parameters_are_multiplied_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(4, 1000, dtype=torch.float64), torch.randn(3, 1000, dtype=torch.float64)
    monkeypatch.setattr(contract, "_SLAB", 64)
    torch.testing.assert_close(contract._product(a, b), a @ b.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(contract._product(a, a), a @ a.T, rtol=1e-12, atol=1e-12)


def test_the_gram_of_a_single_precision_jacobian_keeps_its_small_eigenvalues() -> None:
    # Singular values 1 to 1e-6, hence eigenvalues to 1e-12: a float32 Gram loses those below 1e-7 (theory.md, E1).
    n, generator = 64, torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(256, n, generator=generator, dtype=torch.float64))[0]
    exact = torch.logspace(0, -6, n, dtype=torch.float64) ** 2
    jacobian = (u * exact.sqrt() @ v.T).float()

    def error(k: Tensor) -> float:
        return float((torch.linalg.eigvalsh(k.double()).flip(0) / exact - 1).abs().max())

    kernel = gram(Given({"w": jacobian[:, None]}), None, "trace", group=lambda _: "", memory_limit=2**30)[""]
    assert error(kernel) < 0.1
    assert error(jacobian @ jacobian.T) > 1


# The self-check.


def _faulty(jacobian: Jacobian, fault: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    class Faulty:
        samples, outputs, bytes_per_sample = jacobian.samples, jacobian.outputs, jacobian.bytes_per_sample

        def block(self, rows: slice) -> dict[str, Tensor]:
            return fault(jacobian.block(rows))

    return Faulty()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engines_that_agree_pass_the_self_check(dtype: torch.dtype) -> None:
    case = BY_NAME["transformer encoder"]
    network, inputs = Network(case.model(dtype)), case.inputs(dtype)
    assert disagreement(ReferenceJacobian(network, inputs, 2**20), network, inputs) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["transformer encoder", "lstm", "one number per sample", "outputs of two axes"])
def test_the_structured_engine_passes_its_self_check(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    assert structured_disagreement(Network(case.model(dtype)), case.inputs(dtype)) == ""


def test_the_self_check_names_the_parameter_that_is_wrong() -> None:
    case = BY_NAME["mlp"]
    network, inputs = Network(case.model()), case.inputs()
    honest = ReferenceJacobian(network, inputs, 2**20)
    for factor in (0.0, 2.0, float("nan")):

        def fault(block: dict[str, Tensor], factor: float = factor) -> dict[str, Tensor]:
            return {**block, "2.weight": factor * block["2.weight"]}

        sentence = disagreement(_faulty(honest, fault), network, inputs)
        assert "at 2.weight" in sentence
        assert "differs from autograd's" in sentence


def test_a_gradient_that_is_zero_everywhere_is_no_disagreement() -> None:
    case = BY_NAME["mlp"]
    network = Network(case.model(), forward=lambda m, x: m(x) * 0)
    assert disagreement(ReferenceJacobian(network, case.inputs(), 2**20), network, case.inputs()) == ""
    assert structured_disagreement(network, case.inputs()) == ""


@pytest.mark.parametrize("engine", [RowsJacobian, BatchedJacobian])
def test_outputs_that_reach_no_parameter_have_zero_rows(engine: type[RowsJacobian]) -> None:
    case = BY_NAME["mlp"]
    network = Network(case.model(), forward=lambda m, x: x[:, :2])
    for value in engine(network, case.inputs()).block(slice(0, N)).values():
        assert torch.equal(value, torch.zeros_like(value))
