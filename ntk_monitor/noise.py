"""What small batches do to a step: gradient-noise scale, batch sharpness, stability and loss in the mean square.

N samples, C outputs, n = N·C rows, sample-major. Gᵢ is the gradient of sample i's own loss and G their mean, the
batch gradient; Σ is the covariance of the Gᵢ. M = Sᵀ K S is the loss-weighted kernel (the loss's 1/N inside) and
u = S⁺ g the residual in its coordinates, so that a full-batch step with learning rate lr is u ← (I - lr M) u.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntk_monitor.errors import InputError

Array = NDArray[np.float64]

LEAST = 3
"""Samples that a noise scale needs at least."""

# An estimate this many standard errors above zero is told from zero.
_RESOLVED = 2.0


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """The gradient-noise scale tr Σ / |G|², as numerator and denominator with their uncertainty.

    Attributes:
        signal: unbiased estimate of |G|², squared loss units per squared parameter unit; noise can make it negative.
        noise: unbiased estimate of tr Σ, the same unit.
        error: standard error of the signal.
        samples: what it was estimated from.
    """

    signal: float
    noise: float
    error: float
    samples: int

    @property
    def resolved(self) -> bool:
        """True when the signal lies more than two standard errors above zero."""
        return bool(np.isfinite(self.error) and self.signal > _RESOLVED * self.error)

    @property
    def value(self) -> float:
        """The noise scale in samples; NaN when it is not resolved, because then no number is right."""
        return self.noise / self.signal if self.resolved else float("nan")

    @property
    def bound(self) -> float:
        """Lower bound of the noise scale in samples: noise over signal plus two standard errors; NaN without noise."""
        largest = max(self.signal, 0.0) + _RESOLVED * self.error
        return self.noise / largest if np.isfinite(largest) and largest > 0 else float("nan")

    @property
    def text(self) -> str:
        """What was found, for people."""
        if self.resolved:
            return f"{self.value:.3g} samples, from {self.samples} ({self.signal / self.error:.1f} standard errors)"
        if not np.isfinite(self.bound):
            return f"not resolved: {self.samples} samples say nothing"
        multiple = self.bound / self.samples
        return f"not resolved: more than {self.bound:.3g} samples ({multiple:.2g} x the {self.samples} measured)"


def gradient_gram(kernel: Array, gradient: Array) -> Array:
    """Return Gᵢ · Gⱼ, the Gram matrix (N, N) of the gradients of each sample's own loss.

    Args:
        kernel: (n, n) full kernel, sample-major; (N, N) when C = 1.
        gradient: dL/df (N, C) of the mean loss over these N samples, its 1/N inside.

    Exact for losses that are means over samples. With class weights or ignored samples it is the Gram of N times each
    sample's share of the loss, whose mean is still the batch gradient.

    Raises:
        InputError: the kernel has another number of rows than the gradient.

    Cost: O(n²).
    """
    samples, outputs = gradient.shape
    if kernel.shape != (gradient.size, gradient.size):
        raise InputError(
            f"the kernel needs {gradient.size} rows, one for each of {samples} x {outputs} outputs, got "
            f'{kernel.shape}; pass the full kernel (outputs="full")'
        )
    weighted = gradient.reshape(-1, 1) * kernel * gradient.reshape(1, -1)
    return np.asarray(samples**2 * weighted.reshape(samples, outputs, samples, outputs).sum(axis=(1, 3)))


def noise_scale(gram: Array) -> NoiseScale:
    """Return the gradient-noise scale from the Gram matrix of per-sample gradients.

    Unbiased, unlike tr Σ over the squared norm of the measured mean, which can never exceed the number of samples:
    with q = mean |Gᵢ|² and b = |mean Gᵢ|², |G|² = (m b - q)/(m - 1) and tr Σ = (q - b) m/(m - 1). The standard error of
    |G|² is a jackknife over samples, which errs on the large side where the signal vanishes.

    Args:
        gram: (m, m), see `gradient_gram`; or the kernel of the per-sample losses.

    Raises:
        InputError: fewer than three samples, or not square.

    Lies when the samples are no random draw from the training set. Heavy tails make it noisy.

    Cost: O(m²). Source: McCandlish et al. 2018, "An empirical model of large-batch training", appendix A.
    """
    m = len(gram)
    if gram.shape != (m, m) or m < LEAST:
        raise InputError(f"a noise scale needs the (m, m) Gram matrix of {LEAST} or more samples, got {gram.shape}")
    norms = np.diag(gram)
    pairs = gram.sum(axis=1) - norms
    total = pairs.sum()
    # The unbiased |G|² is the mean over pairs of different samples; the noise is what their norms have beyond it.
    signal = total / (m * (m - 1))
    without = (total - 2 * pairs) / ((m - 1) * (m - 2))
    error = np.sqrt((m - 1) / m * ((without - without.mean()) ** 2).sum())
    return NoiseScale(float(signal), float(norms.mean() - signal), float(error), m)


def noise_scale_from_batches(small: ArrayLike, large: ArrayLike, sizes: tuple[int, int]) -> NoiseScale:
    """Return the gradient-noise scale from squared gradient norms at two batch sizes a trainer already has.

    Args:
        small: (k,) squared norms of gradients of micro-batches, or of single ranks.
        large: (k,) squared norms of the accumulated or averaged gradients at the same steps.
        sizes: samples in each of the two.

    Both ends of the ratio are averaged over the k steps before dividing; the standard error is that of the mean, so
    two steps or more are needed before anything counts as resolved.

    Raises:
        InputError: sizes that are not increasing, or lists of different or no length.

    Source: McCandlish et al. 2018, appendix A.1.
    """
    b, B = sizes
    little, big = np.atleast_1d(np.asarray(small, dtype=float)), np.atleast_1d(np.asarray(large, dtype=float))
    if not 0 < b < B or little.shape != big.shape or not little.size:
        raise InputError(
            f"two batch sizes b < B and as many norms of each are needed, got sizes {sizes}, {little.size} and "
            f"{big.size} norms"
        )
    signals = (B * big - b * little) / (B - b)
    noises = (little - big) / (1 / b - 1 / B)
    k = len(signals)
    error = float(signals.std(ddof=1) / np.sqrt(k)) if k > 1 else float("inf")
    return NoiseScale(float(signals.mean()), float(noises.mean()), error, B * k)


def pooled(estimates: Sequence[NoiseScale], decay: float = 0.8) -> NoiseScale:
    """Return the noise scale of the latest probes together: numerator and denominator smoothed, never their ratio.

    Args:
        estimates: oldest first.
        decay: weight of each probe relative to the next.

    Probes share their samples, so their errors do not average out: the error is the weighted mean of the errors.

    Raises:
        InputError: no estimate.
    """
    if not estimates:
        raise InputError("at least one estimate is needed, got none")
    weights = decay ** np.arange(len(estimates) - 1, -1, -1.0)
    table = np.array([(e.signal, e.noise, e.error) for e in estimates])
    signal, noise, error = weights @ table / weights.sum()
    return NoiseScale(float(signal), float(noise), float(error), estimates[-1].samples)


def batch_sharpness(kernel: Array, gradient: Array, root: Array, size: int, *, draws: int = 64, seed: int = 0) -> float:
    """Return the curvature that a batch's own step meets, in 1 / learning rate: (K g)ᵀ H (K g) / (gᵀ K g).

    Mean over random sub-batches of the probe, all at the same weights. A step with a learning rate above 2 over it
    raises the loss of the very batch it was computed on, to second order. In training with small batches this ratio,
    not the largest eigenvalue, settles near 2 / learning rate.

    Args:
        kernel: (n, n) full kernel, or lr-weighted and preconditioned J D Jᵀ for steps of an adaptive optimizer.
        gradient: dL/df (N, C) of the mean loss over the probe.
        root: S with S Sᵀ = d²L/df², (N, C, C), or (N, C) where it is diagonal.
        size: samples in a batch, at most N.
        draws: how many sub-batches.
        seed: of their choice.

    Returns:
        NaN when no sub-batch has a gradient.

    Raises:
        InputError: a batch size outside 1 to N, or shapes that do not fit (see `gradient_gram`).

    Gauss-Newton curvature: the network's own curvature is left out. Cost: O(draws · (size·C)²).
    Source: Andreyev and Beneventano 2024, arXiv 2412.20553.
    """
    samples, outputs = gradient.shape
    if not 1 <= size <= samples or len(kernel) != gradient.size:
        raise InputError(
            f"a batch of 1 to {samples} samples and a kernel of {gradient.size} rows are needed, got {size} and "
            f"{len(kernel)}; pass a larger probe or the full kernel"
        )
    generator = np.random.default_rng(seed)
    blocks = kernel.reshape(samples, outputs, samples, outputs)
    found = []
    for _ in range(draws if size < samples else 1):
        batch = np.sort(generator.choice(samples, size, replace=False))
        # Means over the batch instead of the probe: both g and H grow by N / size.
        scale = samples / size
        g = scale * gradient[batch].reshape(-1)
        motion = blocks[batch][:, :, batch].reshape(g.size, g.size) @ g
        slope = g @ motion
        if slope > 0:
            found.append(scale * _curvature(root[batch], motion.reshape(size, outputs)) / slope)
    return float(np.mean(found)) if found else float("nan")


def _curvature(root: Array, motion: Array) -> float:
    """Return |Sᵀ v|² of output changes v (B, C)."""
    seen = root * motion if root.ndim == 2 else np.einsum("nij,ni->nj", root, motion)
    return float((seen**2).sum())


def mean_square_limit(weighted: Array, samples: int, size: int, tolerance: float = 1e-6) -> float:
    """Return the largest learning rate at which SGD with batches of this size stays bounded in the mean square.

    From the exact recursion of the second moment U = E[u uᵀ] for batches drawn without replacement, independently at
    every step: U ← A U A + lr² M Cov M with A = I - lr M and, block-diagonal parts taken by sample,
    Cov = (N/B - 1) (N/(N-1) blockdiag U - U/(N-1)). Full batch: 2/λ₁.

    Args:
        weighted: M (n, n), on the N samples that batches are drawn from.
        samples: N.
        size: B, samples in a batch.
        tolerance: relative width at which the bisection stops.

    Plain SGD on a quadratic loss with a fixed kernel. For other losses it is the statement about M at the present
    outputs. Passes over shuffled data are a little more stable than independent draws. Infinite for a zero kernel.

    Raises:
        InputError: a batch size outside 1 to N, or n no multiple of N.

    Cost: O(n³) for each of some hundred products; meant for n up to a few hundred.
    Source: Ma, Bassily and Belkin 2018 (stability of SGD in the second moment); the recursion is derived here.
    """
    _checked(weighted, samples, size)
    rates, vectors = np.linalg.eigh((weighted + weighted.T) / 2)
    kept = rates > len(rates) * np.finfo(float).eps * max(rates[-1], 0)
    if not kept.any():
        return float("inf")
    rates, vectors = rates[kept], vectors[:, kept]
    full = 2 / rates[-1]
    if size == samples:
        return float(full)
    low, high = 0.0, float(full)
    start = np.eye(len(weighted))
    while high - low > tolerance * full:
        lr = (low + high) / 2
        growth, start = _response(rates, vectors, samples, size, lr, start)
        low, high = (lr, high) if growth < 1 else (low, lr)
    return (low + high) / 2


def _response(rates: Array, vectors: Array, samples: int, size: int, lr: float, start: Array) -> tuple[float, Array]:
    """Return the spectral radius of (1 - A·A)⁻¹ ∘ lr² M Cov M, and its eigenmatrix.

    Both maps keep matrices positive semi-definite, so this radius passes 1 exactly where that of their sum does
    (regular splitting), and unlike the sum's it is not crowded by the slow modes near 1.
    """
    pairs = rates[:, None] * rates[None, :]
    # lr² λᵢλⱼ / (1 - (1 - lr λᵢ)(1 - lr λⱼ))
    factor = lr * pairs / (rates[:, None] + rates[None, :] - lr * pairs)
    state, growth = start, 0.0
    for _ in range(300):
        inner = vectors.T @ _covariance(state, samples, size) @ vectors
        state = vectors @ (factor * inner) @ vectors.T
        norm = float(np.trace(state))
        if not norm > 0:
            return 0.0, start
        state = state / norm
        if abs(norm - growth) < 1e-9 * norm:
            return norm, state
        growth = norm
    return growth, state


def _covariance(second: Array, samples: int, size: int) -> Array:
    """Return Cov of w ∘ u over batches, w = N/B on the batch and 0 elsewhere, given E[u uᵀ]."""
    outputs = len(second) // samples
    same = np.kron(np.eye(samples), np.ones((outputs, outputs)))
    spread = (samples / size - 1) / (samples - 1) if samples > 1 else 0.0
    return np.asarray(spread * (samples * same * second - second))


def _checked(weighted: Array, samples: int, size: int) -> None:
    if not 1 <= size <= samples or len(weighted) % samples:
        raise InputError(
            f"batches of 1 to N samples and a kernel of N x C rows are needed, got size {size}, N {samples} and "
            f"{weighted.shape}"
        )


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The loss of a quadratic model under SGD, step by step: of the mean outputs, and its own mean.

    Attributes:
        of_mean: (steps + 1,) loss at the mean outputs, which is the full-batch forecast.
        expected: (steps + 1,) mean loss over draws of the batches, at least as large.
    """

    of_mean: Array
    expected: Array

    @property
    def in_the_mean_only(self) -> bool:
        """True when batch noise adds more than a tenth to the final loss: then the forecast is of mean outputs only."""
        return bool(self.expected[-1] > 1.1 * self.of_mean[-1])


def batch_forecast(
    weighted: Array, residual: Array, rates: Sequence[float] | Array, samples: int, size: int
) -> BatchForecast:
    """Follow the first two moments of the residual under SGD with batches of this size.

    Args:
        weighted: M (n, n).
        residual: u = S⁺ g (n,); the loss above its minimum is |u|²/2.
        rates: learning rate of each step.
        samples: N.
        size: B.

    Exact for squared error, a fixed kernel and batches drawn independently at every step. Epochs of shuffled data
    break the independence: their mean deviates by a few per cent and their noise is smaller.

    Raises:
        InputError: see `mean_square_limit`.

    Cost: O(n³) per step. Source: derived here; see `mean_square_limit`.
    """
    _checked(weighted, samples, size)
    mean, second = residual.copy(), np.outer(residual, residual)
    of_mean, expected = [mean @ mean / 2], [np.trace(second) / 2]
    for lr in rates:
        step = np.eye(len(weighted)) - lr * weighted
        second = step @ second @ step.T + lr**2 * weighted @ _covariance(second, samples, size) @ weighted.T
        mean = step @ mean
        of_mean.append(mean @ mean / 2)
        expected.append(np.trace(second) / 2)
    return BatchForecast(np.array(of_mean), np.array(expected))
