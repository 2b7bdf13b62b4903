"""What skip connections do to the kernel of a network: K = K_skip + K_branch + cross, and whether eigenvalues rise.

z = s + b wherever the network adds a skip s and a branch b. K is its kernel, K_skip that of the network with z = s,
K_branch with z = b, on the same weights; the cross term is what is left. Without it Weyl's inequality would lift every
eigenvalue: λᵢ(K) ≥ max(λᵢ(K_skip), λᵢ(K_branch)). It is zero for parallel ways with readouts of their own, for branches
that are zero, and in the mean over independent readouts of mean zero; behind a shared readout it is not.
Always true: K ≥ the kernel of the branches' own parameters, since kernels of disjoint parameters add.

Source: Weyl 1912 (eigenvalues of sums); Zhang, Dauphin and Ma 2019 (Fixup: branches that start at zero).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.report import Report
from ntk_monitor.applications.residual_words import told
from ntk_monitor.applications.skips import Skip, Skips, residual_connections, twin
from ntk_monitor.batch import Batch, size
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import measured
from ntk_monitor.network import Forward
from ntk_monitor.spectrum import Spectrum

__all__ = [
    "EXAMPLE",
    "Decomposition",
    "Level",
    "decompose_residual",
    "depth_scan",
    "example",
    "residual_connections",
    "study",
]

EXAMPLE = "a network of six residual blocks that has half learned handwritten digits"

Array: TypeAlias = NDArray[np.float64]
Layout: TypeAlias = Literal["trace", "full"]

_MOST_CONNECTIONS = 12
_TINY = 1e-10


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A kernel and its parts, all (n, n).

    Attributes:
        full: K.
        skip: kernel of the network with its branches removed.
        branch: kernel with its skips removed.
        inside: part of K that belongs to parameters of the branches alone, or None where it is not known.
    """

    full: Array
    skip: Array
    branch: Array
    inside: Array | None = None

    def __post_init__(self) -> None:
        parts = [self.full, self.skip, self.branch, *([] if self.inside is None else [self.inside])]
        n = len(self.full)
        if any(part.shape != (n, n) or not np.isfinite(part).all() for part in parts):
            raise InputError(f"wanted finite kernels of one shape (n, n), got {[part.shape for part in parts]}")

    @property
    def cross(self) -> Array:
        """K - K_skip - K_branch, symmetric, of any sign."""
        return self.full - self.skip - self.branch

    @property
    def cross_ratio(self) -> float:
        """‖cross‖_F / ‖K‖_F: 0 where the kernel is the sum of its parts; NaN for a zero kernel."""
        whole = float(np.linalg.norm(self.full))
        return float(np.linalg.norm(self.cross)) / whole if whole > 0 else math.nan

    @property
    def weyl_gaps(self) -> Array:
        """λᵢ(K) - max(λᵢ(K_skip), λᵢ(K_branch)), i from the largest; a negative one is an eigenvalue that fell."""
        found = [_eigenvalues(part) for part in (self.full, self.skip, self.branch)]
        return np.asarray(found[0] - np.maximum(found[1], found[2]))

    @property
    def fallen(self) -> int:
        """Eigenvalues below their floor, rounding apart."""
        return int((self.weyl_gaps < -self._rounding).sum())

    @property
    def lifted(self) -> bool:
        """True when no eigenvalue lies below its floor."""
        return self.fallen == 0

    @property
    def worst(self) -> float:
        """The smallest gap over the largest eigenvalue of K_branch, or of K where there is no branch kernel."""
        top = float(_eigenvalues(self.branch)[0]) or float(_eigenvalues(self.full)[0])
        return float(self.weyl_gaps.min()) / top if top > 0 else math.nan

    @property
    def skip_rank(self) -> int:
        """Eigenvalues of K_skip above rounding: no more than these can be lifted by it."""
        return Spectrum.of(self.skip, vectors=False).rank

    @property
    def floor_holds(self) -> bool | None:
        """True when K - inside has no negative eigenvalue, which is always so; None without `inside`."""
        if self.inside is None:
            return None
        return bool(_eigenvalues(self.full - self.inside)[-1] >= -self._rounding)

    @property
    def _rounding(self) -> float:
        return _TINY * max(float(np.abs(part).max()) for part in (self.full, self.skip, self.branch)) * len(self.full)


@dataclass(frozen=True, slots=True)
class Level:
    """The kernel with the first so many of the connections in place.

    Attributes:
        branches: how many; in the others the branch is removed.
        mean_diagonal: of the kernel.
        lambda_max: its largest eigenvalue.
        condition_log10: of its condition number; NaN for a zero kernel.
        is_bound: the condition number is a lower bound.
    """

    branches: int
    mean_diagonal: float
    lambda_max: float
    condition_log10: float
    is_bound: bool


def decompose_residual(
    model: nn.Module,
    x: Batch,
    skip_modules: Sequence[str] | str | None = None,
    *,
    outputs: Layout = "trace",
    forward: Forward | None = None,
    connections: Skips | None = None,
) -> Decomposition:
    """Return the parts of a network's kernel, the chosen connections cut all at once.

    Args:
        model: any eager module that adds; only read.
        x: N samples.
        skip_modules: modules whose residual connections are meant; see `residual_connections`.
        outputs: "trace": (N, N), summed over outputs. "full": (N·C, N·C).
        forward: as in `empirical_ntk`.
        connections: those of an earlier `residual_connections` on the same model, instead of `skip_modules`.

    Raises:
        InputError: a module name without a residual connection.
        NetworkError: no residual connection at all.

    Cost: three kernels.
    """
    found = connections or residual_connections(model, x, modules=skip_modules, forward=forward)
    cut = _Cut(*twin(model, x), found, forward, outputs)
    return cut.parts(found.found)


