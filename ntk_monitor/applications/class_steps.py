"""Steps on the samples of one class: what the kernel says that they do to the losses of all classes, and what they do.

l_n loss of sample n, L_a its mean over the samples of class a, G_nm = ⟨∂l_n/∂θ, ∂l_m/∂θ⟩ = g_nᵀ K_nm g_m. A step of
plain SGD on class a changes L_b by -lr g_aᵀ K_ab g_b = -lr · mean of G over the samples of a and b, to first order.
"""

import copy
import math
from collections.abc import Sequence
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
from ntk_monitor.network import Forward, Network, Selection, call, only_tensor

Array = NDArray[np.float64]

_HALVINGS = 60
_TWINS = 1e-24
"""Squared length of a gradient, relative to the largest, below which a class has nothing left to learn."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step on each class did to every class: rows, the class it was taken on.

    Attributes:
        lr: learning rate.
        predicted: first-order change of the losses, (K, K).
        bent: change of the losses if they were linear in the outputs, which are the real ones after the step, (K, K).
        actual: (K, K).
    """

    lr: float
    predicted: Array
    bent: Array
    actual: Array

    @property
    def error(self) -> float:
        """Return how far off the first order is between different classes, relative; NaN where nothing changes."""
        return self._off(self.predicted - self.actual)

    @property
    def error_of_network(self) -> float:
        """Return the part of the error that comes from outputs which are not linear in the weights."""
        return self._off(self.predicted - self.bent)

    @property
    def error_of_loss(self) -> float:
        """Return the part of the error that comes from losses which are not linear in the outputs."""
        return self._off(self.bent - self.actual)

    def _off(self, difference: Array) -> float:
        between = ~np.eye(len(self.actual), dtype=bool)
        if not np.isfinite(self.actual).all():
            return math.inf
        length = float(np.linalg.norm(self.actual[between]))
        # Changes at the rounding error of the losses are none.
        floor = 1e-12 * float(np.abs(np.diag(self.predicted)).max())
        return float(np.linalg.norm(difference[between])) / length if length > floor else math.nan


