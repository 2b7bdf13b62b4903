"""Kernels of flows against scipy's solver, the closed form, and the numbers of theory; the rank; a yes and a no."""

import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from ntk_monitor.applications import neural_ode as app
from ntk_monitor.applications.flows import Flow, Solver
from ntk_monitor.errors import InputError

Array = NDArray[np.float64]


class _Scalar(nn.Module):
    """θ·tanh(y)."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, y: Tensor) -> Tensor:
        return self.theta * torch.tanh(y)


class _Timed(nn.Module):
    """tanh(W y + b t): a field that changes with time."""

    def __init__(self) -> None:
        super().__init__()
        draw = np.random.default_rng(0)
        self.w = nn.Parameter(torch.as_tensor(draw.normal(size=(2, 2))))
        self.b = nn.Parameter(torch.as_tensor(draw.normal(size=2)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w.T + self.b * t)


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _twin_tanh(x: float, time: float, theta: float) -> tuple[float, float]:
    """y(T) and ∂y(T)/∂θ by integrating the state and its sensitivity together."""

    def slopes(_: float, z: Array) -> list[float]:
        return [theta * np.tanh(z[0]), np.tanh(z[0]) + theta * z[1] / np.cosh(z[0]) ** 2]

    end = solve_ivp(slopes, (0, time), [x, 0.0], rtol=1e-11, atol=1e-13).y[:, -1]
    return float(end[0]), float(end[1])


def _twin_timed(parameters: Array, x: Array, time: float) -> Array:
    w, b = parameters[:4].reshape(2, 2), parameters[4:]
    return np.asarray(solve_ivp(lambda t, y: np.tanh(w @ y + b * t), (0, time), x, rtol=1e-11, atol=1e-13).y[:, -1])


def test_the_kernel_of_theory() -> None:
    """K(1, 2.5; T = 2, θ = 0.7) = 3.9114971353; the formula for a flow at rest gives 3.0055987346."""
    assert app.closed_form_tanh_ode([1.0], 2.0, 0.7, [2.5])[0, 0] == pytest.approx(3.9114971353, abs=5e-11)
    assert 4 * np.tanh(1.0) * np.tanh(2.5) == pytest.approx(3.0055987346, abs=5e-11)
    assert app.closed_form_tanh_ode([1.0], 2.0, 0.0, [2.5])[0, 0] == pytest.approx(3.0055987346, abs=5e-11)


@pytest.mark.parametrize(("time", "theta"), [(1.0, 0.7), (2.0, 0.7), (2.0, -0.7), (-1.0, 0.4)])
def test_the_closed_form_is_the_sensitivity_that_scipy_integrates(time: float, theta: float) -> None:
    x = [-1.5, 0.3, 2.5]
    ends, sensitivities = zip(*(_twin_tanh(one, time, theta) for one in x), strict=True)
    np.testing.assert_allclose(app.tanh_flow(x, time, theta), ends, rtol=1e-9)
    wanted = np.outer(sensitivities, sensitivities)
    np.testing.assert_allclose(app.closed_form_tanh_ode(x, time, theta), wanted, rtol=1e-8)


def test_a_large_state_does_not_overflow() -> None:
    ends = app.tanh_flow([800.0, -800.0, 0.0, 1e-300], 2.0, 0.7)
    np.testing.assert_allclose(ends, [801.4, -801.4, 0.0, np.exp(1.4) * 1e-300], rtol=1e-12)


@given(st.floats(-20, 20), st.floats(-2, 2), st.floats(0.1, 3))
def test_flows_compose(x: float, theta: float, time: float) -> None:
    once = app.tanh_flow([x], 2 * time, theta)
    np.testing.assert_allclose(app.tanh_flow(app.tanh_flow([x], time, theta), time, theta), once, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("theta", [-0.7, 0.0, 0.7])
def test_the_solver_finds_the_closed_form(theta: float) -> None:
    x = _column(-1.5, 0.3, 2.5)
    found = app.neural_ode_ntk(_Scalar(theta), x, 2.0, solver=Solver(steps=200)).reshape(3, 3)
    np.testing.assert_allclose(found, app.closed_form_tanh_ode(x[:, 0], 2.0, theta), rtol=0, atol=1e-9)


def test_euler_is_of_first_order_and_exact_where_nothing_moves() -> None:
    """Theory: errors .0346, .0177, .00897, .00452 at 10 to 80 steps, of states it does not name; order 1 to 3 %."""
    x = _column(1.0, 2.5)

    def error(theta: float, steps: int, method: str = "euler") -> float:
        found = app.neural_ode_ntk(_Scalar(theta), x, 1.0, solver=Solver(method, steps)).reshape(2, 2)
        return float(np.abs(found.numpy() - app.closed_form_tanh_ode(x[:, 0], 1.0, theta)).max())

    errors = np.array([error(0.7, steps) for steps in (10, 20, 40, 80)])
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2, rtol=0.03)
    assert error(0.0, 10) < 1e-14
    assert error(0.7, 10, "midpoint") / error(0.7, 20, "midpoint") == pytest.approx(4, rel=0.15)
    assert error(0.7, 5, "rk4") / error(0.7, 10, "rk4") == pytest.approx(16, rel=0.2)


def test_a_field_in_time_against_differences_of_scipy() -> None:
    field, x = _Timed(), torch.tensor([[0.3, -1.0], [1.2, 0.4]], dtype=torch.float64)
    flat = np.concatenate([field.w.detach().numpy().reshape(-1), field.b.detach().numpy()])
    jacobian, h = np.zeros((4, 6)), 1e-5
    for k, shift in enumerate(np.eye(6) * h):
        ends = [np.concatenate([_twin_timed(flat + s * shift, row, 1.5) for row in x.numpy()]) for s in (1, -1)]
        jacobian[:, k] = (ends[0] - ends[1]) / (2 * h)
    found = app.neural_ode_ntk(field, x, 1.5).reshape(4, 4)
    np.testing.assert_allclose(found, jacobian @ jacobian.T, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Solver("dopri5"), Solver("dopri5", adjoint=True), Solver("rk4", 200, adjoint=True)])
def test_torchdiffeq_by_autograd_and_by_adjoint_agree_with_our_solver(solver: Solver) -> None:
    field, x = _Timed(), torch.tensor([[0.3, -1.0], [1.2, 0.4]], dtype=torch.float64)
    wanted = app.neural_ode_ntk(field, x, 1.5, x2=x[:1])
    found = app.neural_ode_ntk(field, x, 1.5, x2=x[:1], solver=solver)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_scalar_autonomous_field_has_rank_one_and_a_network_has_more() -> None:
    x = _column(-1.5, -0.5, 0.3, 1.0, 2.5)
    report = app.study(_Scalar(0.7), x, time=2.0, scan=(5, 10))
    assert report.verdicts[0].holds is False
    assert report.number("rank") == 1
    assert report.number("condition") == np.inf
    assert report.verdicts[2].holds is False  # it moves
    field = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    other = app.study(field, x, solver=Solver(steps=20), scan=(5, 10))
    assert other.verdicts[0].holds is True


def test_a_field_at_rest_has_the_kernel_of_the_field() -> None:
    report = app.study(_Scalar(0.0), _column(-1.5, 0.3, 2.5), time=2.0, scan=(5, 10))
    assert report.verdicts[2].holds is True
    assert report.number("distance from rest") < 1e-12


@pytest.mark.slow
def test_few_steps_of_euler_are_not_enough_and_it_says_so() -> None:
    x = _column(1.0, 2.5)
    coarse = app.study(_Scalar(0.7), x, time=2.0, solver=Solver("euler", 4), scan=(5, 10))
    fine = app.study(_Scalar(0.7), x, time=2.0, scan=(5, 10))
    assert (coarse.verdicts[1].holds, fine.verdicts[1].holds) == (False, True)


def test_the_scan_finds_the_orders() -> None:
    scan = app.solver_scan(_Scalar(0.7), _column(1.0, 2.5), 1.0, steps=(5, 10, 20))
    for method, order in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        assert np.log2(scan[method][0] / scan[method][1]) == pytest.approx(order, abs=0.3)


def test_directions_count_what_the_error_lets_be_known() -> None:
    k = np.diag([4.0, 1.0, 1e-6])
    assert (app.directions(k).rank, app.directions(k, error=1e-5).rank, app.directions(k, error=1.0).rank) == (3, 2, 1)
    assert app.directions(k).condition == pytest.approx(4e6)
    assert app.directions(k, error=1e-5).condition == np.inf


def test_a_flow_trains_and_a_field_is_only_read() -> None:
    field = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = copy.deepcopy(field.state_dict())
    app.study(field, torch.randn(3, 2), solver=Solver(steps=4), scan=(2, 4))
    assert field.training
    assert all(torch.equal(before[name], value) for name, value in field.state_dict().items())
    flow = Flow(field.eval(), 1.0, Solver(steps=4))
    flow(torch.randn(3, 2)).square().sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.slow
def test_the_example_says_that_the_formula_for_rest_fails() -> None:
    report = app.example(quick=True)
    assert report.verdicts[0].holds is True
    assert report.verdicts[-1].holds is False
    assert set(report.figures) == {"kernel", "resting", "solver", "tanh_resting", "tanh_moving"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: app.study(nn.Linear(4, 2), torch.randn(3, 4)), "Linear maps \\(1, 4\\) to \\(1, 2\\)"),
        (lambda: app.study(nn.Linear(4, 4), torch.zeros(3, 4).long()), "a floating tensor, got torch.int64"),
        (lambda: app.study(nn.Linear(4, 4), {"x": torch.randn(3, 4)}), "a floating tensor, got dict"),
        (lambda: app.study(nn.Linear(4, 4), torch.randn(3, 4), time=0.0), "time must be finite and not 0"),
        (lambda: Solver(steps=0), "at least one step"),
        (lambda: Solver("leapfrog"), "method must be one of"),
        (lambda: app.solver_scan(nn.Linear(2, 2), torch.randn(3, 2), steps=()), "at least one number of steps"),
        (lambda: app.directions(np.full((2, 2), np.inf)), "did the flow diverge"),
    ],
)
def test_what_cannot_be_used_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_a_missing_torchdiffeq_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(InputError, match=r"pip install ntk-monitor\[ode\]"):
        Solver("dopri5")
    assert Solver().own
