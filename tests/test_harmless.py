"""A fingerprint sees every trace a careless measurement leaves, and reads a bounded amount."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntk_monitor.harmless import _RUNS, Fingerprint, _bits
from ntk_monitor.settings import kept


class Job(nn.Module):
    """A module with one of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.hidden = torch.zeros(2)
        self.calls = 0
        self.seen: list[float] = []
        self.optimizer = [torch.optim.Adam(self.parameters(), lr=0.1)]
        self(torch.randn(5, 3)).sum().backward()
        self.optimizer[0].step()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y

    def print(self) -> Fingerprint:
        return Fingerprint.of(self, self.optimizer)


def scale(t: Tensor) -> None:
    t.data.mul_(1.5)  # leaves no version behind


def add_hook(job: Job) -> Any:
    return job.body.register_forward_hook(lambda *_: None)


TRACES: dict[str, tuple[Callable[[Job], Any], str]] = {
    "a weight": (lambda job: scale(job.body[0].weight), "parameter body.0.weight"),  # type: ignore[arg-type]
    "a written weight": (lambda job: job.body[0].weight.detach().mul_(1), "parameter body.0.weight"),  # type: ignore[operator]
    "a frozen weight": (lambda job: job.body[0].weight.requires_grad_(False), "parameter body.0.weight"),
    "a gradient": (lambda job: scale(job.body[0].bias.grad), "gradient of body.0.bias"),  # type: ignore[arg-type]
    "no gradient": (lambda job: job.zero_grad(), "gradient of body.0.bias"),
    "a buffer": (lambda job: scale(job.body[1].running_mean), "buffer body.1.running_mean"),  # type: ignore[arg-type]
    "batch statistics": (lambda job: job(torch.randn(4, 3)), "buffer body.1.running_var"),
    "a flag": (lambda job: job.body[2].eval(), "training flag or hooks of body.2"),
    "a hook": (add_hook, "training flag or hooks of body"),
    "a counter": (lambda job: setattr(job, "calls", 1), "attributes of the module"),
    "a hidden state": (lambda job: job.hidden.add_(1), "attributes of the module"),
    "a list": (lambda job: job.seen.append(1.0), "attributes of the module"),
    "a moment": (
        lambda job: scale(job.optimizer[0].state[job.body[0].weight]["exp_avg"]),  # type: ignore[index]
        "exp_avg of body.0.weight",
    ),
    "a step": (lambda job: job.optimizer[0].step(), "step of body.0.weight"),
    "a rate": (lambda job: job.optimizer[0].param_groups[0].update(lr=0.2), "options of group 0 of optimizer 0"),
    "torch's generator": (lambda job: torch.rand(()), "torch's random state"),
    "NumPy's generator": (lambda job: np.random.rand(), "NumPy's random state"),
    "Python's generator": (lambda job: random.random(), "Python's random state"),
    "a switch": (lambda job: setattr(torch.backends.cudnn, "benchmark", True), "torch's cuDNN's search"),
}


@pytest.mark.parametrize("name", TRACES)
def test_every_trace_is_seen_and_named(name: str) -> None:
    leave, expected = TRACES[name]
    job = Job()
    before = job.print()
    assert before.changes(job.print()) == []
    with kept():
        handle = leave(job)
        assert expected in before.changes(job.print())
    if name == "a hook":
        handle.remove()
        assert before.changes(job.print()) == []


def test_a_hook_for_all_modules_is_seen() -> None:
    job = Job()
    before = job.print()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert before.changes(job.print()) == ["hooks of all modules (_global_forward_hooks)"]
    finally:
        handle.remove()
    assert before.changes(job.print()) == []


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2]


def words(t: Tensor) -> int:
    """Sum of the bytes of a tensor as little-endian words, without torch, modulo 2^64."""
    flat = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    size = t.element_size() // (2 if t.is_complex() else 1)
    whole = len(flat) // 8 * 8
    total = sum(int.from_bytes(flat[i : i + 8], "little", signed=True) for i in range(0, whole, 8))
    signed = size > 1
    total += sum(int.from_bytes(flat[i : i + size], "little", signed=signed) for i in range(whole, len(flat), size))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (5, 7), (0,), ()], ids=str)
def test_sums_of_bits_are_those_of_plain_python(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = (8 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    found = _bits(t)
    assert (None if found is None else int(found)) == (words(t) if t.numel() else None)


def test_a_transposed_tensor_and_a_part_of_one_are_read_as_they_are() -> None:
    t = torch.randn(6, 5)
    for view in (t.T, t[1:, 1:], t[:, ::2], t.expand(2, 6, 5)):
        assert _bits(view) is not None
        assert int(_bits(view)) == int(_bits(view.clone(memory_format=torch.contiguous_format)))  # type: ignore[arg-type]


def test_a_large_model_is_sampled_and_its_versions_still_tell() -> None:
    net = nn.Linear(1000, 1000)
    before = Fingerprint.of(net, read=4000)
    assert before.changes(Fingerprint.of(net, read=4000)) == []
    seen = 0
    for row in range(0, 1000, 50):
        values = net.weight.data[row].clone()
        net.weight.data[row] += 1
        seen += "parameter weight" in before.changes(Fingerprint.of(net, read=4000))
        net.weight.data[row] = values
    assert 0 < seen <= _RUNS  # which rows are read is a matter of luck
    with torch.no_grad():
        net.weight[37, 41] += 1  # an ordinary write raises the version of the whole tensor
    assert before.changes(Fingerprint.of(net, read=4000)) == ["parameter weight"]


def test_versions_are_compared_where_no_values_are_read() -> None:
    job = Job()
    before = Fingerprint.of(job, job.optimizer, read=0)
    job.body[0].weight.data.mul_(2)  # type: ignore[operator]
    assert before.changes(Fingerprint.of(job, job.optimizer, read=0)) == []
    job.body[0].weight.detach().mul_(2)  # type: ignore[operator]
    assert before.changes(Fingerprint.of(job, job.optimizer, read=0)) == ["parameter body.0.weight"]


def test_no_more_is_read_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = torch.Tensor.sum

    def counted(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        read.append(self.numel() * self.element_size())
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "sum", counted)
    Fingerprint.of(nn.Linear(1000, 1000), read=40_000)
    assert 20_000 < sum(read) < 41_000
