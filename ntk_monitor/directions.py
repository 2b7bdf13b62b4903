"""Named directions of the residual: a class, an output, a task, a loss term, a wave, instead of "mode 7".

N samples, C outputs, n = N·C rows, flattened sample-major. Every vector lives in the coordinates of u = S⁺ g, where
g = dL/df is the loss gradient and S Sᵀ = d²L/df² its curvature, both with the loss's own 1/N: there the residual of a
fixed kernel moves by du = -lr M u, M = Sᵀ K S. Two kinds of direction:

- a group of rows (`parts`): the residual itself, restricted to the group. Nothing cancels, and the squares over a
  partition into groups add up to |u|².
- a pattern of the outputs (`pattern`, `projection`): outputs that are wrong by w leave the residual Sᵀ w.

Along d the residual is dᵀu / |d| and its rate dᵀM d / |d|², in 1 / learning rate: the speed at which the direction
would be learned alone. What others add is in `interference`. A rate is a speed of this moment, not a time-to-learn: for
the ten classes of digits under cross-entropy ln 10/(lr·rate) was 5 to 20 times too early. Simulate the rows of `matrix`
instead (`dynamics.flow`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

MOST = 12
"""Classes or outputs that get directions of their own by default; more would be a list nobody reads."""


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction with a name.

    Attributes:
        name: how it is shown to people, e.g. "class 3".
        vector: (n,) in the coordinates of u = S⁺ g, any length; zero where the residual has no part there.
    """

    name: str
    vector: Array

    def __post_init__(self) -> None:
        """Refuse what has no length.

        Raises:
            InputError: the vector is not one-dimensional and finite.
        """
        if self.vector.ndim != 1 or not np.isfinite(self.vector).all():
            raise InputError(
                f"direction {self.name!r} must be a finite vector (N·C,), got shape {self.vector.shape}; "
                "flatten it sample by sample"
            )


def default_groups(
    samples: int, outputs: int, labels: NDArray[Any] | None = None, names: Sequence[str] | None = None
) -> dict[str, Mask]:
    """Return what a stranger would ask about: one group per class (2 to 12 of them), else one per output, else none.

    Args:
        samples: N.
        outputs: C, after flattening.
        labels: (N,) class of each sample, or None.
        names: names of the classes by label, or of the outputs; default "class 3" and "output 3".
    """
    if labels is not None and len(labels) == samples and 2 <= np.unique(labels).size <= MOST:
        return class_groups(labels, outputs, names)
    return output_groups(samples, outputs, names) if labels is None and 2 <= outputs <= MOST else {}


def class_groups(labels: NDArray[Any], outputs: int, names: Sequence[str] | None = None) -> dict[str, Mask]:
    """Return class name → mask (N, C) of all outputs of its samples; classes without a sample are left out."""
    found = [int(label) for label in np.unique(labels)]
    named = [names[label] if names is not None and 0 <= label < len(names) else f"class {label}" for label in found]
    return {
        name: np.repeat((labels == label)[:, None], outputs, axis=1) for name, label in zip(named, found, strict=True)
    }


def output_groups(samples: int, outputs: int, names: Sequence[str] | None = None) -> dict[str, Mask]:
    """Return output name → mask (N, C) of that output (or task) over all samples.

    Raises:
        InputError: another number of names than outputs.
    """
    if names is not None and len(names) != outputs:
        raise InputError(f"one name per output is needed, got {len(names)} names for {outputs} outputs")
    shown = list(names) if names is not None else [f"output {i}" for i in range(outputs)]
    return {name: np.tile(np.arange(outputs) == i, (samples, 1)) for i, name in enumerate(shown)}


def block_groups(samples: int, sizes: Mapping[str, int]) -> dict[str, Mask]:
    """Return name → mask (N, C) of consecutive outputs, e.g. the terms of a physics-informed loss or several heads."""
    ends = np.cumsum(list(sizes.values()))
    columns = np.arange(int(ends[-1]) if len(ends) else 0)
    masks = [(columns >= end - size) & (columns < end) for end, size in zip(ends, sizes.values(), strict=True)]
    return {name: np.tile(mask, (samples, 1)) for name, mask in zip(sizes, masks, strict=True)}


