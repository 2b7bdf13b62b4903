"""What a monitor is given, in the forms that it works with: optimizers, the probe, the training set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from ntk_monitor.probe import Probe, beside, dataset_of, default_samples
from ntk_monitor.recipe import Recipe


def listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """Return optimizers as a list."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def rates_of(optimizers: Sequence[Optimizer]) -> list[float]:
    """Return the learning rates in force, one for each parameter group."""
    return [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]


def table(rates: Sequence[tuple[float, ...]]) -> NDArray[np.float64]:
    """Return learning rates as (steps, groups); empty where groups came or went in between."""
    return np.array(rates) if len({len(row) for row in rates}) == 1 else np.empty((0, 0))


def probe_of(data: Any, reference: Any, seed: int) -> Probe:
    """Return the probe, with places in the training set only where that is the set it was drawn from."""
    probe = Probe.of(data, default_samples(1), seed)
    drawn = dataset_of(data)
    return probe if reference is None or drawn is None or drawn is dataset_of(reference) else replace(probe, indices=())


def reference_of(data: Any, probe: Probe, recipe: Recipe) -> Probe | None:
    """Return the training samples that drive forecasts, beside those of the probe; None: there are none."""
    if data is None or isinstance(data, Probe):
        return data
    return beside(data, probe, recipe.reference, recipe.seed + 1) if recipe.reference else None
