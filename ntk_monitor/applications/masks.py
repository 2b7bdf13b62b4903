"""Dropout masks as inputs: a network whose dropout modules multiply by masks that are passed along with the samples.

A kernel between samples under chosen masks is then an ordinary kernel, exact by any engine. q = 1 - p is what is kept.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ntk_monitor.batch import Batch, mapped, moved, size
from ntk_monitor.errors import NetworkError
from ntk_monitor.network import Forward, call, only_tensor

_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class _Drop(nn.Module):
    """In the place of one dropout module: multiplies by the next mask, or, without masks, notes the shape it sees."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.keep = 1.0 - float(getattr(original, "p", 0.0))
        self.channels = isinstance(original, _CHANNELS)
        self.masks: list[Tensor] | None = None
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return x times this call's mask."""
        if self.masks is None:
            self.shapes.append(tuple(x.shape))
            return x
        mask = self.masks.pop(0)
        return x * mask.reshape(-1, *mask.shape[2:])


class Masked(nn.Module):
    """A float64 copy of a network in evaluation mode that takes (inputs, masks); see `shapes`.

    Raises:
        NetworkError: no dropout module that masks by multiplication, or one that keeps nothing.
    """

    def __init__(self, network: nn.Module, forward: Forward | None = None) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).double().eval()
        self._head = forward
        found = 0
        for parent in list(self.network.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
                    raise NetworkError(
                        f"{type(part).__name__} shifts what it drops; only masks that multiply are known"
                    )
                if isinstance(part, (nn.Dropout, *_CHANNELS)) and part.p > 0:
                    setattr(parent, name, _Drop(part))
                    found += 1
        if not found:
            raise NetworkError(
                "the network has no dropout module with p > 0; dropout inside attention, recurrent layers and "
                "torch.nn.functional is out of sight"
            )
        if any(drop.keep <= 0 for drop in self.drops):
            raise NetworkError("a dropout module with p = 1 keeps nothing; its network has no kernel")

    @property
    def drops(self) -> list[_Drop]:
        """What stands in the place of the dropout modules, in the order of `modules()`."""
        return [part for part in self.network.modules() if isinstance(part, _Drop)]

    @property
    def keeps(self) -> list[float]:
        """What every dropout module keeps, q."""
        return [drop.keep for drop in self.drops]

    def forward(self, inputs: Batch, masks: list[Tensor]) -> Tensor:
        """Return the outputs under these masks, module by module, and call by call within each."""
        rest = list(masks)
        for drop in self.drops:
            calls = len(drop.shapes)
            drop.masks, rest = rest[:calls], rest[calls:]
        return self._outputs(inputs)

    def prepare(self, x: Batch) -> Batch:
        """Note the shapes at every dropout module, and return the samples in float64 on the network's device.

        Raises:
            NetworkError: a dropout module whose leading axis does not hold the samples.
        """
        device = next(self.network.parameters()).device
        x = moved(x, device, torch.float64)
        for drop in self.drops:
            drop.masks, drop.shapes = None, []
        with torch.no_grad():
            self._outputs(x)
        for drop in self.drops:
            for shape in drop.shapes:
                if shape[0] % size(x):
                    raise NetworkError(
                        f"dropout must see samples along its leading axis, got shape {shape} for {size(x)} samples"
                    )
        return x

    def draw(
        self, count: int, samples: int, generator: torch.Generator, *, shared: bool, rescale: bool
    ) -> list[Tensor]:
        """Return masks for `count` repetitions of the samples, one tensor for each call of a dropout module.

        Args:
            count: repetitions, each with masks of its own.
            samples: N of the batch that was prepared.
            generator: of the masks, on the CPU.
            shared: one mask for all samples of a repetition, instead of one each.
            rescale: divide what is kept by q, as torch does.
        """
        masks = []
        for drop in self.drops:
            for shape in drop.shapes:
                each = (shape[0] // samples, *_masked(shape, drop.channels)[1:])
                drawn = torch.rand((count, 1 if shared else samples, *each), generator=generator) < drop.keep
                values = drawn.double() / (drop.keep if rescale else 1.0)
                masks.append(values.expand(count, samples, *each).reshape(count * samples, *each))
        return masks

    def constant(self, samples: int, *, kept: bool) -> list[Tensor]:
        """Return masks of ones for the samples, or of q where `kept`: evaluation without torch's rescaling."""
        return [
            torch.full(
                (samples, shape[0] // samples, *_masked(shape, drop.channels)[1:]), drop.keep if kept else 1.0
            ).double()
            for drop in self.drops
            for shape in drop.shapes
        ]

    def _outputs(self, inputs: Batch) -> Tensor:
        return only_tensor(call(self.network, inputs)) if self._head is None else self._head(self.network, inputs)


def _masked(shape: tuple[int, ...], channels: bool) -> tuple[int, ...]:
    """Return the shape of a mask: whole channels are dropped together."""
    return (*shape[:2], *[1] * (len(shape) - 2)) if channels else shape


def tiled(x: Batch, times: int) -> Batch:
    """Return the batch repeated `times` over."""
    n = size(x)

    def repeat(t: Tensor) -> Any:
        return t.repeat(times, *[1] * (t.dim() - 1)) if t.dim() and len(t) == n else t

    return mapped(x, repeat)


def kept_together(keeps: list[float]) -> float:
    """Return the product of all q."""
    return math.prod(keeps)
