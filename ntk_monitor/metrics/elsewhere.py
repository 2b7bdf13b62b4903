"""Metrics that need the network, its optimizer or a simulation, so that other parts measure them; what they are."""

import math
from typing import Literal

from ntk_monitor.metrics.catalogue import SCALARS, Scalar
from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import Function, metric

_SHARE, _ANY = (0.0, 1.0), (0.0, math.inf)

_FORMULAS: dict[str, tuple[str, tuple[float, float], Literal["S", "A", "B"], str]] = {
    "lr_headroom_low": ("bound_low / (λ₁ + tr M (1/B - 1/N))", _ANY, "S", "Wu 2018; Andreyev and Beneventano 2024"),
    "lr_headroom_high": ("bound_high / λ₁", _ANY, "S", "Cohen 2021, 2022"),
    "sharpness": ("λ₁(Sᵀ (Σ_g lr_g J_g D_g J_gᵀ) S)", _ANY, "S", "Cohen 2021, 2022"),
    "linearisation_error": ("|f(θ₁) - f(θ₀) - J₀Δθ| / |f(θ₁) - f(θ₀)|", _ANY, "S", "Lee 2019; Fort 2020"),
    "residual_out_of_reach": ("Σ c_i² over time_to_learn_i > remaining, / Σ c_i²", _SHARE, "S", "Jacot 2018"),
    "loss_remaining": ("loss of the simulation at the planned end", _ANY, "S", "Zancato 2020; Lee 2019"),
    "explained_error": ("|f̂(θ₁) - f(θ₁)| / |f(θ₁) - f(θ₀)|, f̂ by (K₀ + K₁)/2", _ANY, "B", "Lee 2019"),
    "overhead": ("seconds in the monitor / seconds, both since its start-up ended", _SHARE, "A", ""),
}

_WORDS = (
    *SCALARS,
    Scalar(
        "loss_remaining",
        "loss units",
        "loss on the probe at the planned end of the run, forecast from the present kernel",
        "the kernel grows while features are learned, so it is pessimistic then; batch noise has a floor of its own",
    ),
    Scalar(
        "explained_error",
        "fraction",
        "error of the simulation with the mean of both kernels, relative to the motion of the outputs: what is left is "
        "optimizer and batches, not the kernel",
        "means nothing when the outputs hardly moved",
    ),
)


def _reader(scalar: Scalar) -> Function:
    def given(measured: Measured) -> float:
        return float(measured.needed("given").get(scalar.name, math.nan))

    given.__doc__, given.__qualname__ = scalar.meaning, scalar.name
    return given


for _scalar in _WORDS:
    if _scalar.name in _FORMULAS:
        _formula, _range, _tier, _source = _FORMULAS[_scalar.name]
        metric(
            name=_scalar.name,
            formula=_formula,
            range=_range,
            unit=_scalar.unit,
            source=_source,
            cost="free",
            tier=_tier,
            lies_when=_scalar.lies_when,
        )(_reader(_scalar))
