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

    A skipped probe has `status="skipped"`, the `reason`, and empty arrays. A light one has the scalars that it measured
    and, of the arrays, only `carried` and `launched_bands`.
    """

    step: int
    """Optimizer steps taken when the weights were measured."""
    wall_time: float
    """Seconds since the Unix epoch, at the end of the probe."""
    status: Literal["measured", "light", "skipped"] = "measured"
    """"light": between two full probes, without kernel and spectrum (see `ntk_monitor.tiers`)."""
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
    facts: dict[str, float] = field(default_factory=dict)
    """Further numbers by name (see `FACTS`, and `ntk_monitor.metrics.METRICS`), only those that could be computed."""
    texts: dict[str, str] = field(default_factory=dict)
    """Further words by name (see `TEXTS`)."""
    layers: tuple[str, ...] = ()
    """Modules that hold the measured parameters: the names along the axis "layer"."""
    directions: tuple[str, ...] = ()
    """Named directions of the residual (classes, outputs, tasks): the names along the axis "direction"."""
    sample_texts: tuple[str, ...] = ()
    """What the probe's samples say, along the axis "sample", at most 120 characters each: at the first probe of a run,
    and where the run can tell."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the probe cost, by stage; "write" is what writing the probe before it took."""

    eigenvalues: Floats = field(default_factory=_nothing)
    rates: Floats = field(default_factory=_nothing)
    coordinates: Floats = field(default_factory=_nothing)
    carried: Floats = field(default_factory=_nothing)
    time_to_learn: Floats = field(default_factory=_nothing)
    forecast_steps: Floats | Integers = field(default_factory=_nothing)
    forecast_loss: Floats = field(default_factory=_nothing)
    layer_trace: Floats = field(default_factory=_nothing)
    layer_share: Floats = field(default_factory=_nothing)
    layer_update: Floats = field(default_factory=_nothing)
    layer_useful: Floats = field(default_factory=_nothing)
    layer_moved: Floats = field(default_factory=_nothing)
    layer_norm: Floats = field(default_factory=_nothing)
    direction_residual: Floats = field(default_factory=_nothing)
    direction_rate: Floats = field(default_factory=_nothing)
    direction_eta: Floats = field(default_factory=_nothing)
    interference: Floats = field(default_factory=_nothing)
    forecast_bands: Floats = field(default_factory=_nothing)
    forecast_directions: Floats = field(default_factory=_nothing)
    launched_bands: Floats = field(default_factory=_nothing)
    sample_residual: Floats = field(default_factory=_nothing)
    predictions: Floats = field(default_factory=_nothing)
    labels: Floats | Integers = field(default_factory=_nothing)
    lr_steps: Floats | Integers = field(default_factory=_nothing)
    lr_values: Floats = field(default_factory=_nothing)
    gram: Floats = field(default_factory=_nothing)
    mode_samples: Floats = field(default_factory=_nothing)
    mode_outputs: Floats = field(default_factory=_nothing)
    thumbnails: Floats | Integers = field(default_factory=_nothing)

    def __repr__(self) -> str:
        if self.status == "light":
            return f"Snapshot(step={self.step}, light: since the probe at step {self.previous_step})"
        what = f"{self.kernel} kernel, {self.samples} samples x {self.outputs} outputs, rank {self.rank}"
        return f"Snapshot(step={self.step}, {self.status}: {self.reason or what})"

    @property
    def residual_energy(self) -> Floats:
        """Share of the residual's energy in each mode, (n,), summing to 1; empty without modes."""
        # A run that diverged has infinite coordinates, whose shares are NaN.
        with np.errstate(over="ignore", invalid="ignore"):
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
    "time_to_learn": Stored(
        ("mode",), "optimizer steps", "simulated steps until the energy of each mode is a tenth; inf: not in reach"
    ),
    "forecast_steps": Stored(
        ("tick",), "optimizer steps", "steps of the forecast, from this probe's on", dtype="int64"
    ),
    "forecast_loss": Stored(("tick",), "loss units", "loss on the probe, forecast from this probe's kernel"),
    "layer_trace": Stored(
        ("layer",),
        "squared output units",
        "trace of each layer's own training operator, estimated; without BatchNorm they sum to the trace",
    ),
    "layer_share": Stored(
        ("layer",), "fraction", "share of the layers in the trace of lr J D J^T, D the optimizer's preconditioner"
    ),
    "layer_update": Stored(
        ("layer",), "fraction", "share of the outputs' change since the previous probe, |J_l dtheta_l|^2 normalised"
    ),
    "layer_useful": Stored(("layer",), "cosine, -1 to 1", "cosine of each layer's change of the outputs with -dL/df"),
    "layer_moved": Stored(
        ("layer",), "fraction", "distance of each layer's parameters from the first probe's, relative to their norm"
    ),
    "layer_norm": Stored(("layer",), "parameter units", "norm of each layer's parameters"),
    "direction_residual": Stored(("direction",), "sqrt(loss units)", "residual along each named direction"),
    "direction_rate": Stored(("direction",), "1 / learning rate", "d^T M d / |d|^2 of each named direction"),
    "direction_eta": Stored(
        ("direction",), "optimizer steps", "simulated steps until its energy is a tenth; inf: not in reach"
    ),
    "interference": Stored(
        ("direction", "direction_2"),
        "loss units / learning rate",
        "g_a^T K g_b of the loss gradients of two directions; negative: a step for one undoes the other",
    ),
    "forecast_bands": Stored(
        ("tick", "reach_band"),
        "loss units",
        "residual's energy in the bands of bands.REACH of this probe, forecast in its modes and curvature",
    ),
    "forecast_directions": Stored(
        ("tick", "direction"),
        "sqrt(loss units)",
        "residual along each named direction, forecast from this probe's kernel",
    ),
    "launched_bands": Stored(
        ("reach_band",),
        "loss units",
        "the residual's energy in the bands, modes and curvature of the forecast of facts['launch_step'], as measured",
    ),
    "sample_residual": Stored(
        ("sample",), "sqrt(loss units)", "norm over outputs of each sample's residual; squares sum to the energy of all"
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
    "mode_samples": Stored(
        ("mode_k", "sample"),
        "fraction",
        "pattern over samples of the leading modes of M (of K without modes), signed so that the residual is positive",
        blob=True,
    ),
    "mode_outputs": Stored(
        ("mode_k", "output"), "fraction", "unit pattern over outputs that goes with mode_samples", blob=True
    ),
    "thumbnails": Stored(
        ("sample", "height", "width", "channel"),
        "grey level, 0 to 255",
        "the probe's samples as small pictures, when inputs are images; at the first probe",
        dtype="uint8",
        blob=True,
    ),
}

