"""Two processes that train together without a trainer: `python -m tests.ranks RANK FILE SCENARIO ...`.

Every scenario of one launch runs in the same processes, one after the other; each prints one line of JSON per process.
"""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ntk_monitor import parts, together
from ntk_monitor import sharded as sharding
from ntk_monitor.kernel import measured
from ntk_monitor.monitor import Monitor
from ntk_monitor.recipe import Recipe
from ntk_monitor.session import Session
from ntk_monitor.together import Together
from tests.training import seeded, state_hash

STEPS, TIMEOUT = 6, 6.0

# Where something fails, and on which process.
PLACES = (
    *(("block", 0), ("block", 1), ("buffers", 1), ("kernel", 0), ("kernel", 1)),
    *(("predictions", 0), ("predictions", 1), ("finish", 0), ("measure", 0)),
)


def network(norm: bool) -> nn.Module:
    inner: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(5, 16), *inner, nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.snapshots: list[Any] = []
        self.published: list[dict[str, float]] = []

    def publish(self, metrics: Any) -> None:
        self.published.append(dict(metrics))

    def write(self, snapshot: Any) -> None:
        self.snapshots.append(snapshot)
        self.publish(snapshot.metrics)

    def keep(self, probe: Any, manifest: Any) -> None: ...

    def flush(self) -> None: ...


def run(
    *,
    watched: bool = True,
    sharded: bool = False,
    norm: bool = False,
    optimizer: str = "sgd",
    before: Callable[[int, int, Any], None] = lambda rank, step, session: None,
    **options: Any,
) -> dict[str, Any]:
    """Train six steps; return what this process saw."""
    seeded()
    rank = dist.get_rank()
    net: Any = network(norm)
    x, y = torch.randn(14, 5).double(), torch.randint(0, 3, (14,))
    model = DistributedDataParallel(net) if not sharded else fully_sharded(net)
    slow = {"adamw": torch.optim.AdamW}.get(optimizer, partial(torch.optim.SGD, momentum=0.9))
    opt = slow(net.parameters(), lr=0.05)
    data, labels = torch.randn(STEPS, 8, 5).double() + rank, torch.randint(0, 3, (STEPS, 8))
    recipe = Recipe(loss="cross_entropy", **{"every_n_steps": 2, "reference": 0, **options})
    session: Any = together.assembled(recipe, TIMEOUT) if watched else Session(recipe)
    assert isinstance(session, Together) or not watched
    sink, kernels, start = Kept(), Kernels(), time.perf_counter()
    session.sink = sink
    if watched:
        session.guarded(begin, session, net, opt, (x, y), kernels)
    for step in range(STEPS + 1):
        before(rank, step, session)
        asked = session.ending if step == STEPS else session.due
        if asked(step):
            session.guarded(session.probe, step, None)
        if step < STEPS:
            opt.zero_grad()
            F.cross_entropy(model(data[step]), labels[step]).backward()
            session.observe(step, [opt])
            opt.step()
    session.close()
    random = state_hash(torch.get_rng_state())
    full = [p.full_tensor() if sharded else p for p in net.parameters()]
    if sink.snapshots and sink.snapshots[-1].step == STEPS:
        kernels.gathered(network(norm), full, list(net.buffers()), x)
    return {
        "rank": rank,
        "weights": state_hash([p.detach() for p in full]),
        "buffers": state_hash(list(net.buffers())),
        "random": random,
        "steps": [s.step for s in sink.snapshots],
        "status": [s.status for s in sink.snapshots],
        "reasons": [s.engine_reason or s.reason for s in sink.snapshots],
        "stability": [s.texts.get("stability", "") for s in sink.snapshots],
        "sharpness": [s.metrics.get("sharpness") for s in sink.snapshots],
        "compared": len(kernels.errors),
        "error": max(kernels.errors, default=None),
        "resting": session.resting,
        "published": sink.published[-1] if sink.published else {},
        "seconds": time.perf_counter() - start,
    }


def fully_sharded(net: Any) -> Any:
    """Two groups of parameters, the first layer's and the rest."""
    for layer in (net[0], net):
        fully_shard(layer)
    return net


