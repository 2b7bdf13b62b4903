"""Is this engine's Jacobian the one that autograd sees? A few rows compared, before a number is shown to anybody."""

import math

from ntk_monitor.batch import Batch
from ntk_monitor.engines.contract import Jacobian
from ntk_monitor.engines.rows import RowsJacobian
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
