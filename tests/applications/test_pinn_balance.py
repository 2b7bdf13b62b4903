"""Weights of loss terms against closed forms, laws and hand-written training; a yes and a no for each claim."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor.applications import pinn_balance as app
from ntk_monitor.applications.loss_terms import Problem
from ntk_monitor.cli import main
from ntk_monitor.errors import InputError


class Series(nn.Module):
    """u(x) = Σ_k θ_k sin kπx: linear in its parameters, so that every kernel has a closed form and never changes."""

    def __init__(self, waves: int = 3) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(0.1, 0.5, waves).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(math.pi * x * torch.arange(1, len(self.theta) + 1)) @ self.theta[:, None]


def second_derivative(model: nn.Module, x: Tensor) -> Tensor:
    """u'' at x (N, 1)."""
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    bend: Tensor = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    return bend


def bent(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """u'' = 0 at x and u(1/3) = 1, in the precision of x."""
    third = torch.full((1, 1), 1 / 3, dtype=x.dtype)
    return {"equation": second_derivative(model, x), "data": model(third) - 1}


def aimed(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Fit y, and be small."""
    return {"fit": model(x) - y, "size": 0.1 * model(x)}


X = torch.linspace(0.05, 0.95, 7).double()[:, None]


def test_kernels_of_second_derivatives_have_their_closed_form() -> None:
    found = Problem.of(Series(), X, None, bent).jacobians()
    k = np.arange(1, 4)
    np.testing.assert_allclose(found["equation"], -((k * np.pi) ** 2) * np.sin(k * np.pi * X.numpy()), rtol=1e-10)
    np.testing.assert_allclose(found["data"], np.sin(k * np.pi / 3)[None], rtol=1e-12, atol=1e-15)


def test_weights_of_the_study_are_those_of_the_closed_form() -> None:
    report = app.study(Series(), X, terms=bent, steps=1)
    k = np.arange(1, 4)
    equation = ((k * np.pi) ** 4 * np.sin(k * np.pi * X.numpy()) ** 2).sum() / 7
    data = (np.sin(k * np.pi / 3) ** 2).sum()
    rows = {row[0]: row for row in report.tables["terms"].rows}
    assert rows["equation"][4] == pytest.approx((equation + data) / equation, rel=1e-9)
    assert rows["data"][4] == pytest.approx((equation + data) / data, rel=1e-9)
    assert rows["data"][5] == pytest.approx(rows["data"][4], rel=1e-9)
    assert report.verdicts[3].holds is True  # the kernel of a linear network lasts


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 4), st.floats(0.1, 10))
def test_laws_of_the_weights(n: int, p: int, terms: int, scale: float) -> None:
    draw = np.random.default_rng(n + 10 * p + 100 * terms)
    j = {f"term {k}": draw.normal(size=(n + k, p)) * scale**k for k in range(terms)}
    traces = app.mean_traces({name: rows @ rows.T for name, rows in j.items()})
    weights = app.suggested_weights(traces)
    assert sum(1 / w for w in weights.values()) == pytest.approx(1)
    whole = np.concatenate(list(j.values()))
    assert np.trace(whole @ whole.T) == pytest.approx(sum(len(j[name]) * t for name, t in traces.items()))
    shares = [weights[name] * np.trace(rows @ rows.T) / len(rows) for name, rows in j.items()]
    np.testing.assert_allclose(shares, shares[0], rtol=1e-9)
    twice = {name: np.concatenate([rows] * (2 if name == "term 0" else 1)) for name, rows in j.items()}
    again = app.suggested_weights(app.mean_traces({name: rows @ rows.T for name, rows in twice.items()}))
    assert again == pytest.approx(weights)


