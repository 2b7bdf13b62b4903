"""A loss over fixed targets as a function of the outputs alone, f → L(f): value, gradient g and curvature H = d²L/df².

The gradient is autograd's, so that any differentiable callable will do; everything is in float64 on the CPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntk_monitor.batch import moved
from ntk_monitor.errors import InputError
from ntk_monitor.losses import Loss, recognised

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of n samples with C outputs each as a function of these outputs; calling it gives the gradient.

    Attributes:
        loss: with its own 1/N.
        targets: of the n samples, on the CPU.
    """

    loss: Loss
    targets: Any

    def __call__(self, outputs: Tensor) -> Tensor:
        """Return g = dL/df in the shape of the outputs."""
        f = outputs.detach().double().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self._of(f), f, allow_unused=True, materialize_grads=True)
        return g

    def value(self, outputs: Tensor) -> float:
        """Return L."""
        with torch.no_grad():
            return float(self._of(outputs.detach().double()))

    def root(self, outputs: Tensor) -> Tensor:
        """Return S with S Sᵀ = H, (n, C, C), or (n·C, n·C) for losses without a closed form.

        Negative curvature has no root and counts as none. Without a closed form, costs n·C backward passes through
        the loss and an eigendecomposition.
        """
        try:
            root = torch.from_numpy(self.loss.terms(outputs, self.targets).root)
        except InputError:
            values, vectors = torch.linalg.eigh(self._hessian(outputs))
            spread: Tensor = vectors * values.clamp_min(0).sqrt()
            return spread
        return torch.diag_embed(root) if root.dim() == 2 else root

    def curvature(self, outputs: Tensor) -> Tensor:
        """Return H, (n, C, C), or (n·C, n·C) for losses without a closed form. Costs as `root`."""
        try:
            root = torch.from_numpy(self.loss.terms(outputs, self.targets).root)
        except InputError:
            return self._hessian(outputs)
        return torch.diag_embed(root.square()) if root.dim() == 2 else root @ root.mT

    def _of(self, f: Tensor) -> Tensor:
        try:
            return self.loss.function(f, self.targets)
        except RuntimeError:  # a callable with constants of its own in single precision
            return self.loss.function(f.float(), _single(self.targets)).double()

    def _hessian(self, outputs: Tensor) -> Tensor:
        flat = outputs.detach().double().reshape(-1)
        with torch.enable_grad():
            hessian = torch.autograd.functional.hessian(
                lambda f: self._of(f.reshape(outputs.shape)), flat, vectorize=True
            )
        matrix = torch.as_tensor(hessian)
        return (matrix + matrix.T) / 2


def loss_gradient(loss: Any, targets: Any) -> Objective:
    """Return the objective of these targets: f (n, C...) → dL/df, for any loss that `losses.recognised` takes."""
    return Objective(recognised(loss), moved(targets, _CPU, torch.float64))


def _single(targets: Any) -> Any:
    return targets.float() if isinstance(targets, Tensor) and targets.is_floating_point() else targets


def weighted(kernel: Tensor, blocks: Tensor) -> Tensor:
    """Return K B, (r, n·C), for a kernel (r, n·C) and B either block-diagonal (n, C, C) or whole (n·C, n·C)."""
    if blocks.dim() == 2:
        return kernel @ blocks
    n, c, _ = blocks.shape
    return torch.einsum("rnc,ncd->rnd", kernel.reshape(-1, n, c), blocks).reshape(kernel.shape)
