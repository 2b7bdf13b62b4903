"""Plasticity: could this network still learn something new? Asked of the kernel, without training on anything.

λ₁ ≥ … ≥ λₙ eigenvalues of K on the probe, μ a ridge fixed at the first probe. Fitting labels y by ridge regression with
K leaves the share μ yᵀ(K + μ)⁻¹ y / |y|² of them unfitted or paid for by distance; over random y that is the mean of
μ/(λᵢ + μ), exactly, so none needs to be drawn. It rises both when the kernel shrinks and when it collapses onto few
directions; the effective rank tells these apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch, owned
from ntk_monitor.engines.products import environment
from ntk_monitor.errors import InputError
from ntk_monitor.guard import seeded
from ntk_monitor.network import Forward, Mode, Network, Selection

Array = NDArray[np.float64]


def fit_cost(eigenvalues: Any, ridge: float) -> float:
    """Return the cost of fitting random labels, mean of μ/(λᵢ + μ): 0 (all at hand) to 1 (none). Costs O(n).

    E[yᵀ(K + μ)⁻¹ y] μ/n over y of independent entries with mean 0 and variance 1.

    Args:
        eigenvalues: (n,) of K; small negative ones are rounding and count as 0.
        ridge: μ > 0, in the unit of the eigenvalues.

    Raises:
        InputError: a ridge that is not positive, or no eigenvalues.
    """
    values = np.clip(np.asarray(eigenvalues, dtype=np.float64).reshape(-1), 0.0, None)
    if not ridge > 0 or not len(values):
        raise InputError(f"wanted eigenvalues and a positive ridge, got {len(values)} eigenvalues and ridge {ridge:g}")
    return float(np.mean(ridge / (values + ridge)))


@dataclass(frozen=True, slots=True)
class Start:
    """What plasticity is measured against: the kernel of the first probe.

    Attributes:
        ridge: μ, a hundredth of the mean eigenvalue then: a label counts as at hand when it is no slower than that.
        fit_cost: of random labels then.
        effective_rank: exp of the entropy of λᵢ/Σλ then, 1 to n.
        size: n.
    """

    ridge: float
    fit_cost: float
    effective_rank: float
    size: int

    @staticmethod
    def of(eigenvalues: Any) -> "Start":
        """Return the start from the eigenvalues (n,) of K at the first probe.

        Raises:
            InputError: no positive eigenvalue.
        """
        values = np.asarray(eigenvalues, dtype=np.float64).reshape(-1)
        mean = float(np.clip(values, 0.0, None).mean()) if len(values) else 0.0
        if not mean > 0 or not math.isfinite(mean):
            raise InputError("plasticity needs a first kernel with a positive finite trace; got none")
        return Start(0.01 * mean, fit_cost(values, 0.01 * mean), _effective_rank(values), len(values))


@dataclass(frozen=True, slots=True)
class Plasticity:
    """How easily random labels would be learned now.

    Attributes:
        fit_cost: 0 to 1, with the ridge of the first probe.
        relative: fit_cost over that of the first probe; above 1: harder than at the start.
        rank_ratio: effective rank over that of the first probe.
    """

    fit_cost: float
    relative: float
    rank_ratio: float


def plasticity(eigenvalues: Any, start: Start) -> Plasticity:
    """Return how easily random labels would be learned with this kernel, relative to the first. Costs O(n).

    A network that has learned its task has bent its kernel towards it, and some loss is the price of every success:
    read it as a trend, in runs whose task changes (reinforcement and continual learning). Comparable on one probe only.
    The kernel of a fresh network often grows a hundredfold over its first task, and the cost falls below that of the
    start by as much: only a cost that comes back above it says that plasticity is lost.

    Args:
        eigenvalues: (n,) of K now, on the samples of the start.
        start: of the first probe.

    Raises:
        InputError: another number of eigenvalues than at the start.

    Source: after Lyle et al. 2023, "Understanding plasticity in neural networks" (random targets as the test).
    """
    values = np.asarray(eigenvalues, dtype=np.float64).reshape(-1)
    if len(values) != start.size:
        raise InputError(
            f"wanted the {start.size} eigenvalues of the first probe's samples, got {len(values)}; "
            "start anew after the probe has changed"
        )
    cost = fit_cost(values, start.ridge)
    return Plasticity(cost, cost / start.fit_cost, _effective_rank(values) / start.effective_rank)


@dataclass(frozen=True, slots=True)
class Trend:
    """Where a positive quantity is going.

    Attributes:
        ratio: end over start of the line fitted to its logarithm; NaN below 4 values.
        z: Mann-Kendall statistic, about normal without a trend: below -2 a fall, above 2 a rise.
    """

    ratio: float
    z: float


def trend(steps: Sequence[float] | NDArray[Any], values: Sequence[float] | NDArray[Any]) -> Trend:
    """Return the trend of a positive quantity over probes, robust to single outliers. Costs O(k²) for k probes.

    Slope: the median over pairs (Theil 1950, Sen 1968); significance: Mann 1945, Kendall 1975, without ties.

    Args:
        steps: increasing, (k,).
        values: (k,); those that are not positive and finite are left out.
    """
    t, v = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    kept = np.isfinite(v) & (v > 0)
    t, v = t[kept], np.log(v[kept])
    k = len(v)
    if k < 4:
        return Trend(math.nan, 0.0)
    i, j = np.triu_indices(k, 1)
    rises = v[j] - v[i]
    slope = float(np.median(rises / (t[j] - t[i])))
    s = float(np.sign(rises).sum())
    spread = math.sqrt(k * (k - 1) * (2 * k + 5) / 18)
    return Trend(math.exp(slope * (t[-1] - t[0])), (s - math.copysign(1, s)) / spread if s else 0.0)


def silent_units(  # noqa: PLR0913 - options of a Network, by keyword
    module: nn.Module,
    inputs: Batch,
    *,
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "eval",
    threshold: float = 0.0,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of units with zero kernel in each linear or convolutional layer, 0 to 1.

    A unit is one row of the weight (an output feature or channel) with its bias. Its kernel is zero when no output of
    any sample depends on them: a ReLU that no sample opens, or whatever follows ignores it.

    Args:
        module: the live module, only read.
        inputs: N samples; a unit that is silent on these may speak on others.
        params: as for `empirical_ntk`.
        forward: as for `empirical_ntk`.
        mode: as for `empirical_ntk`.
        threshold: a unit is silent when its gradient is at most this share of the layer's mean unit; 0: exactly zero.
            Saturated units are never exactly silent; .01 finds them.
        device: where to measure; None: where the parameters are.
        seed: of the random cotangents.

    Raises:
        NetworkError: nothing trainable, or a module that cannot be followed.

    Cost: one forward and two backward passes. A whole layer of silent units may be structural (`structural_zeros`).

    Source: after Sokar et al. 2023, "The dormant neuron phenomenon" (which looks at activations).
    """
    with environment(seed):
        batch = owned(inputs)
        network = Network.careful(module, batch, params=params, forward=forward, mode=mode, device=device)
        seeded(seed)
        outputs = network.outputs(network.prepared(batch))
        energy = _energy(network, outputs, seed)
    names = {id(p): name for name, p in network.parameters.items()}
    found: dict[str, float] = {}
    for path, layer in network._module.named_modules():
        name = names.get(id(layer.weight), "") if isinstance(layer, _LAYERS) else ""
        if name and name in energy:
            units = energy[name] + energy.get(names.get(id(layer.bias), ""), 0.0)
            norms = units.sqrt()
            found[path] = float((norms <= threshold * norms.mean()).double().mean())
    return found


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _energy(network: Network, outputs: Tensor, seed: int) -> dict[str, Tensor]:
    """Return Σ |Jᵀ w|² of two random w by the leading index of each parameter: zero where J is, almost surely."""
    generator = torch.Generator().manual_seed(seed)
    parameters = network.parameters
    found = {name: torch.zeros(len(p) if p.dim() else 1, dtype=torch.float64) for name, p in parameters.items()}
    if not outputs.requires_grad:
        return found
    for _ in range(2):
        w = torch.randn(outputs.shape, generator=generator).to(outputs)
        gradients = torch.autograd.grad(
            outputs, list(parameters.values()), w, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, g in zip(found, gradients, strict=True):
            found[name] += g.to_dense().abs().cpu().double().reshape(len(found[name]), -1).square().sum(1)
    return found


def _effective_rank(values: Array) -> float:
    p = np.clip(values, 0.0, None)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0
