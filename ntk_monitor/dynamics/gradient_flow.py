"""Many steps at once: the gradient flow that an optimizer's steps follow where they are small, by an implicit method.

Over times long against 1/(1 - β), momentum amounts to a learning rate lr (1 - damp)/(1 - β) (Adam: lr). Parameters obey

    θ_g' = -r_g(t) (D_g J_gᵀ g(f) + wd_g θ_g),  hence  θ_g = e^(-W_g) θ_g(0) - D_g J_gᵀ a_g,  a_g' = r_g (g - wd_g a_g),

so that vectors a of D numbers say it all, W_g = wd_g ∫ r_g. Groups whose rates stay in proportion and that decay alike
share one a. Rates of 10⁻⁷ and 1 meet in one kernel, so the method is implicit: two stages, L-stable, of second order
(Alexander 1977), with steps that double and halve. A system of D equations is factorised when it has changed enough.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_monitor.dynamics.model import Dynamics, Part
from ntk_monitor.dynamics.objective import Objective, weighted
from ntk_monitor.optimizers import Family

_GAMMA = 1 - math.sqrt(0.5)
_TOLERANCE = 5e-4
"""Error of a step that is accepted, relative to the outputs' motion so far, by the difference of orders one and two."""
_NEWTON = 1e-2
"""Newton's method stops at this fraction of the tolerance."""
_ITERATIONS = 10
_PATIENCE = 4
"""Iterations after which a factorisation is out of date."""


@dataclass(slots=True)
class _Shared:
    """What groups with proportional rates and equal decay do together."""

    kernel: Tensor
    weights: Tensor
    dose: Tensor
    """∫ r from the start to each step, (T + 1,)."""
    decay: float
    a: Tensor

    def during(self, start: int, stop: int) -> float:
        return float(self.dose[stop] - self.dose[start])


