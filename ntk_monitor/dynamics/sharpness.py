"""Largest eigenvalue, trace and small-sample bias of M = Sᵀ J diag(steps) Jᵀ S on one set of samples.

steps = lr·D per parameter; J, S and M as in `stability`. Matrix-free for losses with a known root S of their curvature,
by whole matrices for others.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch, mapped, moved, owned, size
from ntk_monitor.engines.operator import NTKOperator
from ntk_monitor.engines.products import environment
from ntk_monitor.guard import seeded
from ntk_monitor.kernel import measured
from ntk_monitor.losses import Loss
from ntk_monitor.network import Forward, Mode, Network, Selection
from ntk_monitor.optimizers import OptimizerState
from ntk_monitor.shadow import unwrapped

_PROBES = 8
"""Random vectors for the trace, one pass each."""

_LEFT_OUT = 4
"""Random vectors for the jackknife, two passes each."""

_OUTPUTS = 2**22
"""Outputs N·C of a Lanczos run, whose twenty vectors and the loss's curvature then take 0.8 GiB in float64."""

_DENSE = 1024
"""Rows up to which a loss without a root of its curvature is measured by whole matrices."""


def affordable(samples: int, outputs: int) -> int:
    """Return how many of N samples of C outputs the gauge can be measured on: fewer of them for whole texts."""
    return min(samples, _OUTPUTS // max(outputs, 1))


@dataclass(frozen=True, slots=True)
class Sharpness:
    """What was measured of M, learning rate x curvature."""

    value: float
    """λ₁."""
    trace: float
    bias: float
    """Of λ₁, as a fraction of it; NaN where it was not estimated."""
    vector: NDArray[np.float64] | None
    how: str
    negative: float = 0.0
    """Smallest eigenvalue where it is negative."""

    def scaled(self, factor: float) -> "Sharpness":
        """Return the same for steps longer by this factor."""
        changes = {"value": self.value * factor, "trace": self.trace * factor, "negative": self.negative * factor}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Task:
    """The function whose curvature is measured, on one set of samples."""

    model: nn.Module
    x: Batch
    y: Any
    loss: Loss
    params: Selection | None
    forward: Forward | None
    mode: Mode
    seed: int

    def steps(self, state: OptimizerState, scale: float) -> dict[str, Tensor]:
        """Return lr·D for each parameter, zero for those that no optimizer moves."""
        rates = {name: group.lr for group in state.groups for name in group.names}
        trainable = {name: p for name, p in unwrapped(self.model).named_parameters() if p.requires_grad}
        if state.family == "adam":
            trainable_d = self._anticipated(state, scale).preconditioner(trainable) or {}
        else:
            trainable_d = {name: torch.ones_like(p, dtype=torch.float64) for name, p in trainable.items()}
        return {name: rates.get(name, 0.0) * d for name, d in trainable_d.items()}

    def _anticipated(self, state: OptimizerState, scale: float) -> OptimizerState:
        """Return the state with the second moment that the step on these samples would use.

        Adam squares a gradient before it divides by it, so that a step never exceeds lr (1-β₁)/√(1-β₂). The v that was
        left by the last step does not know of a unit that wakes or a token not seen for long: its D would be 1/ε.
        """
        _, gradients = self._evaluated()
        second, ages = dict(state.second), dict(state.ages)
        for group in state.groups:
            beta = group.betas[1]
            for name in group.names:
                if name not in gradients or name not in second:
                    continue
                fresh = (1 - beta) * (scale * gradients[name].detach().cpu().double()).square()
                v = second[name].cpu().double()
                second[name] = torch.maximum(v, fresh) if group.amsgrad else beta * v + fresh
                ages[name] = ages.get(name, 0) + 1
        return dataclasses.replace(state, second=second, ages=ages)

    def _evaluated(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the outputs as the module gives them, and the gradient of the loss."""
        with environment(self.seed):
            batch = owned(self.x)
            options: dict[str, Any] = {"params": self.params, "forward": self.forward, "mode": self.mode}
            network = Network.careful(self.model, batch, **options)
            seeded(self.seed)
            outputs = network.raw(network.prepared(batch))
            value = self.loss.function(outputs, moved(self.y, outputs.device))
            parameters = list(network.parameters.values())
            found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        dense = [g.to_dense() for g in found]
        return outputs.detach(), dict(zip(network.parameters, dense, strict=True))

    def measured(self, steps: Mapping[str, Tensor], start: Any, tolerance: float) -> Sharpness | str:
        """Return λ₁, trace and bias of M, or why there are none."""
        if self.loss.kind == "other" and not {"shift", "delta"} & set(self.loss.options):
            return self._indefinite(steps)
        op = NTKOperator(
            self.model,
            self.x,
            params=self.params,
            forward=self.forward,
            mode=self.mode,
            preconditioner=steps,
            loss=self.loss,
            targets=self.y,
            seed=self.seed,
        )
        n, c = op.samples, op.outputs
        guess = start if start is not None and np.size(start) == n * c and np.isfinite(start).all() else None
        values, vectors = op.eigsh(1, tolerance=tolerance, start=guess, vectors=True)
        value, v = max(0.0, float(values[0])), vectors[:, 0]
        random = np.random.default_rng(self.seed)
        # The largest eigenvalue is known: what is estimated is the trace of the rest.
        signs = random.choice([-1.0, 1.0], (_PROBES, n * c))
        rest = float(np.mean([op.quadratic(z - v * (v @ z)) for z in signs]))
        flipped = np.repeat(random.choice([-1.0, 1.0], (n, _LEFT_OUT)), c, axis=0) * v[:, None]
        flipped -= np.outer(v, v @ flipped)
        # Random signs of the samples see each of them in expectation.
        bias = jackknife_bias(value, v, n, flipped, op @ flipped) / _LEFT_OUT
        how = f"Lanczos on the operator of {n} samples in {self.mode} mode ({op.route}, {op.passes} passes)"
        return Sharpness(value, value + rest, bias, v, how)

    def _indefinite(self, steps: Mapping[str, Tensor]) -> Sharpness | str:
        """Eigenvalues of K^½ H K^½, which exist whatever the loss and are those of K H."""
        outputs, _ = self._evaluated()
        n = outputs.numel()
        if n > _DENSE:
            return (
                f"{self.loss.name} has no known root of its curvature, and {n} outputs are more than the {_DENSE} "
                "that can be measured without; pass fewer samples"
            )
        f, y = outputs.cpu().double(), mapped(moved(self.y, torch.device("cpu")), _double)
        hessian = torch.autograd.functional.hessian(lambda z: self.loss.function(z.reshape(f.shape), y), f.flatten())
        options: dict[str, Any] = {"params": self.params, "forward": self.forward, "mode": self.mode}
        found = measured(self.model, self.x, preconditioner=steps, seed=self.seed, **options)
        kernel = found.values.cpu().double().reshape(n, n)
        if not (torch.isfinite(kernel).all() and torch.isfinite(hessian).all()):
            return "kernel or curvature of the loss is not finite; look for NaN in weights and inputs"
        squares, basis = torch.linalg.eigh(kernel)
        half = basis * squares.clamp_min(0).sqrt()
        values = torch.linalg.eigvalsh(half.T @ hessian @ half)
        top, bottom = float(values[-1]), min(0.0, float(values[0]))
        if top <= 0:
            return f"{self.loss.name} has no positive curvature in the outputs here, so that it bounds no step"
        if -bottom <= 1e-9 * top:
            bottom = 0.0
        how = f"full kernel of {size(self.x)} samples in {self.mode} mode with the loss's Hessian ({found.engine})"
        return Sharpness(top, float(values.clamp_min(0).sum()), float("nan"), None, how, bottom)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def jackknife_bias(
    value: float, v: Float64[ndarray, " r"], samples: int, flipped: Float64[ndarray, "r k"], images: Any
) -> float:
    """Return the jackknife bias of λ₁, (N-1) (mean λ₁ without sample n - λ₁), as a fraction of it.

    In the parameters the curvature is a mean over samples, H = mean h_n, with eigenpairs λ_k, w_k. Leaving one out
    changes H by (H - h_n)/(N-1) and λ₁, in second order, by Σ_k (w_kᵀ h_n w₁)²/(λ₁ - λ_k)/(N-1)². Seen from the outputs
    the bias is N/(N-1) Σ_n y_nᵀ M (1 - M/λ₁)⁻¹ y_n, y_n the part of v's block of sample n that is orthogonal to v; it
    is evaluated at the mean eigenvalue that these y meet, which is a little too small where λ₂ is near λ₁.

    Args:
        value: λ₁.
        v: its eigenvector.
        samples: N.
        flipped: the y_n as columns.
        images: M times them.

    Source: Quenouille 1956 (jackknife); the rest is perturbation theory, compared with leaving samples out in tests.
    """
    images = images - np.outer(v, v @ images)
    first, second = float((flipped * images).sum()), float(np.square(images).sum())
    if samples < 2 or value <= 0:
        return float("nan")
    if first <= 0:
        return 0.0
    met = min(second / first / value, 0.9)
    return samples / (samples - 1) * first / (1 - met) / value


def blocks(v: Float64[ndarray, " r"], samples: int) -> Float64[ndarray, "r n"]:
    """Return the y_n of `jackknife_bias`, one column for each sample."""
    whole = np.kron(np.eye(samples), np.ones((len(v) // samples, 1))) * v[:, None]
    return np.asarray(whole - np.outer(v, v @ whole))
