"""Bands: the residual of all n modes, shown as a few shares, from what is learned first to what is never learned.

Modes are the eigenvectors of the loss-weighted kernel M and rateᵢ ≥ 0 its eigenvalues, in 1 / learning rate: a
gradient-descent step shrinks the residual along mode i by the factor 1 - lr·rateᵢ. The top sixteen modes hold a few
per cent of a cross-entropy residual, so single modes tell little; a band adds up every mode learned at a similar speed.

Two sets of bands: four by simulated time-to-learn against the steps that remain (`REACH`), which need a forecast, and
eight by decades of rate (`NAMES`), which need none. The decades order the modes but do not say when they are learned:
lr·rateᵢ is a speed for squared errors and plain gradient descent only.
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
"""Every band by rate, fastest first. The list never changes, so that each band is one continuous line over training."""

REACH: tuple[str, ...] = (
    "within a tenth of the remaining steps",
    "within the remaining steps",
    "out of reach",
    "below the noise floor",
)
"""Every band by time-to-learn, soonest first. This list never changes either."""

FAST = 0.1
"""Share of the remaining steps within which a mode of the first band is learned."""


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
    """Return the eight bands by rate of one probe; their masks partition the modes.

    Rates have shape (n,), any order, in the unit of the floor. A rate that is not finite counts as below the floor: it
    was not resolved. A floor that is not finite or negative counts as 0. Empty bands stay in the list.
    """
    usable, limit = _resolved(rates, floor)
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


def _resolved(rates: Floats, floor: float) -> tuple[Floats, float]:
    """Return rates, with those that are not finite under any floor, and a floor that is a number."""
    limit = floor if np.isfinite(floor) and floor > 0 else 0.0
    return np.where(np.isfinite(rates), rates, -1.0), limit


def band_energy(snapshot: Snapshot) -> dict[str, float]:
    """Return the share of the residual's energy in each band by rate, by band name, summing to 1.

    Energy is coordinate², in loss units. A residual of exactly zero gives eight zeros. Empty without modes, and when
    the residual is not finite.
    """
    energy = snapshot.residual_energy
    if energy.size == 0 or not np.isfinite(energy).all():
        return {}
    return {band.name: float(energy[band.mask].sum()) for band in bands(snapshot.rates, snapshot.rates_floor)}


def reach(rates: Floats, floor: float, time_to_learn: Floats, remaining: float) -> dict[str, NDArray[np.bool_]]:
    """Return which modes belong to each band by time-to-learn, name → (n,) bool; the masks partition the modes.

    Args:
        rates: (n,), in the unit of the floor; one that is not finite counts as below it.
        floor: rates at or below it are rounding noise, whatever the simulation says of their residual.
        time_to_learn: (n,), simulated optimizer steps until the residual along each mode is a tenth; inf: never.
        remaining: optimizer steps left in the run.

    Empty where there is nothing to say: no steps left or not known how many, or modes that were not simulated (NaN).
    """
    if time_to_learn.shape != rates.shape or np.isnan(time_to_learn).any() or not remaining > 0:
        return {}
    usable, limit = _resolved(rates, floor)
    noise = usable <= limit
    fast, within = time_to_learn <= FAST * remaining, time_to_learn <= remaining
    masks = (~noise & fast, ~noise & within & ~fast, ~noise & ~within, noise)
    return dict(zip(REACH, masks, strict=True))


def remaining_steps(snapshot: Snapshot) -> float:
    """Return the optimizer steps left in the run; NaN when its planned length is not known, never negative."""
    return max(snapshot.facts.get("total_steps", float("nan")) - snapshot.step, 0.0)


def reach_energy(snapshot: Snapshot) -> dict[str, float]:
    """Return the share of the residual's energy in each band by time-to-learn, by band name, summing to 1.

    Empty without modes, without a simulation of them (`Snapshot.time_to_learn`), when the planned length of the run is
    not known or over, and when the residual is not finite; `band_energy` needs none of these but the modes.
    """
    energy = snapshot.residual_energy
    if energy.size == 0 or not np.isfinite(energy).all():
        return {}
    masks = reach(snapshot.rates, snapshot.rates_floor, snapshot.time_to_learn, remaining_steps(snapshot))
    return {name: float(energy[mask].sum()) for name, mask in masks.items()}


def residual_out_of_reach(energy: Floats, time_to_learn: Floats, remaining: float) -> float:
    """Return the share of the residual's energy in modes not learned within the remaining steps, 0 to 1.

    Modes below the noise floor count as soon as their residual is not learned: no step moves them. Hence the sum of
    the bands "out of reach" and, except for what the simulation moves there, "below the noise floor".

    Args:
        energy: (n,) energy of the residual in each mode, any common unit.
        time_to_learn: (n,) optimizer steps, inf for never.
        remaining: optimizer steps left in the run.

    NaN without modes or steps left, for a residual of zero or not finite, and when a mode was not simulated.
    """
    total = float(energy.sum())
    known = energy.size > 0 and energy.shape == time_to_learn.shape and not np.isnan(time_to_learn).any()
    if not (known and remaining > 0 and total > 0 and np.isfinite(total)):
        return float("nan")
    # Rounding of the two sums must not make a share above 1.
    return min(float(energy[time_to_learn > remaining].sum()) / total, 1.0)


def readable(samples: int, outputs: int = 1) -> int:
    """Return how many leading modes of a probe describe the data rather than the choice of samples, at least 1.

    A quarter of the rows. There, eigenvalues of the kernel on m samples, divided by m, are those of more data: of 640
    rows (64 digits, 10 outputs) the 160th came out 5 to 9 % below that of four times the samples, the 240th 20 to 27 %,
    the 480th 50 to 77 %. The largest ones are too high on few samples (one output: 34 % at 16, 8 % at 64, 3 % at 128).
    All modes together still hold the whole residual, so bands need no such limit.

    Args:
        samples: samples in the probe.
        outputs: outputs of each sample that are rows of the kernel.
    """
    return max(samples * outputs // 4, 1)
