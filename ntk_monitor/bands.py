"""Bands: the residual of all n modes, shown as eight shares ordered from the fastest mode to the unresolvable ones.

Modes are the eigenvectors of the loss-weighted kernel M and rateᵢ ≥ 0 its eigenvalues, in 1 / learning rate: a
gradient-descent step shrinks the residual along mode i by the factor 1 - lr·rateᵢ. The top sixteen modes hold a few
per cent of a cross-entropy residual, so single modes tell little; a band adds up every mode learned at a similar speed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.snapshot import Floats, Snapshot

NAMES: tuple[str, ...] = (
    "within 10x of the fastest",
    "10 to 100x slower",
    "100 to 1000x slower",
    "1e3 to 1e4x slower",
    "1e4 to 1e5x slower",
    "1e5 to 1e6x slower",
    "over 1e6x slower",
    "below the noise floor",
)
"""Every band, fastest first. The list never changes, so that each band is one continuous line over training."""


@dataclass(frozen=True, slots=True)
class Band:
    """The modes with slowest < rate ≤ fastest, both in the unit of the rates (1 / learning rate)."""

    name: str
    fastest: float
    slowest: float
    mask: NDArray[np.bool_]
    """Which modes belong to the band, (n,) bool. All False for an empty band."""


def _edges(rates: Floats, floor: float) -> NDArray[np.floating[Any]]:
    """Return the nine descending limits of the eight bands.

    Decades below the fastest resolved mode, none of them under the floor; the last band takes everything at or under
    it. Without a resolved mode all the limits lie at the floor, so every mode is in the last band.
    """
    fastest = float(rates.max(initial=floor))
    decades = fastest / 10.0 ** np.arange(len(NAMES) - 1)
    return np.concatenate([np.maximum(decades, floor), [floor, -np.inf]])


def bands(rates: Floats, floor: float) -> tuple[Band, ...]:
    """Return the eight bands of one probe; their masks partition the modes.

    Rates have shape (n,), any order, in the unit of the floor. A rate that is not finite counts as below the floor: it
    was not resolved. A floor that is not finite or negative counts as 0. Empty bands stay in the list.
    """
    finite = np.isfinite(rates)
    limit = floor if np.isfinite(floor) and floor > 0 else 0.0
    usable = np.where(finite, rates, -1.0)
    edges = _edges(usable, limit)
    last = len(NAMES) - 1
    return tuple(
        Band(
            name,
            fastest=float(upper),
            slowest=float(lower),
            mask=usable <= upper if i == last else (usable <= upper) & (usable > lower),
        )
        for i, (name, upper, lower) in enumerate(zip(NAMES, edges[:-1], edges[1:], strict=True))
    )


def band_energy(snapshot: Snapshot) -> dict[str, float]:
    """Return the share of the residual's energy in each band, by band name, summing to 1.

    Energy is coordinate², in loss units. A residual of exactly zero gives eight zeros. Empty without modes, and when
    the residual is not finite.
    """
    energy = snapshot.residual_energy
    if energy.size == 0 or not np.isfinite(energy).all():
        return {}
    return {band.name: float(energy[band.mask].sum()) for band in bands(snapshot.rates, snapshot.rates_floor)}
