"""What a probe's targets are to a loss: class labels, numbers to align a kernel with, its gradient and curvature."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntk_monitor.errors import said
from ntk_monitor.losses import Loss, Terms
from ntk_monitor.probe import Probe

Array = NDArray[np.float64]


def classes(probe: Probe, loss: Loss | None) -> NDArray[np.int64] | None:
    """Return class labels (N,): what cross-entropy takes for labels, or integers that look like some; None: none."""
    targets, labels = probe.targets, probe.labels
    if labels is None and isinstance(targets, Tensor) and targets.numel() == probe.samples:
        integers = not (targets.is_floating_point() or targets.is_complex())
        if integers and loss is not None and loss.kind == "cross_entropy":
            return targets.detach().cpu().reshape(-1).numpy().astype(np.int64)
    return labels


def features(probe: Probe, loss: Loss | None) -> Array | None:
    """Return targets as (N, D) for the alignment: one-hot classes, or numbers; None when they are neither."""
    labels, targets = classes(probe, loss), probe.targets
    if labels is not None:
        return np.asarray(labels[:, None] == np.unique(labels), dtype=np.float64)
    if not isinstance(targets, Tensor) or targets.is_complex():
        return None
    if not (targets.is_floating_point() or (loss is not None and loss.kind == "mse")):
        return None
    return np.asarray(targets.detach().cpu().double().reshape(probe.samples, -1).numpy())


def terms_of(
    loss: Loss | None, status: str, probe: Probe, layout: str, predictions: Tensor
) -> tuple[Terms | None, str]:
    """Return the loss terms on the probe, or None and the reason why there are no modes.

    Args:
        loss: None: not known.
        status: how it is known, or why it is not.
        probe: whose targets.
        layout: of the kernel.
        predictions: (N, ...).
    """
    if layout != "full" and predictions[0].numel() > 1:
        return None, f"modes need the full kernel; this one is the {layout} kernel"
    if loss is None:
        return None, f"loss {status}"
    if not isinstance(probe.targets, Tensor):
        return None, "the probe has no targets"
    try:
        terms = loss.terms(predictions, probe.targets)
    except Exception as error:  # noqa: BLE001 - shapes that do not fit cost the modes, not the probe
        return None, said(error)
    return (terms, "") if np.isfinite(terms.gradient).all() else (None, "the loss gradient is not finite")


def loss_value(loss: Loss | None, probe: Probe, predictions: Tensor) -> float:
    """Return the loss on the probe; NaN without loss or targets."""
    if loss is None or not isinstance(probe.targets, Tensor):
        return float("nan")
    return loss.value(predictions, probe.targets.cpu())
