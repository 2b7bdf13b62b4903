"""What one step on the samples of one class does to the loss of every other class, and whether the kernel foresees it.

To first order a step of plain SGD on class a changes the loss of class b by -lr g_aᵀ K_ab g_b, K_ab the kernel between
their samples and g = dL/df the gradients of the real loss; normalised by the gain of a itself, lr g_aᵀ K_aa g_a, it is
-1 for b = a, negative where a helps b, positive where it hurts. Valid for steps so small that neither the losses nor
the network bend: every figure stands beside the step that a copy of the network really took.

Sources: Doan et al. 2021 (overlap of tasks in the NTK), He and Su 2020 (local elasticity); see `class_steps`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.class_steps import Array, Classes, Step, class_gram, doubt, sample_gram
from ntk_monitor.applications.class_words import told
from ntk_monitor.applications.report import Report
from ntk_monitor.batch import Batch, size, take
from ntk_monitor.errors import InputError
from ntk_monitor.losses import IGNORED, recognised
from ntk_monitor.network import Forward, Selection

__all__ = [
    "EXAMPLE",
    "Classes",
    "Step",
    "class_gram",
    "doubt",
    "example",
    "interference",
    "sample_gram",
    "study",
]

EXAMPLE = "a small network halfway through learning the ten handwritten digits"

MOST_CLASSES = 12
"""More than so many rows of a heat map cannot be read."""

_SCAN = tuple(2.0**k for k in range(-8, 4))


def interference(kernel: Any, gradients: Any, of: Any, lr: float = 1.0) -> Array:
    """Return the first-order change (K, K) of every class's loss (columns) by a step on every class (rows).

    Args:
        kernel: of the N samples, (N, C, N, C); or (N, N) of their losses, then without gradients.
        gradients: dl_n/df_n (N, C), of each sample's own loss; None for a kernel of losses.
        of: (N,) class of each sample, 0 … K-1.
        lr: of plain SGD.

    Raises:
        InputError: shapes that do not fit, or a class without samples.
    """
    return -lr * class_gram(kernel if gradients is None else sample_gram(kernel, gradients), of)


def study(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    labels: Any = None,
    classes: Sequence[Any] | None = None,
    loss: Any = None,
    lr: float | None = None,
    per_class: int = 16,
    params: Selection | None = None,
    forward: Forward | None = None,
) -> Report:
    """Return which classes of a network help or hurt each other in one step, and whether its kernel foresees that.

    Args:
        model: any eager module; a copy in float64 and evaluation mode is used.
        x: N samples.
        y: N targets, of the loss.
        labels: (N,) class of each sample; None: the targets themselves, if they are classes.
        classes: which of them to look at, two or more; None: the twelve with most samples.
        loss: name, torch loss or callable of outputs and targets; None: cross-entropy for integer targets, else MSE.
        lr: learning rate of the step; None: the largest that every class can use, see `Classes.useful_rate`.
        per_class: samples of each class, the first ones; classes with a single sample are left out.
        params: which parameters take the step; as in `empirical_ntk`.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: no targets, no classes in them, fewer than two classes with two samples, or losses that are not
            finite.
        NetworkError: a module that cannot be followed exactly.

    Cost: one kernel of the losses of K · per_class samples, K gradients and about 25 K forward passes.
    """
    if y is None:
        raise InputError("class_interference needs targets: what a step does depends on the loss; pass y=")
    y = torch.as_tensor(y)
    if per_class < 2 or (lr is not None and not lr > 0):
        raise InputError(
            f"wanted at least two samples per class and a positive learning rate, got {per_class} and {lr}"
        )
    names, rows, of = _chosen(_labels(labels, y, size(x)), classes, per_class)
    lossy = recognised(loss or ("mse" if y.is_floating_point() else "cross_entropy"))
    seen = Classes.measured(model, take(x, rows), y[rows], of, lossy, params=params, forward=forward)
    if not seen.inner.any():
        raise InputError(
            "the loss has no gradient at these weights, so that no class moves another; nothing is learned"
        )
    rate = lr or seen.useful_rate()
    scan = sorted({rate, *(rate * factor for factor in _SCAN)})
    steps = seen.steps(scan)
    return told(names, seen, steps[scan.index(rate)], steps)


def example(quick: bool = False) -> Report:
    """Return the study of a small network that has half learned the handwritten digits; `quick`: fewer samples."""
    from sklearn.datasets import load_digits

    from ntk_monitor.guard import undisturbed

    inputs, digits = load_digits(return_X_y=True)
    x, y = torch.as_tensor(inputs / 16.0), torch.as_tensor(digits).long()
    with undisturbed(seed=0):
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
        weights = list(model.parameters())
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(x[:1000]), y[:1000])
            with torch.no_grad():
                for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    p.sub_(g, alpha=0.5)
    return study(model, x, y, per_class=8 if quick else 32)


def _labels(labels: Any, y: Tensor, samples: int) -> NDArray[Any]:
    """Return one label per sample, from what is given or from targets that are classes."""
    if labels is None:
        values = y.detach().cpu().reshape(-1).numpy()
        whole = values.dtype.kind in "iub" or (values == values.round()).all()
        if values.size != samples or not whole:
            raise InputError(
                f"class_interference needs the class of each of the {samples} samples, got targets of {y.dtype} and "
                f"shape {tuple(y.shape)}, which are no classes; pass labels= with one per sample"
            )
        return np.asarray(values if values.dtype.kind in "iub" else values.astype(np.int64))
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.shape != (samples,):
        raise InputError(f"wanted one label for each of the {samples} samples, got shape {found.shape}")
    return found


def _chosen(
    labels: NDArray[Any], classes: Sequence[Any] | None, per_class: int
) -> tuple[list[str], Tensor, NDArray[np.int64]]:
    """Return names of classes, their samples' rows, class after class, and the class of each row."""
    values, counts = np.unique(labels, return_counts=True)
    known = [(count, value) for count, value in zip(counts.tolist(), values.tolist(), strict=True) if value != IGNORED]
    if classes is not None:
        if missing := [one for one in classes if one not in [value for _, value in known]]:
            raise InputError(
                f"there is no sample of class {missing[0]}; there are {[value for _, value in known][:20]}"
            )
        known = [(count, value) for count, value in known if value in list(classes)]
    usable = sorted((one for one in known if one[0] > 1), key=lambda one: -one[0])[:MOST_CLASSES]
    kept = [value for _, value in known if value in [usable_value for _, usable_value in usable]]
    if len(kept) < 2:
        raise InputError(
            f"wanted two classes with two samples each, got {len(kept)} such among {len(labels)} samples; pass more "
            "samples (--probe on the command line)"
        )
    rows = [np.flatnonzero(labels == value)[:per_class] for value in kept]
    of = np.repeat(np.arange(len(kept)), [len(row) for row in rows])
    return [str(value) for value in kept], torch.as_tensor(np.concatenate(rows)), of
