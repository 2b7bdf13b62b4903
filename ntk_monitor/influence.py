"""Influence: which training samples push this validation error up or down? From the kernel of per-sample losses.

φₙ the gradient of the loss of sample n in the parameters. A gradient step on training sample n with learning rate lr
and preconditioner D changes the loss of validation sample m by -lr φₘᵀ D φₙ, to first order: the loss kernel, crossed.

It tells what one more step on a sample would do at these weights, not what training without the sample would have
given; samples with large gradients come first whether or not they are alike. Nor is it a detector of wrong labels:
ranking by it found them no better than ranking by the loss itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Forward, Selection

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Influence:
    """What steps on N training samples would do to the losses of M validation samples.

    Attributes:
        scores: (M, N), loss units / learning rate. Positive: a step on the training sample lowers the validation loss.
        total: (N,), their mean over the validation samples.
        helpful: up to `top` pairs (training sample, total), largest first; positive ones only.
        harmful: the same of negative ones, most negative first.
    """

    scores: Array
    total: Array
    helpful: tuple[tuple[int, float], ...]
    harmful: tuple[tuple[int, float], ...]

    def of(self, sample: int, top: int = 10) -> tuple[tuple[int, float], ...]:
        """Return the training samples that matter most to one validation sample, by size, with their signed scores."""
        row = self.scores[sample]
        return tuple((int(n), float(row[n])) for n in np.argsort(-np.abs(row), kind="stable")[:top])


def influence(  # noqa: PLR0913 - the public door
    model: nn.Module,
    train: tuple[Batch, Any],
    valid: tuple[Batch, Any],
    loss: Any,
    *,
    preconditioner: Mapping[str, Tensor] | None = None,
    ridge: float | None = None,
    top: int = 10,
    params: Selection | None = None,
    forward: Forward | None = None,
    memory_limit: int | None = None,
) -> Influence:
    """Return which training samples push the validation losses up or down.

    Args:
        model: any eager module, in evaluation mode for this; only read.
        train: (inputs, targets) of N samples.
        valid: (inputs, targets) of M samples.
        loss: name, torch loss or callable (outputs, targets) → scalar, applied to one sample at a time.
        preconditioner: the optimizer's D by parameter name, for what a step of Adam would do; None: 1.
        ridge: None: one step at these weights (TracIn at one checkpoint). A positive number, relative to the mean of
            |φₙ|² over the training samples: scores (Φₘ Φₙᵀ)(Φₙ Φₙᵀ + ridge)⁻¹ instead, which share what several samples
            teach alike between them (influence functions with the empirical Fisher; TRAK).
        top: how many samples to name on either side.
        params: as for `empirical_ntk`.
        forward: as for `empirical_ntk`.
        memory_limit: as for `empirical_ntk`.

    Raises:
        InputError: batches, targets or a ridge that cannot be used.
        NetworkError: a module that cannot be followed exactly.

    Cost: one cross kernel (M, N) of scalar outputs; with `ridge` also the (N, N) kernel and O(N³).

    Sources: Pruthi et al. 2020 (TracIn); Koh and Liang 2017 (influence functions); Park et al. 2023 (TRAK).
    """
    if ridge is not None and not ridge > 0:
        raise InputError(f"ridge must be positive, got {ridge:g}; pass None for the effect of one step")
    options: dict[str, Any] = {
        "outputs": "loss",
        "loss": loss,
        "preconditioner": preconditioner,
        "params": params,
        "forward": forward,
        "memory_limit": memory_limit,
    }
    cross = empirical_ntk(model, valid[0], train[0], targets=(valid[1], train[1]), **options).numpy()
    if ridge is not None:
        own = empirical_ntk(model, train[0], targets=train[1], **options).numpy()
        own[np.diag_indices(len(own))] += ridge * _mean_diagonal(own)
        cross = np.linalg.solve(own, cross.T).T
    total = cross.mean(axis=0)
    order = np.argsort(-total, kind="stable")
    named = [(int(n), float(total[n])) for n in order]
    helpful = tuple(pair for pair in named[:top] if pair[1] > 0)
    harmful = tuple(pair for pair in named[::-1][:top] if pair[1] < 0)
    return Influence(cross, total, helpful, harmful)


def leverage(kernel: Any, ridge: float, cross: Any = None, own: Any = None) -> Array:
    """Return what is left to be learned at a sample once the others are known: k(x,x) - k(x)ᵀ (K + μ)⁻¹ k(x).

    The posterior variance of the Gaussian process with this kernel and noise μ: for choosing samples, as uncertainty
    and as distance from the data. Between 0 and k(x,x), in the unit of K.

    Args:
        kernel: K (n, n), of training samples.
        ridge: μ over the mean diagonal of K, positive.
        cross: k (m, n), of other samples with the training samples; None: the training samples themselves, of which
            each knows its own label (with noise μ).
        own: (m,) diagonal of the other samples' kernel; belongs to `cross`.

    Raises:
        InputError: shapes that do not fit, or a ridge that is not positive.

    Cost: O(n³ + m n²).

    Source: Rasmussen and Williams 2006, equation 2.26; with the kernel of a network: Khan et al. 2019.
    """
    k = _array(kernel)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not ridge > 0:
        raise InputError(f"wanted a square kernel and a positive ridge, got shape {k.shape} and ridge {ridge:g}")
    if (cross is None) != (own is None):
        raise InputError("cross= and own= belong together; pass both for other samples, neither for the training ones")
    rows = k if cross is None else _array(cross)
    diagonal = np.diag(k) if own is None else _array(own)
    if rows.ndim != 2 or rows.shape != (len(diagonal), len(k)):
        raise InputError(
            f"wanted cross (m, {len(k)}) and own (m,), got shapes {rows.shape} and {np.shape(diagonal)}; "
            "cross is the kernel of the other samples with the training samples"
        )
    damped = k + ridge * _mean_diagonal(k) * np.eye(len(k))
    explained = np.einsum("mn,nm->m", rows, np.linalg.solve(damped, rows.T))
    return np.asarray(np.clip(diagonal - explained, 0.0, None))


def _mean_diagonal(kernel: Array) -> float:
    # A kernel of zeros has nothing to invert; any ridge gives 0.
    return float(np.diag(kernel).mean()) or 1.0


def _array(values: Any) -> Array:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    return np.asarray(array, dtype=np.float64)