def parts(groups: Mapping[str, Mask], residual: Array) -> tuple[Direction, ...]:
    """Return one direction per group: the residual u (n,) restricted to it, so that |dᵀu| / |d| is its norm there.

    Raises:
        InputError: a mask of another size than the residual.
    """
    return tuple(
        Direction(name, np.where(_rows(name, mask, residual.size), residual, 0.0)) for name, mask in groups.items()
    )


def sample_shares(residual: Array, samples: int) -> Array:
    """Return the share of |u|² on each sample, (N,), summing to 1; zeros for a residual of zero.

    Under cross-entropy a sample whose label has probability p holds 1/p - 1: late in training one wrong sample can hold
    a third of the whole residual, and bands and directions are then mostly about that sample.
    """
    energy = np.square(residual).reshape(samples, -1).sum(axis=1)
    total = float(energy.sum())
    return np.asarray(energy / total if total > 0 else energy)


def pattern(name: str, outputs: Array, root: Array) -> Direction:
    """Return the direction of outputs that are wrong by `outputs` (N, C): d = Sᵀ w.

    Args:
        name: how it is shown to people.
        outputs: w, in output units; its scale does not matter.
        root: S (N, C, C), or (N, C) where it is diagonal (`losses.Terms.root`).

    Raises:
        InputError: another shape than the root's.
    """
    if outputs.shape != root.shape[:2]:
        raise InputError(f"direction {name!r} needs one number per output, {root.shape[:2]}, got {outputs.shape}")
    weighted = outputs * root if root.ndim == 2 else np.einsum("nij,ni->nj", root, outputs)
    return Direction(name, weighted.reshape(-1))


def projection(name: str, patterns: Sequence[Array], root: Array, residual: Array) -> Direction:
    """Return the part of the residual u (n,) in the span of several patterns, e.g. sine and cosine of one wave.

    The projection takes the phase from the residual, so no part of it is missed.
    """
    columns = np.stack([pattern(name, w, root).vector for w in patterns], axis=1)
    # Least squares, not a QR: patterns may coincide on the probe (a wave above its resolution).
    weights = np.linalg.lstsq(columns, residual, rcond=None)[0]
    return Direction(name, columns @ weights)


def class_pair(first: int, second: int, labels: NDArray[Any], root: Array) -> Direction:
    """Return the direction in which samples of two classes are taken for each other; outputs are the classes' logits.

    Outputs of samples of the first class too high at the second and too low at the first, and the reverse.

    Raises:
        InputError: a class that has no output.
    """
    n, c = root.shape[:2]
    if not (0 <= first < c and 0 <= second < c and first != second and len(labels) == n):
        raise InputError(f"two different classes of 0..{c - 1} and {n} labels are needed, got {first}, {second}")
    sign = (labels == second).astype(np.float64) - (labels == first)
    w = np.zeros((n, c))
    w[:, first], w[:, second] = sign, -sign
    return pattern(f"class {first} against {second}", w, root)


