"""Eight claims about the NTK that are often made and are false, each with a network for which the product says no.

Here the public `study` of an application meets a small counter-example and has to say "does not hold" to the claim in
so many words. What is behind each no, with the numbers, is tested more closely in the tests that are named.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ntk_monitor.applications import (
    Report,
    activations,
    dropout,
    early_stopping,
    initialization,
    kernel_regression,
    residual,
    saliency,
    task_overlap,
)
from ntk_monitor.applications.initializers import INITS


@dataclass(frozen=True, slots=True)
class Claim:
    """A false claim.

    Attributes:
        said: as it is said.
        asked: the verdict about it, in the words of the report.
        ask: returns the report on a counter-example.
        shown: tests that show it at length, "test_NAME.py::test_function" in tests/applications.
    """

    said: str
    asked: str
    ask: Callable[[], Report]
    shown: tuple[str, ...]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rows(count: int, inputs: int) -> Tensor:
    return nn.functional.normalize(normal(count, inputs), dim=1)


class SharedReadout(nn.Module):
    """a·(x + V relu(W x)), He's weights: skip and branch go through one readout."""

    def __init__(self, inputs: int = 5, width: int = 32) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Linear(inputs, width, bias=False), nn.ReLU(), nn.Linear(width, inputs, bias=False)
        )
        self.readout = nn.Linear(inputs, 1, bias=False)
        for layer in (self.branch[0], self.branch[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight)
        nn.init.normal_(self.readout.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.readout(x + self.branch(x))
        return outputs


def dropped() -> Report:
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1))
    return dropout.study(model, normal(6, 5), draws=200)


def sensitive() -> Report:
    model = nn.Sequential(nn.Linear(5, 128), nn.Tanh(), nn.Linear(128, 1)).double()
    return saliency.study(model, normal(60, 5), resamples=200)


def skipped() -> Report:
    return residual.study(SharedReadout().double(), normal(12, 5), levels=2)


def orthogonal() -> Report:
    """A linear model whose tasks use different inputs."""
    x = torch.zeros(16, 6, dtype=torch.float64)
    x[:8, :3], x[8:, 3:] = normal(8, 3), normal(8, 3)
    model = nn.Linear(6, 1, bias=False).double()
    return task_overlap.study(model, x, normal(16, 1), tasks=torch.arange(16) // 8, steps=2, per_task=8)


def stopped() -> Report:
    x = normal(40, 4)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    return early_stopping.study(model, x, torch.sin(2 * x[:, :1]) + x[:, 1:2], steps=100)


def scaled() -> Report:
    model = nn.Sequential(nn.Linear(5, 64, bias=False), nn.ReLU(), nn.Linear(64, 1, bias=False)).double()
    return activations.study(model, normal(6, 5))


def drawn() -> Report:
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 1, bias=False))
    return initialization.study(model, rows(16, 16).float(), count=14, inits={k: INITS[k] for k in ("he", "xavier")})


def narrow() -> Report:
    x = rows(40, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    return kernel_regression.study(model, x, 3 * torch.sign(x[:, :1] * x[:, 1:2]), ridge=0.1, steps=2000)


CLAIMS = (
    Claim(
        "dropout slows learning by p²",
        "dropout multiplies the kernel by q² = 0.25, like a smaller learning rate",
        dropped,
        (
            "test_dropout.py::test_a_network_has_the_ratios_of_the_table",
            "test_dropout.py::test_one_layer_keeps_the_mean_drift_and_is_no_smaller_learning_rate",
        ),
    ),
    Claim(
        "saliency correlates with Θ(x, x)",
        "Θ(x, x) tells at which samples the output is sensitive to its input",
        sensitive,
        ("test_saliency.py::test_at_random_weights_there_is_no_strong_positive_correlation",),
    ),
    Claim(
        "a ResNet's kernel is a sum",
        "the kernel is the sum of the kernel without branches and the kernel without skips",
        skipped,
        ("test_residual.py::test_a_shared_readout_is_no_sum_and_eigenvalues_fall",),
    ),
    Claim(
        "a skip connection never lowers an eigenvalue",
        "skip connections never lower an eigenvalue",
        skipped,
        ("test_residual.py::test_a_shared_readout_is_no_sum_and_eigenvalues_fall",),
    ),
    Claim(
        "Tr(K_A K_B) measures interference",
        "Tr(K_A K_B) measures interference between tasks with different samples",
        orthogonal,
        ("test_task_overlap.py::test_orthogonal_tasks_have_no_overlap_though_the_trace_of_the_product_is_large",),
    ),
    Claim(
        "early stopping equals a ridge",
        "stopping early is the same as one ridge",
        stopped,
        (
            "test_early_stopping.py::test_ridge_of_each_mode_under_flow",
            "test_early_stopping.py::test_study_says_no_where_stopping_is_no_ridge_and_the_kernel_moves",
        ),
    ),
    Claim(
        "the ReLU kernel is scale invariant",
        "the kernel of this network does not change with the scale of inputs",
        scaled,
        (
            "test_activations.py::test_bias_free_networks_are_homogeneous_at_every_width_and_draw",
            "test_activations.py::test_the_report_says_no_where_the_claims_fail",
        ),
    ),
    Claim(
        "He is better conditioned than Xavier",
        "He is better conditioned than Xavier",
        drawn,
        ("test_initialization.py::test_he_is_not_better_conditioned_than_xavier_here",),
    ),
    Claim(
        "the NTK predicts finite ReLU networks",
        "training this network is kernel regression with its present kernel",
        narrow,
        (
            "test_kernel_regression.py::test_gap_of_real_descent_shrinks_with_width",
            "test_kernel_regression.py::test_a_network_that_is_not_lazy_is_told_so",
        ),
    ),
)
"""Nine rows: that a ResNet's kernel is a sum, and that its eigenvalues never fall, are usually said as one."""


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.said)
def test_product_says_no(claim: Claim) -> None:
    torch.manual_seed(0)
    report = claim.ask()
    holds = {verdict.claim: verdict.holds for verdict in report.verdicts}
    assert holds[claim.asked] is False
    assert f"DOES NOT HOLD: {claim.asked[:40]}" in report.text(1000)


def test_predictions_of_finite_networks_come_with_their_error() -> None:
    """The last claim may be made with its error beside it: no report of kernel regression is without."""
    torch.manual_seed(0)
    text = narrow().text()
    gap = next(line for line in text.splitlines() if line.startswith("gap "))
    assert "of the trained change" in gap


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.said)
def test_named_tests_are_there(claim: Claim) -> None:
    for name in claim.shown:
        file, _, function = name.partition("::")
        tree = ast.parse((Path(__file__).parent / "applications" / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