class Kernels:
    """Every kernel that a session measured, compared with that of this process alone; largest relative errors."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.newest: Tensor | None = None

    def compare(self, found: Tensor, wanted: Tensor) -> None:
        self.newest = found
        self.errors.append(float((found - wanted).abs().max() / wanted.abs().max()))

    def gathered(self, fresh: nn.Module, parameters: list[Tensor], buffers: list[Tensor], x: Tensor) -> None:
        """Compare the last kernel with that of a plain network whose weights torch itself put together."""
        with torch.no_grad():
            for new, value in zip([*fresh.parameters(), *fresh.buffers()], [*parameters, *buffers], strict=True):
                new.copy_(value)
        wanted = measured(fresh, x).values
        if self.newest is not None and self.newest.shape == wanted.shape:
            self.compare(self.newest, wanted)


def begin(session: Together, net: nn.Module, opt: Any, probe: Any, kernels: Kernels) -> None:
    """Set a session up, and compare every kernel it measures with that of this process alone."""
    plain = session.plain(net)
    if session.enlist(plain, net, [opt]):
        return
    monitor = Monitor(plain, [opt], probe, recipe=session.recipe)
    session.begin(monitor, net, None)
    inner = monitor.measured

    def compared(model: Any, inputs: Any, **options: Any) -> Any:
        found = inner(model, inputs, **options)
        alone = measured(model, inputs, **options)
        kernels.compare(found.values, alone.values)
        return found

    monitor.measured = compared


@contextmanager
def failing(place: str, on: int, error: BaseException) -> Iterator[None]:
    """Raise on one rank, from the second probe on."""
    owner, name = {
        "block": (parts.Part, "block"),
        "buffers": (parts, "with_buffers"),
        "kernel": (parts, "measured"),
        "predictions": (parts, "predictions"),
        "shards": (sharding, "shards"),
        "finish": (Monitor, "finish"),
        "measure": (Monitor, "measure"),
    }[place]
    real, calls = getattr(owner, name), [0]

    def faulty(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if dist.get_rank() == on and calls[0] > 1:
            raise error
        return real(*arguments, **options)

    with mock.patch.object(owner, name, faulty):
        yield


def unfit(rank: int, step: int, session: Any) -> None:
    """Rest on process 1 between two probes."""
    if rank == 1 and step == 3:
        session.rest("a step of its own failed")


def tired(rank: int, step: int, session: Any) -> None:
    """Rest on process 0 between two probes."""
    if rank == 0 and step == 3:
        session.rest("a step of its own failed")


def absent(rank: int, step: int, session: Any) -> None:
    """Stay away from the meeting at step 4 on process 1, as a process would that counts steps otherwise."""
    if rank == 1 and step == 4:
        session._next = STEPS + 1


def killed(rank: int, step: int, session: Any) -> None:
    if rank == 1 and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)


def faulty(place: str, on: int, error: BaseException, **options: Any) -> dict[str, Any]:
    with failing(place, on, error):
        return run(**options)


def divergent() -> dict[str, Any]:
    """Outputs that depend on the process: the replicas do not hold the same function."""

    class Ranked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + dist.get_rank())

    return with_network(Ranked)


def speaking() -> dict[str, Any]:
    """A network that averages over processes in its forward pass."""

    class Averaged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.detach().clone()
            dist.all_reduce(total)
            return x - total.mean() / dist.get_world_size()

    return with_network(Averaged)


def with_network(first: type[nn.Module]) -> dict[str, Any]:
    def made(norm: bool) -> nn.Module:
        return nn.Sequential(first(), nn.Linear(5, 3)).double()

    with mock.patch.object(sys.modules[__name__], "network", made):
        return run()


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: run(watched=False, norm=True),
    "watched": lambda: run(norm=True),
    "budget": lambda: run(norm=True, every_n_steps=None, max_overhead=0.9),
    "trace": lambda: run(outputs="trace"),
    "loss": lambda: run(outputs="loss"),
    "plain sharded": lambda: run(watched=False, sharded=True, optimizer="adamw"),
    "sharded": lambda: run(sharded=True, optimizer="adamw"),
    "replicated": run,
    "sharded sgd": lambda: run(sharded=True),
    **{
        f"shards fail on {on}": lambda on=on: faulty("shards", on, MemoryError("planted"), sharded=True)  # type: ignore[misc]
        for on in (0, 1)
    },
    "unfit hand": lambda: run(before=unfit),
    "tired conductor": lambda: run(before=tired),
    "absent": lambda: run(before=absent),
    "killed": lambda: run(before=killed),
    "divergent": divergent,
    "speaking": speaking,
    **{
        f"{place} fails on {on}": lambda place=place, on=on: faulty(place, on, RuntimeError("planted"))  # type: ignore[misc]
        for place, on in PLACES
    },
}


def main() -> None:
    rank, rendezvous, *scenarios = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
    for name in scenarios:
        try:
            found = SCENARIOS[name]()
        except RuntimeError as error:  # of training, when a process is gone
            sys.stdout.write(json.dumps({"scenario": name, "rank": int(rank), "raised": str(error)}) + "\n")
            sys.stdout.flush()
            os._exit(1)
        sys.stdout.write(json.dumps({"scenario": name, **found}) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