class Flow:
    """A trajectory on its way.

    Attributes:
        now: the step it has reached.
        outputs: all rows there, (S, C...).
    """

    def __init__(
        self, dynamics: Dynamics, outputs: Tensor, weights: list[Tensor], rates: Float64[Tensor, "t g"]
    ) -> None:
        """Start from outputs and J_g θ_g of a moment whose future learning rates these are."""
        self._dynamics = dynamics
        self._start = outputs.double().reshape(-1)
        self.now, self.outputs = 0, outputs
        self._horizon = len(rates)
        self._rows = dynamics.parts[0].kernel.shape[1]
        self._shared = _merged(dynamics, weights, rates)
        self._length = 1
        self._factor: tuple[Tensor, Tensor] | None = None
        self._factored: list[float] = []
        self._moved = 0.0

    def advance(self, coefficient: float = 1.0, moved: float = 0.0) -> bool:
        """Take one step as long as accuracy allows; return False at the horizon, or where the flow has no solution.

        Args:
            coefficient: of clipping, that gradients are multiplied by.
            moved: root mean square motion of the driving outputs before this flow began.
        """
        self._moved = max(self._moved, moved)
        while self.now < self._horizon:
            length = min(self._length, self._horizon - self.now)
            error = self._attempt(length, coefficient)
            if error <= 1:
                if error < 0.15:
                    self._length *= 2
                return True
            if length == 1:
                return False
            self._length = max(1, length // 2)
        return False

    def _attempt(self, length: int, coefficient: float) -> float:
        """Try a step; return its error in units of what is tolerated, infinity where the equations have no solution."""
        doses = [s.during(self.now, self.now + length) for s in self._shared]
        f = self.outputs.reshape(-1)[: self._rows]
        slopes: list[list[Tensor]] = []
        for stage in (0, 1):
            known = [s.a + (1 - _GAMMA) * slopes[0][i] if stage else s.a for i, s in enumerate(self._shared)]
            reached = doses if stage else [_GAMMA * d for d in doses]
            solved = self._solve(f, known, doses, reached, coefficient)
            if solved is None:
                return math.inf
            f, g = solved
            slopes.append(
                [
                    d * (coefficient * g - s.decay * a) / (1 + _GAMMA * d * s.decay)
                    for s, a, d in zip(self._shared, known, doses, strict=True)
                ]
            )
        differences = [_GAMMA * (late - early) for early, late in zip(*slopes, strict=True)]
        error = _rms(self._driven(differences))
        motion = max(self._moved, _rms(f - self._start[: self._rows]))
        if not math.isfinite(error) or error > _TOLERANCE * motion:
            # The flow may be cut short, but steps of one are as fine as it gets.
            return math.inf if not math.isfinite(error) or length > 1 else 1.0
        self._moved = motion
        for s, early, late in zip(self._shared, *slopes, strict=True):
            s.a = s.a + (1 - _GAMMA) * early + _GAMMA * late
        self.now += length
        self.outputs = self._all().reshape(self._dynamics.outputs.shape)
        return error / (_TOLERANCE * motion) if motion else 0.0

    def _solve(
        self, guess: Tensor, known: list[Tensor], doses: list[float], reached: list[float], coefficient: float
    ) -> tuple[Tensor, Tensor] | None:
        """Solve f = f* - Σ w_c K_c g(f) for the driving outputs of one stage; return them and g."""
        shrunk = [1 + _GAMMA * d * s.decay for s, d in zip(self._shared, doses, strict=True)]
        weights = [_GAMMA * d * coefficient / by for d, by in zip(doses, shrunk, strict=True)]
        base = self._start[: self._rows] - self._driven([a / by for a, by in zip(known, shrunk, strict=True)])
        for s, dose in zip(self._shared, reached, strict=True):
            base = base - _lost(s, self.now, dose) * s.weights[: self._rows]
        tolerance = _NEWTON * _TOLERANCE * max(self._moved, 1e-300)
        for fresh in (False, True):
            if fresh or self._factor is None or not self._near(weights):
                self._factor = self._factorised(guess, weights)
                self._factored = weights
            factor, f, last = self._factor, guess, math.inf
            for i in range(_ITERATIONS):
                g = self._gradient(f)
                rest = base - self._driven([w * g for w in weights]) - f
                change = torch.linalg.lu_solve(*factor, rest[:, None])
                f = f + change[:, 0]
                size = _rms(change)
                if not math.isfinite(size) or size > 2 * last:
                    break
                if size <= tolerance or size <= 1e-14 * _rms(f):
                    self._factor = None if i >= _PATIENCE else self._factor
                    return f, self._gradient(f)
                last = size
        return None

    def _near(self, weights: list[float]) -> bool:
        """True while Newton's method converges well with the factors at hand."""
        return all(abs(w - old) <= 0.25 * abs(w) for w, old in zip(weights, self._factored, strict=True))

    def _factorised(self, f: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
        objective = self._dynamics.gradient
        outputs = f.reshape(self._dynamics.outputs[: self._dynamics.driving].shape)
        curvature = objective.curvature(outputs) if isinstance(objective, Objective) else _hessian(objective, outputs)
        total = torch.zeros(self._rows, self._rows, dtype=torch.float64)
        for s, w in zip(self._shared, weights, strict=True):
            total.add_(s.kernel[: self._rows], alpha=w)
        matrix = weighted(total, curvature)
        matrix.diagonal().add_(1)
        lu, pivots = torch.linalg.lu_factor(matrix)
        return lu, pivots

    def _gradient(self, f: Tensor) -> Tensor:
        shape = self._dynamics.outputs[: self._dynamics.driving].shape
        return self._dynamics.gradient(f.reshape(shape)).reshape(-1)

    def _driven(self, vectors: list[Tensor]) -> Tensor:
        """Return Σ K_c v_c on the driving rows."""
        total = torch.zeros(self._rows, dtype=torch.float64)
        for s, v in zip(self._shared, vectors, strict=True):
            total += s.kernel[: self._rows] @ v
        return total

    def _all(self) -> Tensor:
        f = self._start.clone()
        for s in self._shared:
            f -= s.kernel @ s.a + _lost(s, self.now, 0.0) * s.weights
        return f


def _lost(s: _Shared, now: int, further: float) -> float:
    """Return 1 - e^(-W): how much of J θ at the start has decayed, a further dose from now."""
    return -math.expm1(-s.decay * (float(s.dose[now]) + further))


def _merged(dynamics: Dynamics, weights: list[Tensor], rates: Tensor) -> list[_Shared]:
    found: list[tuple[Tensor, _Shared]] = []
    for part, q, column in zip(dynamics.parts, weights, rates.double().T, strict=True):
        r = column * _gain(part, dynamics.family)
        sign = -1.0 if part.group.maximize else 1.0
        if not bool(part.kernel.any()) or not bool(r.any()):
            continue
        for pattern, s in found:
            ratio = float(r @ pattern / (pattern @ pattern))
            same = torch.allclose(r, ratio * pattern, rtol=1e-9, atol=0.0)
            if same and math.isclose(ratio * part.group.weight_decay, s.decay, rel_tol=1e-9):
                s.kernel = s.kernel + sign * ratio * part.kernel
                s.weights = s.weights + q
                break
        else:
            dose = torch.cat([r.new_zeros(1), r.cumsum(0)])
            a = torch.zeros(part.kernel.shape[1], dtype=torch.float64)
            found.append((r, _Shared(sign * part.kernel, q, dose, part.group.weight_decay, a)))
    return [s for _, s in found]


def _gain(part: Part, family: Family) -> float:
    """Return by how much momentum multiplies the learning rate in the long run."""
    group = part.group
    if family == "adam" or not group.momentum:
        return 1.0
    return (1 - group.dampening) / (1 - group.momentum)


def _hessian(gradient: object, outputs: Tensor) -> Tensor:
    """Return the derivative of a gradient that is only known as a function, by central differences."""
    flat, step = outputs.reshape(-1), 1e-5
    columns = []
    for i in range(len(flat)):
        e = torch.zeros_like(flat)
        e[i] = step
        ahead, behind = (gradient((flat + sign * e).reshape(outputs.shape)).reshape(-1) for sign in (1, -1))  # type: ignore[operator]
        columns.append((ahead - behind) / (2 * step))
    return torch.stack(columns, 1)


def _rms(v: Tensor) -> float:
    return float(v.square().mean().sqrt())
