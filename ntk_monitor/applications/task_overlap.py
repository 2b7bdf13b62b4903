"""Which tasks share directions of learning, which hurt each other, and what training on one does to the others.

J_A (n_A, P) Jacobian of the outputs on the samples of task A, K_AB = J_A J_Bᵀ the cross kernel, g_A = dL_A/df. Overlap
‖K_AB‖²_F = Tr(J_AᵀJ_A J_BᵀJ_B) has no sign: only g_Aᵀ K_AB g_B tells whether a step on B helps or hurts A.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntk_monitor.applications.report import Report
from ntk_monitor.applications.task_words import told
from ntk_monitor.applications.tasks import Array, Overlap, Tasks, array, interference, matrix, overlap, trained_on
from ntk_monitor.batch import Batch, size, take, tensors
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.losses import recognised

__all__ = [
    "EXAMPLE",
    "Overlap",
    "example",
    "interference",
    "overlap",
    "predict_forgetting",
    "study",
    "task_overlap",
    "trace_product",
    "trained_on",
]

EXAMPLE = "a small network halfway through learning handwritten digits; each pair of digits is a task"

_MOST_TASKS = 12


def task_overlap(
    model: nn.Module, x_a: Batch, x_b: Batch, *, share: float = 1.0, params: Any = None, forward: Any = None
) -> Overlap:
    """Return the overlap of the tasks with inputs `x_a` and `x_b` in a network; see `overlap`.

    Raises:
        InputError: as for `empirical_ntk`.
        NetworkError: a module that cannot be followed exactly.
    """
    options = {"params": params, "forward": forward}
    kernels = (empirical_ntk(model, x, x2, **options) for x, x2 in ((x_a, None), (x_b, None), (x_a, x_b)))
    return overlap(*kernels, share=share)


def predict_forgetting(k_ab: Any, k_bb: Any, y_b: Any, f_b: Any, ridge: float = 0.0) -> Array:
    """Return how the outputs on A change when B is trained to the end: K_AB (K_BB + ridge)⁺ (y_B - f_B).

    For the squared error, trained to convergence, of a network that stays linear in its parameters; other losses and
    finite training: `trained_on`.

    Raises:
        InputError: shapes that do not fit, or a negative ridge.

    Source: Doan et al. 2021; Jacot, Gabriel and Hongler 2018.
    """
    cross, own, residual = matrix(k_ab), matrix(k_bb), (array(y_b) - array(f_b)).reshape(-1)
    if own.shape != (residual.size,) * 2 or cross.shape[1] != residual.size or ridge < 0:
        raise InputError(
            f"wanted K_BB ({residual.size}, {residual.size}), K_AB (a, {residual.size}) and ridge ≥ 0, "
            f"got {own.shape}, {cross.shape} and {ridge:g}"
        )
    solved = np.linalg.lstsq(own + ridge * np.eye(len(own)), residual, rcond=1e-12)[0]
    return np.asarray(cross @ solved)


def trace_product(k_a: Any, k_b: Any, x_a: Batch, x_b: Batch) -> float:
    """Return Tr(K_A K_B) of two kernels (two networks, two heads, two times) on the same inputs.

    Raises:
        InputError: the inputs differ. Then the product pairs the first sample of A with the first of B: it changes when
            either set is put in another order, and is not zero for orthogonal gradients.
    """
    same = [torch.equal(a, b) for a, b in zip(tensors(x_a), tensors(x_b), strict=False)]
    if not same or not all(same) or len(tensors(x_a)) != len(tensors(x_b)):
        raise InputError(
            "Tr(K_A K_B) means something for the same inputs only: for different ones it depends on the order of the "
            "samples; use task_overlap, which is ‖K_AB‖²_F"
        )
    return float((matrix(k_a) * matrix(k_b).T).sum())


def study(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    tasks: Any = None,
    loss: Any = None,
    steps: int = 50,
    per_task: int = 12,
) -> Report:
    """Return which tasks of a network share directions, which hurt each other, and whether the kernel predicts it.

    Args:
        model: any eager module; only read.
        x: N samples.
        y: N targets, of the loss.
        tasks: (N,) label of each sample's task; None: the classes in `y`.
        loss: name, torch loss or callable; None: cross-entropy for integer targets, else MSE.
        steps: of gradient descent on the task that does most harm, simulated and taken by a copy of the network.
        per_task: samples of each task, the first ones.

    Raises:
        InputError: no targets, fewer than two tasks or more than twelve, or a loss without a closed form.
        NetworkError: a module that cannot be followed exactly.

    Cost: one kernel of tasks · per_task samples, and `steps` steps of a copy.
    """
    if y is None:
        raise InputError("task_overlap needs targets: whether tasks hurt each other depends on the loss; pass y=")
    rows = _groups(tasks if tasks is not None else y, size(x), per_task)
    kept = torch.cat(list(rows.values()))
    x, y = take(x, kept), torch.as_tensor(y)[kept]
    lossy = recognised(loss or ("mse" if y.is_floating_point() else "cross_entropy"))
    seen = Tasks.of(model, x, y, lossy, list(rows), [len(row) for row in rows.values()])
    return told(seen, seen.forgetting(model, steps), steps)


def example(quick: bool = False) -> Report:
    """Return the study of a small network that has half learned handwritten digits, pairs of digits as tasks."""
    from sklearn.datasets import load_digits

    from ntk_monitor.guard import undisturbed

    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(inputs / 16.0), torch.as_tensor(labels).long()
    with undisturbed(seed=0):
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
            optimizer.step()
    names = np.array([f"{d} or {d + 1}" for d in range(0, 10, 2)])[labels // 2]
    return study(model, x, y, tasks=names, per_task=4 if quick else 16, steps=20 if quick else 50)


def _groups(tasks: Any, samples: int, per_task: int) -> dict[str, Tensor]:
    labels = tasks.detach().cpu().numpy() if isinstance(tasks, Tensor) else np.asarray(tasks)
    if labels.shape != (samples,) or labels.dtype.kind == "f":
        raise InputError(
            f"wanted one task per sample ({samples}), got {labels.dtype} of shape {labels.shape}; pass tasks="
        )
    found = {str(name): torch.as_tensor(np.flatnonzero(labels == name)[:per_task]) for name in np.unique(labels)}
    if not 2 <= len(found) <= _MOST_TASKS:
        raise InputError(f"wanted 2 to {_MOST_TASKS} tasks, got {len(found)}; pass tasks= with one label per sample")
    return found
