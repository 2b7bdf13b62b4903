"""Is this engine's Jacobian the one that autograd sees? A few rows compared, before a number is shown to anybody."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size, take
from ntk_monitor.engines.contract import Jacobian
from ntk_monitor.engines.rows import RowsJacobian, real_part
from ntk_monitor.engines.structured.engine import Line, structured_gram
from ntk_monitor.network import Network, layer

# Two orders of summation of the same float32 gradient differ by about 1e-5; a missed use of a parameter by about 1e-1.
_TOLERANCE = {4: 1e-3, 8: 1e-7}

_WHOLE = 2**22
"""Networks of up to so many scalars are compared on the whole batch, at three samples; a pass of larger ones takes too
long, and a third gradient too much memory."""
_ENTRIES = 2**24
"""The same for entries of all kernels by parameter together, 128 MiB in float64."""
_FEW = 16
"""Samples on which all others are compared."""


def disagreement(jacobian: Jacobian, network: Network, inputs: Batch, *, width: int = 1) -> str:
    """Compare rows of the first and the last sample with plain autograd over the whole batch.

    `width`: samples per block, which an engine's answer should not depend on.

    Returns the worst parameter and its error in words, or "" when they agree. Catches parameters that an engine does
    not see, uses it counts twice, and samples that are coupled (batch statistics). Cost: two blocks and a few
    backward passes.
    """
    oracle = RowsJacobian(network, inputs)
    worst, culprit = 0.0, ""
    width = min(width, oracle.samples)
    for n in sorted({0, oracle.samples - 1}):
        start = min(n, oracle.samples - width)
        block = jacobian.block(slice(start, start + width))
        for c in sorted({0, oracle.outputs - 1}):
            row = oracle.row(n, c)
            scale = sum(float(g.double().square().sum()) for g in row.values()) ** 0.5
            if not math.isfinite(scale):
                continue  # the weights are the problem, not the engine
            for name, gradient in row.items():
                error = float((block[name][n - start, c].double() - gradient.double()).norm()) / (scale or 1.0)
                if not error <= worst:  # NaN included
                    worst, culprit = error if math.isfinite(error) else math.inf, name
    tolerance = _TOLERANCE[8 if network.dtype.itemsize == 8 else 4]
    if worst <= tolerance:
        return ""
    return (
        f"its gradient differs from autograd's over the whole batch by {worst:.1e} of the row at {culprit} "
        "(samples coupled by batch statistics, or a parameter used in a way that is not followed)"
    )


class _Projected(Network):
    """The network with its outputs combined into one by fixed random weights, which no output escapes."""

    def __init__(self, network: Network) -> None:
        self._whole = network
        self.parameters = network.parameters

    def outputs(self, inputs: Batch) -> Tensor:
        y = self._whole.outputs(inputs)
        generator = torch.Generator().manual_seed(3)
        return y @ torch.randn(y.shape[1], 1, generator=generator, dtype=torch.float64).to(y)


def structured_disagreement(network: Network, inputs: Batch, other: Batch | None = None) -> str:
    """Compare the structured kernel of a random combination of the outputs with plain autograd.

    All pairs of the first, the middle and the last sample, parameter by parameter; then rᵀ K s, layer by layer, with
    random weights r of all samples and s of the other batch's, which is the product of two gradients. Returns the worst
    parameter or layer, the operations it enters and the error in words, or "". Cost: two or three structured passes
    for one output, and four or five backward passes; of 16 samples, evenly spread, where the network has more than four
    million scalars or the kernels by parameter would take more than 128 MiB. Memory: three gradients of all parameters,
    two of large networks.
    """
    inputs, other = _few(network, inputs), None if other is None else _few(network, other)
    projected = _Projected(network)
    tolerance = _TOLERANCE[8 if network.dtype.itemsize == 8 else 4]
    kernels, lines = structured_gram(projected, inputs, None, "trace", group=lambda name: name, scale={})
    worst, culprit = _worst_pair(kernels, lines, projected, inputs)
    if worst > tolerance:
        return (
            f"the kernel of {culprit.parameter} ({', '.join(culprit.operations) or 'no operation'}) differs from "
            f"autograd's by {worst:.1e} of the whole"
        )
    for batch in (None, other) if other is not None else (None,):
        worst, layer = _worst_form(projected, inputs, batch)
        if worst > tolerance:
            what = "kernel" if batch is None else "cross kernel"
            return f"the {what} of {layer or 'a parameter'} differs from autograd's by {worst:.1e} of the whole"
    return ""


def _few(network: Network, inputs: Batch) -> Batch:
    n = size(inputs)
    whole = network.parameter_count <= _WHOLE and n * n * len(network.parameters) <= _ENTRIES
    if whole or n <= _FEW:
        return inputs
    return take(inputs, [i * (n - 1) // (_FEW - 1) for i in range(_FEW)])


def _worst_pair(
    kernels: Mapping[str, Tensor], lines: Sequence[Line], network: Network, inputs: Batch
) -> tuple[float, Line]:
    oracle, n = RowsJacobian(network, inputs), size(inputs)
    middle = {n // 2} if network.parameter_count <= _WHOLE else set()
    chosen = sorted({0, *middle, n - 1})
    rows: list[Mapping[str, Tensor]] = [oracle.row(i, 0) for i in chosen]
    scales = [math.sqrt(sum(float(g.double().square().sum()) for g in row.values())) for row in rows]
    worst, culprit = 0.0, lines[0]
    for line in lines:
        for i, (a, left) in enumerate(zip(chosen, rows, strict=True)):
            for j, (b, right) in enumerate(zip(chosen, rows, strict=True)):
                wanted = float(left[line.parameter].double() @ right[line.parameter].double())
                error = _error(float(kernels[line.parameter][a, b]), wanted, scales[i] * scales[j])
                if error > worst:
                    worst, culprit = error, line
    return worst, culprit


def _worst_form(network: Network, inputs: Batch, other: Batch | None) -> tuple[float, str]:
    """Compare rᵀ K s by layer, as a layer's biases may be multiplied together with its weights."""
    kernels, _ = structured_gram(network, inputs, other, "trace", group=layer, scale={})
    r, g = _weighted(network, inputs)
    s, h = (r, g) if other is None else _weighted(network, other)
    wanted = dict.fromkeys(kernels, 0.0)
    for name in g:
        wanted[layer(name)] += float(g[name].double() @ h[name].double())
    found = {name: float(r @ kernel @ s) for name, kernel in kernels.items()}
    # Without the signs: what the rounding of the entries adds up to, and of the two gradients.
    left, right = (math.sqrt(sum(float(v.double().square().sum()) for v in part.values())) for part in (g, h))
    whole = max(left * right, *(float(r.abs() @ kernel.abs() @ s.abs()) for kernel in kernels.values()))
    errors = {name: _error(found[name], wanted[name], whole) for name in kernels}
    culprit = max(errors, key=lambda name: errors[name])
    return errors[culprit], culprit


def _weighted(network: Network, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return random weights of the samples, and the gradient of the outputs' sum with these weights."""
    y = network.outputs(inputs)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(len(y), generator=generator, dtype=torch.float64).to(y.device)
    parameters = list(network.parameters.values())
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if y.requires_grad:
        gradients = torch.autograd.grad(y[:, 0] @ weights.to(y.dtype), parameters, allow_unused=True)
    return weights, {
        name: real_part(torch.zeros_like(p) if g is None else g.to_dense())
        for (name, p), g in zip(network.parameters.items(), gradients, strict=True)
    }


def _error(found: float, wanted: float, whole: float) -> float:
    if not math.isfinite(whole) or not math.isfinite(wanted):
        return 0.0  # the weights are the problem, not the engine
    error = abs(found - wanted) / (whole or 1.0)
    return error if math.isfinite(error) else math.inf
