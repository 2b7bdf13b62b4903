"""Scale-free weights: f(c w) = f(w), hence ⟨∇f, w⟩ = 0, K_w(c w) = K_w(w)/c², and a learning rate that acts as lr/|w|².

True of weights in front of a normalisation with ε = 0, their bias taken along; not of BatchNorm in evaluation, whose σ
is a constant. Descent on such weights only lets them grow, |w - lr ∇|² = |w|² + lr² |∇|², so their steps shrink until
weight decay holds them: then a step turns them by √(2 lr wd).

Source: van Laarhoven 2017; Arora, Li and Lyu 2019 (scale-free weights); Wan et al. 2021 (equilibrium).
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ntk_monitor.applications.norm_layers import Norm
from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import measured
from ntk_monitor.network import Forward, Mode, Network

Optimizer: TypeAlias = Literal["sgd", "adam", "adamw"]

_STEP = 1e-4
_SCALE = 3.0
_NOTHING = 1e-20


@dataclass(frozen=True, slots=True)
class ScaleTest:
    """Whether the weights and bias that feed one layer are scale-free.

    Attributes:
        norm: the layer.
        mode: "eval", or "train" with the statistics of the batch.
        alignment: |J w| / (|J| |w|): 0 where scaling the weights does not move the outputs, 1 where nothing else does.
        ratio: tr K_w(3w) / tr K_w(w): 1/9 for scale-free weights.
        error: max |9 K_w(3w) - K_w(w)| / max |K_w(w)|.
        dead: tr K of the biases over tr K_w; NaN without biases.
        length: |w|, weights and biases.
    """

    norm: Norm
    mode: Mode
    alignment: float
    ratio: float
    error: float
    dead: float
    length: float

    @property
    def scale_free(self) -> bool:
        """True within 1 %, which leaves room for ε."""
        return self.error < 0.01 and self.alignment < 0.01


def scale_test(
    model: nn.Module, x: Batch, norm: Norm, *, mode: Mode = "eval", forward: Forward | None = None
) -> ScaleTest:
    """Return whether the weights that feed a layer are scale-free.

    Args:
        model: a float64 network; only read.
        x: N samples.
        norm: one that has weights.
        mode: "train" for the statistics of the batch.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: a layer that no single linear operation feeds.

    Cost: two kernels of the layer's parameters and two forward passes.
    """
    if not norm.weights:
        raise InputError(f"no single linear operation feeds {norm.name}; its weights are not known")
    names = [*norm.weights, *norm.biases]
    outputs = [_outputs(_scaled(model, names, c), x, mode, forward) for c in (1 - _STEP, 1 + _STEP)]
    radial = float((outputs[1] - outputs[0]).norm()) / (2 * _STEP)
    kernels = []
    for c in (1.0, _SCALE):
        found = measured(
            _scaled(model, names, c),
            x,
            outputs="trace",
            params=names,
            forward=forward,
            mode=mode,
            group=lambda name: "bias" if name in norm.biases else "weight",
        )
        kernels.append((found.values, found.layers))
    (one, layers), (other, _) = kernels
    trace, largest = float(one.diagonal().sum()), float(one.abs().max())
    length = math.sqrt(sum(float(model.get_parameter(name).detach().square().sum()) for name in names))
    # Outputs that are zero but for rounding have a kernel of rounding: a mean over what was centred, for example.
    whole = max(1.0, float(outputs[0].square().sum()))
    if not trace * length**2 > _NOTHING * whole:
        raise InputError(f"the weights that feed {norm.name} do not reach the outputs")
    dead = float(layers["bias"].diagonal().sum()) / trace if norm.biases else math.nan
    return ScaleTest(
        norm,
        mode,
        radial / (math.sqrt(trace) * length),
        float(other.diagonal().sum()) / trace,
        float((_SCALE**2 * other - one).abs().max()) / largest,
        dead,
        length,
    )


def _scaled(model: nn.Module, names: list[str], c: float) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            copied.get_parameter(name).mul_(c)
    return copied


def _outputs(model: nn.Module, x: Batch, mode: Mode, forward: Forward | None) -> Tensor:
    with torch.no_grad():
        return Network(model, mode=mode, forward=forward).outputs(x)


def effective_lr(layer: nn.Module | Tensor | float, lr: float = 1.0, optimizer: Optimizer = "sgd") -> float:
    """Return the learning rate that acts on the direction of scale-free weights.

    Args:
        layer: that holds the weights, bias included; the weights alone; or their length |w|.
        lr: of the optimizer.
        optimizer: "sgd": lr/|w|², as the gradient itself falls as 1/|w|. "adam", "adamw": lr/|w|, since their updates
            do not depend on the size of gradients.

    Raises:
        InputError: a length that is not positive, or an unknown optimizer.
    """
    held = list(layer.parameters()) if isinstance(layer, nn.Module) else [torch.as_tensor(layer)]
    length = math.sqrt(sum(float(w.detach().double().square().sum()) for w in held))
    if not length > 0 or not math.isfinite(length):
        raise InputError(f"weights must have a positive length, got {length}")
    if optimizer not in ("sgd", "adam", "adamw"):
        raise InputError(f'optimizer must be "sgd", "adam" or "adamw", got {optimizer!r}')
    return lr / length**2 if optimizer == "sgd" else lr / length


def equilibrium_step(lr: float, weight_decay: float) -> float:
    """Return √(2 lr wd), by how much of its length one step turns a scale-free weight once decay balances growth.

    For SGD without momentum and for AdamW; at a constant learning rate, after about 1/(lr wd) steps.

    Raises:
        InputError: a negative rate or decay.
    """
    if not lr >= 0 or not weight_decay >= 0:
        raise InputError(f"learning rate and weight decay must not be negative, got {lr} and {weight_decay}")
    return math.sqrt(2 * lr * weight_decay)