FACTS: dict[str, str] = {
    "lr": "largest learning rate of any parameter group in force, learning rate",
    "batch_size": "samples whose mean loss one optimizer step follows, samples",
    "total_steps": "planned length of the run, optimizer steps",
    "bound_low": "bound that sharpness and batch noise together must stay under, learning rate x curvature",
    "bound_high": "bound that sharpness must stay under at full batch, learning rate x curvature",
    "sharpness_bias": "jackknife estimate of how much a probe of this size over-estimates sharpness, fraction",
    "noise_trace": "what dividing by the batch size adds to sharpness: mean trace of the per-sample blocks, same unit",
    "gradient_norm": "norm of the probe's loss gradient in the parameters, loss units / parameter units",
    "batch_gradient_norm": "root mean square norm of the gradient of batches of the run's size, same unit",
    "motion": "change of the probe's outputs since the previous probe relative to the residual, fraction",
    "forecast_error": "error of the forecast made at the previous probe relative to the motion, fraction, 100 at most",
    "forecast_error_residual": "the same relative to the residual, fraction",
    "explained_error": "error of the same simulation with the mean of both kernels, relative to the motion, fraction",
    "buffers_change": "change of the outputs by buffers alone since the previous probe, relative to the motion",
    "launch_step": "step of the probe whose forecast launched_bands is to be compared with, optimizer steps",
    "loss_remaining": "forecast loss at the planned end of the run, loss units",
    "noise_scale_bound": "lower bound of the noise scale where it is not resolved, samples",
    "k90": "modes of K that hold nine tenths of the centred targets' energy, modes",
    "label_energy": "share of the centred targets' energy in the first tenth of the modes of K, fraction",
    "label_energy_chance": "the same for random targets, fraction",
    "target_rms": "root mean square of the targets, target units",
    "target_offset": "absolute mean of the targets relative to their standard deviation, ratio",
    "output_rms": "root mean square of the outputs, output units",
    "output_spread": "standard deviation of the outputs over samples relative to their root mean square, ratio",
    "input_offset": "norm of the mean input relative to the root mean square distance from it, ratio",
    "input_rms": "root mean square of floating inputs, input units",
    "input_range": "largest ratio of the standard deviations of two input features that vary, ratio",
    "duplicates": "probe samples whose input equals that of another, samples",
    "duplicate_labels": "pairs of equal inputs with different targets, pairs",
    "outlier": "largest diagonal entry of K relative to the median, ratio",
    "top_share": "largest eigenvalue over the trace of K, fraction",
    "uncovered": "trainable parameters that no optimizer updates, parameters",
    "frozen": "parameters without requires_grad, parameters",
    "coverage": "trainable parameters that the kernel holds over all trainable ones, fraction",
    "unselected": "trainable parameters that params= leaves out of the kernel, parameters",
    "unused": "selected parameters that no operation of the measured forward pass takes, parameters",
    "detached": "selected parameters that are cut off from gradients of the outputs, see Coverage, parameters",
    "accuracy": "share of probe samples whose largest output is their class, fraction",
    "startup_seconds": "what the monitor took before its budget began to count, seconds",
    "memory_limit": "most that blocks of the kernel's computation may take, bytes",
    "train_loss": "mean of the losses the trainer returned since the previous probe, loss units",
    "clip_coefficient": "mean factor by which clipping by norm shortened gradients since the previous probe, fraction",
    "sample_loo": "leave-one-sample-out error of kernel regression on the probe relative to predicting the mean",
}
"""What the keys of `Snapshot.facts` mean, with unit."""

