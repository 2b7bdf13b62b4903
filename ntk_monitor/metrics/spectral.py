"""Metrics of the spectrum of K: how fast the outputs can move, and in how many directions. λ₁ ≥ … ≥ λₙ."""

import math

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import metric
from ntk_monitor.spectrum import Spectrum

Array = NDArray[np.float64]

RELATIVE_RIDGE = 1e-3
"""Ridge of the regularised condition number, relative to the mean eigenvalue."""

_SQUARED = "squared output units"


@metric(formula="Σ_i K_ii", range=(0, math.inf), unit=_SQUARED, cost="free", tier="S", source="Jacot 2018")
def trace(measured: Measured) -> float:
    """Sum of squared gradient norms of all outputs: how fast they can move at a given learning rate."""
    return float(np.trace(measured.kernel))


@metric(
    formula="λ₁",
    range=(0, math.inf),
    unit=_SQUARED,
    cost="free",
    tier="S",
    source="Cohen 2021",
    lies_when="a small probe over-estimates its value per sample, 8 % at 64 samples",
)
def lambda_max(measured: Measured) -> float:
    """Largest eigenvalue of K."""
    return measured.spectrum.lambda_max


@metric(formula="tr K / n", range=(0, math.inf), unit=_SQUARED, cost="free", tier="S")
def mean_diagonal(measured: Measured) -> float:
    """Mean squared gradient norm of one output."""
    return float(measured.kernel.diagonal().mean())


@metric(formula="√Σ K_ij²", range=(0, math.inf), unit=_SQUARED, tier="S")
def frobenius(measured: Measured) -> float:
    """Frobenius norm of K."""
    return float(np.linalg.norm(measured.kernel))


@metric(
    formula="log10 λ₁/min{λ_i > noise floor}",
    range=(0, math.inf),
    unit="decades",
    cost="free",
    tier="A",
    source="Chen 2021 (TE-NAS), with a stated rank",
    lies_when="rank-deficient kernels: a lower bound; comparable only at equal rank and precision",
)
def condition_log10(measured: Measured) -> float:
    """How far apart the fastest and the slowest resolved modes are."""
    return float(np.log10(measured.spectrum.condition_number))


@metric(
    formula="log10 (λ₁ + ε)/(λₙ + ε), ε = 1e-3 tr K / n",
    range=(0, math.inf),
    unit="decades",
    cost="free",
    tier="A",
    lies_when="modes slower than a thousandth of the mean are not told apart",
)
def condition_regularised_log10(measured: Measured) -> float:
    """How far apart fast and slow modes are, at a fixed relative ridge: comparable between precisions and ranks."""
    values = measured.spectrum.eigenvalues.clip(min=0)
    ridge = RELATIVE_RIDGE * values.mean()
    return float(np.log10((values[0] + ridge) / (values[-1] + ridge)))


@metric(
    formula="exp(-Σ p ln p), p = λ / Σλ",
    range=(1, math.inf),
    unit="modes",
    cost="free",
    tier="A",
    source="Roy and Vetterli 2007",
    lies_when="one dominant, usually constant, mode pulls it towards 1; see centred_effective_rank",
)
def effective_rank(measured: Measured) -> float:
    """How many directions can be learned at a similar speed."""
    return measured.spectrum.effective_rank


@metric(
    formula="exp(-Σ p ln p) of (I - 11ᵀ/N) K (I - 11ᵀ/N), K averaged over outputs",
    range=(1, math.inf),
    unit="modes",
    cost="n^3",
    tier="A",
    source="Roy and Vetterli 2007",
)
def centred_effective_rank(measured: Measured) -> float:
    """Effective rank without the constant mode: how many ways the samples can be told apart."""
    means = measured.means - measured.means.mean(axis=0)
    return Spectrum.of(means - means.mean(axis=1)[:, None], vectors=False).effective_rank


@metric(formula="(Σλ)² / Σλ²", range=(1, math.inf), unit="modes", cost="free", tier="A")
def participation_ratio(measured: Measured) -> float:
    """Number of equal eigenvalues with the same first two moments."""
    return measured.spectrum.participation_ratio


@metric(
    formula="Σλ / λ₁",
    range=(1, math.inf),
    unit="modes",
    cost="free",
    tier="A",
    lies_when="it is the stable rank of J, not of K",
)
def intrinsic_dimension(measured: Measured) -> float:
    """Trace over largest eigenvalue."""
    return measured.spectrum.intrinsic_dimension


@metric(formula="λ₁ / tr K", range=(0, 1), unit="fraction", cost="free", tier="A")
def top_share(measured: Measured) -> float:
    """Share of the trace in the fastest mode."""
    return 1 / measured.spectrum.intrinsic_dimension


@metric(
    formula="λ₁ / λ₂",
    range=(1, math.inf),
    unit="ratio",
    cost="free",
    tier="A",
    source="Davis and Kahan 1970",
    lies_when="equal eigenvalues (symmetric outputs) have no gap and no eigenvectors of their own",
)
def spectral_gap(measured: Measured) -> float:
    """How far the fastest mode stands out; infinite for a kernel of rank one."""
    values = measured.spectrum.eigenvalues
    if len(values) < 2 or not values[0] > 0:
        return float("nan")
    return float(values[0] / values[1]) if values[1] > measured.spectrum.noise_floor else float("inf")


def relative_gaps(eigenvalues: Array) -> Array:
    """Return (λ_k - λ_{k+1}) / λ_k of descending eigenvalues, (n - 1,), 0 to 1: how separable neighbours are.

    NaN where λ_k ≤ 0. Source: Davis and Kahan 1970.
    """
    upper = np.where(eigenvalues[:-1] > 0, eigenvalues[:-1], np.nan)
    return np.asarray((eigenvalues[:-1] - eigenvalues[1:]) / upper)


@metric(
    formula="max K_nn / median K_nn over samples, outputs averaged",
    range=(1, math.inf),
    unit="ratio",
    cost="free",
    tier="A",
)
def outlier(measured: Measured) -> float:
    """How much faster than usual the most sensitive sample moves."""
    norms = measured.means.diagonal()
    return float(norms.max() / np.median(norms))


def power_law(eigenvalues: Array, noise_floor: float = 0.0) -> tuple[float, float]:
    """Return a of λ_i ~ i⁻ᵃ and its standard error, by least squares of log λ on log i over the middle of the spectrum.

    The middle runs from index 3 to half of the eigenvalues above the noise floor: the first ones are not on the law,
    the last ones are bent by the finite number of samples. NaN for fewer than five such points.

    Args:
        eigenvalues: (n,) descending.
        noise_floor: eigenvalues at or below it do not count.

    The error takes neighbouring eigenvalues for independent, which they are not; multiplicities make steps.

    Source: Bordelon et al. 2020; Canatar et al. 2021.
    """
    resolved = int((eigenvalues > noise_floor).sum())
    index = np.arange(3, resolved // 2 + 1)
    if len(index) < 5:
        return float("nan"), float("nan")
    x, y = np.log(index), np.log(eigenvalues[index - 1])
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return -slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


@metric(
    formula="-slope of log λ_i on log i, middle of the spectrum",
    unit="exponent",
    cost="free",
    tier="B",
    default=False,
    source="Bordelon 2020; Canatar 2021",
    lies_when="few samples, or eigenvalues with multiplicity; see power_law for its error",
)
def power_law_exponent(measured: Measured) -> float:
    """How quickly the spectrum falls: smooth data and architectures have large exponents."""
    return power_law(measured.spectrum.eigenvalues, measured.spectrum.noise_floor)[0]
