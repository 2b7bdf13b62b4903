"""Snapshot, the frozen record of one probe, and the table that says how each of its arrays is stored.

N probe samples, C outputs per sample, n rows of the kernel (n = N·C for the full kernel, N otherwise), G parameter
groups. K = J Jᵀ is unnormalised: no learning rate, batch size or loss factor is inside. M = Sᵀ K S is K weighted by the
loss, with S Sᵀ the Hessian of the probe's loss in the outputs: a gradient-descent step with learning rate lr shrinks
the residual along mode i of M by the factor 1 - lr·rate_i (exact for a fixed kernel; theory: Jacot et al. 2018).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]


def _nothing() -> Floats:
    return np.empty(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything one probe measured, in numpy float64, with what is needed to judge it.

    A skipped probe has `status="skipped"`, the `reason`, and empty arrays.
    """

    step: int
    """Optimizer steps taken when the weights were measured."""
    wall_time: float
    """Seconds since the Unix epoch, at the end of the probe."""
    status: Literal["measured", "skipped"] = "measured"
    reason: str = ""
    """Why the probe was skipped, in one sentence; empty when it was measured."""
    epoch: int | None = None

    kernel: str = ""
    """Which kernel: "full", "trace", "sum" or "loss" (layouts of `empirical_ntk`)."""
    mode: str = "eval"
    """"eval": BatchNorm running statistics, dropout off. "train": batch statistics, dropout off."""
    engine: str = ""
    engine_reason: str = ""
    """Why this engine computed the kernel."""
    precision: str = ""
    """dtype of the Jacobian and of the Gram accumulation, e.g. "float32 Jacobian, float64 Gram"."""
    samples: int = 0
    outputs: int = 0
    parameters: int = 0
    """Trainable parameters in the kernel (scalars, shared ones once)."""
    probe: str = ""
    """Hash of the probe's inputs and targets; snapshots with different hashes are not comparable."""
    probe_source: str = ""
    """Where the probe's samples come from, in words."""

    noise_floor: float = float("nan")
    """Eigenvalues below this are rounding noise (same unit as `eigenvalues`)."""
    rank: int = 0
    """Number of eigenvalues above the noise floor."""
    condition_number: float = float("nan")
    """Largest eigenvalue over the smallest one above the noise floor."""
    condition_is_lower_bound: bool = False
    negative: int = 0
    """Eigenvalues below minus the noise floor: above 0 something is wrong with the kernel."""

    loss: str = ""
    """Loss that drives the modes, e.g. "cross_entropy(mean)"; empty without modes."""
    loss_status: str = ""
    """"matched" to the Trainer's value, "given" by the user, or why there is none ("not verified: ...")."""
    loss_value: float = float("nan")
    """The loss on the probe, in evaluation mode."""
    modes_reason: str = ""
    """Why there are no modes; empty when there are."""
    rates_floor: float = float("nan")
    """Rates below this are rounding noise (same unit as `rates`)."""
    previous_step: int | None = None
    """Step of the probe in whose basis `carried` is expressed."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars by name (see `ntk_monitor.metrics`), only those that could be computed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the probe cost, by stage."""

    eigenvalues: Floats = field(default_factory=_nothing)
    rates: Floats = field(default_factory=_nothing)
    coordinates: Floats = field(default_factory=_nothing)
    carried: Floats = field(default_factory=_nothing)
    predictions: Floats = field(default_factory=_nothing)
    labels: Floats | Integers = field(default_factory=_nothing)
    lr_steps: Floats | Integers = field(default_factory=_nothing)
    lr_values: Floats = field(default_factory=_nothing)
    gram: Floats = field(default_factory=_nothing)

    def __repr__(self) -> str:
        what = f"{self.kernel} kernel, {self.samples} samples x {self.outputs} outputs, rank {self.rank}"
        return f"Snapshot(step={self.step}, {self.status}: {self.reason or what})"

    @property
    def residual_energy(self) -> Floats:
        """Share of the residual's energy in each mode, (n,), summing to 1; empty without modes."""
        energy = self.coordinates**2
        total = energy.sum()
        return energy / total if total > 0 else energy


SHOWN_SAMPLES = 256
"""The stored Gram matrix shows at most this many samples."""


def shown_order(labels: Floats | Integers | None, samples: int) -> Integers:
    """Return which samples the stored Gram matrix shows, in its order: sorted by class, evenly thinned to 256."""
    order = np.arange(samples) if labels is None or not len(labels) else np.argsort(labels, kind="stable")
    if samples > SHOWN_SAMPLES:
        order = order[np.linspace(0, samples - 1, SHOWN_SAMPLES).round().astype(int)]
    return order


@dataclass(frozen=True, slots=True)
class Stored:
    """How one array of a Snapshot is stored and what it means."""

    dims: tuple[str, ...]
    unit: str
    meaning: str
    dtype: str = "float32"
    blob: bool = False
    """True: large and not written at every probe, stored so that one step can be read without the others."""


ARRAYS: dict[str, Stored] = {
    "eigenvalues": Stored(("mode",), "squared output units", "eigenvalues of the unnormalised kernel K, descending"),
    "rates": Stored(("mode",), "1 / learning rate", "eigenvalues of the loss-weighted kernel M, descending"),
    "coordinates": Stored(("mode",), "sqrt(loss units)", "residual along the eigenvectors of M"),
    "carried": Stored(
        ("mode",), "sqrt(loss units)", "the same residual along the eigenvectors of the previous probe's M"
    ),
    "predictions": Stored(("sample", "output"), "output units", "network outputs on the probe, evaluation mode"),
    "labels": Stored(("sample",), "class", "class of each probe sample, when targets are class labels", dtype="int32"),
    "lr_steps": Stored(("change",), "optimizer steps", "steps at which a learning rate changed", dtype="int64"),
    "lr_values": Stored(("change", "group"), "learning rate", "learning rates from that step on, by parameter group"),
    "gram": Stored(
        ("sample", "sample_2"),
        "squared output units",
        "mean over outputs of the kernel, samples sorted by class when there are classes, at most 256 of them",
        blob=True,
    ),
}
