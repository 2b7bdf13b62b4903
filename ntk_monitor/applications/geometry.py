"""How a network arranges its samples: distances in the kernel, a picture of them, and whether the inputs explain them.

K (n, n) kernel, summed over outputs. d²_ij = K_ii + K_jj - 2 K_ij is the squared distance between the gradients of two
samples: samples that are near learn alike. Kernel PCA draws it; with all components the distances are exact, with few
they come out too short.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.geometry_words import told
from ntk_monitor.applications.report import Report
from ntk_monitor.batch import Batch, size
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk

Array = NDArray[np.float64]
Method: TypeAlias = Literal["pearson", "spearman"]

EXAMPLE = "handwritten digits in a small network, before, during and after training"


@dataclass(frozen=True, slots=True)
class Embedding:
    """Kernel PCA: a picture of the samples.

    Attributes:
        points: (n, k) coordinates, in √ of the unit of K; each column is up to sign.
        explained: (r,) share of the variance that each component explains, all of them.
    """

    points: Array
    explained: Array


@dataclass(frozen=True, slots=True)
class Correlation:
    """Correlation of two sets of pairwise distances.

    Attributes:
        value: from -1 to 1; NaN if one set is constant.
        p_value: of the Mantel test: share of the orders of the samples that correlate as well. NaN if not asked for.
    """

    value: float
    p_value: float


def kernel_distances(kernel: Any) -> Array:
    """Return √(K_ii + K_jj - 2 K_ij), (n, n); a square that rounding makes negative is 0.

    Raises:
        InputError: not a finite square kernel.
    """
    k = _kernel(kernel)
    diagonal = np.diag(k)
    found = np.sqrt(np.clip(diagonal[:, None] + diagonal - 2 * k, 0.0, None))
    np.fill_diagonal(found, 0.0)
    return np.asarray(found)


def kernel_pca(kernel: Any, components: int | None = None) -> Embedding:
    """Return the leading components of the double-centred kernel.

    Distances in k components never exceed those of the kernel; with all components they are equal.

    Args:
        kernel: (n, n), symmetric.
        components: k; None: all that stand out from rounding.

    Raises:
        InputError: not a finite square kernel, or fewer than one component.

    Cost: one eigendecomposition, O(n³).

    Source: Schölkopf, Smola and Müller 1998.
    """
    k = _kernel(kernel)
    if components is not None and components < 1:
        raise InputError(f"components must be at least 1, got {components}")
    centred = k - k.mean(axis=0) - k.mean(axis=1)[:, None] + k.mean()
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    # eigh is exact to n·ε of the largest eigenvalue of what it was given, the mean included.
    kept = values > len(k) * np.finfo(np.float64).eps * max(float(np.abs(k).max()) * len(k), 0.0)
    values, vectors = values[kept], vectors[:, kept]
    total = values.sum()
    points = np.asarray(vectors * np.sqrt(values))
    return Embedding(points[:, :components], values / total if total > 0 else values)


def distance_correlation(
    kernel: Any, x: Any, method: Method = "pearson", *, mantel: int = 999, seed: int = 0
) -> Correlation:
    """Return how distances in the kernel correlate with distances between the inputs.

    The p-value is that of a permutation test, one-sided. The ordinary one of a correlation takes n (n-1)/2 distances
    for independent and is wrong: at a level of 0.05 it found 18 to 24 of 60 unrelated sets "significant".

    Args:
        kernel: (n, n).
        x: (n, ...) inputs, flattened; Euclidean distances.
        method: "pearson", or "spearman" for ranks.
        mantel: random orders of the samples; 0 for no p-value.
        seed: of the orders.

    Raises:
        InputError: shapes that do not fit, fewer than three samples, or an unknown method.

    Cost: O(mantel n²).

    Source: Mantel 1967.
    """
    a, inputs = kernel_distances(kernel), _flat(x)
    if method not in ("pearson", "spearman"):
        raise InputError(f'method must be "pearson" or "spearman", got {method!r}')
    if len(inputs) != len(a) or len(a) < 3 or mantel < 0:
        raise InputError(
            f"wanted inputs of the {len(a)} samples of the kernel, at least 3, and mantel ≥ 0, got {len(inputs)} "
            f"inputs and mantel={mantel}"
        )
    upper = np.triu_indices(len(a), 1)
    b = input_distances(inputs)
    one, other = _standard(a[upper], method), _standard(b[upper], method)
    value = float(one @ other)
    if not np.isfinite(value) or mantel == 0:
        return Correlation(value, float("nan"))
    square = np.zeros_like(a)
    square[upper] = other
    square += square.T
    draw = np.random.default_rng(seed)
    as_good = 0
    for _ in range(mantel):
        order = draw.permutation(len(a))
        as_good += float(one @ square[order[upper[0]], order[upper[1]]]) >= value - 1e-12
    return Correlation(value, (1 + as_good) / (1 + mantel))


def input_distances(x: Any) -> Array:
    """Return Euclidean distances between inputs (n, ...), flattened, as (n, n)."""
    flat = _flat(x)
    # By differences: |a|² + |b|² - 2ab would cancel for samples that are near. One row at a time, for memory.
    return np.stack([np.sqrt(((flat - row) ** 2).sum(axis=1)) for row in flat])


def aligned(points: Array, reference: Array) -> tuple[Array, float]:
    """Return the points turned (and mirrored) to lie as near as possible to the reference, and what remains.

    Axes of a kernel PCA have no sign and turn where eigenvalues are near; without this a trajectory jumps.

    Args:
        points: (n, k), centred.
        reference: (n, k), centred.

    Returns:
        The turned points and |turned - reference|² / |reference|².

    Raises:
        InputError: different shapes.

    Source: Schönemann 1966 (orthogonal Procrustes).
    """
    if points.shape != reference.shape or points.ndim != 2:
        raise InputError(f"wanted two sets of points of one shape (n, k), got {points.shape} and {reference.shape}")
    u, _, v = np.linalg.svd(points.T @ reference)
    turned = points @ (u @ v)
    size_of = float((reference**2).sum())
    return turned, float(((turned - reference) ** 2).sum() / size_of) if size_of > 0 else float("nan")


def trajectory(kernels: Sequence[Any], components: int = 2) -> list[Array]:
    """Return the picture of each kernel of the same samples, each turned to the one before.

    Kernels are divided by their mean diagonal first, so that growth does not hide movement.

    Raises:
        InputError: no kernels, or kernels of different samples.
    """
    found: list[Array] = []
    for kernel in kernels:
        k = _kernel(kernel)
        points = kernel_pca(k / (np.diag(k).mean() or 1.0), components).points
        # A kernel of few directions has fewer columns than asked for.
        points = np.pad(points, ((0, 0), (0, components - points.shape[1])))
        found.append(aligned(points, found[-1])[0] if found else points)
    if not found:
        raise InputError("a trajectory needs at least one kernel, got none")
    return found


def study(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    kernel: Any = None,
    states: Mapping[str, Mapping[str, Tensor]] | None = None,
    components: int = 2,
    mantel: int = 999,
) -> Report:
    """Return how a network arranges samples, whether the inputs explain it, and how it moved over checkpoints.

    Args:
        model: any eager module; only read.
        x: (n, ...) a floating tensor of inputs.
        y: (n,) classes, to compare within and between them; other targets are left out.
        kernel: (n, n) or (n, C, n, C) of these samples, if it is known already.
        states: name → state_dict of checkpoints, in order, for the trajectory; the model's own weights come last.
        components: of the picture.
        mantel: random orders of the permutation test.

    Raises:
        InputError: inputs that have no Euclidean distance (token ids, dicts), or fewer than three samples.
        NetworkError: a module that cannot be followed exactly.

    Cost: one trace kernel per state and O(n³ + mantel n²).
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(
            f"geometry compares with distances between inputs, which need one floating tensor, got {type(x).__name__}"
            f"{f' of {x.dtype}' if isinstance(x, Tensor) else ''}; pass embedded inputs"
        )
    if size(x) < 3:
        raise InputError(f"distances need at least 3 samples, got {size(x)}")
    k = _sum_kernel(model, x) if kernel is None else _summed(kernel)
    kernels = {name: _sum_kernel(_loaded(model, state), x) for name, state in (states or {}).items()}
    if kernels:
        kernels["now"] = k
    embedding = kernel_pca(k, components)
    found = {method: distance_correlation(k, x, method, mantel=mantel) for method in ("pearson", "spearman")}
    paths = dict(zip(kernels, trajectory(list(kernels.values())), strict=True)) if kernels else {}
    return told(
        points=embedding.points,
        explained=embedding.explained,
        correlations={name: (one.value, one.p_value) for name, one in found.items()},
        distances=(input_distances(x), kernel_distances(k)),
        classes=_classes(y, len(k)),
        paths=paths,
    )