def test_curvature_is_the_largest_eigenvalue_of_the_hessian_of_the_loss() -> None:
    model, weight = Series(), {"equation": 0.2, "data": 70.0}
    problem = Problem.of(model, X, None, bent)
    k = torch.arange(1, 4).double()
    rows = torch.sin(math.pi * X * k), torch.sin(math.pi / 3 * k)[None]

    def loss(theta: Tensor) -> Tensor:
        equation, data = -(rows[0] * (math.pi * k) ** 2) @ theta, rows[1] @ theta - 1
        return 0.2 * equation.square().mean() + 70 * data.square().mean()

    hessian = torch.autograd.functional.hessian(loss, model.theta.detach())
    wanted = float(torch.linalg.eigvalsh(torch.as_tensor(hessian))[-1])
    assert app.largest_eigenvalue(problem.jacobians(), weight) == pytest.approx(wanted, rel=1e-9)


def test_training_is_adam_on_the_weighted_means() -> None:
    weight, theta = {"equation": 0.5, "data": 3.0}, torch.linspace(0.1, 0.5, 3).double()
    model, record = Problem.of(Series(), X, None, bent, lambda x: 0 * x + 1).trained(weight, 5, 0.01)
    k = torch.arange(1, 4).double()
    equation, data = -torch.sin(math.pi * X * k) * (math.pi * k) ** 2, torch.sin(math.pi / 3 * k)
    m, v = torch.zeros(3).double(), torch.zeros(3).double()
    for step in range(1, 6):
        g = 0.5 * 2 / 7 * equation.T @ equation @ theta + 3 * 2 * data * (data @ theta - 1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert isinstance(model, Series)
    torch.testing.assert_close(model.theta.detach(), theta)
    assert record.steps == [0, 1, 2, 3, 4, 5]
    assert record.losses[-1] == pytest.approx(
        [float((equation @ theta).square().mean()), float((data @ theta - 1) ** 2)]
    )
    assert record.errors[-1] == pytest.approx(float((torch.sin(math.pi * X * k) @ theta - 1).norm() / math.sqrt(7)))


def _plane() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network, points, and the coefficients of a plane that is to be found."""
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model, torch.randn(12, 4).double(), torch.tensor([[1.0], [-1.0], [0.5], [2.0]]).double()


def test_a_term_in_small_units_starves_and_the_weights_feed_it() -> None:
    model, x, truth = _plane()
    edge = torch.eye(4).double()[2:]

    def terms(u: nn.Module, points: Tensor) -> dict[str, Tensor]:
        return {"inside": u(points[:2]) - points[:2] @ truth, "edge": 1e-3 * (u(edge) - edge @ truth)}

    report = app.study(model, x, terms=terms, solution=lambda points: points @ truth, steps=300, lr=0.02)
    assert [verdict.holds for verdict in report.verdicts] == [True, True, True, True]
    assert report.number("imbalance") > 1e5


def test_weights_that_feed_a_wrong_term_get_a_no() -> None:
    """A term that pulls elsewhere, quiet in its own units, becomes as loud as the right one."""
    model, x, truth = _plane()

    def terms(u: nn.Module, points: Tensor) -> dict[str, Tensor]:
        return {"right": u(points) - points @ truth, "wrong": 0.03 * (u(points) + 3 * points @ truth)}

    report = app.study(model, x, terms=terms, solution=lambda points: points @ truth, steps=400, lr=0.02)
    assert report.verdicts[0].holds is True
    assert report.verdicts[2].holds is False
    assert report.number("with weights") > 10 * report.number("without weights")
    assert report.number("smallest cosine") < -0.9


def test_terms_that_are_alike_leave_nothing_to_decide() -> None:
    model, x, truth = _plane()

    def terms(u: nn.Module, points: Tensor) -> dict[str, Tensor]:
        return {"one": u(points) - points @ truth, "other": 1.05 * (u(points) - points @ truth)}

    report = app.study(model, x, terms=terms, steps=60)
    assert [verdict.holds for verdict in report.verdicts] == [False, None, None, True]


def test_training_that_diverges_is_said_to() -> None:
    report = app.study(Series(), X, terms=bent, steps=3, lr=1e200)
    assert [verdict.holds for verdict in report.verdicts[1:]] == [None, None, None]
    assert "diverged" in report.verdicts[2].evidence
    report.json()


def test_terms_may_be_named_functions_single_ones_or_want_targets() -> None:
    y = torch.ones(7, 1).double()
    by_name = app.study(Series(), X, y, terms=f"{__name__}:aimed", steps=2)
    alone = app.study(
        Series(),
        X.numpy(),
        y.numpy(),
        terms={"fit": lambda u, x, y: u(x) - y, "size": lambda u, x: 0.1 * u(x)},
        steps=2,
    )
    assert by_name.tables["terms"].rows == alone.tables["terms"].rows


def test_a_network_keeps_its_precision_and_is_only_read() -> None:
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).train()
    before = copy.deepcopy(model.state_dict())
    report = app.study(model, X.float(), terms=bent, steps=2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model).double()
    assert report.number("imbalance") == pytest.approx(
        app.study(twin, X, terms=bent, steps=2).number("imbalance"), rel=1e-4
    )


def test_the_example_solves_its_equation() -> None:
    report = app.example(quick=True)
    assert report.number("with weights") < 1 < report.number("imbalance")
    assert set(report.figures) == {"losses", "judged", "weights"}


@pytest.mark.slow
def test_the_whole_example_says_yes_and_no() -> None:
    """The weights of the first step help here, and are far from those of the trained network."""
    report = app.example()
    assert [verdict.holds for verdict in report.verdicts] == [False, True, True, False]
    assert report.number("with weights") < 0.02


@pytest.mark.slow
def test_on_a_network_with_small_weights_the_suggestion_makes_the_equation_worse() -> None:
    """Second derivatives are small there, so the equation gets weight 20 and the boundary starves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                layer.bias.zero_()
    x = torch.linspace(0, 1, 34).double()[1:-1, None]
    report = app.study(model, x, terms=app.poisson, solution=app.sine, steps=600, lr=1e-3)
    assert report.verdicts[2].holds is False


def test_the_command_takes_terms_by_name_and_says_when_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "points.npz", x=X.numpy(), y=np.ones((7, 1)))
    words = ["app", "pinn_balance", "--model", f"{__name__}.Series", "--data", str(tmp_path / "points.npz")]
    assert main([*words, "--set", f"terms={__name__}:bent", "steps=5", "--out", str(tmp_path / "out")]) == 0
    assert "2 terms, 8 residuals" in capsys.readouterr().out
    assert (tmp_path / "out/judged.png").exists()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "which a plain supervised model has not; pass terms=, or --set terms=pkg:function" in said
    assert said.count("\n") == 1


