"""Memory that probes may take, half of what is free at the peak of training, and what to do when it was not enough.

Only the size of blocks follows from it, never the engine: a kernel is the same for every block size, up to rounding.
"""

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ntk_monitor.errors import InputError, said
from ntk_monitor.kernel import MEMORY_LIMIT
from ntk_monitor.recipe import FULL_KERNEL_PRODUCTS, Recipe

Found = TypeVar("Found")

LEAST = 16 * 2**20
"""Bytes for blocks below which shrinking does not help."""

_GROUP = Path("/sys/fs/cgroup")
_MEMORY, _STATUS = Path("/proc/meminfo"), Path("/proc/self/status")


class Room:
    """The bytes that blocks of one monitor may take; kept for the run, so that a probe does not change in mid-history.

    Before the second optimizer step neither the optimizer's state nor the peak of training exist, and memory looks
    free: until then a quarter of what is free. From then on half of what is free at the peak. On the CPU never more
    than `empirical_ntk` takes by default (1 GiB), on a GPU whatever is there. Rounded down to a power of two, so that a
    resumed run finds the same.

    Args:
        given: the user's own limit in bytes, which is taken as it is; None: by what is free.
    """

    def __init__(self, given: int | None) -> None:
        self._given = given
        self._known: int | None = None
        self._most: int | None = None
        self._left = -1
        self.limit = given or MEMORY_LIMIT
        """Of the newest probe, bytes."""

    def within(self, module: nn.Module, measure: Callable[..., Found], *, settled: bool, **options: Any) -> Found:
        """Return `measure(memory_limit=..., **options)`, in smaller blocks where memory runs out.

        What a failed try held is freed before the next one.

        Args:
            module: where it lives says whose memory counts.
            measure: what takes the memory.
            settled: True once training has taken two steps.
            options: of `measure`.

        Raises:
            MemoryError: not even the smallest blocks fit. A new error: the first one holds on to what it failed with.
        """
        limit = self.bytes(module, settled=settled)
        while True:
            try:
                return measure(memory_limit=limit, **options)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = said(error, kind=True)
            finally:
                self.left(module)
            release()
            smaller = self.shrink(limit)
            if smaller is None:
                raise MemoryError(f"{reason} (in blocks of {limit:,} bytes; a smaller probe= or params= needs less)")
            limit = smaller

    def bytes(self, module: nn.Module, *, settled: bool) -> int:
        """Return the limit for the probe to come.

        Args:
            module: where it lives says whose memory counts.
            settled: True once training has taken two steps.
        """
        limit = self._known
        if limit is None:
            limit = self._given or _power(free(_device(module), self._left), 0.5 if settled else 0.25, _device(module))
            if settled or self._given:
                self._known = limit
        self.limit = limit if self._most is None else min(limit, self._most)
        return self.limit

    def shrink(self, tried: int) -> int | None:
        """Return a smaller limit after one that was too much, to be kept from now on; None: it cannot be smaller."""
        if tried <= LEAST:
            return None
        self._most = self.limit = max(LEAST, tried // 4)
        return self._most

    def left(self, module: nn.Module) -> None:
        """Note the peak that a probe has left, which is not training's."""
        self._left = _peak(_device(module))


def weighed(recipe: Recipe, samples: int, layout: str, outputs: int, parameters: int) -> str:
    """Return one sentence when a probe will take long; empty when it will not.

    Raises:
        InputError: it would not fit in memory by the engine that was asked for.
    """
    rows = outputs if layout in ("full", "trace") else 1
    # The structured engine holds no Jacobian.
    needed = rows * parameters * 4 if recipe.engine in ("rows", "reference") else 0
    if recipe.memory_limit is None and needed > 4 * MEMORY_LIMIT:
        raise InputError(
            f"the Jacobian of one sample takes {needed / 2**30:.1f} GiB ({rows} x {parameters:,} parameters); "
            "select some with params=, or set memory_limit= if there is room"
        )
    width = rows if layout == "full" else 1
    products = (samples * width) ** 2 * parameters * (rows if layout == "trace" else 1)
    # A Jacobian that does not fit is computed in blocks, and blocks again for each pair of them.
    blocks = samples * needed > 2 * (recipe.memory_limit or MEMORY_LIMIT)
    if not blocks and products <= 2 * FULL_KERNEL_PRODUCTS:
        return ""
    return (
        f"each probe needs about {products:.0e} multiply-adds ({samples} samples, {outputs} outputs, "
        f"{parameters:,} parameters), minutes on a CPU; a smaller probe=, params= or outputs= makes it quicker"
    )


def free(device: torch.device, ours: int = -1) -> int | None:
    """Return the bytes that are free at the peak of memory so far; None where nobody knows.

    Args:
        device: CUDA: what the driver has and the allocator's unused part, less the peak of this process. CPU: what the
            system, or the container, can give, less the same.
        ours: a peak that a probe made, and training did not; it does not count.
    """
    peak, now = _peak(device), _used(device)
    extra = 0 if peak == ours else max(0, peak - now)
    if device.type == "cuda":
        available, _ = torch.cuda.mem_get_info(device)
        return max(0, available + torch.cuda.memory_reserved(device) - now - extra)
    found = [value for value in (_system(), _container()) if value is not None]
    return max(0, min(found) - extra) if device.type == "cpu" and found else None


def out_of_memory(error: BaseException) -> bool:
    """True for the errors by which torch, on any device, and Python say that memory is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "out of memory" in text.lower() or "can't allocate memory" in text or "not enough memory" in text


def waited() -> float:
    """Let the devices finish what training has queued; return the seconds, which are training's and not a probe's."""
    if not torch.cuda.is_initialized():
        return 0.0
    start = time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def release() -> None:
    """Give back what a failed probe held: call it when its frames are gone, that is after the `except` block."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _power(room: int | None, share: float, device: torch.device) -> int:
    """Return a share of the room, rounded down to a power of two."""
    if room is None:
        return MEMORY_LIMIT
    found: int = 2 ** int(math.log2(max(LEAST, room * share)))
    return found if device.type == "cuda" else min(found, MEMORY_LIMIT)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _field(_STATUS, "VmHWM") or 0


def _used(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _field(_STATUS, "VmRSS") or 0


def _system() -> int | None:
    return _field(_MEMORY, "MemAvailable")


def _container() -> int | None:
    """Return what a container with a limit has left (cgroup 2), cached files aside; None without one."""
    limit, used = (_number(_GROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return None
    cached = _field(_GROUP / "memory.stat", "inactive_file", unit=1) or 0
    return max(0, limit - used + cached)


def _field(file: Path, name: str, unit: int = 1024) -> int | None:
    """Return a field of one of the system's files in bytes; None where it is not there."""
    try:
        for line in file.read_text().splitlines():
            words = line.split()
            if words and words[0].rstrip(":") == name:
                return int(words[1]) * unit
    except (OSError, ValueError, IndexError):
        pass
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