@dataclass(frozen=True, slots=True)
class Classes:
    """A network in float64 and evaluation mode, and samples of classes 0 … K-1, class after class."""

    model: nn.Module
    weights: list[nn.Parameter]
    x: Batch
    y: Tensor
    of: NDArray[np.int64]
    """(N,), the class of each sample."""
    loss: Loss
    forward: Forward | None
    gram: Array
    """G, (N, N)."""

    @staticmethod
    def measured(  # noqa: PLR0913 - what a network, a loss and classes are made of
        model: nn.Module,
        x: Batch,
        y: Tensor,
        of: NDArray[np.int64],
        loss: Loss,
        *,
        params: Selection | None = None,
        forward: Forward | None = None,
    ) -> "Classes":
        """Return the gradients' inner products of a copy of the network.

        Raises:
            InputError: losses that are not finite.
            NetworkError: a module that cannot be followed exactly.

        Cost: one kernel of N rows.
        """
        own = copy.deepcopy(model).double()
        for part in own.modules():
            part.training = False
        names = list(Network(own, params=params).parameters)
        named = dict(own.named_parameters())
        place = next(own.parameters()).device
        x = mapped(x, lambda t: t.to(place, torch.float64) if t.is_floating_point() else t.to(place))
        y = y.to(place, torch.float64) if y.is_floating_point() else y.to(place)
        gram = empirical_ntk(own, x, outputs="loss", targets=y, loss=loss, params=names, forward=forward)
        made = Classes(own, [named[name] for name in names], x, y, of, loss, forward, gram.cpu().numpy())
        if not np.isfinite(made.losses()).all() or not np.isfinite(made.gram).all():
            raise InputError(
                "wanted finite losses and gradients, got NaN or infinity; check inputs, targets and weights"
            )
        return made

    @property
    def count(self) -> int:
        """K."""
        return int(self.of.max()) + 1

    @property
    def inner(self) -> Array:
        """Inner products of the classes' loss gradients, (K, K)."""
        return class_gram(self.gram, self.of)

    def learning(self) -> NDArray[np.bool_]:
        """Return which classes have a gradient left, (K,)."""
        own = np.diag(self.inner)
        return np.asarray(own > _TWINS * max(float(own.max()), np.finfo(np.float64).tiny))

    def outputs(self, x: Batch) -> Tensor:
        """Return the outputs as the loss takes them."""
        return only_tensor(call(self.model, x) if self.forward is None else self.forward(self.model, x))

    def sample_losses(self, f: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return l of samples, all by default, whose outputs these are."""
        y, single = self.y if rows is None else self.y[list(rows)], self.loss.singly(self.y)

        def one(outputs: Tensor, target: Tensor) -> Tensor:
            return single(outputs[None], target[None])

        if self.loss.kind != "other":
            return torch.vmap(one)(f, y)
        # A callable of the user's may do what vmap does not follow.
        return torch.stack([one(outputs, target) for outputs, target in zip(f, y, strict=True)])

    def losses(self) -> Array:
        """Return L, (K,)."""
        with torch.no_grad():
            return self._means(self.sample_losses(self.outputs(self.x)))

    def steps(self, rates: Sequence[float]) -> list[Step]:
        """Take one step on each class, at every learning rate, from the same weights, which are put back.

        Cost: K gradients, and a forward pass for each class and rate.
        """
        f = self.outputs(self.x).detach().requires_grad_(True)
        before = self.sample_losses(f)
        g = torch.autograd.grad(before.sum(), f)[0]
        start, first = self._means(before.detach()), self.inner
        bent, actual = (np.zeros((len(rates), self.count, self.count)) for _ in range(2))
        for a in range(self.count):
            for k, moved in enumerate(self._moved(a, rates)):
                with torch.no_grad():
                    actual[k, a] = self._means(self.sample_losses(moved)) - start
                    bent[k, a] = self._means((g * (moved - f)).flatten(1).sum(1))
        return [Step(lr, -lr * first, bent[k], actual[k]) for k, lr in enumerate(rates)]

    def _moved(self, a: int, rates: Sequence[float]) -> list[Tensor]:
        """Return the outputs of all samples after a step on class a with each rate."""
        rows = np.flatnonzero(self.of == a).tolist()
        value = self.sample_losses(self.outputs(take(self.x, rows)), rows).mean()
        slope: tuple[Tensor | None, ...] = torch.autograd.grad(value, self.weights, allow_unused=True)
        home = [p.detach().clone() for p in self.weights]
        found = []
        with torch.no_grad():
            for lr in rates:
                for p, g, start in zip(self.weights, slope, home, strict=True):
                    p.copy_(start if g is None else start - lr * g)
                found.append(self.outputs(self.x).clone())
            for p, start in zip(self.weights, home, strict=True):
                p.copy_(start)
        return found

    def useful_rate(self) -> float:
        """Return a learning rate that every class can use: its own loss falls by half of what is promised, or more.

        The largest of the halvings of Polyak's step, min L_a / |∇L_a|², for which this holds (Armijo's rule with 1/2).

        Raises:
            InputError: none of them lowers every class.
        """
        own, alive = np.diag(self.inner), self.learning()
        polyak = self.losses()[alive] / own[alive]
        rate = float(polyak.min()) if polyak.min() > 0 else 1.0 / float(own.max())
        for _ in range(_HALVINGS):
            step = self.steps([rate])[0]
            if (np.diag(step.actual) <= 0.5 * np.diag(step.predicted))[alive].all():
                return rate
            rate /= 2
        raise InputError("no learning rate lowers the loss of every class; check that the loss is differentiable here")

    def _means(self, values: Tensor) -> Array:
        each = values.detach().cpu().double().numpy()
        return np.bincount(self.of, weights=each, minlength=self.count) / np.bincount(self.of)


def class_gram(gram: Any, of: Any) -> Array:
    """Return ⟨∇L_a, ∇L_b⟩, (K, K), the means of G over pairs of samples.

    Args:
        gram: G (N, N), the kernel of the sample losses: `empirical_ntk(..., outputs="loss")`.
        of: (N,) class of each sample, 0 … K-1.

    Raises:
        InputError: shapes that do not fit, or a class without samples.
    """
    g, labels = np.asarray(gram, dtype=np.float64), np.asarray(of)
    if g.shape != (labels.size,) * 2 or labels.size == 0 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(f"wanted G (N, N) and N classes 0 to K-1, got {g.shape} and {labels.dtype} of {labels.shape}")
    counts = np.bincount(labels)
    if not counts.all():
        raise InputError(f"every class 0 to {len(counts) - 1} needs a sample, got none of {int(counts.argmin())}")
    mean = (labels == np.arange(len(counts))[:, None]) / counts[:, None]
    return np.asarray(mean @ g @ mean.T)


def sample_gram(kernel: Any, gradients: Any) -> Array:
    """Return G (N, N) from a kernel (N, C, N, C) and the gradients of the sample losses by the outputs, (N, C).

    Raises:
        InputError: shapes that do not fit.
    """
    k, g = (np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t, dtype=np.float64) for t in (kernel, gradients))
    if k.ndim != 4 or k.shape != (*g.shape, *g.shape):
        raise InputError(f"wanted a kernel (N, C, N, C) and gradients (N, C), got {k.shape} and {g.shape}")
    return np.asarray(np.einsum("nc,ncmd,md->nm", g, k, g, optimize=True))


def doubt(gram: Array, of: NDArray[np.int64]) -> Array:
    """Return the standard error, (K, K), of ⟨∇L_a, ∇L_b⟩ as an estimate for other samples; NaN on the diagonal.

    The first-order (Hájek) variance of a mean over pairs: that of the row means over n_a, plus that of the column means
    over n_b. NaN for a class of one sample.
    """
    count = int(of.max()) + 1
    found = np.full((count, count), np.nan)
    for a in range(count):
        for b in range(count):
            block = gram[np.ix_(of == a, of == b)]
            if a != b and min(block.shape) > 1:
                spread = [block.mean(axis=1 - k).var(ddof=1) / block.shape[k] for k in range(2)]
                found[a, b] = math.sqrt(sum(spread))
    return found


def within_and_between(gram: Array, of: NDArray[np.int64]) -> tuple[Array, Array]:
    """Return the mean cosine between gradients of different samples of each class, and with the class nearest to it.

    Both (K,); NaN for a class of one sample or none with a gradient.
    """
    length = np.sqrt(np.clip(np.diag(gram), 0, None))
    alive = length > math.sqrt(_TWINS) * max(float(length.max()), np.finfo(np.float64).tiny)
    cosines = np.full(gram.shape, np.nan)
    cosines[np.ix_(alive, alive)] = gram[np.ix_(alive, alive)] / np.outer(length[alive], length[alive])
    np.fill_diagonal(cosines, np.nan)
    count = int(of.max()) + 1
    blocks = [[_mean(cosines[np.ix_(of == a, of == b)]) for b in range(count)] for a in range(count)]
    means = np.array(blocks)
    within, between = np.diag(means).copy(), means.copy()
    np.fill_diagonal(between, -np.inf)
    between[np.isnan(between)] = -np.inf
    nearest = between.max(axis=1)
    return within, np.where(np.isfinite(nearest), nearest, np.nan)


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
