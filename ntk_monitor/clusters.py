"""Which modes of one probe are which modes of the next: degenerate ones as blocks, confirmed by measured overlap.

M₀ = V₀ Λ₀ V₀ᵀ and M₁ = V₁ Λ₁ V₁ᵀ, symmetric n × n, eigenvalues descending. Eigenvectors of close eigenvalues turn
freely inside their common subspace: rounding turns those of a multiple eigenvalue anywhere, while the subspace stays.
So a block B of neighbouring modes is compared as a whole: with P₀ the projector on its span and P₁ the one on d = |B|
modes of the next probe, tr(P₀ P₁)/d is 1 when the subspace is the same and about d/n by chance.

A block that hardly couples to the rest must be found again: with R = (I - P₀) M₁ P₀, the off-diagonal part alone,
sin θ ≤ |R| / gap (Davis and Kahan 1970). Growth M → a M turns nothing and gives R = 0. The bound proves what the
overlap measures, so the measurement decides and the bound is reported. No chain of close neighbours is merged into one
block: a block is made no larger than its confirmation needs, and modes that none confirms have lost their identity.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import InputError

Array = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]

OVERLAP = 0.9
"""Least mean squared cosine between the two subspaces of a confirmed block."""

SPREAD = 2.0
"""Largest ratio of the rates within a block: it stands for one speed of learning."""


@runtime_checkable
class Basis(Protocol):
    """Eigenvalues and eigenvectors of one symmetric matrix, e.g. `modes.Modes`."""

    @property
    def rates(self) -> Array:
        """(n,) eigenvalues, descending."""
        ...

    @property
    def vectors(self) -> Array:
        """(n, n), column i belongs to rate i."""
        ...

    @property
    def floor(self) -> float:
        """Rates below it are rounding noise."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring modes of one probe that span the same space as `after` at the next.

    Attributes:
        before: (d,) indices of the modes at the first probe, consecutive.
        after: (d,) indices at the second, ascending; not consecutive when eigenvalues crossed.
        overlap: tr(P₀ P₁)/d, `OVERLAP` to 1.
        bound: |R| / gap, an upper bound of sin θ wherever it is below 1; inf without a gap.
        turn: (d, d) orthogonal, takes coordinates along `before` to those along `after` (the nearest rotation to
            V₁ᵀ V₀ on the block); ±1 for a single mode.
    """

    before: Integers
    after: Integers
    overlap: float
    bound: float
    turn: Array


@dataclass(frozen=True, slots=True)
class Matched:
    """How the leading modes of one probe continue at the next.

    Attributes:
        blocks: confirmed blocks, fastest first; disjoint at both probes.
        lost: indices of the leading modes at the first probe that have no counterpart: identity lost.
        count: how many leading modes were looked at; `blocks` and `lost` hold each of them once.
    """

    blocks: tuple[Block, ...]
    lost: Integers
    count: int

    def energies(self, coordinates: Array) -> Array:
        """Return the energy Σ c² of each block, (blocks,), from the coordinates (n,) in the first probe's basis.

        Unlike the energies of its single modes it does not depend on how a degenerate block is turned.
        """
        return np.array([float(np.square(coordinates[block.before]).sum()) for block in self.blocks])


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one residual moves between the modes only because the basis turned, as shares of its energy.

    Attributes:
        turned: Σ |V₁ᵀu - O V₀ᵀu|² over confirmed blocks, O turning each block as a whole; 0 to 4 times `kept`.
        kept: energy of the residual in the confirmed blocks, in the second basis.
        unmatched: the rest of it: modes whose identity is lost or that were not looked at. kept + unmatched = 1.
    """

    turned: float
    kept: float
    unmatched: float


