"""A kernel in parts: each process of a run computes the blocks of some samples, rank 0 puts them together.

The samples are cut into R parts, one for each process. Process r meets part r with parts r ... r + ⌊R/2⌋ (mod R), so
that every pair of parts meets at least once, and the rest of K follows from K = Kᵀ. Of the whole kernel's cost each
process has about 1/(2R) of the products (1/2 for R = 2) and 1/2 + 2/R of the backward passes (3/2 for R = 2, 1 for
R = 3 and 4), as its own part is run on both sides: shared rows pay where products of Jacobians are what takes time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ntk_monitor.batch import Batch, size, take
from ntk_monitor.crew import Crew, CrewError, Hand, joint
from ntk_monitor.errors import NetworkError, said
from ntk_monitor.guard import undisturbed
from ntk_monitor.kernel import Kernel, measured
from ntk_monitor.losses import Loss
from ntk_monitor.network import Network
from ntk_monitor.probe import Probe
from ntk_monitor.say import say
from ntk_monitor.shadow import Shadow, unwrapped

_VIEW = ("params", "forward", "device")


def window(samples: int, rank: int, ranks: int) -> tuple[list[int], list[int]]:
    """Return the rows and the columns of the block that one process computes; the rows are the first columns."""
    bounds = [samples * part // ranks for part in range(ranks + 1)]
    parts = [list(range(bounds[part], bounds[part + 1])) for part in range(ranks)]
    met = [parts[(rank + further) % ranks] for further in range(ranks // 2 + 1)]
    return parts[rank], [row for part in met for row in part]


def assembled(blocks: Sequence[Tensor], samples: int) -> Tensor:
    """Return the kernel whose blocks these are, one for each process: (n, c, m, d) of the whole, or (n, m).

    Each entry is the mean of the ways in which it was computed, so that K = Kᵀ to the bit.
    """
    shape = [samples if axis % (blocks[0].dim() // 2) == 0 else length for axis, length in enumerate(blocks[0].shape)]
    turned = tuple(range(len(shape) // 2, len(shape))) + tuple(range(len(shape) // 2))
    total, times = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], samples, dtype=torch.float64)
    for rank, block in enumerate(blocks):
        rows, columns = (torch.tensor(found) for found in window(samples, rank, len(blocks)))
        whole = torch.zeros_like(total)
        if len(shape) == 4:
            whole[rows[:, None], :, columns[None, :], :] = block.permute(0, 2, 1, 3).double()
        else:
            whole[rows[:, None], columns[None, :]] = block.double()
        met = torch.zeros_like(times)
        met[rows[:, None], columns[None, :]] = 1
        total += whole + whole.permute(turned)
        times += met + met.T
    return total / (times[:, None, :, None] if len(shape) == 4 else times)


def predictions(model: nn.Module, inputs: Batch, options: Any) -> Tensor:
    """Return the outputs (N, C), float64 on the CPU, as a probe sees them."""
    with undisturbed(seed=options.get("seed", 0)):
        view = {name: options[name] for name in _VIEW if name in options}
        network = Network.careful(model, inputs, **view)
        return network.outputs(network.prepared(inputs)).detach().double().cpu()


@dataclass(frozen=True, slots=True)
class Part:
    """Rank 0's order to compute one block each."""

    layout: str
    loss: str
    probe: Probe | None
    """None: the one sent before."""
    buffers: dict[str, Tensor]
    """Of rank 0, whose are the ones that a checkpoint holds."""
    predictions: Tensor
    """Of the whole probe, with which every process compares its own."""

    def serve(self, hand: Hand) -> None:
        """Compute and send this process's block."""

        def work() -> list[Tensor]:
            if self.probe is not None:
                hand.probe = self.probe
            module = with_buffers(hand.fit(), self.buffers)
            named = [loss for loss in hand.losses() if loss.name == self.loss] if self.loss else [None]
            if len(named) != 1:
                raise CrewError(f"the loss {self.loss} has {len(named)} meanings here")
            return [self.block(hand.crew, module, hand.probe, named[0], hand.options).values]

        joint(hand.crew, work)

    def block(self, crew: Crew, module: nn.Module, probe: Probe, loss: Loss | None, options: Any) -> Kernel:
        """Return the block of this rank.

        Raises:
            NetworkError: the outputs of a sample depend on its companions, or differ between the processes.
        """
        rows, columns = window(probe.samples, crew.rank, crew.size)
        part, beside = take(probe.inputs, rows), take(probe.inputs, columns)
        for indices, batch in ((rows, part), (columns, beside)):
            _compare(predictions(module, batch, options), self.predictions[indices])
        targets = None if loss is None else (take(probe.targets, rows), take(probe.targets, columns))
        return measured(module, part, beside, outputs=self.layout, targets=targets, loss=loss, **options)  # type: ignore[arg-type]


class Shared:
    """`measured`, its rows shared by the processes of a run; on rank 0.

    Where that is not exact (samples that see each other, replicas that differ) or fails on some process, rank 0
    computes the whole by itself, and says why once.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.apart = ""
        self._sent: Probe | None = None

    def __call__(self, model: nn.Module, inputs: Batch, *, probe: Probe, **options: Any) -> Kernel:
        """Return what `measured(model, inputs, **options)` returns.

        Args:
            model: as there.
            inputs: as there; those of the probe.
            probe: whose kernel it is.
            options: as there.
        """
        if self.apart or self.crew.size == 1 or size(inputs) < 2 * self.crew.size:
            return measured(model, inputs, **options)
        try:
            return self._shared(model, probe, options)
        except Exception as error:  # noqa: BLE001 - what is wrong with the network shows again below
            self.apart = said(error)
            say(f"process 0 computes the kernel by itself: {self.apart}")
        return measured(model, inputs, **options)

    def _shared(self, model: nn.Module, probe: Probe, options: Any) -> Kernel:
        kernel_options = {k: v for k, v in options.items() if k not in ("outputs", "targets", "loss")}
        loss: Loss | None = options.get("loss")
        part = Part(
            layout=options["outputs"],
            loss="" if loss is None else loss.name,
            probe=None if probe is self._sent else probe,
            buffers={name: b.detach().cpu() for name, b in unwrapped(model).named_buffers()},
            predictions=predictions(model, probe.inputs, kernel_options),
        )
        self.crew.shared(part)
        self._sent = probe
        own: list[Kernel] = []

        def work() -> list[Tensor]:
            own.append(part.block(self.crew, model, probe, loss, kernel_options))
            return [own[0].values]

        blocks = joint(self.crew, work)
        values = assembled([block for (block,) in blocks], probe.samples)
        reason = f"{own[0].reason}; rows shared by {self.crew.size} processes"
        return replace(own[0], values=values, layers={"": values}, reason=reason)


def with_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> nn.Module:
    """Return a shadow of a live module that holds these buffers in place of its own.

    Raises:
        NetworkError: buffers of other names or shapes.
    """
    shadow = Shadow(module).module
    own = dict(shadow.named_buffers())
    if {name: b.shape for name, b in own.items()} != {name: b.shape for name, b in buffers.items()}:
        raise NetworkError("the module has other buffers than that of process 0; build the same one on every process")
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(buffers[name])
    return shadow


def _compare(found: Tensor, wanted: Tensor) -> None:
    # Companions of BatchNorm without running statistics, or another replica, change outputs in their first digits;
    # another size of batch in the last ones. Half of the digits of float32 lie in between.
    wanted = wanted.reshape(len(wanted), -1)
    scale = max(float(wanted.abs().max()), 1e-30)
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= 3e-4 * scale:
        raise NetworkError("the outputs of a sample depend on its companions in the batch or on the process")
