"""Roots of loss curvatures as linear maps of the flattened outputs: S v and Sᵀ v with S Sᵀ = H = d²L/df².

Conventions and the table of S are those of `ntk_monitor.losses`, 1/N included. S is applied, never formed: a softmax
over V classes costs O(V) for each row it normalises, where the matrix would take V² numbers.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_monitor.errors import InputError
from ntk_monitor.losses import Loss

# As in the loss's own root (`Loss.terms`), so that both describe one matrix.
_SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True, slots=True)
class Diagonal:
    """S = diag(root)."""

    root: Float[Tensor, " n"]

    def times(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return S v."""
        return self.root * v

    def transposed(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return Sᵀ v."""
        return self.root * v


@dataclass(frozen=True, slots=True)
class Softmax:
    """S = a (diag √p - p √pᵀ) for each row p of probabilities."""

    shape: torch.Size
    """Of the outputs."""
    axis: int
    """Where the classes are in it."""
    p: Float[Tensor, "rows classes"]
    a: Float[Tensor, "rows 1"]
    """Root of the weight of the row in the loss; zero where it is ignored."""

    def times(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return S v."""
        rows, q = self._rows(v), self.p.sqrt()
        return self._flat(self.a * (q * rows - self.p * (q * rows).sum(1, keepdim=True)))

    def transposed(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return Sᵀ v."""
        rows = self._rows(v)
        return self._flat(self.a * self.p.sqrt() * (rows - (self.p * rows).sum(1, keepdim=True)))

    def _rows(self, v: Tensor) -> Tensor:
        return v.reshape(self.shape).movedim(self.axis, -1).reshape(self.p.shape)

    def _flat(self, rows: Tensor) -> Tensor:
        moved = [length for axis, length in enumerate(self.shape) if axis != self.axis]
        return rows.reshape(*moved, self.shape[self.axis]).movedim(-1, self.axis).reshape(-1)


Root: TypeAlias = Diagonal | Softmax
"""A linear map S with S Sᵀ = H, in double precision."""


def root_of(loss: Loss, outputs: Tensor, targets: Any) -> Root:
    """Return S of a loss at these outputs, which have the shape that the module gives them.

    Supported: mean squares, cross-entropy (one class per sample or per position, class weights, label smoothing,
    ignored labels, soft targets), binary cross-entropy with logits, token cross-entropy, Huber (whose curvature is zero
    where the error is clipped).

    Raises:
        InputError: another loss, or targets that do not fit the outputs.
    """
    f, y = outputs.detach(), torch.as_tensor(targets)
    # Doubles on the CPU where the device has none.
    device = torch.device("cpu") if f.device.type == "mps" else f.device
    f, y = f.to(device).double(), y.detach().to(device)
    if "shift" in loss.options:
        return _tokens(loss, f, y)
    if loss.kind == "cross_entropy":
        if f.dim() < 2:
            raise InputError(f"{loss.name} needs outputs (N, C) or (N, C, ...), got shape {tuple(f.shape)}")
        soft = y.is_floating_point()
        return _softmax(loss, f, 1, y.movedim(1, -1) if soft and y.dim() > 1 else y)
    if "delta" in loss.options:
        if y.numel() != f.numel():
            raise InputError(f"targets of shape {tuple(y.shape)} do not fit outputs {tuple(f.shape)} of {loss.name}")
        inside = (f.flatten() - y.double().flatten()).abs() < loss.options["delta"]
        return Diagonal((inside.double() / f.numel()).sqrt())
    if loss.kind == "other":
        raise InputError(
            f"{loss.name} has no known root of its curvature; wanted mse, cross_entropy, bce_with_logits, "
            "token_cross_entropy or huber; leave out loss= and targets= for the kernel itself"
        )
    return Diagonal(torch.as_tensor(loss.terms(f, y).root).reshape(-1).to(device))


def _tokens(loss: Loss, f: Tensor, y: Tensor) -> Softmax:
    if f.dim() != 3 or y.is_floating_point() or y.shape != f.shape[:2]:
        raise InputError(
            f"{loss.name} needs outputs (N, T, V) and integer targets (N, T), "
            f"got {tuple(f.shape)} and {tuple(y.shape)} of {y.dtype}"
        )
    if loss.options["shift"]:
        y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], -100)], dim=1)
    return _softmax(loss, f, 2, y)


def _softmax(loss: Loss, f: Tensor, axis: int, y: Tensor) -> Softmax:
    """Return S of a cross-entropy over the classes on `axis`; soft targets have theirs at the end."""
    rows = f.movedim(axis, -1).reshape(-1, f.shape[axis])
    p = rows.softmax(1).clamp_min(_SMALLEST_PROBABILITY)
    p = p / p.sum(1, keepdim=True)
    mass, total = _masses(loss, y, *rows.shape)
    return Softmax(f.shape, axis, p, (mass / (total or 1.0)).sqrt()[:, None])


def _masses(loss: Loss, y: Tensor, rows: int, classes: int) -> tuple[Tensor, float]:
    """Return Σ_c W of each row, the weight of its softmax in the loss, and what a mean divides by."""
    weight = loss.options.get("weight")
    w = torch.ones(classes).to(y.device).double() if weight is None else weight.detach().to(y.device).double()
    eps = float(loss.options.get("label_smoothing", 0.0))
    if y.is_floating_point():
        if y.numel() != rows * classes:
            raise InputError(f"soft targets must have the shape of the outputs ({rows} x {classes}), got {y.numel()}")
        mass, total = (1 - eps) * (y.double().reshape(rows, classes) @ w) + eps * w.mean(), float(rows)
    else:
        if y.numel() != rows:
            raise InputError(f"class targets must be one integer per softmax ({rows}), got shape {tuple(y.shape)}")
        labels = y.reshape(rows)
        kept = labels != loss.options.get("ignore_index", -100)
        if bool(((labels < 0) | (labels >= classes))[kept].any()):
            raise InputError(f"class targets must lie in 0..{classes - 1}, got up to {int(labels.max())}")
        of_labels = w[labels.masked_fill(~kept, 0).long()] * kept
        # Torch divides by the sum of class weights of the labels, not of the smoothed targets.
        mass, total = (1 - eps) * of_labels + eps * w.mean() * kept, float(of_labels.sum())
    return mass, 1.0 if loss.options.get("reduction") == "sum" else total
