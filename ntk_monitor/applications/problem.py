"""A network's regression problem in float64: its samples in two parts, outputs, kernels, and training by descent.

N training and M held-out samples, C outputs. Everything is evaluated as in evaluation mode (dropout off, BatchNorm's
running statistics), since only then is the network one fixed function of its weights.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk_monitor.batch import Batch, mapped, size, take, tensored
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Forward, call, only_tensor

Array = NDArray[np.float64]

MOST_ROWS = 4096
"""Rows N·C of a kernel that is factorised: 4096 take 128 MiB and a minute."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A network, and what it is to learn.

    Attributes:
        model: a float64 copy.
        x: inputs of the N training samples.
        y: targets (N, C).
        x_test: inputs of the M held-out samples.
        y_test: (M, C).
        forward: see `empirical_ntk`.
        classes: True where the targets were class labels, now one-hot.
    """

    model: nn.Module
    x: Batch
    y: Array
    x_test: Batch
    y_test: Array
    forward: Forward | None
    classes: bool

    def outputs(self, x: Batch, model: nn.Module | None = None) -> Array:
        """Return the outputs (samples, C) of the copy, or of another model."""
        with torch.no_grad():
            return np.asarray(_outputs(model or self.model, x, self.forward).cpu().numpy())

    def kernels(self) -> tuple[Array, Array]:
        """Return the training kernel (N·C, N·C) and the cross kernel (M·C, N·C)."""
        rows = self.y.size
        train = empirical_ntk(self.model, self.x, forward=self.forward)
        cross = empirical_ntk(self.model, self.x_test, self.x, forward=self.forward)
        return train.reshape(rows, rows).cpu().numpy(), cross.reshape(-1, rows).cpu().numpy()

    def weights_pushed(self, x: Batch) -> Array:
        """Return J θ (samples, C), the change of the outputs per unit of a uniform growth of all trainable weights."""
        return self.pushed(x, [p.detach() for p in self.model.parameters() if p.requires_grad])

    def pushed(self, x: Batch, direction: Sequence[Tensor]) -> Array:
        """Return J v (samples, C), the change of the outputs per unit of a step along v, one tensor per trained weight.

        Cost: two backward passes, the second through the first.
        """
        weights = [p for p in self.model.parameters() if p.requires_grad]
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            f = _outputs(self.model, x, self.forward)
            along = torch.zeros_like(f, requires_grad=True)
            gradients = torch.autograd.grad(f, weights, along, create_graph=True, allow_unused=True)
            found: list[Tensor | None] = list(gradients)
            terms = [(g * v).sum() for g, v in zip(found, direction, strict=True) if g is not None]
            return np.asarray(torch.autograd.grad(torch.stack(terms).sum(), along)[0].cpu().numpy())

    def descend(  # noqa: PLR0913 - as many as torch.optim.SGD has, and the penalty
        self,
        steps: int,
        rate: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        scale: float = 1.0,
        pull: float = 0.0,
        center: str = "init",
        watch: Callable[[int, nn.Module], bool] | None = None,
    ) -> nn.Module:
        """Train a copy of the copy by full-batch descent on scale/2 |f - y|² + scale·pull/2 |θ - center|².

        Args:
            steps: at most so many.
            rate: of learning.
            momentum: as torch.optim.SGD has it.
            nesterov: likewise.
            scale: s: 1 for half the sum of squares, 2/(N·C) for torch's mean squared error.
            pull: ridge λ.
            center: "init" or "zero".
            watch: called as (step, model) before the first step and after each; True ends training.

        Raises:
            InputError: the loss grows a thousandfold: the rate is too large for this network.
        """
        model = copy.deepcopy(self.model)
        trained = [p for p in model.parameters() if p.requires_grad]
        start = [torch.zeros_like(p) if center == "zero" else p.detach().clone() for p in trained]
        optimizer = torch.optim.SGD(trained, lr=rate, momentum=momentum, nesterov=nesterov)
        y = torch.from_numpy(self.y).to(trained[0].device)
        if watch is not None and watch(0, model):
            return model
        first = math.inf
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = scale / 2 * (_outputs(model, self.x, self.forward) - y).square().sum()
            loss.backward()
            first = loss.item() if step == 1 else first
            # Momentum may overshoot, but not by this much: what comes back from there is another network.
            if not loss.item() <= 1e3 * first + 1e-12:
                raise InputError(f"training diverged at step {step} with learning rate {rate:.3g}; pass a smaller one")
            if pull:
                for p, home in zip(trained, start, strict=True):
                    if p.grad is not None:
                        p.grad.add_(p.detach() - home, alpha=scale * pull)
            optimizer.step()
            if watch is not None and watch(step, model):
                break
        return model


def problem(
    model: nn.Module,
    x: Batch,
    y: Any,
    *,
    held_out: float = 0.25,
    forward: Forward | None = None,
    seed: int = 0,
) -> Problem:
    """Return the regression problem of a model and its samples; the model is copied and not touched.

    Args:
        model: any module with one floating output per sample.
        x: N + M samples.
        y: numbers (N + M, ...) of the shape of the outputs, or class labels (N + M,), which become one-hot.
        held_out: fraction M / (N + M), drawn at random.
        forward: see `empirical_ntk`.
        seed: of the draw.

    Raises:
        InputError: no targets, targets that do not fit the outputs, fewer than 8 samples, or more than 4096 rows N·C.
    """
    x, count = tensored(x), size(x)
    if y is None:
        raise InputError("training needs targets, got none; pass (inputs, targets)")
    if not 0 < held_out < 1 or count < 8:
        raise InputError(f"at least 8 samples and 0 < held_out < 1 are needed, got {count} and {held_out}")
    copied = copy.deepcopy(model).double()
    for child in copied.modules():
        child.training = False
    x = _double(x, copied)
    with torch.no_grad():
        columns = _outputs(copied, take(x, slice(0, 2)), forward).shape[1]
    targets, classes = _targets(torch.as_tensor(y), count, columns)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = count - max(2, round(held_out * count))
    if kept * columns > MOST_ROWS:
        raise InputError(
            f"the kernel of {kept} samples x {columns} outputs has {kept * columns} rows, more than {MOST_ROWS}; "
            f"pass at most {MOST_ROWS // columns} training samples, or forward= that returns fewer outputs"
        )
    train, test = order[:kept], order[kept:]
    parts = (take(x, train), targets[train].numpy(), take(x, test), targets[test].numpy())
    return Problem(copied, *parts, forward, classes)


def _targets(y: Tensor, count: int, columns: int) -> tuple[Tensor, bool]:
    y = y.detach().cpu()
    if len(y) != count:
        raise InputError(f"one target per sample is needed, got {len(y)} for {count} samples")
    if not y.is_floating_point() and y.numel() == count and columns > 1:
        if int(y.min()) < 0 or int(y.max()) >= columns:
            raise InputError(f"class labels must be 0 to {columns - 1}, got {int(y.min())} to {int(y.max())}")
        return nn.functional.one_hot(y.reshape(-1).long(), columns).double(), True
    if y.numel() != count * columns:
        raise InputError(f"targets must fit the outputs ({count}, {columns}), got {tuple(y.shape)}")
    return y.double().reshape(count, columns), False


def _outputs(model: nn.Module, x: Batch, forward: Forward | None) -> Tensor:
    found = only_tensor(call(model, x) if forward is None else forward(model, x))
    return found.reshape(len(found), -1)


def _double(x: Batch, model: nn.Module) -> Batch:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return mapped(x, lambda t: t.to(device, torch.float64 if t.is_floating_point() else t.dtype))


class ReLUNetwork(nn.Module):
    """√(2/h) a·relu(W x), W and a standard normal: two layers in the NTK parametrisation, homogeneous of degree 2."""

    def __init__(self, inputs: int, width: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(width, inputs, generator=draw, dtype=torch.float64))
        self.last = nn.Parameter(torch.randn(1, width, generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1)."""
        return math.sqrt(2 / len(self.first)) * torch.relu(x @ self.first.T) @ self.last.T


class Antisymmetric(nn.Module):
    """(f_a - f_b)/√2 of two copies of a module: zero at the start, with the same kernel (Zhang et al. 2020)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.plus, self.minus = copy.deepcopy(module), copy.deepcopy(module)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the scaled difference."""
        difference: Tensor = self.plus(*inputs, **named) - self.minus(*inputs, **named)
        return difference / math.sqrt(2)


def times(most: int, count: int) -> Sequence[int]:
    """Return steps 0, 1, ... to `most`, at most `count` + 1 of them, ever further apart."""
    spread = np.unique(np.geomspace(1, max(most, 1), count).round().astype(int))
    return [0, *spread.tolist()]
