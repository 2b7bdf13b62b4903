"""Slow, obvious twins for modes, blocks and directions: projectors written out, all permutations, all cuts."""

from itertools import combinations, pairwise, permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def projector(columns: Array) -> Array:
    return np.asarray(columns @ columns.T)


def overlap(before: Array, after: Array) -> float:
    """tr(P₀ P₁) / d."""
    return float(np.trace(projector(before) @ projector(after)) / before.shape[1])


def sine(before: Array, after: Array) -> float:
    """Sine of the largest angle between two subspaces of one dimension."""
    return float(np.linalg.norm((np.eye(len(before)) - projector(after)) @ projector(before), 2))


def counterpart(before: Array, after: Array) -> tuple[int, ...]:
    """The modes of which more than half lies in the span of `before`, measured by projecting each."""
    p = projector(before)
    return tuple(j for j in range(after.shape[1]) if float(np.linalg.norm(p @ after[:, j])) ** 2 > 0.5)


def best_cut(before: Any, after: Any, top: int, least: float, spread: float) -> tuple[int, int, float]:
    """Modes, blocks and total overlap of the best way to confirm blocks of neighbours, over every set of intervals."""
    runs = []
    for start, stop in combinations(range(top + 1), 2):
        if before.rates[stop - 1] * spread < before.rates[start]:
            continue
        block = before.vectors[:, start:stop]
        columns = list(counterpart(block, after.vectors))
        if len(columns) != stop - start:
            continue
        share = overlap(block, after.vectors[:, columns])
        rest0 = np.delete(before.rates, range(start, stop))
        rest1 = np.delete(after.rates, columns)
        gap0 = min((abs(a - b) for a, b in product(before.rates[start:stop], rest0)), default=np.inf)
        gap1 = min((abs(a - b) for a, b in product(after.rates[columns], rest1)), default=np.inf)
        wide = (1 - least) ** -0.5
        if share >= least and gap0 > wide * before.floor and gap1 > wide * after.floor:
            runs.append((start, stop, min(share, 1.0)))
    best = (0, 0, 0.0)
    for size in range(1, top + 1):
        for chosen in combinations(runs, size):
            if all(one[1] <= other[0] for one, other in pairwise(chosen)):
                score = sum(b - a for a, b, _ in chosen), size, sum(s for _, _, s in chosen)
                best = max(best, score)
    return best


def assignment(squares: Array) -> float:
    """Largest total overlap over all permutations."""
    n = len(squares)
    return max(float(sum(squares[i, p[i]] for i in range(n))) for p in permutations(range(n)))


def interference(kernel: Array, gradient: Array, masks: list[NDArray[np.bool_]]) -> Array:
    """gₐᵀ K g_b, pair of rows by pair of rows; kernel (N, C, N, C)."""
    n, c = gradient.shape
    found = np.zeros((len(masks), len(masks)))
    for a, b in product(range(len(masks)), repeat=2):
        for i, j, k, m in product(range(n), range(c), range(n), range(c)):
            if masks[a][i, j] and masks[b][k, m]:
                found[a, b] += gradient[i, j] * kernel[i, j, k, m] * gradient[k, m]
    return found


def out_of_reach(energy: list[float], times: list[float], remaining: float) -> float:
    total, late = 0.0, 0.0
    for value, time in zip(energy, times, strict=True):
        total += value
        late += value if time > remaining else 0.0
    return late / total
