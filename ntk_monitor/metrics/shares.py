"""Metrics of which layers learn. The kernels of the layers add up to K."""

import math
from collections.abc import Mapping

from ntk_monitor.metrics.measured import Measured
from ntk_monitor.metrics.registry import metric


def shares(traces: Mapping[str, float]) -> dict[str, float]:
    """Return each layer's part of the sum, by name; NaN when the sum is zero.

    From plain traces tr K_l this is the share at equal learning rates without an optimizer; from tr (lr J_l D_l J_lᵀ),
    D the optimizer's preconditioner, the share of the motion (head 53-61 % in the one, 25-30 % in the other and in
    truth, for one network trained by AdamW).
    """
    total = sum(traces.values())
    return {name: value / total if total > 0 else float("nan") for name, value in traces.items()}


@metric(
    formula="max_l s_l / Σ s, s_l = tr(lr J_l D_l J_lᵀ)",
    range=(0, 1),
    unit="fraction",
    cost="free",
    tier="A",
    lies_when="layers before a norm shrink as 1/|w|² without learning less",
)
def largest_share(measured: Measured) -> float:
    """Share of the fastest layer in the motion of the outputs, learning rates and preconditioner included."""
    return max(shares(measured.needed("layer_speed")).values())


@metric(
    formula="exp(-Σ p ln p) of the shares of the layers",
    range=(1, math.inf),
    unit="layers",
    cost="free",
    tier="A",
)
def active_layers(measured: Measured) -> float:
    """How many layers carry the motion of the outputs at a similar rate."""
    found = [p for p in shares(measured.needed("layer_speed")).values() if not p <= 0]
    return math.exp(-sum(p * math.log(p) for p in found))


@metric(
    formula="tr K_head / tr K",
    range=(0, 1),
    unit="fraction",
    cost="free",
    tier="B",
    source="Lee 2019",
    lies_when="the last layer in the network's order is not its head",
)
def head_share(measured: Measured) -> float:
    """Share of the last layer in the kernel: near 1 the features below are as good as frozen."""
    return list(shares(measured.needed("layer_trace")).values())[-1]