TEXTS: dict[str, str] = {
    "optimizer": "class of the optimizer, e.g. AdamW",
    "stability": "how sharpness was measured, or why it was not",
    "forecast": "what the forecast rests on, or why there is none",
    "forecast_score": "why the forecast of the previous probe could not be scored",
    "ahead": "what the simulation to the end of the run rests on, or why there is none",
    "noise": "how the noise scale was measured, or why it is not resolved",
    "updates": "why the change of the outputs since the previous probe was not taken apart; likewise the next four",
    "layers": "why traces by layer were not measured",
    "directions": "why no directions are followed",
    "metrics": "why the metrics of the registry were not evaluated",
    "samples": "why what concerns single samples is missing",
    "facts": "why facts about data, outputs and parameters are missing",
    "uncovered": "names of trainable parameters that no optimizer updates",
    "weights": "which weights were measured, where a callback of the trainer keeps an average of them",
    "unselected": "names of trainable parameters that params= leaves out of the kernel, the first few",
    "unused": "names of selected parameters that no operation of the measured forward pass takes, the first few",
    "detached": "names of selected parameters that are cut off from gradients of the outputs, the first few",
    "structural_zeros": "layers whose kernel is zero by construction (LoRA's A while B is zero, biases before norms)",
    "scale_free": "layers followed by a norm, whose kernel shrinks as 1 / |w|^2",
}
"""What the keys of `Snapshot.texts` hold."""
