"""What a plan knows of a kernel: its arguments, the operations of one forward pass, and what the sample map found.

N samples, C outputs. The pass is made as the structured engine makes it; where that one refuses, it is an ordinary
one, and a backward pass of two rows tells whether autograd can vectorise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_monitor.batch import Batch, size, take
from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.speeds import Clock, speeds
from ntk_monitor.engines.structured.held import of_one_output
from ntk_monitor.engines.structured.recording import SharedValueError, Side, located, recorded
from ntk_monitor.engines.structured.tap import UnfollowedError
from ntk_monitor.engines.work import Meter
from ntk_monitor.errors import NTKMonitorError, said
from ntk_monitor.network import Mode, Network


@dataclass(frozen=True, slots=True)
class Watched:
    """A kernel that is asked for, and the forward pass that was watched for it."""

    network: Network
    layout: Layout
    work: torch.dtype
    """Of products."""
    limit: int
    """Bytes."""
    samples: int
    outputs: int
    clock: Clock
    meter: Meter
    metered: int
    """Samples in what the meter saw."""
    side: Side | None
    """What the structured engine sees, samples located; None where it refuses."""
    refusal: str
    """Why it does."""
    problem: str
    """Why autograd's backward pass cannot be vectorised, or ""; tried only where the structured engine refuses."""

    @property
    def share(self) -> float:
        """All samples relative to those that the meter saw."""
        return self.samples / self.metered

    @property
    def kernel(self) -> int:
        """Bytes of the kernel in float64."""
        return 8 * self.samples**2 * {"full": self.outputs**2, "trace": 1, "per_output": self.outputs}[self.layout]


def watched(network: Network, inputs: Batch, layout: Layout, work: torch.dtype, limit: int, mode: Mode) -> Watched:
    """Return what one forward pass tells; `work` is the dtype of products, `limit` bytes.

    One more forward pass where the structured engine stops within the first, or where gradients exceed `limit`.
    """
    look = _Look(network, inputs, limit)
    side, refusal, problem = None, "training mode may couple the samples of a batch", ""
    if mode != "train":
        side, refusal = look.followed()
    if side is None:
        problem = look.ordinary()
    return Watched(
        network,
        layout,
        work,
        limit,
        samples=size(inputs),
        outputs=look.y.shape[1],
        clock=Clock(speeds(network.device), network.dtype),
        meter=look.meter,
        metered=look.metered,
        side=side,
        refusal=refusal,
        problem=problem,
    )


class _Look:
    """One call of `watched`."""

    y: Tensor

    def __init__(self, network: Network, inputs: Batch, limit: int) -> None:
        self._network, self._inputs, self._limit = network, inputs, limit
        self.meter = Meter(network.parameters)
        self.metered = size(inputs)

    def followed(self) -> tuple[Side | None, str]:
        """Return what the structured engine sees, with the samples located, or None and why it refuses."""
        try:
            return self._followed(), ""
        except NTKMonitorError as error:
            if not isinstance(error, UnfollowedError):
                raise
            return None, str(error)
        except Exception as error:  # noqa: BLE001 - whatever a user's forward does to a mode that it does not expect
            return None, said(error, kind=True)

    def _followed(self) -> Side:
        n = size(self._inputs)
        with self.meter:
            side = recorded(self._network, self._inputs)
        self.y = side.y
        step = n
        while 2 * of_one_output(side) * step > self._limit * n and step > 1:
            step = -(-step // 2)
        if step == n:
            return self._located(self._inputs, side)
        # As the engine does, in blocks of samples; one of them tells of all.
        self.meter.steps.clear()
        self.metered = step
        block = take(self._inputs, slice(0, step))
        with self.meter:
            side = recorded(self._network, block)
        return self._located(block, side)

    def _located(self, inputs: Batch, side: Side) -> Side:
        try:
            located(side)
        except SharedValueError:
            side = recorded(self._network, inputs, values=False)
            located(side)
        side.gradients = []
        return side

    def ordinary(self) -> str:
        """Watch an ordinary forward pass, and return why its backward pass cannot be vectorised, or ""."""
        self.meter.steps.clear()
        self.metered = size(self._inputs)
        with self.meter, torch.enable_grad():
            self.y = self._network.outputs(self._inputs)
        return self._vectorised()

    def _vectorised(self) -> str:
        """Try a backward pass with two rows."""
        if any(p.is_complex() for p in self._network.parameters.values()):
            return "RuntimeError: complex parameters"
        if not self.y.requires_grad:
            return ""
        cotangents = self.y.detach().new_zeros(2, *self.y.shape)
        cotangents[0, 0, 0], cotangents[1, -1, -1] = 1, 1
        parameters = list(self._network.parameters.values())
        try:
            torch.autograd.grad(
                self.y, parameters, cotangents, allow_unused=True, is_grads_batched=True, retain_graph=True
            )
        except Exception as error:  # noqa: BLE001 - vectorised backward passes refuse with any kind of error
            return f"vectorised: {said(error, kind=True)}"
        return ""
