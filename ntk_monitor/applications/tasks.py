"""Tasks measured together: one kernel over the samples of all, and what training on one of them does to the others."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch, mapped, take
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.losses import Loss
from ntk_monitor.network import call, only_tensor

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of the parameter space two tasks share; no order of samples matters.

    Attributes:
        frobenius: ‖K_AB‖²_F, in squared units of K.
        normalised: ‖K_AB‖²_F / (‖K_AA‖_F ‖K_BB‖_F), from 0 (orthogonal gradients) to 1 (the same task).
        angles: principal angles between the leading directions of J_A and J_B, ascending, in radians.
    """

    frobenius: float
    normalised: float
    angles: Array


def overlap(k_aa: Any, k_bb: Any, k_ab: Any, *, share: float = 1.0) -> Overlap:
    """Return the overlap of two tasks from their kernels, (n, n) or (N, C, M, C).

    Args:
        k_aa: kernel of task A.
        k_bb: kernel of task B.
        k_ab: cross kernel.
        share: principal angles are between the leading directions that hold this share of each trace.

    Raises:
        InputError: shapes that do not fit, a kernel of zeros, or a share outside (0, 1].

    Cost: two eigendecompositions, O(n³).

    Sources: Doan et al. 2021 (NTK overlap matrix); Björck and Golub 1973 (principal angles).
    """
    a, b, cross = matrix(k_aa), matrix(k_bb), matrix(k_ab)
    if a.shape != (cross.shape[0],) * 2 or b.shape != (cross.shape[1],) * 2:
        raise InputError(f"wanted K_AA (a, a), K_BB (b, b) and K_AB (a, b), got {a.shape}, {b.shape} and {cross.shape}")
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share:g}")
    squared, scale = float((cross**2).sum()), float(np.linalg.norm(a) * np.linalg.norm(b))
    if not scale > 0:
        raise InputError("a task whose kernel is zero moves nothing; check that the parameters reach its outputs")
    # Rows of S⁻¹ Uᵀ J are an orthonormal basis, so cosines come from K_AB alone.
    cosines = np.linalg.svd(_basis(a, share).T @ cross @ _basis(b, share), compute_uv=False)
    return Overlap(squared, squared / scale, np.arccos(np.clip(cosines, 0.0, 1.0)))


def interference(g_a: Any, k_ab: Any, g_b: Any, lr: float = 1.0) -> float:
    """Return the first-order change of the loss of A by one gradient step on B: -lr g_Aᵀ K_AB g_B; negative helps.

    Args:
        g_a: dL_A/df, (N, C) or (n_A,), the loss's own mean included.
        k_ab: cross kernel.
        g_b: dL_B/df.
        lr: of plain SGD.

    Raises:
        InputError: shapes that do not fit.
    """
    a, cross, b = array(g_a).reshape(-1), matrix(k_ab), array(g_b).reshape(-1)
    if cross.shape != (a.size, b.size):
        raise InputError(f"wanted K_AB ({a.size}, {b.size}) for these gradients, got {cross.shape}")
    return float(-lr * a @ cross @ b)


def trained_on(k_rows: Array, k_bb: Array, f_b: Array, gradient: Callable[[Array], Array], steps: int) -> Array:
    """Return Δf on any samples after gradient descent on B of the network that is linear in its parameters.

    Exact for any loss at a frozen kernel: every step moves the outputs by -K g_B(f_B).

    Args:
        k_rows: (n, b), learning rate times the cross kernel of the samples with those of B.
        k_bb: (b, b), learning rate times the kernel of B.
        f_b: (b,) outputs on B before.
        gradient: outputs on B (b,) → dL_B/df (b,).
        steps: of gradient descent.
    """
    moved, f = np.zeros(len(k_rows)), f_b.astype(np.float64).copy()
    for _ in range(steps):
        g = gradient(f)
        moved -= k_rows @ g
        f -= k_bb @ g
    return moved


def array(values: Any) -> Array:
    """Return a tensor or array as float64 numpy."""
    held = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(held, dtype=np.float64)


def matrix(kernel: Any) -> Array:
    """Return a kernel (N, C, M, D) or (n, m) as a matrix, rows sample-major; NaN is refused with an InputError."""
    k = array(kernel)
    if k.ndim == 4:
        k = k.reshape(k.shape[0] * k.shape[1], -1)
    if k.ndim != 2 or not np.isfinite(k).all():
        raise InputError(f"wanted a finite kernel (n, m) or (N, C, M, D), got shape {k.shape}")
    return k


