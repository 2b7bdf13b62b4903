"""Metrics of the step the loss asks for: g = dL/df (N, C), gradient norm gᵀ K g, noise between samples."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.directions import cosines, interference
from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import metric
from ntk_monitor.noise import NoiseScale, gradient_gram
from ntk_monitor.noise import noise_scale as scale_of

Array = NDArray[np.float64]


def noise(measured: Measured) -> NoiseScale:
    """Return the gradient-noise scale of a probe, with what is needed to smooth it over probes.

    The kernel of the losses is the Gram matrix of per-sample gradients already; otherwise the full kernel is needed.

    Raises:
        InputError: no loss gradient, a kernel without all outputs, or fewer than three samples.
    """
    if measured.layout == "loss":
        return scale_of(measured.kernel)
    return scale_of(gradient_gram(measured.kernel, measured.needed("gradient")))


@metric(
    formula="tr Σ / |G|², tr Σ = (q - b) m/(m - 1), |G|² = (m b - q)/(m - 1), q = mean |G_i|², b = |mean G_i|²",
    range=(0, math.inf),
    unit="samples",
    tier="A",
    source="McCandlish 2018",
    lies_when="left out when |G|² is within two standard errors of zero; then noise_scale_bound is the answer",
)
def noise_scale(measured: Measured) -> float:
    """Batch size at which noise and signal of the gradient are equal."""
    return noise(measured).value


@metric(
    formula="tr Σ / (|G|² + 2 standard errors)",
    range=(0, math.inf),
    unit="samples",
    tier="A",
    source="McCandlish 2018",
    lies_when="a bound with about 97 % confidence, not an estimate",
)
def noise_scale_bound(measured: Measured) -> float:
    """Batch size that the noise scale exceeds."""
    return noise(measured).bound


def loss_decrease(rates: Array, coordinates: Array, lr: float) -> Array:
    """Return the first-order change of the loss by one full-batch gradient step along each mode, (n,), all ≤ 0.

    -lr rate_i c_i²: the modes that will produce the next drop. They sum to -lr |∇L|². First order and full batch only.

    Args:
        rates: (n,) eigenvalues of M.
        coordinates: (n,) residual along its eigenvectors.
        lr: learning rate.
    """
    return np.asarray(-lr * rates.clip(min=0) * coordinates**2)


@metric(
    formula="-lr Σ_i rate_i c_i² = -lr |∇L|²",
    range=(-math.inf, 0),
    unit="loss units",
    cost="free",
    tier="A",
    lies_when="full-batch gradient descent with one learning rate only, to first order",
)
def first_order_decrease(measured: Measured) -> float:
    """Change of the probe's loss by one plain gradient step."""
    return float(loss_decrease(measured.needed("rates"), measured.needed("coordinates"), measured.lr).sum())


@metric(
    formula="min over pairs a ≠ b of g_aᵀ K_ab g_b / √(g_aᵀ K_aa g_a · g_bᵀ K_bb g_b)",
    range=(-1, 1),
    unit="cosine",
    tier="A",
    source="Doan 2021; Yu 2020",
    lies_when="terms whose gradient is nearly zero fight over nothing",
)
def worst_conflict(measured: Measured) -> float:
    """Smallest cosine between the gradients of two loss terms or tasks; below 0 one undoes the other."""
    found = interference(measured.kernel, measured.needed("gradient"), measured.needed("terms"))
    cosine = cosines(found)
    between = cosine[~np.eye(len(cosine), dtype=bool)]
    return float(np.nanmin(between)) if between.size else float("nan")


def balance(kernel: Array, terms: Mapping[str, NDArray[np.bool_]]) -> dict[str, float]:
    """Return weights that make mean-reduced loss terms learn at the same average speed; Σ 1/weight = 1.

    weight_a = Σ_b (tr K_bb / N_b) / (tr K_aa / N_a), N_a rows of term a: torch averages every term over its own rows.
    Infinite for a term without a gradient. The stability bound must be checked again after re-weighting.

    Args:
        kernel: (n, n).
        terms: name → mask (N, C).

    Source: Wang, Yu and Perdikaris 2022, corrected for terms of different size.
    """
    diagonal = kernel.diagonal()
    speeds = {name: float(diagonal[mask.reshape(-1)].mean()) for name, mask in terms.items()}
    total = sum(speeds.values())
    return {name: total / speed if speed > 0 else float("inf") for name, speed in speeds.items()}


@metric(
    formula="max_a s_a / min_a s_a, s_a = tr K_aa / N_a",
    range=(1, math.inf),
    unit="ratio",
    cost="free",
    tier="B",
    source="Wang 2022",
    lies_when="terms with weights of their own: multiply them in first",
)
def term_imbalance(measured: Measured) -> float:
    """How much faster the fastest loss term is learned than the slowest, on average."""
    weights = balance(measured.kernel, measured.needed("terms")).values()
    return max(weights) / min(weights)