def matched(before: Basis, after: Basis, *, count: int | None = None, overlap: float = OVERLAP) -> Matched:
    """Return which leading modes of one probe are which at the next.

    Of all ways to cut the modes into blocks of neighbours, the one that confirms most modes, then in most blocks, then
    with most overlap.

    Args:
        before: modes of the first probe.
        after: modes of the second, of the same samples and outputs, in the coordinates of the first: where the loss's
            curvature moves (not for squared errors), weight both kernels with that of the first probe,
            `Modes.of(later_kernel, earlier.terms)`. Otherwise the change of weights alone takes identities away.
        count: leading modes to look at; default a quarter of them, at most 64. Never those below the noise floor.
        overlap: least tr(P₀ P₁)/d of a confirmed block, above 1/2.

    Raises:
        InputError: probes of different sizes.

    Cost: count · n² for the overlaps, and n for each run of neighbours whose rates lie within a factor of `SPREAD`.
    """
    n = before.rates.size
    if after.rates.size != n:
        raise InputError(f"modes of two probes need the same rows, got {n} and {after.rates.size}; use one probe")
    top = min(max(n // 4, 1), 64) if count is None else min(count, n)
    top = min(top, int((before.rates > max(before.floor, 0.0)).sum()))
    cosines = before.vectors[:, :top].T @ after.vectors
    blocks: list[Block] = []
    lost: list[int] = []
    seen = 0
    for run in _best_cut(_confirmed(before, after, np.square(cosines), overlap), top):
        lost += range(seen, run.start)
        blocks.append(_block(run, cosines, after.rates))
        seen = run.stop
    return Matched(tuple(blocks), np.array([*lost, *range(seen, top)], dtype=np.int64), top)


@dataclass(frozen=True, slots=True)
class _Run:
    """Modes start … stop-1 of the first probe, confirmed as the modes `columns` of the second."""

    start: int
    stop: int
    columns: Integers
    overlap: float


def _confirmed(before: Basis, after: Basis, squares: Array, overlap: float) -> list[_Run]:
    """Return every run of leading modes that is found again; squares: cosines² (top, n), a row per earlier mode."""
    found: list[_Run] = []
    # A gap this much wider than rounding: only then is the block itself no accident of rounding.
    limit = 1 / np.sqrt(1 - overlap) if overlap < 1 else np.inf
    for start in range(len(squares)):
        share = np.zeros(squares.shape[1])
        for stop in range(start + 1, len(squares) + 1):
            if before.rates[stop - 1] * SPREAD < before.rates[start]:
                break
            share = share + squares[stop - 1]
            # A mode of the second probe belongs to the run that holds more than half of it: to one at most.
            inside = share > 0.5
            size = stop - start
            mean = float(share[inside].sum()) / size
            if int(inside.sum()) != size or mean < overlap:
                continue
            own = np.zeros(inside.size, dtype=np.bool_)
            own[start:stop] = True
            if _gap(before.rates, own) > limit * before.floor and _gap(after.rates, inside) > limit * after.floor:
                found.append(_Run(start, stop, np.flatnonzero(inside), min(mean, 1.0)))
    return found


def _gap(rates: Array, inside: NDArray[np.bool_]) -> float:
    """Return the distance of a set of eigenvalues from the rest, inf without a rest."""
    ours, rest = rates[inside], rates[~inside]
    return float(np.abs(ours[:, None] - rest).min()) if rest.size else float("inf")


def _best_cut(runs: list[_Run], top: int) -> list[_Run]:
    """Return disjoint runs in order that hold most modes, then are most, then overlap most (dynamic programme)."""
    starting: list[list[_Run]] = [[] for _ in range(top)]
    for run in runs:
        starting[run.start].append(run)
    # From the last mode backwards: the best cut of everything from here on.
    best: list[tuple[int, int, float]] = [(0, 0, 0.0)] * (top + 1)
    choice: list[_Run | None] = [None] * top
    for start in range(top - 1, -1, -1):
        best[start] = best[start + 1]
        for run in starting[start]:
            modes, count, total = best[run.stop]
            score = (modes + run.stop - start, count + 1, total + run.overlap)
            if score > best[start]:
                best[start], choice[start] = score, run
    cut: list[_Run] = []
    start = 0
    while start < top:
        run_here = choice[start]
        if run_here is not None:
            cut.append(run_here)
        start = start + 1 if run_here is None else run_here.stop
    return cut


def _block(run: _Run, cosines: Array, rates: Array) -> Block:
    """Return the block of a confirmed run; cosines V₀ᵀ V₁ (top, n), rates those of the second probe."""
    ours = cosines[run.start : run.stop]
    left, _, right = np.linalg.svd(ours[:, run.columns].T)
    # V₁ᵀ R = Λ₁ X - X (Xᵀ Λ₁ X) with X = V₁ᵀ V₀ on the block: no difference of large numbers as in PM₁²P - (PM₁P)².
    within = (ours * rates) @ ours.T
    coupling = rates[:, None] * ours.T - ours.T @ within
    ritz = np.linalg.eigvalsh((within + within.T) / 2)
    rest = np.delete(rates, run.columns)
    # The theorem wants the rest outside the interval of the block's own values.
    outside = np.maximum(ritz[0] - rest, rest - ritz[-1])
    gap = float(outside.min()) if rest.size else float("inf")
    bound = float(np.linalg.norm(coupling, 2)) / gap if gap > 0 else float("inf")
    return Block(np.arange(run.start, run.stop), run.columns, run.overlap, bound, left @ right)


def rotation(found: Matched, own: Array, carried: Array) -> Rotation:
    """Return what turning of the basis did to one residual, apart from its decay.

    Args:
        found: how the modes of the first probe continue at the second.
        own: (n,) coordinates of the residual in the second probe's basis, V₁ᵀ u.
        carried: (n,) those of the same residual in the first probe's basis, V₀ᵀ u. With a loss whose curvature moved
            the two probes weigh residuals differently; then that difference is in `turned` as well.

    All NaN for a residual of zero or not finite.
    """
    total = float(np.square(own).sum())
    if not (total > 0 and np.isfinite(total)):
        return Rotation(float("nan"), float("nan"), float("nan"))
    turned, kept = 0.0, 0.0
    for block in found.blocks:
        turned += float(np.square(own[block.after] - block.turn @ carried[block.before]).sum())
        kept += float(np.square(own[block.after]).sum())
    return Rotation(turned / total, kept / total, max(1 - kept / total, 0.0))