def example(quick: bool = False) -> Report:
    """Return the study of handwritten digits in a small network, with checkpoints from before and during training."""
    from sklearn.datasets import load_digits

    from ntk_monitor.guard import undisturbed

    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(inputs / 16.0), torch.as_tensor(labels).long()
    few = torch.nonzero(y < 4)[:, 0]
    states: dict[str, Mapping[str, Tensor]] = {}
    with undisturbed(seed=0):
        model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(161):
            if step in (0, 20, 80):
                states[f"step {step}"] = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
            optimizer.step()
    shown = few[: 24 if quick else 100]
    return study(model, x[shown], y[shown], states=states, mantel=99 if quick else 999)


def _sum_kernel(model: nn.Module, x: Tensor) -> Array:
    return _kernel(empirical_ntk(model, x, outputs="trace"))


def _summed(kernel: Any) -> Array:
    k = _array(kernel)
    return _kernel(np.einsum("ncmc->nm", k) if k.ndim == 4 else k)


def _loaded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(dict(state))
    return other


def _kernel(kernel: Any) -> Array:
    k = _array(kernel)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not np.isfinite(k).all():
        raise InputError(f'wanted a finite kernel (n, n), got shape {k.shape}; use outputs="trace" for several outputs')
    return (k + k.T) / 2


def _array(values: Any) -> Array:
    held = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(held, dtype=np.float64)


def _flat(x: Any) -> Array:
    held = _array(x)
    return held.reshape(len(held), -1)


def _standard(distances: Array, method: str) -> Array:
    """Return distances (or their ranks) with mean 0 and length 1; NaN where they are all the same."""
    if method == "spearman":
        from scipy.stats import rankdata

        distances = rankdata(distances)
    centred = distances - distances.mean()
    length = np.linalg.norm(centred)
    flat = length <= 1e-12 * max(float(np.linalg.norm(distances)), np.finfo(np.float64).tiny)
    return np.full_like(centred, np.nan) if flat else centred / length


def _classes(y: Any, samples: int) -> Array | None:
    if y is None:
        return None
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.shape != (samples,) or labels.dtype.kind not in "iub" or not 2 <= len(np.unique(labels)) <= samples // 2:
        return None
    return labels.astype(np.float64)
