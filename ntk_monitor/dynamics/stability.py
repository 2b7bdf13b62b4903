"""How far the learning rate is from where steps become unstable: an interval of factors, measured on the live run.

    sharpness = λ₁ of M = Sᵀ (Σ_g lr_g J_g D_g J_gᵀ) S,    noise = tr M

J Jacobian of the training operator (BatchNorm couples the batch), S Sᵀ = H the curvature of the loss in the outputs,
which holds the loss's own 1/N, D the optimizer's preconditioner, g its parameter groups: learning rate and 1/N are
inside once, and nothing else multiplies λ₁. M has the non-zero eigenvalues of the Gauss-Newton matrix in the
parameters, preconditioned, times the learning rates.

All learning rates could be multiplied by `low` before noise of batches of size B makes steps unstable, by `high`
before full-batch steps are (`bounds`):

    low = bound_low / (sharpness + noise (1/B - 1/N)),    high = bound_high / sharpness,

and low = high where every step follows the whole training set, which has no noise.

Measured on small networks with momentum or AdamW, the factor at which a run broke lay between the two; plain SGD on
cross-entropy survived 3 times `high` at batches of 64 and broke just below `low` at batches of 8. Neither end is safe
by itself, and neither knows how the curvature will change.

Sources: Cohen et al. 2021, 2022 (edge of stability, preconditioned for Adam); Schraudolph 2002 (Gauss-Newton).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.batch import Batch, size
from ntk_monitor.dynamics.bounds import Bounds, smallest
from ntk_monitor.dynamics.sharpness import Sharpness, Task, blocks, jackknife_bias
from ntk_monitor.errors import InputError, NetworkError, NumericsError
from ntk_monitor.losses import Loss, recognised
from ntk_monitor.network import Forward, Mode, Selection
from ntk_monitor.optimizers import WARM, OptimizerState, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """How many times larger the learning rates could be, and what that rests on. Numbers are NaN where not available.

    "learning rate x curvature" is dimensionless: what one step does to a residual, 1 taking all of it.
    """

    low: float = float("nan")
    """Factor of all learning rates at which noise of batches of this size makes steps unstable."""
    high: float = float("nan")
    """The same for full-batch steps."""
    sharpness: float = float("nan")
    """Learning rate x curvature: largest eigenvalue of M."""
    noise: float = float("nan")
    """Learning rate x curvature: mean trace of the blocks of M's samples, what dividing by B adds to sharpness."""
    bound_low: float = float("nan")
    bound_high: float = float("nan")
    """What sharpness must stay under at the present learning rate; weight decay is taken off."""
    bias: float = float("nan")
    """Jackknife estimate of how much a set of this size over-estimates sharpness, as a fraction of it."""
    negative: float = 0.0
    """Most negative eigenvalue, learning rate x curvature; not 0 only for losses that are not convex in the outputs."""
    samples: int = 0
    batch_size: int | None = None
    available: bool = False
    reason: str = ""
    """Why it is not available, in one sentence."""
    how: str = ""
    """How sharpness was measured, in words."""
    vector: NDArray[np.float64] | None = field(default=None, repr=False)
    """Top eigenvector of M, (N·C,): where the next call may start."""

    @property
    def ratio(self) -> float:
        """Sharpness over the full-batch bound; 1 is the edge of stability."""
        return self.sharpness / self.bound_high


