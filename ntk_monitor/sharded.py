"""A plain copy of a module that FSDP2 (`fully_shard`) shards over processes, filled by all of them before each probe.

Shards travel over the monitor's own connections as they lie in each process; no parameter of the live module is
gathered, resharded or otherwise touched. What cannot be put together completely is refused.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.crew import Crew, Hand, joint
from ntk_monitor.errors import NetworkError
from ntk_monitor.shadow import Shadow, unwrapped

# A copy is kept where training computes while so many times its size is free there; the rest is for the probe.
_ROOM = 4


def sharded(module: nn.Module) -> bool:
    """True when parameters of the module are sharded over processes by FSDP2, or are DTensors of other origin."""
    whole = unwrapped(module)
    names = {base.__name__ for child in whole.modules() for base in type(child).__mro__}
    return "FSDPModule" in names or any(is_dtensor(p) for p in whole.parameters())


def is_dtensor(value: Any) -> bool:
    """True for a tensor whose values are spread over processes."""
    return isinstance(value, Tensor) and hasattr(value, "__create_chunk_list__") and hasattr(value, "to_local")


@dataclass(frozen=True, slots=True)
class State:
    """Rank 0's order to send the shards of parameters and, if asked for, of the optimizers' state."""

    optimizers: bool

    def serve(self, hand: Hand) -> None:
        """Send this process's shards."""
        joint(hand.crew, lambda: shards(spread(hand.fit(), hand.optimizers if self.optimizers else ())))


def spread(module: nn.Module, optimizers: Sequence[Any]) -> list[Tensor]:
    """Return all DTensors of a run in an order that is the same on every process: parameters, then optimizer state."""
    found = [p for p in unwrapped(module).parameters() if is_dtensor(p)]
    return found + [value for _, _, value in _states(optimizers) if is_dtensor(value)]


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return place and values of each local shard: offsets, shard, offsets, shard, ..."""
    found = []
    for t in tensors:
        chunk = t.__create_chunk_list__()[0]  # type: ignore[attr-defined]
        found += [torch.tensor(list(chunk.offsets), dtype=torch.int64), t.detach().to_local()]  # type: ignore[attr-defined]
    return found


def joined(like: Tensor, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the whole tensor on the CPU from (offsets, shard) of every process; replicas may repeat each other.

    Raises:
        NetworkError: the shards leave a gap or overlap.
    """
    whole = torch.empty(like.shape, dtype=like.dtype)
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for offsets, piece in pieces:
        place = (tuple(offsets.tolist()), tuple(piece.shape))
        if piece.numel() and place not in seen:
            seen.add(place)
            whole[tuple(slice(o, o + n) for o, n in zip(*place, strict=True))] = piece
    covered = sum(torch.Size(shape).numel() for _, shape in seen)
    if covered != whole.numel():
        raise NetworkError(
            f"shards of a parameter of shape {tuple(like.shape)} hold {covered} values, wanted {whole.numel()}; it is "
            "sharded in a way that cannot be put together here"
        )
    return whole


class Standin:
    """The plain copy, on rank 0.

    Args:
        crew: all processes of the run, the others serving.
        module: the live module.
        device: where the copy is kept; None: where its parameters are if there is room, else on the CPU.

    Attributes:
        live: the live module.
        module: the copy: always the same object, with the same Parameters.
        optimizers: of the run.
    """

    def __init__(self, crew: Crew, module: nn.Module, device: str | torch.device | None = None) -> None:
        self.live, self.optimizers = module, []  # type: tuple[nn.Module, list[Any]]
        self._crew = crew
        live = dict(unwrapped(module).named_parameters())
        self._device = torch.device(device) if device is not None else _place(live.values())
        self._parameters = {
            name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=self._device), requires_grad=False)
            for name, p in live.items()
            if p.is_floating_point() or p.is_complex()
        }
        self._names: dict[int, str] = {}
        self._owners: list[Tensor] = []
        self._known: dict[Tensor, Tensor] = {}
        self.module = self._shadow()
        self.refresh()

    def refresh(self) -> None:
        """Bring the copy to the weights, buffers, flags and optimizer state of now, with the help of all processes.

        Raises:
            CrewError: another process failed, or cannot be reached.
            NetworkError: shards that do not form a whole.
        """
        self._crew.shared(State(bool(self.optimizers)))
        tensors = spread(self.live, self.optimizers)
        found = joint(self._crew, lambda: shards(tensors))
        if len({len(rank) for rank in found}) > 1:
            raise NetworkError("the processes of this run hold different numbers of parameters or optimizer states")
        self._known = {}
        for i, t in enumerate(tensors):
            self._known[t] = joined(t, [(rank[2 * i], rank[2 * i + 1]) for rank in found])
        with torch.no_grad():
            for name, p in unwrapped(self.live).named_parameters():
                if name in self._parameters:
                    self._parameters[name].copy_(self._known.get(p, p.detach()))
        # The same object with a new content: whatever else training has set on the module is taken over.
        self.module.__dict__ = self._shadow().__dict__

    def stand_ins(self, optimizers: Sequence[Any]) -> list[Optimizer]:
        """Return optimizers of the run as they are now, on the parameters of the copy, with the state last gathered."""
        return [self._stand_in(getattr(optimizer, "optimizer", optimizer)) for optimizer in optimizers]

    def _stand_in(self, live: Optimizer) -> Optimizer:
        new: Optimizer = object.__new__(type(live))
        new.__dict__.update({name: value for name, value in vars(live).items() if name != "step"})
        mine = {p: self._parameters[self._names[id(p)]] for g in live.param_groups for p in g["params"] if self._has(p)}
        new.param_groups = [{**g, "params": [mine.get(p, p) for p in g["params"]]} for g in live.param_groups]
        new.state = defaultdict(dict)
        for p, state in live.state.items():
            kept = {key: self._known.get(value) if is_dtensor(value) else value for key, value in state.items()}
            if all(value is not None or state[key] is None for key, value in kept.items()):
                new.state[mine.get(p, p)] = kept
        return new

    def _has(self, parameter: Tensor) -> bool:
        return self._names.get(id(parameter)) in self._parameters

    def _shadow(self) -> nn.Module:
        live = dict(unwrapped(self.live).named_parameters())
        for name, p in live.items():
            if id(p) not in self._names:  # a Parameter may have a sharded and a gathered object; both are kept alive
                self._names[id(p)] = name
                self._owners.append(p)
            if name in self._parameters:
                self._parameters[name].requires_grad_(p.requires_grad)
        shadow = Shadow(self.live, values={p: self._parameters[name] for name, p in live.items() if self._has(p)})
        for child in shadow.module.modules():
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[name] = buffer.to(self._device)
        return shadow.module


def _states(optimizers: Sequence[Any]) -> Iterator[tuple[Tensor, str, Any]]:
    for optimizer in optimizers:
        bare = getattr(optimizer, "optimizer", optimizer)
        for group in bare.param_groups:
            for p in group["params"]:
                for key in sorted(bare.state[p]) if p in bare.state else ():
                    yield p, key, bare.state[p][key]


def _place(parameters: Iterable[Tensor]) -> torch.device:
    """Return the device of the parameters where several copies fit, else the CPU."""
    held = list(parameters)
    device = held[0].device
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if free > _ROOM * sum(p.numel() * p.element_size() for p in held) else torch.device("cpu")
