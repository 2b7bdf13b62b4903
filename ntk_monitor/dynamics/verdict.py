"""How good was a forecast, and could any linear one have been good? f₁, f₂ outputs before and after, f̂ the forecast.

Errors are relative to the motion |f₂ - f₁|, on which scale "nothing changes" has the error 1 by definition, and
relative to the residual |r|, on which scale it has the error |f₂ - f₁|/|r|. Both are given: late in training the motion
is so small that a useless-looking error of it is nothing to the residual.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch
from ntk_monitor.dynamics.kept import Change, Kept, change
from ntk_monitor.errors import InputError
from ntk_monitor.network import Forward, Mode

Values: TypeAlias = Tensor | NDArray[Any]

SMALL_MOTION = 0.05
"""Motion over |r| below which an error of the motion says little: kinks of ReLU alone give .4 there, at .01 of |r|."""

NO_CHANGE = 1.0
"""The error, relative to the motion, of the forecast that nothing changes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a forecast was worth.

    Attributes:
        error: |f̂ - f₂|/|f₂ - f₁|; compare with `NO_CHANGE`. NaN when nothing moved.
        error_residual: |f̂ - f₂|/|r|; compare with `motion`.
        motion: |f₂ - f₁|/|r|.
        suppressed: why `error` should not be shown, in one sentence; empty when it should.
    """

    error: float
    error_residual: float
    motion: float
    suppressed: str

    @property
    def better_than_nothing(self) -> bool:
        """True when the forecast was nearer to what happened than no change at all."""
        return self.error < NO_CHANGE


def verdict(before: Values, predicted: Values, after: Values, residual: Values) -> Verdict:
    """Judge a forecast of outputs by what they became.

    All four in one space, of equal size: outputs and f - y for squares; for classification either logits with a
    residual of their scale, or probabilities p with p - y.

    Args:
        before: f₁.
        predicted: f̂, a forecast of `after`; not finite when it diverged, which is an infinite error.
        after: f₂.
        residual: r, at `before`.

    Raises:
        InputError: arrays that differ in size.
    """
    one, guess, two, r = (_flat(v) for v in (before, predicted, after, residual))
    if len({len(v) for v in (one, guess, two, r)}) > 1:
        sizes = [len(v) for v in (one, guess, two, r)]
        raise InputError(f"before, predicted, after and residual must be of one size, got {sizes}")
    moved, scale = float(np.linalg.norm(two - one)), float(np.linalg.norm(r))
    missed = float(np.linalg.norm(guess - two)) if np.isfinite(guess).all() else math.inf
    motion = _over(moved, scale)
    return Verdict(_over(missed, moved), _over(missed, scale), motion, _suppressed(motion))


def _suppressed(motion: float) -> str:
    if not math.isfinite(motion):
        return "the outputs or the residual are zero or not finite"
    if motion < SMALL_MOTION:
        return f"the outputs moved by {motion:.1%} of the residual only, too little to judge a forecast by"
    return ""


@dataclass(frozen=True, slots=True)
class Linearisation:
    """Could a forecast with a fixed kernel have been right? Whatever the optimizer, the loss and the batches were.

    Attributes:
        error: |f(θ₂) - f(θ₁) - J₁ Δθ| / |f(θ₂) - f(θ₁)|, both under the buffers of θ₁. 0: the network was linear over
            this interval; near 1 or above: its kernel moved, so no forecast from the start can hold. NaN: no motion.
        motion: |f(θ₂) - f(θ₁)|, output units.
        buffers: change of the outputs by buffers alone (running statistics), over the motion. NaN: no motion.
    """

    error: float
    motion: float
    buffers: float


def linearisation(found: Change) -> Linearisation:
    """Return the errors of a change whose parts were taken at its start."""
    moved = (found.after - found.before).double()
    linear = torch.stack([part.double() for part in found.parts.values()]).sum(0)
    motion, missed = float(moved.norm()), float((moved - linear).norm())
    buffers = float((found.now - found.after).double().norm())
    return Linearisation(_over(missed, motion), motion, _over(buffers, motion))


def linearisation_error(  # noqa: PLR0913 - options of a Network, by keyword
    module: nn.Module,
    before: Kept,
    inputs: Batch,
    *,
    forward: Forward | None = None,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Linearisation:
    """Compare the change of the outputs since `before` with its linear part, taken at `before`.

    Means little while the motion is under `SMALL_MOTION` of the residual. In float32 the error cannot be resolved below
    about 1e-6 |f|/|f(θ₂) - f(θ₁)|.

    Args:
        module: the live module, only read.
        before: its weights and buffers then; the parameters kept are those whose change counts.
        inputs: N samples.
        forward: as for `empirical_ntk`.
        mode: as for `empirical_ntk`.
        device: where to measure; None: where the parameters are.
        seed: of random numbers that a forward pass may draw.

    Raises:
        InputError: the module's parameters are no longer those that were kept.
        NetworkError: the network's products with J are not exact by any route.

    Cost: about seven passes over the batch; one copy of the parameters for the time of the call.

    Sources: Lee et al. 2019, Fort et al. 2020 (the linearised network as a measure of how lazy training is).
    """
    found = change(module, before, inputs, forward=forward, mode=mode, device=device, seed=seed)
    return linearisation(found)


def _flat(values: Values) -> NDArray[np.float64]:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float64).reshape(-1)


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
