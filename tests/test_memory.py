"""Memory for probes: what counts as free, what running out of it costs, and that nothing is held on to."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ntk_monitor as ntk
from ntk_monitor import memory
from ntk_monitor.kernel import MEMORY_LIMIT
from ntk_monitor.memory import LEAST, Room, free, out_of_memory, waited
from ntk_monitor.say import NTKWarning

GIB = 2**30
MODEL = nn.Linear(3, 1)
CPU = torch.device("cpu")


def system(monkeypatch: pytest.MonkeyPatch, root: Path, **fields: int | str) -> None:
    """Give the module files of a system in which so many bytes are used and free."""
    kib = {name: int(value) // 1024 for name, value in fields.items() if name in ("MemAvailable", "VmHWM", "VmRSS")}
    (root / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {kib['MemAvailable']} kB\n")
    (root / "status").write_text(f"Name:\tpython\nVmHWM:\t {kib['VmHWM']} kB\nVmRSS:\t {kib['VmRSS']} kB\n")
    for name in ("memory.max", "memory.current"):
        (root / name).write_text(f"{fields.get(name.partition('.')[2], 'max')}\n")
    (root / "memory.stat").write_text(f"anon 5\ninactive_file {fields.get('cached', 0)}\n")
    for name, file in (("_MEMORY", "meminfo"), ("_STATUS", "status")):
        monkeypatch.setattr(memory, name, root / file)
    monkeypatch.setattr(memory, "_GROUP", root)


def test_what_is_free_is_free_at_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system(monkeypatch, tmp_path, MemAvailable=10 * GIB, VmHWM=5 * GIB, VmRSS=2 * GIB)
    assert free(CPU) == 7 * GIB  # training needs three more at its peak
    assert free(CPU, ours=5 * GIB) == 10 * GIB  # that peak was a probe's own
    assert free(torch.device("mps")) is None
    system(monkeypatch, tmp_path, MemAvailable=10 * GIB, VmHWM=GIB, VmRSS=GIB, max=6 * GIB, current=5 * GIB, cached=GIB)
    assert free(CPU) == 2 * GIB  # the container has less than the machine, files in its cache aside
    system(monkeypatch, tmp_path, MemAvailable=GIB, VmHWM=9 * GIB, VmRSS=GIB)
    assert free(CPU) == 0


def test_a_system_that_does_not_tell_leaves_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MEMORY", "_STATUS", "_GROUP"):
        monkeypatch.setattr(memory, name, tmp_path / "nowhere")
    assert free(CPU) is None
    assert Room(None).bytes(MODEL, settled=True) == MEMORY_LIMIT
    (tmp_path / "nowhere").write_text("MemAvailable: many kB\n")
    assert free(CPU) is None


def test_this_system_tells() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc on this system")
    found = free(CPU)
    assert found is not None
    assert 2**20 < found < 2**50


@pytest.mark.parametrize(
    ("available", "early", "settled"), [(64, 1, 1), (3, 0.5, 1), (1.1, 0.25, 0.5), (0.1, 1 / 64, 1 / 32)]
)
def test_half_of_it_is_taken_once_training_has_settled(
    available: float, early: float, settled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda *_: int(available * GIB))
    room = Room(None)
    assert room.bytes(MODEL, settled=False) == early * GIB
    assert room.bytes(MODEL, settled=True) == settled * GIB
    monkeypatch.setattr(memory, "free", lambda *_: GIB // 50)
    assert room.bytes(MODEL, settled=True) == settled * GIB  # one size for the whole history
    assert Room(12345).bytes(MODEL, settled=False) == 12345


def test_errors_that_mean_memory() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    ):
        assert out_of_memory(error)
    for other in (RuntimeError("boom"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not out_of_memory(other)


class Held:
    """Something large that a failed try leaves on its stack."""


def test_blocks_shrink_until_they_fit_and_nothing_is_held_on_to() -> None:
    tries: list[int] = []
    held: list[weakref.ref[Held]] = []

    def measure(memory_limit: int, *, what: str) -> str:
        assert all(ref() is None for ref in held)  # what the tries before held is gone
        large = Held()
        held.append(weakref.ref(large))
        tries.append(memory_limit)
        if memory_limit > GIB // 32:
            raise RuntimeError("CUDA out of memory")
        return what

    room = Room(GIB)
    assert room.within(MODEL, measure, settled=True, what="kernel") == "kernel"
    assert tries == [GIB, GIB // 4, GIB // 16, GIB // 64]
    assert room.limit == GIB // 64
    tries.clear()
    assert room.within(MODEL, measure, settled=True, what="again") == "again"
    assert tries == [GIB // 64]  # remembered


def test_what_never_fits_ends_in_a_new_error() -> None:
    held: list[weakref.ref[Held]] = []

    def measure(memory_limit: int) -> None:
        large = Held()
        held.append(weakref.ref(large))
        raise MemoryError(f"no {memory_limit} bytes beside {large}")

    with pytest.raises(MemoryError, match=rf"in blocks of {LEAST:,} bytes; a smaller probe= or params=") as caught:
        Room(GIB).within(MODEL, measure, settled=True)
    gc.collect()
    assert len(held) == 4
    assert all(ref() is None for ref in held)
    assert caught.value.__cause__ is None


def test_other_errors_pass() -> None:
    calls: list[int] = []

    def measure(memory_limit: int) -> None:
        calls.append(memory_limit)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        Room(None).within(MODEL, measure, settled=True)
    assert len(calls) == 1


def test_a_probe_that_does_not_fit_shrinks_then_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), (torch.randn(6, 3), torch.randn(6, 2))
    monitor = ntk.Monitor(model, None, data, "mse", memory_limit=GIB)
    whole, real = monitor.snapshot(0), monitor.measured
    least = [GIB // 4]

    def limited(*arguments: Any, memory_limit: int, **options: Any) -> Any:
        if memory_limit > least[0]:
            raise RuntimeError("CUDA out of memory")
        return real(*arguments, memory_limit=memory_limit, **options)

    monkeypatch.setattr(monitor, "measured", limited)
    small = monitor.snapshot(1)
    assert (small.status, small.facts["memory_limit"], whole.facts["memory_limit"]) == ("measured", GIB // 4, GIB)
    assert small.engine == whole.engine
    assert small.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-12)
    least[0] = 0
    with pytest.warns(NTKWarning, match="probe at step 2 skipped: MemoryError: RuntimeError: CUDA out of memory"):
        assert monitor.snapshot(2).status == "skipped"
    least[0] = GIB
    assert monitor.snapshot(3).facts["memory_limit"] == LEAST


def test_nothing_waits_without_a_device() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a device is in use")
    assert waited() == 0
    memory.release()
    assert not torch.cuda.is_initialized()


@pytest.mark.gpu
def test_a_device_tells_what_is_free_and_a_full_one_is_recognised() -> None:
    device = torch.device("cuda")
    model = nn.Linear(3, 1).to(device)
    total = torch.cuda.get_device_properties(device).total_memory
    before = free(device)
    assert before is not None
    assert 0 < before <= total
    held = torch.empty(before // 4, dtype=torch.uint8, device=device)
    now = free(device)
    assert now is not None
    assert now <= before - before // 4 + 64 * 2**20
    del held
    later = free(device)
    assert later is not None
    assert later <= before - before // 4 + 64 * 2**20  # the peak counts, not the moment
    assert Room(None).bytes(model, settled=True) <= later
    with pytest.raises(RuntimeError) as caught:
        torch.empty(4 * total, dtype=torch.uint8, device=device)
    assert out_of_memory(caught.value)
    assert waited() >= 0
