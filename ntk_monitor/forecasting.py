"""The rest of a run, simulated in function space from the kernel of one probe: when each mode and direction is learned.

Training samples drive, and the probe rides along. Were it among the few that drive, its own residual would have a
hundred times its share in the gradient: forecast from the probe's own kernel, 20 first steps came out twice too good,
and later ones diverged. Only where probe and reference are the whole training set do both drive.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor import directions
from ntk_monitor.batch import take
from ntk_monitor.directions import Direction
from ntk_monitor.dynamics.flow import Learning, residual_of, times_to_learn
from ntk_monitor.dynamics.linearise import coupled, linearise
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.look import Now
from ntk_monitor.losses import Loss, Terms
from ntk_monitor.modes import Modes
from ntk_monitor.optimizers import OptimizerState
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import FULL_KERNEL_PRODUCTS, Recipe
from ntk_monitor.walk import NoForecastError, driven, everything

Array = NDArray[np.float64]

LEARNED = 10**-0.5
"""A mode or direction counts as learned when its residual is this fraction of today's, its energy a tenth."""

# Rows of a forecast's kernel: each simulated step reads all of it, and long horizons factorise it.
_ROWS = 1536

# Without a planned length, forecasts look this far ahead.
_AHEAD = 1000

# The forecast loss is stored at about so many steps.
_TICKS = 60


def linearised(
    model: nn.Module, probe: Probe, now: Now, state: OptimizerState, recipe: Recipe
) -> tuple[Dynamics, slice]:
    """Return the linear model of the run at this moment, and which of its samples are the probe's.

    Raises:
        NoForecastError: it is not possible or affordable here.
    """
    if state.reason:
        raise NoForecastError(state.reason)
    if coupled(model):
        raise NoForecastError("BatchNorm couples the samples, whose joint kernel is too expensive for every probe")
    if now.loss is None:
        raise NoForecastError("it takes a known loss")
    reference, samples = now.reference, _affordable(model, now, probe, recipe)
    whole = everything(probe, reference, now.population) and (reference is None or samples == reference.samples)
    if reference is not None:
        inputs, targets = (take(t, slice(0, samples)) for t in (reference.inputs, reference.targets))
        reference = Probe(inputs, targets)
    driving, riding = driven(probe, reference, whole=whole)
    dynamics = linearise(
        model,
        state,
        driving,
        now.loss,
        riding=riding,
        params=recipe.params,
        forward=recipe.forward,
        memory_limit=recipe.memory_limit,
        dtype=torch.float32,
        clipping=now.clip is not None and state.family == "adam",
        seed=recipe.seed,
    )
    return dynamics, slice(0, probe.samples) if whole else slice(dynamics.driving, None)


def _affordable(model: nn.Module, now: Now, probe: Probe, recipe: Recipe) -> int:
    """Return how many reference samples the kernel may have."""
    outputs = now.predictions[0].numel()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reference = 0 if now.reference is None else now.reference.samples
    samples = int(min(reference, recipe.reference, max(1, _ROWS // outputs)))
    rows, columns = (probe.samples + samples) * outputs, max(samples, probe.samples) * outputs
    if rows * columns * parameters > FULL_KERNEL_PRODUCTS:
        raise NoForecastError(
            f"the kernel of {rows} x {columns} outputs in {parameters:,} parameters is too expensive for every probe; "
            "a smaller reference= makes it cheaper"
        )
    return samples


def learned(  # noqa: PLR0913 - what, of which samples, in which loss, along what, how fast
    dynamics: Dynamics,
    rows: slice,
    loss: Loss,
    targets: Any,
    projections: Mapping[str, Array],
    rates: Array,
    clip: float | None,
) -> Learning:
    """Return when the modes and directions of the probe will be learned, and its loss until then."""
    count = len(dynamics.outputs[rows])
    span = slice(rows.start, rows.start + count)
    residual = residual_of(dynamics, loss, targets, span)
    return times_to_learn(dynamics, torch.from_numpy(rates), projections, residual, clip=clip, fraction=LEARNED)


def horizon(step: int, total: int | None) -> int:
    """Return how many steps to look ahead: to the planned end, or a fixed number where there is none."""
    return max(0, total - step) if total is not None else _AHEAD


def coming(steps: int, state: OptimizerState, ahead: Callable[[int], Array | None] | None) -> Array:
    """Return the learning rates of the coming steps, (steps, groups): the schedule's, or those in force."""
    planned = ahead(steps) if ahead is not None and steps else None
    current = np.array([group.lr for group in state.groups])
    if planned is None or planned.shape != (steps, len(current)) or not np.isfinite(planned).all():
        return np.tile(current, (steps, 1))
    return planned


def ticks(count: int) -> NDArray[np.int64]:
    """Return which of so many steps of a forecast are stored: few enough, denser at first, the last included."""
    if count <= _TICKS:
        return np.arange(count)
    return np.unique(np.geomspace(1, count, _TICKS).round().astype(np.int64)) - 1


def foreseen(
    outputs: Tensor, loss: Loss, targets: Tensor, modes: Modes, naming: Callable[[Terms], tuple[Direction, ...]]
) -> tuple[Array, Array]:
    """Return what simulated outputs leave of the residual.

    Args:
        outputs: (T, N, C...), of the probe.
        loss: with a closed form (see `ntk_monitor.losses`).
        targets: of the probe.
        modes: of the probe that launched the simulation.
        naming: loss terms → the directions that a probe with these terms would follow.

    Returns:
        (T, n) along the modes, in the basis and the loss curvature of the launch, as `Modes.carried`; and (T, D) along
        the directions in the curvature of each moment, which is how a later probe measures them.

    Cost: T times the loss terms, O(N C²), and T n².
    """
    along, named = [], []
    for f in outputs.double():
        terms = loss.terms(f, targets)
        along.append(modes.terms.residual(terms.gradient))
        if following := naming(terms):
            named.append(directions.residuals(following, terms.residual()))
    return np.stack(along) @ modes.vectors, np.stack(named) if named else np.empty((len(along), 0))


def band_energies(along: Array, masks: Mapping[str, NDArray[np.bool_]]) -> Array:
    """Return the energy of residuals (T, n) along modes in each of the bands, (T, bands); empty without bands."""
    if not masks:
        return np.empty(0)
    return np.stack([np.square(along[:, mask]).sum(axis=1) for mask in masks.values()], axis=1)
