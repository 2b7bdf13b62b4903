"""Which parameters a kernel holds: by kind, in the record, on screen; partial and zero kernels are refused by name."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntk_monitor import coverage as subject
from ntk_monitor import selfcheck
from ntk_monitor.batch import size
from ntk_monitor.coverage import Coverage, Forwards, listed
from ntk_monitor.engines.structured.operations import Matrix
from ntk_monitor.errors import NetworkError
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.history import load_history
from ntk_monitor.kernel import measured
from ntk_monitor.monitor import Monitor
from ntk_monitor.network import Network
from ntk_monitor.recorder import Recorder
from ntk_monitor.selfcheck import structured_disagreement
from ntk_monitor.summary import rows, text
from tests.cases import CASES, Case, Lambda, answer


class Several(nn.Module):
    """One block of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.constant = nn.Linear(3, 3)
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2, bias=False)
        self.auxiliary = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.frozen(x) + self.constant(x).detach()))
        y: Tensor = self.head(h)
        return y


def of(model: nn.Module, x: Any, **options: Any) -> Coverage:
    return Forwards(**options).outputs(model, x)[1]


def monitored(model: nn.Module, x: Tensor, **options: Any) -> Monitor:
    with torch.no_grad():
        y = torch.zeros(len(x), *model(x).shape[1:])
    return Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), "mse", **options)


def test_parameters_by_kind() -> None:
    found = of(Several(), torch.randn(5, 3), params="body|constant|auxiliary")
    assert found == Coverage(
        covered={"body.weight": 12, "body.bias": 4},
        frozen={"frozen.weight": 9, "frozen.bias": 3},
        unselected={"head.weight": 8},
        unused={"auxiliary.weight": 20, "auxiliary.bias": 5},
        detached={"constant.weight": 9, "constant.bias": 3},
        unreachable={},
    )
    assert found.total == sum(p.numel() for p in Several().parameters()) == 73
    assert found.selected == 53
    assert found.share == 16 / 61


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_covered_is_what_autograd_reaches(case: Case) -> None:
    """The twin asks autograd for one output and one parameter at a time, in an untouched network."""
    model = case.model().eval()
    y = answer(case, model, case.inputs()).flatten()
    reached = set()
    for name, p in model.named_parameters():
        for value in y:
            if p.requires_grad and value.requires_grad:
                g: Any = torch.autograd.grad(value, p, retain_graph=True, allow_unused=True)[0]
                reached |= {name} if g is not None else set()
    live = case.model()
    before = Fingerprint.of(live)
    found = of(live, case.inputs(), forward=case.forward)
    assert set(found.covered) == reached
    assert found.total == sum(p.numel() for p in live.parameters())
    assert {n for f in fields(found) for n in getattr(found, f.name)} == {n for n, _ in live.named_parameters()}
    assert before.changes(Fingerprint.of(live)) == []


def test_an_expert_that_no_sample_goes_to_is_unused_though_training_goes_there() -> None:
    def routed(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.first(x) + m.second(x) if m.training else m.first(x)
        return y

    found = of(Lambda(routed, first=nn.Linear(3, 1), second=nn.Linear(3, 1)), torch.randn(5, 3))
    assert set(found.unused) == {"second.weight", "second.bias"}


class Gated(nn.Module):
    """Runs its first layer without gradients in evaluation mode; what training mode returns is up to the test."""

    def __init__(self, trained: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.trained = trained
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.training):
            h = self.first(x)
        y = self.last(h)
        return self.trained(y) if self.training else y


def test_a_block_that_only_training_reaches_is_refused_until_it_is_left_out() -> None:
    model, x = Gated(lambda y: y), torch.randn(5, 3)
    with pytest.raises(NetworkError, match=r"gradients reach first.weight, first.bias \(12 scalars\) in training mode"):
        of(model, x)
    assert of(model, x, params="last").share == 4 / 16
    # An answer that cannot be compared with the measured one says nothing.
    assert set(of(Gated(lambda y: (y, y)), x).detached) == {"first.weight", "first.bias"}


def test_a_kernel_that_would_be_zero_is_refused_by_name() -> None:
    model, x = Several(), torch.randn(5, 3)
    for params, why in (("auxiliary", "does not use them"), ("constant", "cuts them off")):
        with pytest.raises(NetworkError, match=rf"no output depends on {params}.weight, {params}.bias .* {why}"):
            of(model, x, params=params)
        snapshot = monitored(model, x, params=params).snapshot(0)
        assert snapshot.status == "skipped"
        assert f"no output depends on {params}.weight" in snapshot.reason


def test_a_kernel_that_is_zero_is_refused_and_measured_once_it_is_not() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)), torch.randn(5, 3)
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    monitor = monitored(model, x, params="^0")
    assert "the kernel is exactly zero: at these weights nothing measured depends on 0.weight (6 scalars)" in (
        monitor.snapshot(0).reason
    )
    nn.init.ones_(model[1].weight)  # type: ignore[arg-type]
    assert monitor.snapshot(1).status == "measured"


