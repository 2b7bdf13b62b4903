"""Slow, obvious twins of the metrics and of batch noise: loops, refits and draws."""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def means(kernel: Array, samples: int) -> Array:
    outputs = len(kernel) // samples
    found = np.zeros((samples, samples))
    for n in range(samples):
        for m in range(samples):
            for c in range(outputs):
                found[n, m] += kernel[n * outputs + c, m * outputs + c] / outputs
    return found


def entropy_rank(kernel: Array) -> float:
    values = np.linalg.svd(kernel, compute_uv=False)
    total = sum(values)
    return float(np.exp(sum(-v / total * np.log(v / total) for v in values if v > 1e-14 * total)))


def mode_energies(kernel: Array, targets: Array) -> list[tuple[float, float]]:
    """(eigenvalue, share of the centred targets), largest eigenvalue first; from the singular vectors."""
    centred = [[t[d] - sum(s[d] for s in targets) / len(targets) for d in range(targets.shape[1])] for t in targets]
    total = sum(v * v for row in centred for v in row)
    left, values, _ = np.linalg.svd(kernel)
    found = []
    for i in range(len(values)):
        energy = 0.0
        for d in range(targets.shape[1]):
            energy += sum(left[n, i] * centred[n][d] for n in range(len(targets))) ** 2
        found.append((float(values[i]), energy / total))
    return found


def class_contrast(kernel: Array, labels: NDArray[np.int64]) -> float:
    same: list[float] = []
    different: list[float] = []
    for i, j in itertools.combinations(range(len(labels)), 2):
        cosine = kernel[i, j] / (kernel[i, i] * kernel[j, j]) ** 0.5
        (same if labels[i] == labels[j] else different).append(cosine)
    return float(np.mean(same) - np.mean(different))


def sample_loo(kernel: Array, targets: Array, ridge: float, intercept: bool) -> Array:
    """Refit without each sample in turn; the intercept is a free weight of the model."""
    samples, columns = targets.shape
    if len(kernel) == samples:
        kernel = np.asarray(np.kron(kernel, np.eye(columns)), dtype=np.float64)
    residuals = np.zeros((samples, columns))
    for n in range(samples):
        out = np.arange(n * columns, (n + 1) * columns)
        rest = np.setdiff1d(np.arange(samples * columns), out)
        y = targets.reshape(-1)[rest]
        inverse = np.linalg.inv(kernel[np.ix_(rest, rest)] + ridge * np.eye(len(rest)))
        constants = np.tile(np.eye(columns), (samples - 1, 1))
        free = np.zeros(columns)
        if intercept:
            free = np.linalg.solve(constants.T @ inverse @ constants, constants.T @ inverse @ y)
        predicted = free + kernel[np.ix_(out, rest)] @ inverse @ (y - constants @ free)
        residuals[n] = targets[n] - predicted
    return residuals


def gcv(kernel: Array, y: Array, ridge: float) -> float:
    n = len(y)
    hat = kernel @ np.linalg.inv(kernel + ridge * np.eye(n))
    return float(np.mean((y - hat @ y) ** 2) / (1 - np.trace(hat) / n) ** 2)


def mode_steps(rate: float, lr: float, left: float, options: dict[str, Any]) -> float:
    """Run torch's SGD on ½ rate x² and read the decay of the envelope off the last thousand steps."""
    import torch

    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr, **options)
    sizes = []
    for _ in range(400):
        optimizer.zero_grad()
        (rate * x**2 / 2).sum().backward()
        optimizer.step()
        sizes.append(abs(float(x.detach())))
    # The largest of each half: an oscillation's envelope.
    early, late = np.array(sizes[50:200]), np.array(sizes[200:350])
    decay = (late.max() / early.max()) ** (1 / 150)
    return float(np.log(left) / np.log(decay))


def noise_scale(gradients: Array) -> tuple[float, float]:
    """(|G|², tr Σ), both unbiased: mean over pairs of different samples; trace of the sample covariance."""
    m = len(gradients)
    pairs = [gradients[i] @ gradients[j] for i in range(m) for j in range(m) if i != j]
    return float(np.mean(pairs)), float(np.trace(np.atleast_2d(np.cov(gradients.T, ddof=1))))


def signal_error(gradients: Array) -> float:
    """Jackknife standard error of |G|², by leaving samples out and starting over."""
    m = len(gradients)
    without = [noise_scale(np.delete(gradients, i, axis=0))[0] for i in range(m)]
    return float(np.sqrt((m - 1) * np.var(without)))


def batch_losses(weighted: Array, residual: Array, lr: float, samples: int, size: int, steps: int) -> Array:
    """Loss after each step of every possible sequence of batches, averaged: (steps + 1,)."""
    outputs = len(residual) // samples
    batches = list(itertools.combinations(range(samples), size))
    found = [float(residual @ residual / 2)]
    states = [residual]
    for _ in range(steps):
        moved = []
        for u in states:
            for batch in batches:
                w = np.zeros(samples)
                w[list(batch)] = samples / size
                moved.append(u - lr * weighted @ (np.repeat(w, outputs) * u))
        states = moved
        found.append(float(np.mean([u @ u / 2 for u in states])))
    return np.array(found)


def mean_square_radius(weighted: Array, lr: float, samples: int, size: int) -> float:
    """Spectral radius of the second-moment map on modes with a rate, as the mean of U_b ⊗ U_b over all batches."""
    outputs = len(weighted) // samples
    rates, vectors = np.linalg.eigh(weighted)
    kept = vectors[:, rates > 1e-10 * rates[-1]]
    total = np.zeros((kept.shape[1] ** 2,) * 2)
    batches = list(itertools.combinations(range(samples), size))
    for batch in batches:
        w = np.zeros(samples)
        w[list(batch)] = samples / size
        step = kept.T @ (np.eye(len(weighted)) - lr * weighted @ np.diag(np.repeat(w, outputs))) @ kept
        total += np.kron(step, step) / len(batches)
    return float(np.abs(np.linalg.eigvals(total)).max())
