"""May a forecast be believed? What was measured about it, against thresholds that are named here."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_monitor.dynamics.bounds import smallest
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.dynamics.objective import Objective, weighted
from ntk_monitor.optimizers import OptimizerState

LINEAR = 0.15
"""Largest error of the linear model at the end, over motion. On the MLPs of the table in theory (B2), networks whose
forecasts failed had .19 and more, those whose forecasts held at most .03."""
OPINIONS = 0.1
"""Largest disagreement of two forecasts at the end, over motion."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What is known about the error of a forecast before the steps have happened."""

    reliable: bool
    """No reason below."""
    reasons: tuple[str, ...]
    """Why not, in plain words."""
    stability: float
    """Largest lr·λ over the full-batch bound of the optimizer; above 1 the simulation diverges. NaN: not known."""
    linearisation: float
    """|f(θ + Δθ) - forecast| over motion, with the weights that the forecast leads to. NaN: not measured."""
    kernel: float
    """How much the forecast changes with the mean of the kernels here and there, over motion. NaN: not measured."""
    rule: float
    """How much it changes when Adam's second moment moves, over motion. NaN: no Adam, or not run."""
    motion: float
    """|f(T) - f(0)| over |f(0)|: errors over a motion near zero say little."""
    optimizer: str = ""
    """Why the steps have no function-space form and the real rule was run instead; empty where they have one."""


def judged(
    path: Tensor,
    *,
    ratio: float = math.nan,
    there: Tensor | None = None,
    second: Tensor | None = None,
    rule: Tensor | None = None,
    optimizer: str = "",
) -> Trust:
    """Return the verdict on a path (T + 1, S, C...).

    Args:
        path: the forecast.
        ratio: of lr·λ to its bound.
        there: outputs of the network itself at the weights where the path ends.
        second: where the forecast of second order ends.
        rule: where a forecast ends in which Adam's second moment moves.
        optimizer: why function space was left.
    """
    start, end = path[0], path[-1]
    motion = float((end - start).norm())
    linearisation, kernel, disagreement = (
        math.nan if other is None else float((other - end).norm()) / max(motion, 1e-300)
        for other in (there, second, rule)
    )
    found = []
    if not math.isfinite(motion):
        found.append("the simulation diverges")
    if ratio > 1:
        found.append(f"the learning rate is {ratio:.2g} times the full-batch bound")
    # Comparisons with NaN are false: what was not measured speaks neither way.
    if linearisation > LINEAR or math.isinf(linearisation):
        found.append(f"at the predicted weights the network is {linearisation:.0%} of the motion off the forecast")
    if kernel > OPINIONS:
        found.append(f"the kernel moves on the way, which changes the forecast by {kernel:.0%} of the motion")
    if disagreement > OPINIONS:
        found.append(f"{disagreement:.0%} of the motion depends on what Adam's second moment does on the way")
    scale = float(start.norm())
    return Trust(
        reliable=not found,
        reasons=tuple(found),
        stability=ratio,
        linearisation=linearisation,
        kernel=kernel,
        rule=disagreement,
        motion=motion / scale if scale else math.nan,
        optimizer=optimizer,
    )


def ratio_of(dynamics: Dynamics, rates: Tensor, state: OptimizerState) -> float:
    """Return the largest lr·λ at the highest of these rates over the optimizer's full-batch bound; NaN: not known."""
    objective = dynamics.gradient
    if not isinstance(objective, Objective) or not len(rates):
        return math.nan
    root = objective.root(dynamics.outputs[: dynamics.driving])
    highest = dynamics.speed(rates[int(rates.sum(1).argmax())])[: root.numel() // root.shape[-1]]
    matrix = weighted(weighted(highest, root).T, root)
    if not bool(torch.isfinite(matrix).all()):
        return math.inf
    largest = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])
    bound = smallest(tuple(group for group in state.groups if group.names), state.family)
    return largest / (bound.high - bound.decay_high)
