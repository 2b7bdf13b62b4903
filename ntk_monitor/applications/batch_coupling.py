"""BatchNorm: the kernel of evaluation, that of training, and what the gradient through the statistics is worth.

K_eval: running statistics, one function per sample. K_batch: the statistics of the batch, with the gradient through
them, which is what a training step feels; a sample's kernel then depends on its company. K_frozen: the same statistics
as constants, so that the outputs are those of training and only the gradient through the statistics is missing.

Source: Ioffe and Szegedy 2015 (BatchNorm).
"""

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ntk_monitor.applications.skips import twin
from ntk_monitor.batch import Batch, size, take
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Forward, Mode, Network, call

Array: TypeAlias = NDArray[np.float64]

_AGREES = 1e-8


@dataclass(frozen=True, slots=True)
class Coupling:
    """Kernels of one batch of N samples, summed over outputs, (N, N); `alone` of its first half, (N // 2, N // 2)."""

    evaluation: Array
    batch: Array
    frozen: Array
    alone: Array

    @property
    def evaluation_gap(self) -> float:
        """‖K_eval - K_batch‖ / ‖K_batch‖."""
        return _gap(self.evaluation, self.batch)

    @property
    def statistics_gap(self) -> float:
        """‖K_frozen - K_batch‖ / ‖K_batch‖: what the gradient through the statistics is worth."""
        return _gap(self.frozen, self.batch)

    @property
    def company(self) -> float:
        """How far the kernel of the first half changes when the second half joins its batch, relative."""
        half = len(self.alone)
        return _gap(self.batch[:half, :half], self.alone)

    @property
    def top_ratio(self) -> float:
        """λ₁ of evaluation over λ₁ of training: how much too high a learning-rate gauge of evaluation reads."""
        return float(np.linalg.eigvalsh(self.evaluation)[-1] / np.linalg.eigvalsh(self.batch)[-1])


def has_batch_norm(model: nn.Module) -> bool:
    """True for a network with a BatchNorm layer of torch's."""
    return any(isinstance(part, _BatchNorm) for part in model.modules())


def batch_coupling(model: nn.Module, x: Batch, *, forward: Forward | None = None) -> Coupling:
    """Return the kernels of a batch under the statistics of evaluation, of the batch, and of the batch held fixed.

    Args:
        model: a network with BatchNorm; only read.
        x: N samples, at least four; they are the batch.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: fewer than four samples.
        NetworkError: no BatchNorm, or one that is used more than once.

    Cost: four kernels, two of them by N·C backward passes of the whole batch.
    """
    if not has_batch_norm(model):
        raise NetworkError(f"{type(model).__name__} has no BatchNorm layer; nothing couples the samples of a batch")
    model, x = twin(model, x)
    if size(x) < 4:
        raise InputError(f"wanted at least four samples, two halves of a batch, got {size(x)}")
    held = _with_statistics(model, x, forward)
    outputs = [_outputs(model, x, "train", forward), _outputs(held, x, "eval", forward)]
    if float((outputs[0] - outputs[1]).norm()) > _AGREES * float(outputs[0].norm()):
        raise NetworkError(
            "a BatchNorm layer is used more than once in a pass, so that no one set of statistics is its own"
        )

    def kernel(network: nn.Module, samples: Batch, mode: Mode) -> Array:
        found = empirical_ntk(network, samples, outputs="trace", mode=mode, forward=forward)
        return np.asarray(found.cpu().numpy())

    half = take(x, slice(0, size(x) // 2))
    return Coupling(
        kernel(model, x, "eval"), kernel(model, x, "train"), kernel(held, x, "eval"), kernel(model, half, "train")
    )


def _with_statistics(model: nn.Module, x: Batch, forward: Forward | None) -> nn.Module:
    """Return a copy whose running statistics are those of the batch, its biased variance included."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def run(module: nn.Module, inputs: Batch) -> Any:
        hooks = []
        for name, part in module.named_modules():
            if isinstance(part, _BatchNorm):

                def note(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                    z = given[0].transpose(0, 1).flatten(1)
                    found.setdefault(name, (z.mean(1), z.var(1, correction=0)))

                hooks.append(part.register_forward_pre_hook(note))
        try:
            return (forward or call)(module, inputs)
        finally:
            for hook in hooks:
                hook.remove()

    _outputs(model, x, "train", run)
    held = copy.deepcopy(model)
    for name, (mean, variance) in found.items():
        part = held.get_submodule(name)
        part.register_buffer("running_mean", mean.clone())
        part.register_buffer("running_var", variance.clone())
    return held


def _outputs(model: nn.Module, x: Batch, mode: Mode, forward: Forward | None) -> Tensor:
    with torch.no_grad():
        return Network(model, mode=mode, forward=forward).outputs(x)


def _gap(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
