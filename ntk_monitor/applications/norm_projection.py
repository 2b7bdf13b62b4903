"""What a normalisation layer does to the kernel of the values it sees: it projects, and divides by σ.

Values of one group: du/dz = (1/σ)(I - 11ᵀ/P - u uᵀ/P), u = (z - μ)/σ: two directions of each group are removed (with
ε = 0), one by RMSNorm, none by BatchNorm in evaluation. Behind the layer the kernel of earlier parameters is A K Aᵀ,
A = γ du/dz. A projection alone only lowers eigenvalues; 1/σ may raise them again.

Source: Santurkar et al. 2018 (BatchNorm's Jacobian); Cauchy's interlacing theorem.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.norm_layers import Groups, groups_of
from ntk_monitor.applications.skips import twin
from ntk_monitor.batch import Batch, size, take
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import measured
from ntk_monitor.network import Forward, Mode, Network, call

Array: TypeAlias = NDArray[np.float64]

_ROWS, _MOST_ROWS, _SAMPLES = 256, 1024, 4
_TINY = 1e-10


@dataclass(frozen=True, slots=True)
class Projection:
    """Kernels of the values before and behind a layer, (m, m), of all parameters but the layer's own.

    Attributes:
        before: of z.
        after: of γ u + β.
        predicted: A K Aᵀ.
        projected: Π K Π, with Π the projection alone.
        removed: directions that Π removes.
        group: P.
    """

    before: Array
    after: Array
    predicted: Array
    projected: Array
    removed: int
    group: int

    @property
    def error(self) -> float:
        """Departure of the kernel behind the layer from the formula, relative."""
        return float(np.linalg.norm(self.after - self.predicted) / max(float(np.linalg.norm(self.after)), 1e-300))

    @property
    def kept(self) -> float:
        """Share of the trace that the projection leaves, 0 to 1."""
        return float(np.trace(self.projected) / np.trace(self.before))

    @property
    def top(self) -> tuple[float, float, float]:
        """The largest eigenvalue before the layer, after the projection alone, and behind the layer."""
        before, projected, after = (float(np.linalg.eigvalsh(k)[-1]) for k in (self.before, self.projected, self.after))
        return before, projected, after

    @property
    def risen(self) -> int:
        """How many of the m eigenvalues, in order, are larger behind the layer than before it."""
        before, after = np.linalg.eigvalsh(self.before), np.linalg.eigvalsh(self.after)
        return int((after > before + _TINY * max(before[-1], after[-1])).sum())


def derivative(z: Array, groups: Groups, *, alone: bool = False) -> Array:
    """Return A (m, m) for values z (n, R) of n samples, flattened sample-major; with `alone` the projection Π instead.

    Args:
        z: values before the layer.
        groups: of these R values.
        alone: without γ and 1/σ, and exactly idempotent whatever ε is.
    """
    n, r = z.shape
    flat, found = z.reshape(-1), np.zeros((n * r, n * r))
    gains = np.tile(groups.gains.numpy(), n)
    if groups.scales is not None:
        return np.eye(n * r) if alone else np.diag(gains / np.tile(groups.scales.numpy(), n))
    labels = groups.labels.numpy()
    each = np.tile(labels, n) if groups.across else (labels + np.arange(n)[:, None] * (labels.max() + 1)).reshape(-1)
    for label in np.unique(each):
        rows = np.flatnonzero(each == label)
        centre = flat[rows] - (flat[rows].mean() if groups.centred else 0.0)
        sigma = np.sqrt((centre**2).mean() + groups.eps)
        length = (centre**2).sum() if alone else sigma**2 * len(rows)
        block = np.eye(len(rows)) - (1 / len(rows) if groups.centred else 0.0)
        if length > 0:
            block = block - np.outer(centre, centre) / length
        found[np.ix_(rows, rows)] = block if alone else gains[rows, None] * block / sigma
    return found


def norm_projection_report(
    model: nn.Module, x: Batch, name: str, *, batch: bool = False, forward: Forward | None = None
) -> Projection:
    """Return the kernels before and behind one normalisation layer, over a few of its groups and samples.

    Args:
        model: any eager module; only read.
        x: N samples; four are used, or eight as a batch.
        name: of the layer.
        batch: with the statistics of the batch, as BatchNorm has in training.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: a layer whose formula is not known, that does not see one sample per row, that no trainable
            parameter precedes, or whose groups hold more than 1024 values.

    Cost: two kernels of at most 256 rows, or of one group.
    """
    model, x = twin(model, x)
    mode: Mode = "train" if batch else "eval"
    layer = model.get_submodule(name)
    x = take(x, slice(0, 2 * _SAMPLES if batch else _SAMPLES))
    values = _seen(model, x, name, mode, forward)
    n = size(x)
    groups = groups_of(layer, tuple(values.shape[1:]), training=batch)
    n, columns = _chosen(groups, n)
    x = x if groups.across else take(x, slice(0, n))
    own = {f"{name}.{key}" if name else key for key, _ in layer.named_parameters()}
    outer = [key for key, p in model.named_parameters() if p.requires_grad and key not in own]
    before, after = (
        _kernel(model, x, mode, outer, _tapped(name, columns, forward, behind=behind)) for behind in (False, True)
    )
    if not np.trace(before) > 0:
        raise InputError(f"no trainable parameter lies before {name}")
    z = values[:n].flatten(1)[:, columns].cpu().numpy()
    part = Groups(
        groups.labels[columns],
        groups.gains[columns],
        groups.eps,
        groups.centred,
        groups.across,
        None if groups.scales is None else groups.scales[columns],
    )
    a, alone = derivative(z, part), derivative(z, part, alone=True)
    removed = len(alone) - round(float(np.trace(alone)))
    count = int((groups.labels == groups.labels[columns[0]]).sum()) * (n if groups.across else 1)
    return Projection(before, after, a @ before @ a.T, alone @ before @ alone, removed, count)


def _chosen(groups: Groups, n: int) -> tuple[int, Tensor]:
    """Return how many samples and which of their values to look at: whole groups, as many as fit."""
    per = int((groups.labels == groups.labels[0]).sum())
    if groups.scales is not None:  # no groups: any values will do
        return n, torch.arange(min(len(groups.labels), max(1, _ROWS // n)))
    if per * (n if groups.across else 1) > _MOST_ROWS:
        raise InputError(f"a group of {per * (n if groups.across else 1)} values is more than {_MOST_ROWS}")
    n = n if groups.across else max(1, min(n, _ROWS // per))
    kept = torch.unique(groups.labels)[: max(1, _ROWS // (per * n))]
    return n, torch.isin(groups.labels, kept).nonzero().flatten()


def _tapped(name: str, columns: Tensor | None, forward: Forward | None, *, behind: bool) -> Forward:
    """Return a forward whose output is what a layer sees, or what it returns, at its first call."""

    def run(module: nn.Module, inputs: Batch) -> Any:
        found: list[Tensor] = []
        layer = module.get_submodule(name)

        def keep(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if behind and len(found) < 1:
                found.append(output.clone())

        def keep_input(_: nn.Module, given: tuple[Any, ...]) -> None:
            if not behind and len(found) < 1:
                found.append(next(value for value in given if isinstance(value, Tensor)).clone())

        # Copies: what follows may add to these tensors in place.
        hooks = layer.register_forward_hook(keep), layer.register_forward_pre_hook(keep_input)
        try:
            (forward or call)(module, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if columns is None else found[0].flatten(1)[:, columns.to(found[0].device)]

    return run


def _seen(model: nn.Module, x: Batch, name: str, mode: Mode, forward: Forward | None) -> Tensor:
    network = Network(model, mode=mode, forward=_tapped(name, None, forward, behind=False))
    try:
        with torch.no_grad():
            return network.raw(x)
    except InputError as error:
        raise InputError(f"{name} does not see one sample per row, so that its groups are not known") from error


def _kernel(model: nn.Module, x: Batch, mode: Mode, params: list[str], forward: Forward) -> Array:
    values = measured(model, x, mode=mode, params=params, forward=forward).values
    rows = values.shape[0] * values.shape[1]
    return np.asarray(values.reshape(rows, rows).cpu().numpy())
