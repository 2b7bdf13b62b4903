"""Metrics that ask whether the kernel is made for its targets. K averaged over outputs (N, N), targets Y (N, D)."""

import math

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import metric
from ntk_monitor.similarity import alignment as kernel_alignment

Array = NDArray[np.float64]

COMPLEXITY_RIDGE = 1e-3
"""Ridge of the label complexity, relative to the mean eigenvalue."""


@metric(
    formula="HSIC(K, YYᵀ) / √(HSIC(K, K) HSIC(YYᵀ, YYᵀ)), unbiased HSIC",
    range=(-1, 1),
    unit="cosine",
    tier="S",
    source="Cortes 2012; Song 2012",
    lies_when="below about 100 samples it is noisy; class imbalance shifts it",
)
def alignment(measured: Measured) -> float:
    """How far samples that the kernel ties together share their targets."""
    return kernel_alignment(measured.means, measured.centred_targets)


def label_energies(vectors: Array, targets: Array) -> Array:
    """Return Σ_d (vᵢᵀ Y_d)² / |Y|² for every mode, (N,), summing to 1 over a full basis.

    Source: Arora et al. 2019.
    """
    energy = ((vectors.T @ targets) ** 2).sum(axis=1)
    return np.asarray(energy / (targets**2).sum())


def _first_tenth(samples: int) -> int:
    return math.ceil(samples / 10)


def _energies(measured: Measured) -> Array:
    targets, vectors = measured.centred_targets, measured.modes.eigenvectors
    assert vectors is not None
    return label_energies(vectors, targets)


@metric(
    formula="Σ_{i ≤ N/10} Σ_d (v_iᵀ Y_d)² / |Y|², Y centred",
    range=(0, 1),
    unit="fraction",
    cost="n^3",
    tier="S",
    source="Arora 2019; Oymak 2019",
    lies_when="compare it with label_energy_chance; equal eigenvalues share their energy arbitrarily",
)
def label_energy(measured: Measured) -> float:
    """Share of the centred targets in the fastest tenth of the modes."""
    return float(_energies(measured)[: _first_tenth(measured.samples)].sum())


@metric(
    formula="Σ_{i ≤ N/10} v_iᵀ (I - 11ᵀ/N) v_i / (N - 1)",
    range=(0, 1),
    unit="fraction",
    cost="n^3",
    tier="S",
)
def label_energy_chance(measured: Measured) -> float:
    """What label_energy is on average when the same targets are shuffled over the samples."""
    measured.centred_targets  # noqa: B018 - raises where there is nothing to compare with
    vectors = measured.modes.eigenvectors
    assert vectors is not None
    n, top = measured.samples, vectors[:, : _first_tenth(measured.samples)]
    # A shuffle of centred targets has covariance proportional to I - 11ᵀ/N, whose trace is N - 1.
    return float(((top**2).sum() - (top.sum(axis=0) ** 2).sum() / n) / (n - 1))


@metric(
    formula="smallest k with Σ_{i ≤ k} Σ_d (v_iᵀ Y_d)² ≥ .9 |Y|², Y centred",
    range=(1, math.inf),
    unit="modes",
    cost="n^3",
    tier="S",
    source="Arora 2019",
    lies_when="it counts modes of the probe; a larger probe has more",
)
def k90(measured: Measured) -> float:
    """How many of the fastest modes hold nine tenths of the targets."""
    held = np.cumsum(_energies(measured)) >= 0.9 - 1e-12
    return float(np.argmax(held) + 1)


@metric(
    formula="√(2 tr Yᵀ (K + ρI)⁻¹ Y / N), ρ = 1e-3 tr K / N, Y as given",
    range=(0, math.inf),
    unit="target units / output units",
    cost="n^3",
    tier="B",
    default=False,
    source="Arora 2019b",
    lies_when="the smallest eigenvalues dominate it, hence the ridge, which sets the scale of hard targets",
)
def label_complexity(measured: Measured) -> float:
    """How far the weights must move to fit the targets, per sample: small for easy ones."""
    targets, values = measured.needed("targets"), measured.modes.eigenvalues.clip(min=0)
    vectors = measured.modes.eigenvectors
    assert vectors is not None
    energy = ((vectors.T @ targets) ** 2).sum(axis=1)
    return float(np.sqrt(2 * (energy / (values + COMPLEXITY_RIDGE * values.mean())).sum() / measured.samples))


@metric(
    formula="mean cosine of K over pairs of one class - over pairs of two classes",
    range=(-2, 2),
    unit="cosine",
    tier="A",
    source="He and Su 2020; Seleznova 2023",
    lies_when="classes of very different size: the largest dominates both means",
)
def class_contrast(measured: Measured) -> float:
    """How much more a step on one sample moves its own class than the others."""
    labels = measured.needed("labels")
    norms = np.sqrt(measured.means.diagonal())
    cosine = measured.means / np.outer(norms, norms)
    same = labels[:, None] == labels[None, :]
    pairs = ~np.eye(measured.samples, dtype=bool)
    if not (same & pairs).any() or same.all():
        return float("nan")
    return float(cosine[same & pairs].mean() - cosine[~same].mean())
