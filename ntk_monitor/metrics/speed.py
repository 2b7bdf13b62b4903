"""Metrics of what is still unlearned and how long it takes: rates and coordinates of M."""

import math

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import metric

Array = NDArray[np.float64]


def steps_to_learn(
    rates: Array, lr: float, left: float = 0.1, *, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0
) -> Array:
    """Return the steps until each mode's residual is a fraction `left` of what it was, (n,), full-batch SGD.

    ln(1/left) / -ln |q|, q the dominant root of the optimizer's recursion. Underdamped modes of momentum all take
    √(momentum)ᵗ, whatever their rate; then it is the envelope that is meant. Infinite where |q| ≥ 1.

    Args:
        rates: (n,) eigenvalues of M, in 1 / learning rate.
        lr: learning rate.
        left: fraction of the residual that counts as learned, 0 to 1.
        momentum: β.
        nesterov: as in torch.
        dampening: τ.

    Exact for squared error and a fixed kernel. For any other loss it is wrong by orders of magnitude (500 times on
    cross-entropy): simulate instead.

    Raises:
        InputError: `left` outside 0 to 1.

    Source: Jacot et al. 2018; Polyak 1964.
    """
    if not 0 < left < 1:
        raise InputError(f"left must lie between 0 and 1, got {left}")
    a = lr * rates
    # Buffer b' = β b + (1 - τ) a x, then x' = x - b', or x' = x - a x - β b' with Nesterov (where torch wants τ = 0).
    # The eigenvalues q of this pair of recursions have these sums and products.
    push = (1 + momentum) * a if nesterov else (1 - dampening) * a
    product = momentum * (1 - a) if nesterov else np.full_like(a, momentum)
    half = (1 + momentum - push) / 2
    root = np.sqrt((half**2 - product).astype(complex))
    largest = np.maximum(np.abs(half + root), np.abs(half - root))
    with np.errstate(divide="ignore"):
        steps = np.log(left) / np.log(largest)
    # A mode without a rate has a root at 1, up to rounding.
    return np.asarray(np.where(largest < 1 - 1e-13, steps, np.inf))


@metric(
    formula="Σ c_i² over rate_i > rate_1 / 10, relative to Σ c_i²",
    range=(0, 1),
    unit="fraction",
    cost="free",
    tier="S",
    source="Jacot 2018; Arora 2019",
    lies_when="cross-entropy: its residual is spread over hundreds of modes; see residual_out_of_reach",
)
def fast_energy(measured: Measured) -> float:
    """Share of the residual in modes within ten times of the fastest."""
    rates, energy = measured.needed("rates"), measured.needed("coordinates") ** 2
    return float(energy[rates > rates.max() / 10].sum() / energy.sum())


@metric(
    formula="energy-weighted median of ln 10 / -ln |1 - lr rate_i|",
    range=(0, math.inf),
    unit="optimizer steps",
    cost="free",
    tier="S",
    default=False,
    source="Jacot 2018",
    lies_when="momentum, Adam or mini-batches: the steps of plain full-batch SGD; only given for squared error",
)
def median_steps_to_learn(measured: Measured) -> float:
    """Steps of plain gradient descent until the modes with half of the residual are learned to a tenth."""
    if measured.loss != "mse":
        raise InputError("the closed form holds for squared error only; read time_to_learn of the simulation")
    steps = steps_to_learn(measured.needed("rates"), measured.lr)
    order = np.argsort(steps, kind="stable")
    energy = np.cumsum(measured.needed("coordinates")[order] ** 2)
    return float(steps[order][np.searchsorted(energy, energy[-1] / 2)]) if energy[-1] > 0 else float("nan")
