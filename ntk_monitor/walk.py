"""The forecast to the next probe: the real optimizer, copied, on the tangent of the network, driven by training data.

Two passes over reference and probe for each simulated step, whatever the optimizer and the number of outputs or
parameters; BatchNorm couples the samples as it does in training. No kernel is formed. Up to 512 samples drive, because
a small reference fits itself: on digits with AdamW the error of the motion was .33 to .63 with all of the training set,
.40 to .91 with 512 samples, .49 to 1.9 with 150. What is left of it with all samples is batch noise: with the batches
that the run really drew it was .01 to .17.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.batch import Batch, joined
from ntk_monitor.dynamics.ahead import Scene
from ntk_monitor.dynamics.frozen import frozen_path
from ntk_monitor.dynamics.linearise import natural_mode
from ntk_monitor.dynamics.objective import loss_gradient
from ntk_monitor.dynamics.verdict import Verdict, verdict
from ntk_monitor.engines.products import Products, environment, real, routes
from ntk_monitor.losses import Loss
from ntk_monitor.network import Network
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import Recipe

Array = NDArray[np.float64]

_PATH_BYTES = 2**28
_LONGEST = 400


@dataclass(frozen=True, slots=True)
class Path:
    """A forecast that waits for the next probe."""

    motion: Tensor
    """Change of the probe's outputs after each step, (steps + 1, N, ...), float64."""
    start: Tensor
    """The outputs it starts from, in evaluation mode."""
    moved: dict[str, Tensor]
    """θ - θ₀ after the last step."""
    reference: int
    """Samples that drove it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the forecast of the previous probe was worth."""

    forecast: Verdict
    """With the Jacobian of the start."""
    explained: Verdict | None
    """The same steps on the mean of the Jacobians at both ends: what is left is no fault of the kernel's. None where
    the interval was not the one that was simulated to its end."""


class NoForecastError(Exception):
    """There is no forecast, and the message says why in one sentence."""


def walked(  # noqa: PLR0913 - what moves, on what, driven by what, how far, at what price
    model: nn.Module,
    optimizer: Optimizer,
    probe: Probe,
    reference: Probe | None,
    loss: Loss,
    recipe: Recipe,
    *,
    start: Tensor,
    rates: Array,
    clip: float | None,
    seconds: float,
    population: int | None = None,
) -> Path:
    """Simulate the steps of these learning rates, as many of them as the time allows.

    Args:
        model: the live module, only read.
        optimizer: of the run; copied.
        probe: whose outputs are forecast; rides along.
        reference: training samples that drive; None: the probe is all of the training set.
        loss: of the run.
        recipe: parameters, forward, seed.
        start: outputs of the probe in evaluation mode.
        rates: (steps, groups).
        clip: norm that gradients are clipped to.
        seconds: when to stop; a shorter path is a forecast of a shorter time.
        population: size of the training set; where probe and reference are all of it, both drive.

    Raises:
        NoForecastError: the path would be too large to keep.
        InputError: the optimizer cannot be copied, or batches that do not fit each other.
        NetworkError: the network has no products with its Jacobian.
    """
    others = 0 if reference is None else reference.samples
    samples = others + probe.samples
    steps = min(len(rates), _LONGEST)
    if (steps + 1) * samples * start[0].numel() * 8 > _PATH_BYTES:
        raise NoForecastError(f"the outputs of {samples} samples at {steps} steps are too many to follow")
    whole = everything(probe, reference, population)
    driving, riding = driven(probe, reference, whole=whole)
    scene = Scene(
        model,
        driving,
        riding,
        recipe.params,
        recipe.forward,
        natural_mode(model),
        recipe.seed,
    )
    end = time.perf_counter() + seconds
    path, moved = frozen_path(
        scene,
        optimizer,
        loss,
        torch.from_numpy(rates[:steps]),
        clip=clip,
        enough=lambda: time.perf_counter() > end,
    )
    rows = slice(0, probe.samples) if whole else slice(others, None)
    return Path(path[:, rows] - path[:1, rows], start, moved, samples if whole else others)


def everything(probe: Probe, reference: Probe | None, population: int | None) -> bool:
    """True when probe and reference, both drawn from the training set, are all of it."""
    others = 0 if reference is None else reference.samples
    return bool(probe.indices) and population is not None and len(probe.indices) + others >= population


def driven(probe: Probe, reference: Probe | None, *, whole: bool) -> tuple[tuple[Batch, Any], Batch | None]:
    """Return the samples that drive, with their targets, and the inputs of those that ride along.

    Raises:
        NoForecastError: there are no samples to drive.
    """
    if reference is None:
        if not whole:
            raise NoForecastError("there are no training samples beside the probe to drive a forecast")
        return (probe.inputs, probe.targets), None
    x, y = reference.inputs, reference.targets
    return ((joined(probe.inputs, x), joined(probe.targets, y)), None) if whole else ((x, y), probe.inputs)


def scored(  # noqa: PLR0913 - a forecast, and all that it is compared with
    model: nn.Module, made: Path, steps: int, probe: Probe, loss: Loss, now: Tensor, recipe: Recipe
) -> Scored:
    """Compare the forecast made at the previous probe with what became of the probe.

    Outputs are compared through the loss gradients they cause: f - y for squares, p - y for probabilities.

    Args:
        model: the live module.
        made: the forecast.
        steps: optimizer steps since then.
        probe: with its targets.
        loss: of the run.
        now: outputs of the probe in evaluation mode.
        recipe: parameters, forward, seed.

    Raises:
        NoForecastError: the forecast does not reach this far.
    """
    if steps >= len(made.motion):
        raise NoForecastError(
            f"the forecast of the previous probe covers {len(made.motion) - 1} of the {steps} steps since; a shorter "
            "interval between probes would be covered"
        )
    gradient = loss_gradient(loss, probe.targets)
    before, after = gradient(made.start), gradient(now)
    motion = made.motion[steps]

    def judged(change: Tensor) -> Verdict:
        return verdict(before, gradient(made.start + change), after, before)

    forecast = judged(motion)
    if steps < len(made.motion) - 1 or not bool(torch.isfinite(motion).all()):
        return Scored(forecast, None)
    return Scored(forecast, judged((motion + _pushed(model, probe, made.moved, recipe).reshape(motion.shape)) / 2))


def _pushed(model: nn.Module, probe: Probe, moved: Mapping[str, Tensor], recipe: Recipe) -> Tensor:
    """Return J Δθ (N·C,) on the probe, J at the present weights."""
    options: dict[str, Any] = {"params": recipe.params, "forward": recipe.forward, "mode": natural_mode(model)}
    with environment(recipe.seed):
        network = Network.careful(model, probe.inputs, **options)
        products = Products(network, network.prepared(probe.inputs), routes(model), recipe.seed)
        u = [moved[name].to(p.detach()) for name, p in network.parameters.items()]
        return real(products.push(u)).cpu()
