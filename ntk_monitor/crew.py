"""Crew: the processes of one run, and the few things they say to each other. Rank 0 conducts, the others are hands.

Everything goes over a process group of its own (gloo, on the CPU), never over the one that training uses: what is lost
here is lost to the monitor alone. Whoever fails says so in a vote before anything is exchanged; who is gone is noticed
by a closed connection, or at the latest when the time is up.
"""

import contextlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ntk_monitor.errors import NTKMonitorError, said

T = TypeVar("T")

TIMEOUT = 480.0
"""Seconds that processes wait for each other; hands wait while rank 0 finishes a whole probe. Below the ten minutes
after which NCCL gives up a run whose processes wait for each other in training."""


class CrewError(NTKMonitorError):
    """The other processes of this run cannot be reached, or one of them could not do its part."""


@runtime_checkable
class Crew(Protocol):
    """What a monitor needs of the processes of its run. Every method is called by all of them, in the same order."""

    rank: int
    size: int

    def shared(self, value: Any = None) -> Any:
        """Return rank 0's value on every rank."""
        ...

    def objection(self, mine: str = "") -> str:
        """Vote: return the first objection of any rank, with its rank, or "" where all agree to go on."""
        ...

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of every rank on rank 0, on the CPU; nothing elsewhere."""
        ...

    def close(self) -> None:
        """Exchange nothing more."""
        ...


class Alone:
    """The crew of a run with one process."""

    rank = 0
    size = 1

    def shared(self, value: Any = None) -> Any:
        """Return the value."""
        return value

    def objection(self, mine: str = "") -> str:
        """Return one's own objection."""
        return mine

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return one's own tensors."""
        return [[t.detach().cpu() for t in tensors]]

    def close(self) -> None:
        """Do nothing."""


class Processes:
    """All processes of `torch.distributed`. Made on every rank at the same place, which is a collective call itself.

    After one exchange that failed, by a lost process or a time that is up, every further one raises at once and nothing
    is sent any more: the state of the connections is unknown.

    Args:
        timeout: seconds to wait in one exchange.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._broken = ""
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def shared(self, value: Any = None) -> Any:
        """Return rank 0's value on every rank. It is pickled, and has to fit in memory twice.

        What cannot be unpickled somewhere arrives there as an order that objects.
        """
        held = [pickle.dumps(value) if self.rank == 0 else b""]  # what cannot be pickled fails before anything is sent
        self._exchange(lambda: dist.broadcast_object_list(held, src=0, group=self._group))
        if self.rank == 0:
            return value
        try:
            return pickle.loads(held[0])
        except Exception as error:  # noqa: BLE001 - classes that exist on one process only
            return Garbled(said(error, kind=True))

    def objection(self, mine: str = "") -> str:
        """Vote: return the first objection of any rank, with its rank, or "" where all agree to go on."""
        said_by_all: list[Any] = [""] * self.size
        self._exchange(lambda: dist.all_gather_object(said_by_all, mine, group=self._group))
        return next((f"process {rank}: {said_}" for rank, said_ in enumerate(said_by_all) if said_), "")

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of every rank on rank 0, on the CPU; nothing elsewhere."""
        return self._exchange(lambda: self._gather([t.detach().cpu().contiguous() for t in tensors]))

    def close(self) -> None:
        """Exchange nothing more, and close the connections."""
        group, self._group = self._group, None
        self._broken = self._broken or "the run has ended"
        if group is not None and dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)

    def _gather(self, own: list[Tensor]) -> list[list[Tensor]]:
        kinds: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object([(tuple(t.shape), t.dtype) for t in own], kinds, dst=0, group=self._group)
        if kinds is None:
            for t in own:
                if t.numel():
                    dist.send(_bytes(t), dst=0, group=self._group)
            return []
        found = [own]
        for rank in range(1, self.size):
            received = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds[rank]]
            for t in received:
                if t.numel():
                    dist.recv(_bytes(t), src=rank, group=self._group)
            found.append(received)
        return found

    def _exchange(self, talk: Callable[[], T]) -> T:
        if self._broken:
            raise CrewError(f"the processes of this run no longer talk about the monitor: {self._broken}")
        try:
            return talk()
        except BaseException as error:
            # Ctrl-C in the middle of an exchange leaves it half done, too.
            self._broken = said(error, kind=True)
            if not isinstance(error, Exception):
                raise
            raise CrewError(f"the processes of this run lost each other: {self._broken}") from error


@dataclass(slots=True)
class Hand:
    """What a process other than rank 0 works with.

    Attributes:
        crew: of the run.
        module: the live module that is measured.
        options: of the kernel, as `ntk_monitor.kernel.measured` takes them.
        losses: the losses that rank 0 may name.
        probe: of rank 0, once it was sent.
        optimizers: of the run.
        unfit: why this process cannot help, or "".
    """

    crew: Crew
    module: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    losses: Callable[[], Sequence[Any]] = list
    probe: Any = None
    optimizers: Sequence[Any] = ()
    unfit: str = ""

    def fit(self) -> nn.Module:
        """Return the module.

        Raises:
            CrewError: something failed here before, and the reason.
        """
        if self.unfit or self.module is None:
            raise CrewError(self.unfit or "no module was set up here")
        return self.module


@dataclass(frozen=True, slots=True)
class Garbled:
    """An order that could not be read on this process."""

    reason: str

    def serve(self, hand: Hand) -> None:
        """Object in the vote with which every order begins."""

        def work() -> Sequence[Tensor]:
            raise CrewError(f"an order could not be read: {self.reason}")

        joint(hand.crew, work)


def joint(crew: Crew, work: Callable[[], Sequence[Tensor]]) -> list[list[Tensor]]:
    """Work on every rank, vote, and gather what came out on rank 0. Nothing is sent unless every rank succeeded.

    Raises:
        Exception: what `work` raised here.
        CrewError: another rank failed, with its reason.
    """
    try:
        own = list(work())
    except Exception as error:
        crew.objection(said(error, kind=True))
        raise
    except BaseException as error:  # leaving for good: the others must not wait
        with contextlib.suppress(Exception):
            crew.objection(said(error, kind=True))
        raise
    if reason := crew.objection():
        raise CrewError(reason)
    return crew.gathered(own)


def _bytes(t: Tensor) -> Tensor:
    """Return a view as bytes, which every backend carries whatever the dtype is."""
    return t.reshape(-1).view(torch.uint8)
