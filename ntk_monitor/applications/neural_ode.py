"""The kernel of a neural ODE dy/dt = v(y; θ): through a real solver, and in closed form where there is one.

y(0) = x is the input, y(T) the output, K = ∂y(T)/∂θ (∂y'(T)/∂θ)ᵀ. For a scalar autonomous field θ g(y) the sensitivity
is ∂y(T)/∂θ = T g(y(T)), so that K = T² g(y(T)) g(y'(T)): rank one, a single direction that can be learned. The formula
T² g(x) g(x') holds for θ = 0 only, where nothing moves.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.flows import FIXED, RK4, Flow, Solver, Still, check_states, copied
from ntk_monitor.applications.neural_ode_words import heat, told
from ntk_monitor.applications.report import Report, Table, Verdict
from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.kernel import empirical_ntk

Array = NDArray[np.float64]

EXAMPLE = "a flow in the plane that carries tumours' two leading components to their logits, and θ·tanh(y)"


def neural_ode_ntk(
    field: nn.Module, x: Tensor, time: float = 1.0, *, x2: Tensor | None = None, solver: Solver = RK4
) -> Tensor:
    """Return the kernel (N, C, M, C) of the flow along a vector field, in float64; C numbers per state.

    Args:
        field: velocity(y) or velocity(t, y); only read.
        x: (N, ...) initial states.
        time: T.
        x2: (M, ...) other initial states for the cross kernel; None: the same.
        solver: how the flow is integrated and differentiated.

    Raises:
        InputError: states that are no floating tensor (N, ...), or a field that changes their shape.
        NetworkError: a field that cannot be followed exactly.

    Cost: solver steps · C backward passes per sample.

    Source: Chen et al. 2018 (neural ODEs, adjoint); Jacot, Gabriel and Hongler 2018.
    """
    for states in (x,) if x2 is None else (x, x2):
        check_states(field, states, time)
    flow = Flow(copied(field), time, solver)
    x, x2 = x.double(), None if x2 is None else x2.double()
    if solver.own:
        try:
            return torch.as_tensor(empirical_ntk(flow, x, x2, engine="reference"))
        except NetworkError:
            # A field that torch.func cannot follow; plain autograd can, one row at a time.
            pass
    return torch.as_tensor(empirical_ntk(flow, x, x2, engine="rows"))


def scalar_autonomous_ntk(g: Callable[[Array], Array], ends: Any, time: float, other: Any = None) -> Array:
    """Return T² g(y_T) g(y'_T), the kernel of dy/dt = θ g(y) in θ, (n, m); rank one whatever g.

    From dy/g(y) = θ dt: ∂y(T)/∂θ = T g(y(T)).

    Args:
        g: the field at θ = 1, elementwise.
        ends: (n,) states at T.
        time: T.
        other: (m,) other states at T; None: the same.
    """
    one = np.asarray(g(_array(ends)))
    return np.asarray(time**2 * np.outer(one, one if other is None else g(_array(other))))


def tanh_flow(x: Any, time: float, theta: float) -> Array:
    """Return y(T) of dy/dt = θ tanh y: sinh y(T) = e^{θT} sinh x, without overflow."""
    states = _array(x)
    size = np.abs(states)
    with np.errstate(divide="ignore"):
        # log(e^{θT} sinh|x|); x = 0 gives -∞ and stays 0.
        log = theta * time + size + np.log(-np.expm1(-2 * size)) - np.log(2)
    large, small = np.maximum(log, 0.0), np.minimum(log, 0.0)
    # arsinh(e^u) = u + log(1 + √(1 + e^{-2u})).
    ends = np.where(log > 0, large + np.log1p(np.sqrt(1 + np.exp(-2 * large))), np.arcsinh(np.exp(small)))
    return np.asarray(np.sign(states) * ends)


def closed_form_tanh_ode(x: Any, time: float, theta: float, x2: Any = None) -> Array:
    """Return T² tanh(y_T) tanh(y'_T), the exact kernel of dy/dt = θ tanh y, (n, m).

    Args:
        x: (n,) initial states.
        time: T.
        theta: θ.
        x2: (m,) other initial states; None: the same.
    """
    other = None if x2 is None else tanh_flow(x2, time, theta)
    return scalar_autonomous_ntk(np.tanh, tanh_flow(x, time, theta), time, other)


@dataclass(frozen=True, slots=True)
class Directions:
    """How many directions a kernel can learn.

    Attributes:
        rank: eigenvalues above the floor.
        condition: λ₁ / λ_n; infinite where the rank is not full.
        eigenvalues: (n,) descending.
        floor: what rounding and the solver may have added.
    """

    rank: int
    condition: float
    eigenvalues: Array
    floor: float


def directions(kernel: Any, error: float = 0.0) -> Directions:
    """Return the rank of a kernel, (n, n) or (N, C, N, C), as far as its error lets it be known.

    Args:
        kernel: symmetric.
        error: Frobenius norm of the kernel's own error, which moves no eigenvalue by more (Weyl).

    Raises:
        InputError: not a finite square kernel.
    """
    k = _matrix(kernel)
    if k.shape[0] != k.shape[1] or not np.isfinite(k).all():
        raise InputError(f"wanted a finite square kernel, got shape {k.shape}; did the flow diverge?")
    values = np.linalg.eigvalsh((k + k.T) / 2)[::-1]
    floor = max(len(k) * np.finfo(np.float64).eps * float(values[0]), 2 * error)
    rank = int((values > floor).sum())
    full = rank == len(k)
    return Directions(rank, float(values[0] / values[-1]) if full else float("inf"), np.asarray(values), floor)


def solver_scan(
    field: nn.Module, x: Tensor, time: float = 1.0, *, steps: Sequence[int] = (10, 20, 40, 80)
) -> dict[str, Array]:
    """Return the relative error of the kernel for each of our solvers and numbers of steps.

    Against the fourth-order solver at four times the most steps.

    Raises:
        InputError: as for `neural_ode_ntk`, or no steps.
    """
    if not steps:
        raise InputError("a scan needs at least one number of steps")
    exact = _matrix(neural_ode_ntk(field, x, time, solver=Solver(steps=4 * max(steps))))
    size = float(np.linalg.norm(exact)) or float("nan")

    def error(method: str, count: int) -> float:
        found = _matrix(neural_ode_ntk(field, x, time, solver=Solver(method, count)))
        return float(np.linalg.norm(found - exact)) / size

    return {method: np.array([error(method, count) for count in steps]) for method in FIXED}


def study(
    model: nn.Module, x: Batch, y: Any = None, *, time: float = 1.0, solver: Solver = RK4, scan: Sequence[int] = ()
) -> Report:
    """Return what the flow along a vector field can learn, how far it is from standing still, and the solver's error.

    Args:
        model: the vector field, velocity(y) or velocity(t, y), from states to the same shape; only read.
        x: (N, ...) initial states, a floating tensor.
        y: not used; targets have no part in it.
        time: T.
        solver: how the flow is integrated and differentiated.
        scan: numbers of steps for the error of our solvers, on the first eight states; empty: 5, 10, 20, 40.

    Raises:
        InputError: states that are no floating tensor, or a model that is no vector field because it changes their
            shape (a classifier, a regressor).
        NetworkError: a field that cannot be followed exactly.

    Cost: two kernels of the flow, and thirteen of eight states.
    """
    del y
    check_states(model, x, time)
    scan = tuple(scan) or (5, 10, 20, 40)
    kernel = _matrix(neural_ode_ntk(model, x, time, solver=solver))
    finer = _matrix(neural_ode_ntk(model, x, time, solver=solver.finer()))
    resting = _matrix(_resting_ntk(model, x, time))
    error = float(np.linalg.norm(finer - kernel))
    return told(
        kernel=kernel,
        resting=resting,
        found=dataclasses.asdict(directions(kernel, error)),
        error=error,
        scan=(tuple(scan), solver_scan(model, x[:8], time, steps=scan)),
        words={"time": f"{time:g}", "samples": str(len(x)), "solver": str(solver)},
    )


def example(quick: bool = False) -> Report:
    """Return the study of a trained flow in the plane on breast cancer data, and θ·tanh(y) against its closed form."""
    from sklearn.datasets import load_breast_cancer

    from ntk_monitor.guard import undisturbed

    inputs, labels = load_breast_cancer(return_X_y=True)
    z = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    states = torch.as_tensor(z @ np.linalg.svd(z, full_matrices=False)[2][:2].T / 3.0)
    with undisturbed(seed=0):
        field = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        flow = Flow(field, 1.0, Solver(steps=5))
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
        for _ in range(10 if quick else 60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(flow(states), torch.as_tensor(labels).long()).backward()
            optimizer.step()
    order = torch.as_tensor(np.argsort(labels[:30], kind="stable"))
    chosen = states[order[:: 5 if quick else 1]]
    scan, steps = ((2, 4), 10) if quick else ((5, 10, 20, 40), 40)
    return _with_tanh(study(field, chosen, time=1.0, solver=Solver(steps=steps), scan=scan))


class _Tanh(nn.Module):
    """θ·tanh(y)."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, y: Tensor) -> Tensor:
        return self.theta * torch.tanh(y)


def _with_tanh(report: Report) -> Report:
    """Return the report with what θ·tanh(y) says: closed form, solver, and the formula for a flow at rest."""
    x, x2, time = np.array([1.0]), np.array([2.5]), 2.0
    resting = float(closed_form_tanh_ode(x, time, 0.0, x2)[0, 0])
    rows = []
    for theta in (-0.7, 0.0, 0.7):
        exact = float(closed_form_tanh_ode(x, time, theta, x2)[0, 0])
        pair = (torch.as_tensor(x)[:, None], torch.as_tensor(x2)[:, None])
        solved = float(neural_ode_ntk(_Tanh(theta), pair[0], time, x2=pair[1]).reshape(()))
        rows.append((theta, exact, solved, resting, f"{100 * abs(resting / exact - 1):.0f} %"))
    grid = np.linspace(-3, 3, 31)
    figures: Mapping[str, Any] = {
        f"tanh_{name}": heat(
            closed_form_tanh_ode(grid, time, theta),
            f"Kernel of dy/dt = θ tanh y, θ = {theta:g}, T = 2",
            "Closed form T² tanh(y_T) tanh(y'_T): rank one, so every row is a multiple of every other; one direction "
            "can be learned.",
            grid,
        )
        for name, theta in (("resting", 0.0), ("moving", 0.7))
    }
    columns = ("θ", "closed form", "solver", "T² tanh(x) tanh(x')", "off by")
    verdict = Verdict(
        "K = T² tanh(x) tanh(x') for dy/dt = θ tanh y",
        bool(all(abs(resting / row[1] - 1) < 1e-6 for row in rows)),
        f"off by {rows[0][-1]} at θ = -0.7 and {rows[-1][-1]} at θ = 0.7 (x = 1, x' = 2.5, T = 2); exact at θ = 0 only",
    )
    table = Table(columns, tuple(rows))
    return dataclasses.replace(
        report,
        verdicts=(*report.verdicts, verdict),
        tables={**report.tables, "dy/dt = θ tanh y at x = 1, x' = 2.5, T = 2": table},
        figures={**report.figures, **figures},
    )


def _resting_ntk(field: nn.Module, x: Tensor, time: float) -> Tensor:
    return torch.as_tensor(empirical_ntk(Still(copied(field), time), x.double()))


def _array(values: Any) -> Array:
    held = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(held, dtype=np.float64)


def _matrix(kernel: Any) -> Array:
    k = _array(kernel)
    return k.reshape(k.shape[0] * k.shape[1], -1) if k.ndim == 4 else k
