"""Which layers hold the kernel: traces of J_l J_lᵀ and of lr J_l D J_lᵀ by layer, estimated from a few backward passes.

E|J_lᵀ z|² = tr(J_l J_lᵀ) for random signs z, for all layers from one pass. A layer without a gradient gives exactly 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch, owned
from ntk_monitor.engines.products import environment
from ntk_monitor.network import Forward, Mode, Network, Selection, layer

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerTraces:
    """Traces by layer, over L modules that hold measured parameters.

    Attributes:
        names: of the modules; a loose parameter of the root stands for itself.
        trace: (L,) of J_l J_lᵀ, squared output units; they sum to the trace of the kernel, up to the estimate's error.
        radial: (L,) largest cosine of the weights (of two axes and more) with their gradients. 0: the layer is scale
            free, as one before a norm is, so that its kernel shrinks as 1/|w|². NaN without such weights.
        share: (L,) of lr J_l D J_lᵀ, normalised to 1: how much of the next step's motion each layer is set up to make.
    """

    names: tuple[str, ...]
    trace: Array
    share: Array
    radial: Array


def layer_traces(  # noqa: PLR0913 - options of a Network, by keyword
    module: nn.Module,
    inputs: Batch,
    *,
    scale: Mapping[str, Tensor] | None = None,
    group: Callable[[str], str] = layer,
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    probes: int = 8,
    seed: int = 0,
) -> LayerTraces:
    """Estimate the traces.

    Args:
        module: the live module, only read.
        inputs: N samples.
        scale: parameter name → lr·D of its shape; None: 1 everywhere.
        group: name of a parameter → name of what it belongs to.
        params: see `empirical_ntk`, as for the next two.
        forward: function of module and inputs.
        mode: "eval" or "train".
        device: where to compute; None: where the parameters are.
        probes: backward passes; the relative error of a layer with many alike outputs is √(2/(probes · rank)).
        seed: of the random signs.

    Source: Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix".
    """
    with environment(seed):
        network = Network.careful(module, inputs, params=params, forward=forward, mode=mode, device=device)
        outputs = network.outputs(network.prepared(owned(inputs)))
        generator = torch.Generator().manual_seed(seed)
        names = list(dict.fromkeys(group(name) for name in network.parameters))
        found, radial = np.zeros((2, len(names))), np.zeros(len(names))
        for _ in range(probes):
            signs = torch.randint(2, outputs.shape, generator=generator).to(outputs) * 2 - 1
            gradients = _gradients(outputs, network.parameters, signs)
            radial = np.maximum(radial, [_radial(network.parameters, gradients, group, name) for name in names])
            for name, g in gradients.items():
                squares = g.abs().double().square()
                weights = None if scale is None else scale[name].to(squares)
                found[:, names.index(group(name))] += (
                    float(squares.sum()),
                    float((squares if weights is None else squares * weights).sum()),
                )
    trace, share = found / probes
    total = share.sum()
    return LayerTraces(tuple(names), trace, share / total if total > 0 else share, radial)


def _gradients(outputs: Tensor, parameters: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        outputs, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name: g.to_dense() for name, g in zip(parameters, found, strict=True)}


def _radial(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], group: Callable[[str], str], layer: str
) -> float:
    """Return the cosine of a layer's weights with their gradients."""
    own = [n for n, p in parameters.items() if group(n) == layer and p.dim() > 1 and p.is_floating_point()]
    pairs = [(parameters[n].detach().double(), gradients[n].double()) for n in own]
    size = sum(float(p.square().sum()) for p, _ in pairs) * sum(float(g.square().sum()) for _, g in pairs)
    return abs(sum(float((p * g).sum()) for p, g in pairs)) / size**0.5 if size > 0 else float("nan")