def depth_scan(
    model: nn.Module,
    x: Batch,
    connections: Skips,
    *,
    levels: int = 5,
    outputs: Layout = "trace",
    forward: Forward | None = None,
) -> dict[str, list[Level]]:
    """Return the kernel against depth: with the first l of the L connections as they are, the other branches removed.

    Args:
        model: any eager module that adds.
        x: N samples.
        connections: of this model.
        levels: how many l between 0 and L, ends included.
        outputs: as in `decompose_residual`.
        forward: as in `empirical_ntk`.

    Returns:
        "as built"; "branches / √l": every branch divided by the square root of their number; "no skips": b in place of
        s + b in the first l.

    Cost: three kernels per level.
    """
    cut = _Cut(*twin(model, x), connections, forward, outputs)
    counts = sorted({round(k) for k in np.linspace(0, len(connections.found), max(2, levels))})
    settings: dict[str, Callable[[int], tuple[float, float]]] = {
        "as built": lambda _: (1.0, 1.0),
        "branches / √l": lambda kept: (1.0, 1 / math.sqrt(kept)),
        "no skips": lambda _: (0.0, 1.0),
    }
    return {name: [cut.level(k, gate(k) if k else (1.0, 1.0)) for k in counts] for name, gate in settings.items()}


@dataclass(frozen=True, slots=True)
class _Cut:
    """A network whose residual connections can be cut."""

    model: nn.Module
    x: Batch
    skips: Skips
    forward: Forward | None
    outputs: Layout

    def kernel(
        self, gates: dict[Skip, tuple[float, float]], inside: frozenset[str] = frozenset()
    ) -> tuple[Array, Array]:
        """Return the kernel under gates, and the part of it that belongs to some parameters."""
        found = measured(
            self.model,
            self.x,
            outputs=self.outputs,
            forward=self.skips.gated(self.forward, gates),
            group=lambda name: "inside" if name in inside else "outside",
        )
        n = math.isqrt(found.values.numel())
        part = found.layers.get("inside", torch.zeros_like(found.values))
        return found.values.reshape(n, n).cpu().numpy(), part.reshape(n, n).cpu().numpy()

    def parts(self, chosen: Sequence[Skip], full: Array | None = None) -> Decomposition:
        """Return the decomposition for some connections; with `full` without the part of the branches' parameters."""
        inside = frozenset().union(*(skip.parameters for skip in chosen))
        whole, own = self.kernel({}, inside) if full is None else (full, None)
        skip, branch = (self.kernel(dict.fromkeys(chosen, gate))[0] for gate in ((1.0, 0.0), (0.0, 1.0)))
        return Decomposition(whole, skip, branch, own)

    def level(self, branches: int, gate: tuple[float, float]) -> Level:
        """Return the kernel with a gate at the first connections, and the skip alone at the others."""
        found = self.skips.found
        kernel = self.kernel({skip: gate if k < branches else (1.0, 0.0) for k, skip in enumerate(found)})[0]
        spectrum = Spectrum.of(kernel, vectors=False)
        condition = spectrum.condition_number
        return Level(
            branches,
            float(kernel.diagonal().mean()),
            spectrum.lambda_max,
            math.log10(condition) if condition > 0 else math.nan,
            spectrum.condition_is_lower_bound,
        )


def study(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    modules: Sequence[str] | str | None = None,
    outputs: Layout = "trace",
    levels: int = 5,
    forward: Forward | None = None,
) -> Report:
    """Return whether skips add to the kernel of a network, lift its eigenvalues, and keep its scale over depth.

    Args:
        model: any eager module that adds; only read.
        x: N samples, at least two; some tens are enough.
        y: not used.
        modules: whose residual connections are meant: names, or a regular expression; None: all.
        outputs: "trace": kernels summed over outputs. "full": all pairs of outputs.
        levels: of the depth scan.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: fewer than two samples, or a module name without a residual connection.
        NetworkError: no residual connection.

    Cost: 3 + 3 · levels kernels, and two for each of at most twelve connections.
    """
    if size(x) < 2 or levels < 2:
        raise InputError(f"wanted at least two samples and two levels, got {size(x)} and {levels}")
    found = residual_connections(model, x, modules=modules, forward=forward)
    cut = _Cut(*twin(model, x), found, forward, outputs)
    together = cut.parts(found.found)
    shown = [found.found[k] for k in _spread(len(found.found), _MOST_CONNECTIONS)]
    single = {skip: cut.parts([skip], together.full) for skip in shown} if len(found.found) > 1 else {}
    scan = depth_scan(model, x, found, levels=levels, outputs=outputs, forward=forward)
    return told(together, single, scan, len(found.found))


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, most))})


def _eigenvalues(kernel: Array) -> Array:
    """Return the eigenvalues, the largest first."""
    return np.asarray(np.linalg.eigvalsh((kernel + kernel.T) / 2)[::-1])


class _Block(nn.Module):
    """h + F(h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        total: Tensor = h + self.branch(h)
        return total


def example(quick: bool = False) -> Report:
    """Return the study of six residual blocks that have half learned handwritten digits; `quick`: two of them."""
    from sklearn.datasets import load_digits

    from ntk_monitor.guard import undisturbed

    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(inputs / 16.0), torch.as_tensor(labels).long()
    with undisturbed(seed=0):
        blocks = [_Block(32) for _ in range(2 if quick else 6)]
        model = nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(5 if quick else 30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:500]), y[:500]).backward()
            optimizer.step()
    return study(model, x[: 8 if quick else 48], levels=3 if quick else 7)
