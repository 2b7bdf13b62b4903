"""Metrics of how the kernel moves: since the previous probe, and since the first."""

import math

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.metrics.measured import Measured, mean_over_outputs
from ntk_monitor.metrics.registry import metric
from ntk_monitor.similarity import cka
from ntk_monitor.similarity import kernel_change as change

Array = NDArray[np.float64]

_BLIND = "blind to pure growth, which trace_growth shows; depends on the distance between probes"


@metric(
    formula="1 - <K₀, K₁> / (|K₀| |K₁|)",
    range=(0, 1),
    unit="1 - cosine",
    tier="S",
    source="Fort 2020",
    lies_when=_BLIND,
)
def kernel_change(measured: Measured) -> float:
    """Rotation of the kernel since the previous probe; 0 is a frozen (lazy) kernel."""
    return change(measured.needed("previous"), measured.kernel)


@metric(
    formula="1 - <K₀, K> / (|K₀| |K|), K₀ at the first probe",
    range=(0, 1),
    unit="1 - cosine",
    tier="B",
    source="Fort 2020; Chizat 2019",
    lies_when="the first probe is not the initialisation when training was resumed",
)
def kernel_distance(measured: Measured) -> float:
    """Rotation of the kernel since the first probe: how far training has left the lazy regime."""
    return change(measured.needed("first"), measured.kernel)


@metric(formula="ln tr K₁ / tr K₀", unit="nats", tier="S", source="Fort 2020")
def trace_growth(measured: Measured) -> float:
    """Logarithm of the growth of the trace since the previous probe."""
    return float(np.log(np.trace(measured.kernel) / np.trace(measured.needed("previous"))))


@metric(formula="ln tr K / tr K₀, K₀ at the first probe", unit="nats", tier="B", source="Chizat 2019")
def trace_growth_total(measured: Measured) -> float:
    """Logarithm of the growth of the trace since the first probe."""
    return float(np.log(np.trace(measured.kernel) / np.trace(measured.needed("first"))))


@metric(
    formula="HSIC(K₀, K₁) / √(HSIC(K₀, K₀) HSIC(K₁, K₁)), unbiased HSIC, outputs averaged",
    range=(-1, 1),
    unit="cosine",
    tier="B",
    source="Kornblith 2019; Song 2012",
    lies_when="near zero signal its sign is noise; below 4 samples it does not exist",
)
def cka_previous(measured: Measured) -> float:
    """Likeness of the kernel to the previous probe's, without the constant mode."""
    return _cka(measured, measured.needed("previous"))


@metric(
    formula="the same with the first probe's kernel",
    range=(-1, 1),
    unit="cosine",
    tier="B",
    source="Kornblith 2019; Song 2012",
    lies_when="see cka_previous",
)
def cka_first(measured: Measured) -> float:
    """Likeness of the kernel to the first probe's, without the constant mode."""
    return _cka(measured, measured.needed("first"))


def _cka(measured: Measured, other: Array) -> float:
    return cka(mean_over_outputs(other, measured.samples), measured.means)


def laziness(before: Array, after: Array) -> float:
    """Return |θ₁ - θ₀| / |θ₀| of two flat parameter vectors: under a few per cent training is usually lazy.

    NaN for zero parameters. Depends on the parametrisation: small in wide networks that still learn features. Judge it
    beside kernel_distance. Source: Chizat, Oyallon and Bach 2019.
    """
    start = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / start if math.isfinite(start) and start > 0 else float("nan")
