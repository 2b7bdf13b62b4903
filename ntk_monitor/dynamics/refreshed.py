"""The stability gauge between two full measurements: sharpness from a few products, the rest carried along.

λ₁ of M moves quickly, its eigenvector slowly: the largest Ritz value in the Krylov space of the last eigenvector v,
span {v, M v, M² v}, is below λ₁ by an error of second order in how far v has turned. The trace and the small-sample
bias, which cost most of a full measurement, follow the learning rates.
"""

from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from torch import nn

from ntk_monitor.batch import Batch, size
from ntk_monitor.dynamics.bounds import smallest
from ntk_monitor.dynamics.sharpness import Sharpness, Task
from ntk_monitor.dynamics.stability import Stability, fresh, judged, per_batch, unavailable
from ntk_monitor.engines.operator import NTKOperator
from ntk_monitor.errors import NetworkError, NumericsError
from ntk_monitor.losses import recognised
from ntk_monitor.network import Forward, Mode, Selection
from ntk_monitor.optimizers import OptimizerState

PRODUCTS = 3
"""With M, of two passes over the samples each."""


def refreshed(  # noqa: PLR0913 - as `stability`
    model: nn.Module,
    state: OptimizerState,
    data: tuple[Batch, Any],
    loss: Any,
    last: Stability,
    *,
    rates: tuple[float, ...] = (),
    products: int = PRODUCTS,
    batch_size: int | None = None,
    population: int | None = None,
    clipped: float = 1.0,
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "train",
    seed: int = 0,
) -> Stability:
    """Return the interval of `stability` at the present weights, from its last result on the same samples.

    Costs two passes over the samples for each product and about four to set up; one more for Adam's gradient.

    Args:
        model: only read.
        state: of the optimizer, now.
        data: (x, y) as at the last call.
        loss: name, torch loss or callable.
        last: what `stability`, or this function, returned.
        rates: learning rates of the parameter groups at `last`; the trace is carried along by the ratio of the largest
            ones. (): unchanged.
        products: at least 1.
        batch_size: as for `stability`.
        population: as for `stability`.
        clipped: as for `stability`.
        params: as for `stability`.
        forward: as for `stability`.
        mode: as for `stability`.
        seed: as for `stability`.

    Returns:
        `sharpness` is a lower bound; the noise is that of `last`, scaled. With `available` False and a `reason`: as
        `stability`, or no eigenvector to start from.
    """
    x, y = data
    facts: dict[str, Any] = {"samples": size(x), "batch_size": batch_size}
    reason = unavailable(state)
    if last.vector is None or not last.available:
        reason = reason or "there is no eigenvector of an earlier measurement to start from"
    if reason:
        return Stability(reason=reason, **facts)
    task = Task(model, x, y, recognised(loss), params, forward, mode, seed)
    try:
        scale = per_batch(task.loss, size(x), batch_size) * clipped
        options: dict[str, Any] = {"params": params, "forward": forward, "mode": mode, "seed": seed}
        steps = task.steps(state, scale)
        op = NTKOperator(model, x, preconditioner=steps, loss=task.loss, targets=y, **options)
        value, vector = ritz(lambda v: op @ v, np.asarray(last.vector), products)
    except (NetworkError, NumericsError) as error:
        return Stability(reason=str(error), **facts)
    value *= scale
    before, now = max(rates, default=0.0), max((group.lr for group in state.groups), default=0.0)
    noise = last.noise * (now / before if before > 0 else 1.0)
    # At least what it contains: the largest eigenvalue is part of the trace.
    found = Sharpness(value, max(noise, value), last.bias, vector, _HOW.format(products=products, route=op.route))
    return judged(found, smallest(state.groups, state.family), fresh(batch_size, population), facts)


_HOW = (
    "{products} products from the eigenvector of the probe before ({route}), a lower bound; "
    "noise and bias are those of the last full probe"
)


def ritz(product: Any, start: Float64[ndarray, " n"], products: int) -> tuple[float, Float64[ndarray, " n"]]:
    """Return the largest Ritz value of a symmetric matrix in the Krylov space of `start`, and its vector.

    Costs one product for each dimension of the space, at least one. Exact where the space is invariant.

    Raises:
        NumericsError: a start or a product that is zero or not finite.
    """
    basis = np.empty((len(start), 0))
    images = np.empty((len(start), 0))
    v = np.asarray(start, dtype=np.float64)
    for _ in range(max(1, products)):
        for _ in range(2):  # once leaves what rounding of a large projection leaves
            v = v - basis @ (basis.T @ v)
        length = float(np.linalg.norm(v))
        if not np.isfinite(length):
            raise NumericsError("a product with the training operator is not finite; look at weights and inputs")
        if length <= 1e-10 * max(1.0, float(np.linalg.norm(images[:, -1:]))):
            break
        v = v / length
        image = np.asarray(product(v), dtype=np.float64)
        basis, images = np.column_stack([basis, v]), np.column_stack([images, image])
        v = image
    if not basis.shape[1]:
        raise NumericsError("the eigenvector to start from is zero")
    if not np.isfinite(images).all():
        raise NumericsError("a product with the training operator is not finite; look at weights and inputs")
    inner = basis.T @ images
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    return max(0.0, float(values[-1])), np.asarray(basis @ vectors[:, -1])