def waves(inputs: Array, root: Array, residual: Array, *, most: int = 4) -> tuple[Direction, ...]:
    """Return Fourier modes of 1- to 3-dimensional inputs: the residual's part in each wave, sine and cosine together.

    Wave numbers count periods over the extent of the data along each axis, 0 to `most`; of k and -k one is kept.
    Waves over a few samples or over scattered ones are not orthogonal, so their squares need not add up to |u|².

    Args:
        inputs: (N, D), D ≤ 3.
        root: S, see `pattern`; a wave has the same phase at every output.
        residual: u (n,).
        most: highest wave number; (2·most + 1)^D / 2 directions.

    Raises:
        InputError: inputs that are not (N, 1 to 3).
    """
    if inputs.ndim != 2 or not 1 <= inputs.shape[1] <= 3 or len(inputs) != len(root):
        raise InputError(f"waves need inputs ({len(root)}, 1 to 3), got {inputs.shape}; pass the coordinates alone")
    low, extent = inputs.min(axis=0), np.ptp(inputs, axis=0)
    phase = 2 * np.pi * (inputs - low) / np.where(extent > 0, extent, 1.0)
    # The first number that is not zero is positive: k and -k are one wave.
    every = [
        k
        for k in product(*[range(-most, most + 1)] * inputs.shape[1])
        if next((number for number in k if number), 0) >= 0
    ]
    found: list[Direction] = []
    for k in sorted(every, key=lambda k: sum(map(abs, k))):
        angle = phase @ np.array(k, dtype=np.float64)
        shapes = [np.cos(angle), np.sin(angle)] if any(k) else [np.ones(len(angle))]
        patterns = [np.repeat(shape[:, None], root.shape[1], axis=1) for shape in shapes]
        name = "wave " + (str(k[0]) if len(k) == 1 else f"({', '.join(map(str, k))})")
        found.append(projection(name, patterns, root, residual))
    return tuple(found)


def matrix(directions: Sequence[Direction]) -> Array:
    """Return unit vectors as rows (D, n), zero for a direction without length; what a simulation projects on."""
    rows: Array = np.stack([d.vector for d in directions])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0))


def residuals(directions: Sequence[Direction], residual: Array) -> Array:
    """Return dᵀu / |d| of each direction, (D,), sqrt(loss units); 0 for one without length."""
    return np.asarray(matrix(directions) @ residual)


def rates(directions: Sequence[Direction], eigenvalues: Array, vectors: Array) -> Array:
    """Return dᵀM d / |d|² of each direction, (D,), 1 / learning rate; NaN for one without length.

    Args:
        directions: D of them.
        eigenvalues: (n,) of M (`Modes.rates`).
        vectors: (n, n) eigenvectors of M, one per column. Cost D n².
    """
    rows = matrix(directions)
    found = np.square(rows @ vectors) @ eigenvalues
    return np.where(rows.any(axis=1), found, np.nan)


def interference(kernel: Array, gradient: Array, groups: Mapping[str, Mask]) -> Array:
    """Return gₐᵀ K g_b of every pair of groups, (D, D), loss units / learning rate, symmetric.

    A step of gradient descent on group b alone, with a small learning rate lr, changes group a's part of the loss by
    -lr gₐᵀ K g_b: negative entries are groups that undo each other. The diagonal is residual² · rate of `parts`
    where groups are of whole samples or S is diagonal (cross-entropy couples the outputs of a sample). Sums to |dL/dθ|²
    when the groups partition the rows. Signs depend on the residual of the moment.

    Args:
        kernel: K unnormalised, (N, C, N, C) or (n, n).
        gradient: g = dL/df (N, C).
        groups: name → mask (N, C).

    Source: Doan et al. 2021 ("NTK overlap matrix", without the residual). Cost D n².
    """
    n = gradient.size
    g = gradient.reshape(-1)
    rows = np.stack([np.where(_rows(name, mask, n), g, 0.0) for name, mask in groups.items()])
    found = rows @ kernel.reshape(n, n) @ rows.T
    return np.asarray((found + found.T) / 2)


def cosines(matrix: Array) -> Array:
    """Return an interference matrix as cosines between the groups' gradients in the parameters, -1 to 1, (D, D).

    NaN where a group has no gradient.
    """
    scale = np.sqrt(np.clip(np.diag(matrix), 0.0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(matrix / scale[:, None] / scale)


def _rows(name: str, mask: Mask, size: int) -> Mask:
    if mask.size != size:
        raise InputError(f"group {name!r} must mark each of {size} rows (samples × outputs), got shape {mask.shape}")
    return mask.reshape(-1)