def _ones(u: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"fit": u(x), "nothing": torch.ones(3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: app.study(Series(), X), "needs the terms of the loss by name"),
        (lambda: app.study(Series(), X, terms=lambda u, x: {"one": u(x)}), "one term has nothing to be balanced"),
        (lambda: app.study(Series(), X, terms=lambda u, x: u(x)), "tensor of residuals by name, got Tensor"),
        (lambda: app.study(Series(), X, terms=_ones), "'nothing' does not depend on any weight"),
        (lambda: app.study(Series(), X, terms=lambda u, x: {"a": u(x), "b": u(x) / 0}), "'b' must give finite"),
        (lambda: app.study(Series(), X, terms=lambda u, x: {"a": u(x), "b": 0 * u(x)}), "kernel of term 'b' is zero"),
        (lambda: app.study(Series(), X, terms={"a": 3, "b": bent}), "got int"),
        (lambda: app.study(Series(), X, terms="nowhere:terms"), "cannot be imported"),
        (lambda: app.study(Series(), X, terms=bent, steps=0), "steps ≥ 1"),
        (lambda: app.study(Series(), X, terms=bent, solution=lambda x: x[:, 0], steps=1), "shape of the outputs"),
        (lambda: app.mean_traces({"a": np.ones((2, 3))}), "finite square kernel"),
        (lambda: app.suggested_weights({"a": 1.0}), "two positive traces"),
    ],
)
def test_what_cannot_be_used_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
