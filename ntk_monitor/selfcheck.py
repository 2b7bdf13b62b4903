"""Is this engine's Jacobian the one that autograd sees? A few rows compared, before a number is shown to anybody."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size
from ntk_monitor.engines.contract import Jacobian
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.engines.structured.engine import structured_gram
from ntk_monitor.network import Network

# Two orders of summation of the same float32 gradient differ by about 1e-5; a missed use of a parameter by about 1e-1.
_TOLERANCE = {4: 1e-3, 8: 1e-7}


def disagreement(jacobian: Jacobian, network: Network, inputs: Batch) -> str:
    """Compare rows of the first and the last sample with plain autograd over the whole batch.

    Returns the worst parameter and its error in words, or "" when they agree. Catches parameters that an engine does
    not see, uses it counts twice, and samples that are coupled (batch statistics). Cost: one block of two samples and a
    few backward passes.
    """
    oracle = RowsJacobian(network, inputs)
    worst, culprit = 0.0, ""
    for n in sorted({0, oracle.samples - 1}):
        block = jacobian.block(slice(n, n + 1))
        for c in sorted({0, oracle.outputs - 1}):
            row = oracle.row(n, c)
            scale = sum(float(g.double().square().sum()) for g in row.values()) ** 0.5
            if not math.isfinite(scale):
                continue  # the weights are the problem, not the engine
            for name, gradient in row.items():
                error = float((block[name][0, c].double() - gradient.double()).norm()) / (scale or 1.0)
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


def structured_disagreement(network: Network, inputs: Batch) -> str:
    """Compare the structured kernel of a random combination of the outputs with plain autograd rows.

    All pairs of the first, the middle and the last sample, parameter by parameter. Returns the worst parameter, the
    operations it enters and the error in words, or "". Cost: one structured pass and three backward passes.
    """
    projected = _Projected(network)
    kernels, lines = structured_gram(projected, inputs, None, "trace", group=lambda name: name, scale={})
    oracle, n = RowsJacobian(projected, inputs), size(inputs)
    chosen = sorted({0, n // 2, n - 1})
    rows: list[Mapping[str, Tensor]] = [oracle.row(i, 0) for i in chosen]
    scales = [math.sqrt(sum(float(g.double().square().sum()) for g in row.values())) for row in rows]
    worst, culprit = 0.0, lines[0]
    for line in lines:
        for i, (a, left) in enumerate(zip(chosen, rows, strict=True)):
            for j, (b, right) in enumerate(zip(chosen, rows, strict=True)):
                scale = scales[i] * scales[j]
                wanted = float(left[line.parameter].double() @ right[line.parameter].double())
                if not math.isfinite(scale) or not math.isfinite(wanted):
                    continue  # the weights are the problem, not the engine
                error = abs(float(kernels[line.parameter][a, b]) - wanted) / (scale or 1.0)
                if not error <= worst:  # NaN included
                    worst, culprit = error if math.isfinite(error) else math.inf, line
    if worst <= _TOLERANCE[8 if network.dtype.itemsize == 8 else 4]:
        return ""
    return (
        f"the kernel of {culprit.parameter} ({', '.join(culprit.operations) or 'no operation'}) "
        f"differs from autograd's by {worst:.1e} of the whole"
    )