def stability(  # noqa: PLR0913 - the public door
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | OptimizerState,
    data: tuple[Batch, Any],
    loss: Any,
    *,
    batch_size: int | None = None,
    population: int | None = None,
    clipped: float = 1.0,
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "train",
    start: NDArray[np.float64] | None = None,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> Stability:
    """Return the interval of factors by which the learning rates could be multiplied.

    Costs about 20 to 60 passes over the samples for λ₁ (a third from a good start) and 16 for noise and bias; for Adam
    one more, for the gradient. The model is only read.

    Args:
        model: any eager module.
        optimizer: of the run, or several, or what `optimizers.read` made of them.
        data: (x, y), the training batch or a sample of the training set.
        loss: name, torch loss or callable (outputs, targets) → scalar.
        batch_size: samples whose loss one optimizer step follows; None: full batch, `data` is all there is.
        population: samples that batches are drawn from; None: many more than a batch.
        clipped: factor that gradient clipping has applied to recent gradients, 1 without: steps are that much shorter.
        params: which parameters; None: all trainable. A subset gives a sharpness that is too small.
        forward: callable (module, inputs) → tensor; None: as for `empirical_ntk`.
        mode: "train": the operator that training feels. "eval" is up to 70 times too high with BatchNorm.
        start: `vector` of an earlier call on the same samples.
        seed: of random probes.
        tolerance: of sharpness, relative.

    Returns:
        With `available` False and a `reason`: an optimizer without a known step, Adam in its first 10 updates (its
        steps are then signs of gradients), a learning rate of zero, a loss without a usable curvature, weights that are
        not finite, a module without the derivatives needed.

    Raises:
        InputError: samples, targets, batch size or factor of clipping that do not fit.
    """
    x, y = data
    state = optimizer if isinstance(optimizer, OptimizerState) else read(model, optimizer)
    samples = size(x)
    if (batch_size is not None and batch_size < 1) or (population is not None and population < 1):
        raise InputError(f"batch_size and population count samples, got {batch_size} and {population}")
    if not 0 < clipped <= 1:
        raise InputError(f"clipped is a factor of gradients, wanted one above 0 and up to 1, got {clipped}")
    facts: dict[str, Any] = {"samples": samples, "batch_size": batch_size}
    if reason := unavailable(state):
        return Stability(reason=reason, **facts)
    task = Task(model, x, y, recognised(loss), params, forward, mode, seed)
    try:
        scale = per_batch(task.loss, samples, batch_size) * clipped
        found = task.measured(task.steps(state, scale), start, tolerance)
    except (NetworkError, NumericsError) as error:
        return Stability(reason=str(error), **facts)
    if isinstance(found, str):
        return Stability(reason=found, **facts)
    limits = smallest(state.groups, state.family)
    return judged(found.scaled(scale), limits, fresh(batch_size, population), facts)


def max_stable_lr(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | OptimizerState,
    data: tuple[Batch, Any],
    loss: Any,
    **options: Any,
) -> float:
    """Return the learning rate of the first parameter group at which full-batch steps on `data` become unstable.

    Ratios of the groups' learning rates are kept. The upper end of `stability`, whose options these are; exact on a
    linear model with mean squares, a statement about the present weights otherwise.

    Raises:
        InputError: no such rate is known, with the reason; or the first group's learning rate is zero.
    """
    state = optimizer if isinstance(optimizer, OptimizerState) else read(model, optimizer)
    first = state.groups[0].lr if state.groups else 0.0
    if state.groups and not any(group.lr for group in state.groups):  # before a warm-up: any one rate for all
        first = 1.0
        state = dataclasses.replace(state, groups=tuple(dataclasses.replace(g, lr=1.0) for g in state.groups))
    found = stability(model, state, data, loss, **options)
    if not found.available:
        raise InputError(f"no largest stable learning rate is known: {found.reason}")
    if not first:
        raise InputError("the first parameter group has learning rate 0; order the groups so that it has not")
    return first * found.high


def from_kernel(
    kernels: Sequence[Tensor],
    state: OptimizerState,
    root: NDArray[np.float64],
    *,
    batch_size: int | None = None,
    population: int | None = None,
) -> Stability:
    """Return the interval from kernels that are there already, one J_g D_g J_gᵀ for each parameter group.

    Args:
        kernels: full ones (N, C, N, C), or sums over outputs (N, N). The latter stand for the kernel T/C ⊗ I, whose
            largest eigenvalue is an underestimate: λ₁(T)/C ≤ λ₁(K) ≤ C λ₁(T), 4 to 24 % below it where measured.
        state: of the optimizer.
        root: S of the loss, (N, C, C), or (N, C) where diagonal: `losses.Terms.root`.
        batch_size: as in `stability`.
        population: as in `stability`.

    Raises:
        InputError: kernels that do not fit groups or root.

    Costs one eigendecomposition of N·C rows.
    """
    n, c = root.shape[:2]
    facts: dict[str, Any] = {"samples": n, "batch_size": batch_size}
    if reason := unavailable(state):
        return Stability(reason=reason, **facts)
    shapes = {tuple(k.shape) for k in kernels}
    if len(kernels) != len(state.groups) or not shapes <= {(n, c, n, c), (n, n)} or len(shapes) != 1:
        raise InputError(
            f"wanted {len(state.groups)} kernels of shape {(n, c, n, c)} or {(n, n)}, got {sorted(map(str, shapes))}"
        )
    kernel = sum(g.lr * k.double().cpu().numpy() for g, k in zip(state.groups, kernels, strict=True))
    summed = shapes == {(n, n)}
    if summed:
        kernel = np.einsum("nm,cd->ncmd", kernel / c, np.eye(c))
    s = root if root.ndim == 3 else root[:, :, None] * np.eye(c)
    m = np.einsum("nce,ncmd,mdf->nemf", s, kernel, s, optimize=True)
    matrix = m.reshape(n * c, n * c)
    values, vectors = np.linalg.eigh(matrix)
    value, v = max(0.0, float(values[-1])), vectors[:, -1]
    columns = blocks(v, n)
    bias = jackknife_bias(value, v, n, columns, matrix @ columns)
    how = f"{'kernel summed over outputs' if summed else 'full kernel'} of {n} samples"
    top = Sharpness(value, float(np.trace(matrix)), bias, v, f"{how}: an underestimate" if summed else how)
    return judged(top, smallest(state.groups, state.family), fresh(batch_size, population), facts)


def unavailable(state: OptimizerState) -> str:
    """Return why this optimizer, as it stands, has no stability gauge; "" when it has one."""
    if state.family == "other":
        return state.reason or f"the step of {state.name} has no known bound of stability"
    if not state.groups or not any(group.names for group in state.groups):
        return "the optimizer updates none of the measured parameters"
    if any(group.maximize for group in state.groups):
        return f"{state.name}(maximize=True) climbs; curvature bounds no such step"
    steps = max(group.steps for group in state.groups)
    if state.family == "adam" and steps < WARM:
        return f"not available before about {WARM} steps of {state.name}, got {steps}: its preconditioner is forming"
    if not any(group.lr > 0 for group in state.groups):
        return "the learning rate is 0 at this step"
    return ""


def judged(found: Sharpness, limits: Bounds, fresh: float, facts: dict[str, Any]) -> Stability:
    """Return the interval that a sharpness and the bounds of an optimizer make, with 1/B - 1/N as `fresh`."""
    low, high = limits.headroom(found.value, found.trace * fresh)
    low = low if fresh else high  # full batches have no noise, and one bound
    return Stability(
        low=low,
        high=high,
        sharpness=found.value,
        noise=found.trace,
        bound_low=limits.low - limits.decay_low if fresh else limits.high - limits.decay_high,
        bound_high=limits.high - limits.decay_high,
        bias=found.bias,
        negative=found.negative,
        available=True,
        how=found.how,
        vector=found.vector,
        **facts,
    )


def fresh(batch_size: int | None, population: int | None) -> float:
    """Return 1/B - 1/N, the variance of a mean of B of N samples; 0 for full batches."""
    if batch_size is None:
        return 0.0
    return max(0.0, 1 / batch_size - (0.0 if population is None else 1 / population))


def per_batch(loss: Loss, samples: int, batch_size: int | None) -> float:
    """Return B/N for a loss that sums over the samples: its curvature grows with the batch. 1 for means."""
    return batch_size / samples if batch_size is not None and loss.options.get("reduction") == "sum" else 1.0
