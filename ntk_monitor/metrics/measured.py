"""What metrics are computed from: the arrays of one probe, in numpy float64, and what follows from them once.

N samples, C outputs per sample, n rows of the kernel (n = N·C for the full kernel, N otherwise), sample-major.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError
from ntk_monitor.spectrum import Spectrum

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One probe as metrics see it. Only the kernel is needed; a metric without what it needs is left out.

    Attributes:
        kernel: (n, n) unnormalised kernel K.
        samples: N.
        layout: "full", "trace", "sum" or "loss" (layouts of `empirical_ntk`).
        jacobian_eps: machine epsilon of the Jacobian behind the kernel; sets the noise floor.
        targets: (N, D) one-hot classes or regression targets.
        labels: (N,) classes.
        gradient: (N, C) dL/df of the mean loss over the probe.
        loss: kind of the loss, e.g. "mse".
        rates: (n,) eigenvalues of M, descending, in 1 / learning rate.
        coordinates: (n,) residual along the eigenvectors of M.
        lr: learning rate in force; NaN when there is not one.
        previous: (n, n) kernel of the previous probe.
        first: (n, n) kernel of the first probe of the run.
        layer_trace: trace of each layer's own kernel, by name, in the order of the network.
        layer_speed: trace of each layer's lr J D Jᵀ, D the optimizer's preconditioner.
        terms: loss terms or tasks: name → mask (N, C) of the outputs that belong to it.
        given: numbers measured elsewhere, by name of their metric.
        solved: the spectrum of the kernel, when there is one already.
    """

    kernel: Array
    samples: int
    layout: str = "full"
    jacobian_eps: float = 0.0
    targets: Array | None = None
    labels: NDArray[np.int64] | None = None
    gradient: Array | None = None
    loss: str = ""
    rates: Array | None = None
    coordinates: Array | None = None
    lr: float = float("nan")
    previous: Array | None = None
    first: Array | None = None
    layer_trace: Mapping[str, float] = field(default_factory=dict)
    layer_speed: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    given: Mapping[str, float] = field(default_factory=dict)
    solved: Spectrum | None = None

    @property
    def outputs(self) -> int:
        """Rows of the kernel that belong to one sample: C for the full kernel, else 1."""
        return len(self.kernel) // self.samples

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum of K; costs O(n³) once where none was given."""
        return self.solved or Spectrum.of(self.kernel, vectors=False, jacobian_eps=self.jacobian_eps)

    @cached_property
    def means(self) -> Array:
        """Mean over outputs of the kernel, (N, N)."""
        return mean_over_outputs(self.kernel, self.samples)

    @cached_property
    def modes(self) -> Spectrum:
        """Spectrum of `means` with eigenvectors; costs O(N³) once."""
        return Spectrum.of(self.means, jacobian_eps=self.jacobian_eps)

    @cached_property
    def centred_targets(self) -> Array:
        """Targets (N, D) minus their mean over samples.

        Raises:
            InputError: no targets, targets that do not vary, or a kernel whose rows are losses.
        """
        if self.layout == "loss":
            raise InputError("the kernel of the losses has the targets inside; pass the full or trace kernel")
        targets = self.needed("targets")
        centred = targets - targets.mean(axis=0)
        if not (centred**2).sum() > 0:
            raise InputError("targets are needed that differ between samples, got constant ones")
        return np.asarray(centred)

    def needed(self, name: str) -> Any:
        """Return one of the attributes, which must be there.

        Raises:
            InputError: it was not measured.
        """
        value = getattr(self, name)
        if value is None or (isinstance(value, Mapping) and not value):
            raise InputError(f"this metric needs {name}, which was not measured")
        return value


def mean_over_outputs(kernel: Array, samples: int) -> Array:
    """Return the (N, N) kernel averaged over outputs of an (n, n) one: Σ_c K[n c, m c] / C."""
    outputs = len(kernel) // samples
    return np.asarray(np.einsum("ncmc->nm", kernel.reshape(samples, outputs, samples, outputs)) / outputs)