def test_weights_that_are_not_finite_are_another_fault() -> None:
    model = nn.Linear(3, 1)
    nn.init.constant_(model.weight, math.inf)
    assert "must be finite" in monitored(nn.Sequential(nn.Linear(3, 3), model), torch.ones(5, 3)).snapshot(0).reason


def test_coverage_is_found_once_and_again_when_other_parameters_train(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    honest = subject.coverage

    def counted(*arguments: Any, **options: Any) -> Coverage:
        found.append(1)
        return honest(*arguments, **options)

    monkeypatch.setattr(subject, "coverage", counted)
    model, x, forwards = Several(), torch.randn(5, 3), Forwards()
    shares = [forwards.outputs(model, x)[1].share for _ in range(3)]
    assert (len(found), set(shares)) == (1, {24 / 61})
    model.frozen.requires_grad_(True)
    assert forwards.outputs(model, x)[1].share == 36 / 73
    assert len(found) == 2


def test_a_network_without_gaps_costs_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    honest = Network.raw

    def counted(self: Network, inputs: Any) -> Tensor:
        passes.append(size(inputs))
        return honest(self, inputs)

    monkeypatch.setattr(Network, "raw", counted)
    forwards, x = Forwards(), torch.randn(20, 3)
    forwards.outputs(nn.Linear(3, 1), x)
    assert passes == [2, 20]  # the first looks for a forward that rewrites its parameters
    passes.clear()
    Forwards().outputs(Several(), x)
    assert passes == [2, 20, 8, 2, 8]


# Record and screen.


def test_the_record_says_what_was_measured(tmp_path: Path) -> None:
    model, x = Several(), torch.randn(5, 3)
    recorder = Recorder(tmp_path)
    recorder.write(monitored(model, x, params="body|constant|auxiliary").snapshot(0))
    recorder.flush()
    (read,) = load_history(tmp_path).snapshots
    assert read.facts["coverage"] == pytest.approx(16 / 61)
    assert [read.facts[kind] for kind in ("unselected", "unused", "detached", "frozen")] == [8, 25, 12, 12]
    assert read.texts["unselected"] == "head.weight"
    assert read.texts["unused"] == "auxiliary.weight, auxiliary.bias"
    assert read.texts["detached"] == "constant.weight, constant.bias"
    shown = next(row for row in rows([read]) if row.quantity == "parameters measured")
    assert shown.value == "26.2 % of 61 trainable"
    assert shown.meaning == (
        "8 left out by params=: head.weight. 25 not used by the outputs: auxiliary.weight, auxiliary.bias. "
        "12 cut off from the outputs' gradients (no_grad, detach, another output): constant.weight, constant.bias. "
        "Beside them 12 frozen ones, which are constants."
    )


def test_all_parameters_on_screen() -> None:
    snapshot = monitored(nn.Linear(3, 1), torch.randn(5, 3)).snapshot(0)
    assert snapshot.facts["coverage"] == 1
    assert not {"unselected", "unused", "detached"} & set(snapshot.texts)
    shown = text(rows([snapshot]))
    assert "100 % of 4 trainable" in shown
    assert "The kernel holds all of them." in shown


def test_the_reason_of_a_slower_engine_is_in_the_record_and_on_screen() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.real) * self.w.imag.sum()

    model = Spectral()
    snapshot = monitored(model, torch.randn(4, 3)).snapshot(0)
    assert snapshot.status == "measured"
    assert snapshot.engine == "rows"
    assert snapshot.engine_reason.endswith("vectorised: RuntimeError: complex parameters")
    shown = next(row for row in rows([snapshot]) if row.quantity == "computed by")
    assert shown.value.startswith("rows")
    assert snapshot.engine_reason.rstrip(".") in shown.meaning


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(9)]) == "0, 1, 2, 3, 4, 5 and 3 more"


# What the self-check of the engine costs.


def _passes(monkeypatch: pytest.MonkeyPatch, network: Network, x: Tensor) -> list[int]:
    passes: list[int] = []
    honest = Network.outputs

    def counted(self: Network, inputs: Any) -> Tensor:
        passes.append(size(inputs))
        return honest(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "outputs", counted)
        assert structured_disagreement(network, x) == ""
    return passes


@pytest.mark.parametrize("bound", ["_WHOLE", "_ENTRIES"])
def test_the_self_check_of_large_networks_takes_few_samples(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    network, x = Network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), torch.randn(50, 3)
    assert set(_passes(monkeypatch, network, x)) == {50}
    monkeypatch.setattr(selfcheck, bound, 1)
    assert set(_passes(monkeypatch, network, x)) == {16}
    assert set(_passes(monkeypatch, network, x[:9])) == {9}


def test_few_samples_still_find_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_WHOLE", 1)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(50, 3).double()
    assert measured(model, x).engine == "structured"
    honest = Matrix.gradient
    monkeypatch.setattr(Matrix, "gradient", lambda self, g: honest(self, g).flip(0))
    # Another forward function, so that the comparison of before does not count.
    found = measured(model, x, forward=lambda m, inputs: m(inputs))
    assert found.engine == "batched"
    assert "differs from autograd's" in found.reason