@dataclass(frozen=True, slots=True)
class Forgetting:
    """What training on one task did to all outputs and losses."""

    task: int
    predicted: Array
    actual: Array
    losses: Array
    """(3, tasks): before, predicted after, actual after."""

    @property
    def error(self) -> float:
        """Error of the predicted change, relative; infinite if training diverged, NaN if nothing moved."""
        if not np.isfinite(self.actual).all():
            return float("inf")
        length = np.linalg.norm(self.actual)
        return float(np.linalg.norm(self.predicted - self.actual) / length) if length > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class Tasks:
    """Kernel, outputs and loss gradients of the samples of all tasks, task after task."""

    names: list[str]
    spans: list[slice]
    x: Batch
    y: Tensor
    loss: Loss
    f: Tensor
    kernel: Array
    gradients: list[Array]

    @staticmethod
    def of(model: nn.Module, x: Batch, y: Tensor, loss: Loss, names: list[str], counts: list[int]) -> "Tasks":
        """Return what a network says about tasks whose samples lie one after the other, `counts` of each."""
        f = _outputs(_copy(model), x).detach().cpu()
        ends = np.cumsum(counts).tolist()
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        gradients = [loss.terms(f[s], y[s]).gradient.reshape(-1) for s in spans]
        return Tasks(names, spans, x, y, loss, f, matrix(empirical_ntk(model, x)), gradients)

    def block(self, a: slice, b: slice) -> Array:
        """Return the kernel between two spans of samples."""
        c = len(self.kernel) // len(self.f)
        return self.kernel[a.start * c : a.stop * c, b.start * c : b.stop * c]

    def pairs(self, quantity: Callable[[int, int], float]) -> Array:
        """Return a quantity of all pairs of tasks as a matrix."""
        count = range(len(self.names))
        return np.array([[quantity(a, b) for b in count] for a in count])

    def overlaps(self) -> Array:
        """Return the normalised overlap of all pairs."""
        return self.pairs(lambda a, b: self.between(a, b).normalised)

    def between(self, a: int, b: int) -> Overlap:
        """Return the overlap of two tasks, angles between the directions that hold 90 % of each trace."""
        s, t = self.spans[a], self.spans[b]
        return overlap(self.block(s, s), self.block(t, t), self.block(s, t), share=0.9)

    def cosines(self) -> Array:
        """Cosines between the tasks' loss gradients: positive, a step on one lowers the loss of the other."""
        raw = self.pairs(
            lambda a, b: -interference(self.gradients[a], self.block(self.spans[a], self.spans[b]), self.gradients[b])
        )
        length = np.sqrt(np.clip(np.diag(raw), np.finfo(np.float64).tiny, None))
        return np.asarray(raw / length[:, None] / length)

    def forgetting(self, model: nn.Module, steps: int) -> Forgetting:
        """Train a copy on the task that hurts another one most; compare with the linear prediction."""
        hurt = self.cosines() + 2 * np.eye(len(self.names))
        task = int(hurt.min(axis=0).argmin())
        span = self.spans[task]
        own, everything = self.block(span, span), self.block(slice(0, len(self.f)), span)
        lr = 1.0 / (np.linalg.eigvalsh(own)[-1] * _curvature(self.loss, self.f[span].shape))
        y_b, shape = self.y[span], self.f[span].shape

        def gradient(f: Array) -> Array:
            return self.loss.terms(torch.as_tensor(f).reshape(shape), y_b).gradient.reshape(-1)

        predicted = trained_on(lr * everything, lr * own, array(self.f[span]).reshape(-1), gradient, steps)
        after = _descended(_copy(model), take(self.x, torch.arange(span.start, span.stop)), y_b, self.loss, lr, steps)
        actual = array(_outputs(after, self.x) - self.f.to(_device(after)))
        moved = torch.as_tensor(predicted).reshape(self.f.shape)
        outputs = (self.f, self.f + moved, self.f + torch.as_tensor(actual))
        losses = [[self.loss.terms(f[s], self.y[s]).value for s in self.spans] for f in outputs]
        return Forgetting(task, predicted, actual.reshape(-1), np.array(losses))

    def trace_range(self) -> tuple[float, float]:
        """Return smallest and largest Tr(K_A K_B) of the first two tasks over 200 orders of the samples of one."""
        count = min(self.spans[k].stop - self.spans[k].start for k in (0, 1))
        c = len(self.kernel) // len(self.f)
        a, b = (self.block(slice(s.start, s.start + count), slice(s.start, s.start + count)) for s in self.spans[:2])
        generator, rows = np.random.default_rng(0), np.arange(count * c).reshape(count, c)
        found = []
        for _ in range(200):
            order = rows[generator.permutation(count)].reshape(-1)
            found.append(float((a * b[np.ix_(order, order)]).sum()))
        return min(found), max(found)


def _curvature(loss: Loss, shape: torch.Size) -> float:
    """Return an upper bound of d²L/df², so that 1/(λ₁ · bound) is half the largest stable learning rate."""
    outputs = int(np.prod(shape))
    mean = loss.options.get("reduction", "mean") == "mean"
    if loss.kind == "cross_entropy":
        return 0.5 / (shape[0] if mean else 1)
    return (2.0 if loss.kind == "mse" else 0.25) / (outputs if mean else 1)


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _outputs(model: nn.Module, x: Batch) -> Tensor:
    at = _device(model)
    wide = mapped(x, lambda t: t.to(at, torch.float64) if t.is_floating_point() else t.to(at))
    return only_tensor(call(model, wide))


def _descended(model: nn.Module, x: Batch, y: Tensor, loss: Loss, lr: float, steps: int) -> nn.Module:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        value = loss.function(_outputs(model, x), y.to(_device(model)))
        found = torch.autograd.grad(value, trainable, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(trainable, found, strict=True):
                if g is not None:
                    p.sub_(g, alpha=lr)
    return model


def _basis(kernel: Array, share: float) -> Array:
    """Return U S⁻¹ of the leading directions that hold a share of the trace, (n, k)."""
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    # Directions below the rounding error of eigh are noise, and S⁻¹ would blow it up.
    sound = values > len(values) * np.finfo(np.float64).eps ** 0.75 * values[0]
    held = np.cumsum(np.clip(values, 0, None)) / np.clip(values, 0, None).sum()
    count = min(int(np.searchsorted(held, share - 1e-12)) + 1, int(sound.sum()))
    return np.asarray(vectors[:, :count] / np.sqrt(values[:count]))
