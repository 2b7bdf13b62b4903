"""Normalisation layers of a network: which there are, which weights feed them, over which groups they normalise.

A group is what shares one mean and one variance: P values z, of which a layer makes u = (z - μ)/σ, σ² = var z + ε, and
γ u + β. μ is left out by RMSNorm, σ belongs to the batch under BatchNorm in training, and to no group in evaluation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ntk_monitor.applications.skips import twin
from ntk_monitor.batch import Batch, take
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.network import Forward, call, only_tensor

_KINDS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm)
_NAMES = re.compile(r"(Layer|RMS|Rms|Group|Batch|Instance)Norm(\dd)?$")

_SHAPES = re.compile(
    r"^(T|Transpose|Permute|View|UnsafeView|Reshape|Clone|Squeeze|Unsqueeze|Expand|Slice|ToCopy|Alias)"
)
_LINEAR = re.compile(r"^(Addmm|Mm|Bmm|Baddbmm|Convolution|MkldnnConvolution|Linear|MkldnnLinear|Embedding)Backward")
_HOMOGENEOUS = re.compile(r"^(Relu|LeakyRelu|MaxPool|AvgPool|AdaptiveAvgPool|AdaptiveMaxPool|Mean)")
"""Operations that scale with their input: a weight before them is as scale-free, but a bias is not dead."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation layer.

    Attributes:
        name: of the module.
        kind: its class.
        weights: trainable parameters of two or more axes of the linear operation that feeds it, if one does alone.
        biases: those of one axis.
        direct: nothing but reshaping lies between.
        batch: statistics are those of the batch in training.
    """

    name: str
    kind: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    direct: bool
    batch: bool


def is_norm(part: nn.Module) -> bool:
    """True for torch's normalisation layers and for classes named like them."""
    return isinstance(part, _KINDS) or _NAMES.search(type(part).__name__) is not None


def norms_of(model: nn.Module, x: Batch, *, forward: Forward | None = None) -> tuple[Norm, ...]:
    """Return the normalisation layers of a network in the order in which they run, from one pass of a copy.

    Raises:
        NetworkError: there is none.
    """
    model, x = twin(model, x)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Norm] = {}

    def note(name: str, part: nn.Module, values: tuple[Any, ...]) -> None:
        given = next((value for value in values if isinstance(value, Tensor)), None)
        if given is None or name in found:
            return
        feeding, direct = _feeding(given, names) if given.requires_grad else ([], True)
        kept = [p for p in feeding if p in trainable]
        sizes = {p: model.get_parameter(p).dim() for p in kept}
        found[name] = Norm(
            name,
            type(part).__name__,
            tuple(p for p in kept if sizes[p] > 1),
            tuple(p for p in kept if sizes[p] == 1),
            direct,
            isinstance(part, _BatchNorm) or (isinstance(part, _InstanceNorm) and part.track_running_stats),
        )

    for name, part in model.named_modules():
        if is_norm(part):
            part.register_forward_pre_hook(lambda module, values, name=name: note(name, module, values))
    with torch.enable_grad():
        only_tensor((forward or call)(model, take(x, slice(0, 2))))
    if not found:
        raise NetworkError(
            f"{type(model).__name__} runs no normalisation layer (LayerNorm, GroupNorm, InstanceNorm, BatchNorm or "
            "RMSNorm module); normalisation by torch.nn.functional is out of sight"
        )
    return tuple(found.values())


def _feeding(given: Tensor, names: Mapping[int, str]) -> tuple[list[str], bool]:
    """Return the parameters of the linear operation that alone makes a tensor, and whether it does so directly."""
    node, direct, own = torch.autograd.graph.get_gradient_edge(given).node, True, list[str]()
    while True:
        word = node.name()
        children = [child for child, _ in node.next_functions if child is not None]
        leaves = [_leaf(child, names) for child in children]
        own += [leaf for leaf in leaves if leaf is not None]
        if _LINEAR.search(word):
            return own, direct
        rest = [child for child, leaf in zip(children, leaves, strict=True) if leaf is None]
        homogeneous = _HOMOGENEOUS.search(word) is not None
        # Adding a parameter is adding a bias; adding anything else makes another function of the weights.
        known = homogeneous or _SHAPES.search(word) or (word.startswith("AddBackward") and len(rest) < len(children))
        if not known or len(rest) != 1:
            return [], direct
        node, direct = rest[0], direct and not homogeneous


def _leaf(node: Any, names: Mapping[int, str]) -> str | None:
    """Return the parameter that a node is, but for its shape."""
    while _SHAPES.search(node.name()) and len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return names.get(id(getattr(node, "variable", None)))


@dataclass(frozen=True, slots=True)
class Groups:
    """How a layer normalises values of one sample, flattened to R of them.

    Attributes:
        labels: (R,) group of each value.
        gains: (R,) γ.
        eps: ε.
        centred: the mean is subtracted.
        across: groups hold the values of all samples of the batch.
        scales: (R,) σ where it is a constant: there is no group then.
    """

    labels: Tensor
    gains: Tensor
    eps: float
    centred: bool = True
    across: bool = False
    scales: Tensor | None = None


def groups_of(layer: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> Groups:
    """Return how a layer normalises samples of a shape, without the sample axis.

    Args:
        layer: a normalisation module.
        shape: of its input, behind the sample axis.
        training: BatchNorm takes the statistics of the batch.

    Raises:
        InputError: a layer whose formula is not known, e.g. a class that is only named like one.
    """
    numel = torch.Size(shape).numel()
    eps = float(
        getattr(layer, "eps", None) or getattr(layer, "variance_epsilon", None) or torch.finfo(torch.float64).eps
    )
    if isinstance(layer, (_BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return _by_channel(layer, shape, eps, training)
    rms = type(layer).__name__.lower().endswith("rmsnorm")
    if not rms and not isinstance(layer, nn.LayerNorm):
        raise InputError(f"the formula of {type(layer).__name__} is not known")
    weight = getattr(layer, "weight", None)
    size = (
        weight.numel()
        if isinstance(weight, Tensor)
        else torch.Size(getattr(layer, "normalized_shape", shape[-1:])).numel()
    )
    labels = torch.arange(numel) // size
    gains = torch.ones(size, dtype=torch.float64) if weight is None else weight.detach().flatten().cpu().double()
    return Groups(labels, gains.repeat(numel // size), eps, centred=not rms)


def _by_channel(layer: Any, shape: tuple[int, ...], eps: float, training: bool) -> Groups:
    channels, numel = shape[0], torch.Size(shape).numel()
    channel = torch.arange(numel) // (numel // channels)
    weight = layer.weight
    gains = torch.ones(channels, dtype=torch.float64) if weight is None else weight.detach().cpu().double()
    if isinstance(layer, nn.GroupNorm):
        return Groups(channel * layer.num_groups // channels, gains[channel], layer.eps)
    running = layer.running_var is not None and not training
    scales = (layer.running_var.detach().cpu().double() + eps).sqrt()[channel] if running else None
    return Groups(channel, gains[channel], layer.eps, across=isinstance(layer, _BatchNorm), scales=scales)
