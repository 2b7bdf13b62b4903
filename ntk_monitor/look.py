"""What is handed to a look at a run, and what it finds: the monitor's side and the record's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ntk_monitor.coverage import Coverage
from ntk_monitor.dynamics.kept import Kept
from ntk_monitor.dynamics.stability import Stability
from ntk_monitor.kernel import Kernel
from ntk_monitor.losses import Loss, Terms
from ntk_monitor.modes import Modes
from ntk_monitor.probe import Probe
from ntk_monitor.spectrum import Spectrum

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What only the network could tell at one step; everything else follows from it."""

    step: int
    epoch: int | None
    wall_time: float
    layout: str
    kernel: Kernel
    values: Array
    """Square float64 matrix, (N·C, N·C) for the full layout, (N, N) otherwise."""
    spectrum: Spectrum
    predictions: Tensor
    """Outputs (N, ...) on the probe as the module shapes them, float64 on the CPU."""
    seconds: dict[str, float]
    coverage: Coverage

    @property
    def jacobian_eps(self) -> float:
        """Relative spacing of the numbers that the Jacobian was computed in."""
        return float(torch.finfo(self.kernel.jacobian_dtype).eps)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a probe stands in a series that is measured afterwards.

    Nothing is then carried from probe to probe but what is compared: no pooling, no warm start, no budget. The same
    series gives the same records, whatever was interrupted or shared in between.
    """

    index: int
    interval: int | None
    """Optimizer steps to the next probe; None: it is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """One probe as the monitor hands it over, at the weights of this moment."""

    step: int
    layout: str
    values: Array
    """Square float64 kernel, (N·C, N·C) for the full layout."""
    spectrum: Spectrum
    jacobian_eps: float
    targets: Array | None
    """(N, D), one-hot classes or numbers."""
    predictions: Tensor
    """(N, ...), float64 on the CPU."""
    terms: Terms | None
    modes: Modes | None
    labels: NDArray[np.int64] | None
    loss: Loss | None
    optimizers: Sequence[Optimizer]
    others: Sequence[Optimizer] = ()
    """Optimizers of the same run that move other parameters; of these only that they exist is used."""
    batch_size: int | None = None
    population: int | None = None
    total_steps: int | None = None
    reference: Probe | None = None
    clip: float | None = None
    cost: float = 0.0
    """Seconds that the kernel of this probe took."""
    affordable: float = math.inf
    """Seconds that forecasts may take."""
    place: Place | None = None
    rates: Array = field(default_factory=lambda: np.empty((0, 0)))
    """Learning rates of the steps since the previous probe, (steps, groups); empty when they are not known."""
    rates_ahead: Callable[[int], Array | None] | None = None


@dataclass(slots=True)
class Outlook:
    """Fields of the Snapshot that `Watch.look` fills."""

    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    sample_texts: tuple[str, ...] = ()
    arrays: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    forecast: float = 0.0
    """Seconds that a forecast took, in those of its part."""
    saving: float = 0.0
    """Seconds that the next one is expected to take; 0: there will be none."""

    def judge(self, judged: Stability) -> bool:
        """Take over what the gauge says, or why it says nothing; True when it does."""
        self.texts["stability"] = judged.how if judged.available else judged.reason
        if not judged.available:
            return False
        self.metrics |= {"lr_headroom_low": judged.low, "lr_headroom_high": judged.high, "sharpness": judged.sharpness}
        self.facts |= {
            "bound_low": judged.bound_low,
            "bound_high": judged.bound_high,
            "sharpness_bias": judged.bias,
            "noise_trace": judged.noise,
        }
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """What a look leaves for the light probes after it to compare with."""

    kept: Kept | None = None
    """Weights and buffers of that moment."""
    residual: float = 0.0
    """What a motion of the outputs is compared with, output units."""
    clipped: float = 1.0
    """Factor that gradient clipping applied."""
    gauge: Stability | None = None
    """The newest gauge, which a light probe may have refreshed since."""
    rates: tuple[float, ...] = ()
    """Learning rates of the parameter groups at that gauge."""
