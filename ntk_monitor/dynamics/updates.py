"""Who moved the outputs? The change between two moments, taken apart by layer, whatever the optimizer was.

J_l Δθ_l is what the actual step of layer l's parameters did to the outputs, to first order; over all layers it sums to
J Δθ. Unlike shares of the kernel it needs no learning rate and no preconditioner: momentum, clipping, decay, Muon, Lion
and BatchNorm are in it, because they are in Δθ.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch
from ntk_monitor.dynamics.kept import Kept, change
from ntk_monitor.dynamics.verdict import Linearisation, linearisation
from ntk_monitor.errors import InputError
from ntk_monitor.network import Forward, Mode, layer

Array = NDArray[np.float64]

MOST_LAYERS = 32
"""More layers than this are put together by the beginnings of their names: each costs a pass."""


@dataclass(frozen=True, slots=True)
class Updates:
    """The change of the outputs between two moments, by layer. d_l = J_l Δθ_l, g = dL/df at the start.

    Attributes:
        layers: names of modules, or of blocks of them.
        share: (L,) |d_l|² normalised to 1; zeros when nothing moved.
        useful: (L,) cosine of d_l with -g, -1 to 1; NaN where a layer did not move the outputs. Gradient descent itself
            gives less than 1, since J_l J_lᵀ g is not parallel to g.
        gain: (L,) -g·d_l, loss units: what each layer took off the loss, to first order; negative: it added.
        moved: (L,) |Δθ_l|/|θ_l|, the relative distance in the parameters.
        motion: |f(θ₂) - f(θ₁)|, output units, under the same buffers.
        along: cosine of the whole change with -g.
        wasted: share of the energy of the whole change that is not along -g: 1 - along², and 1 where along < 0.
        linearisation: how far the d_l add up to the change, and what buffers did alone. Shares mean little where its
            error is near 1. With `at` other than 0 the error is that of the Jacobian taken there.
    """

    layers: tuple[str, ...]
    share: Array
    useful: Array
    gain: Array
    moved: Array
    motion: float
    along: float
    wasted: float
    linearisation: Linearisation


def decompose(  # noqa: PLR0913 - options of a Network, by keyword
    module: nn.Module,
    kept: Kept,
    inputs: Batch,
    gradient: Tensor | Array,
    *,
    group: Callable[[str], str] | None = None,
    at: float = 0.0,
    forward: Forward | None = None,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Updates:
    """Take the change of the outputs since `kept` apart by layer.

    Args:
        module: the live module, only read.
        kept: weights and buffers of the earlier moment; parameters that were not kept do not count.
        inputs: N samples.
        gradient: g (N, C), gradient of their loss in the outputs at the earlier moment.
        group: name of a parameter → name of what it belongs to; None: `blocks` of all kept parameters.
        at: where J is taken, at θ₁ + at·Δθ. 0: the start, which makes `gain` the first-order change of the loss; .5:
            the middle, whose parts add up to the change to third order.
        forward: as for `empirical_ntk`.
        mode: as for `empirical_ntk`.
        device: where to measure; None: where the parameters are.
        seed: of random numbers that a forward pass may draw.

    Raises:
        InputError: a gradient that does not fit, or parameters that are no longer those that were kept.
        NetworkError: the network's products with J are not exact by any route.

    Cost: about six passes over the batch and one for each layer.
    """
    group = group or blocks(list(kept.parameters))
    found = change(module, kept, inputs, group=group, at=at, forward=forward, mode=mode, device=device, seed=seed)
    g = torch.as_tensor(gradient).detach().cpu().double()
    if g.numel() != found.before.numel():
        raise InputError(
            f"gradient must have the shape of the outputs {tuple(found.before.shape)}, got {tuple(g.shape)}; "
            "pass dL/df on the same samples"
        )
    g = g.reshape(-1)
    parts = torch.stack([part.cpu().double().reshape(-1) for part in found.parts.values()])
    norms, gains = parts.norm(dim=1), -(parts @ g)
    energy = norms.square()
    moved = (found.after - found.before).cpu().double().reshape(-1)
    along = _cosine(-float(moved @ g), float(moved.norm()), float(g.norm()))
    distances = distance(module, kept, group)
    return Updates(
        tuple(found.parts),
        (energy / energy.sum() if bool(energy.sum() > 0) else energy).numpy(),
        np.array([_cosine(float(a), float(n), float(g.norm())) for a, n in zip(gains, norms, strict=True)]),
        gains.numpy(),
        np.array([distances[name] for name in found.parts]),
        float(moved.norm()),
        along,
        1 - max(along, 0.0) ** 2,
        linearisation(found),
    )


def distance(module: nn.Module, kept: Kept, group: Callable[[str], str] = layer) -> dict[str, float]:
    """Return |θ_l - θ_l,kept|/|θ_l,kept| of each group of parameters; inf where they have left zero. No pass.

    Raises:
        InputError: the module's parameters are no longer those that were kept.
    """
    squares: dict[str, list[float]] = {}
    for name, now in kept.now(module).items():
        was = kept.parameters[name]
        found = squares.setdefault(group(name), [0.0, 0.0])
        found[0] += _square(now.cpu() - was)
        found[1] += _square(was)
    return {
        name: math.sqrt(moved / size) if size else (math.inf if moved else 0.0)
        for name, (moved, size) in squares.items()
    }


def blocks(parameters: Sequence[str], most: int = MOST_LAYERS) -> Callable[[str], str]:
    """Return the function from a parameter's name to its layer, or, of more than `most` layers, to a block of them.

    Blocks are the beginnings of names, as long as they may be: "encoder.layers.3" for all that is inside.
    """
    names = {name: layer(name) for name in parameters}
    depth = max(name.count(".") + 1 for name in names.values())
    while len(set(names.values())) > most and depth > 1:
        depth -= 1
        names = {name: ".".join(layer(name).split(".")[:depth]) for name in names}
    return lambda name: names.get(name, layer(name))


def kernel_share(layers: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each layer's share in the trace, from the kernels of layers (`empirical_ntk`, by_layer=True).

    For the share of the *next step* the kernels must hold what the step does: preconditioner lr·D by parameter, with D
    that of the optimizer. Of plain J_l J_lᵀ a head has twice the share that it has in what AdamW does.
    """
    traces = {name: _trace(kernel) for name, kernel in layers.items()}
    total = sum(traces.values())
    return {name: trace / total if total > 0 else 0.0 for name, trace in traces.items()}


def _trace(kernel: Tensor) -> float:
    if kernel.dim() == 4:
        n = kernel.shape[0] * kernel.shape[1]
        return float(kernel.reshape(n, n).trace())
    return float(torch.diagonal(kernel, dim1=-2, dim2=-1).sum())


def _square(t: Tensor) -> float:
    return float(t.abs().double().square().sum())


def _cosine(product: float, *norms: float) -> float:
    scale = math.prod(norms)
    return product / scale if scale > 0 else math.nan
