"""Hooks that users registered fire in a probe as in training, and what they collect there is not seen by training."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from tests import reference
from tests.modules import Classifier, digits, loader, mlp
from tests.training import outcome, seeded, trainer

seen: list[Tensor] = []
by_name: dict[str, Tensor] = {}
recent: deque[int] = deque(maxlen=3)
count = 0


class Recorder:
    """An object at the top of a file."""

    def __init__(self) -> None:
        self.calls = 0
        self.outputs: list[Tensor] = []


recorder = Recorder()


def collect(module: nn.Module, args: Any, output: Tensor) -> None:
    global count  # noqa: PLW0603 - what users do
    count += 1
    seen.append(output)
    by_name[type(module).__name__] = output
    recent.append(count)
    recorder.calls += 1
    recorder.outputs.append(output)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    collect(module, args, output)
    return 2 * output if isinstance(module, nn.Linear) else None


def collected() -> tuple[Any, ...]:
    return count, len(seen), sorted(by_name), list(recent), recorder.calls, len(recorder.outputs)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    global count  # noqa: PLW0603
    yield
    count = recorder.calls = 0
    for container in (seen, by_name, recent, recorder.outputs):
        container.clear()


def in_closures() -> tuple[Callable[..., None], list[Tensor]]:
    kept: list[Tensor] = []
    return (lambda module, args, output: kept.append(output)), kept


@pytest.mark.parametrize("hook", [collect, double])
@pytest.mark.parametrize("everywhere", [True, False], ids=["all modules", "one module"])
@pytest.mark.parametrize("engine", ["rows", "structured", "reference"])
def test_hooks_fire_and_leave_no_trace(hook: Any, everywhere: bool, engine: Any) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    handle = register_module_forward_hook(hook) if everywhere else net[0].register_forward_hook(hook)
    try:
        expected = reference.ntk(reference.rows(net, net(x)))
        assert count > 0
        before = collected()
        found = ntk.empirical_ntk(net, x, engine=engine)
        assert collected() == before
        torch.testing.assert_close(found, expected)
        net(x)
        assert count == before[0] + (4 if everywhere else 1)  # still registered, and the real one
    finally:
        handle.remove()


def test_hooks_with_closures_for_all_modules_leave_no_trace() -> None:
    hook, kept = in_closures()
    handle = register_module_forward_hook(hook)
    try:
        ntk.empirical_ntk(nn.Linear(3, 2), torch.randn(4, 3))
        assert kept == []
        nn.Linear(3, 2)(torch.randn(4, 3))
        assert len(kept) == 1
    finally:
        handle.remove()


def test_backward_hooks_for_all_modules_are_silent_and_come_back() -> None:
    fired: list[int] = []
    handle = register_module_full_backward_hook(lambda *_: fired.append(1))
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    try:
        ntk.empirical_ntk(net, x, engine="rows")
        assert fired == []
        net(x.requires_grad_()).sum().backward()
        assert fired == [1]
    finally:
        handle.remove()


class Regularised(Classifier):
    """Adds what a hook collected since the last step to its loss: a probe's activations there would change the run."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        penalty = torch.stack([a.square().mean() for a in seen]).sum()
        self.losses.append(len(seen))
        seen.clear()
        return loss + 0.01 * penalty


@pytest.mark.parametrize("everywhere", [True, False], ids=["all modules", "one module"])
def test_a_run_whose_loss_uses_what_a_hook_collects_ends_where_it_would(everywhere: bool, tmp_path: Path) -> None:
    def run(callbacks: list[Any]) -> dict[str, str]:
        seeded()
        module = Regularised(mlp())
        linear: Any = module.net[1]  # type: ignore[index]
        handle = register_module_forward_hook(collect) if everywhere else linear.register_forward_hook(collect)
        try:
            fitted = trainer(tmp_path, callbacks, max_steps=6, max_epochs=-1)
            fitted.fit(module, loader(digits(96)))
            return outcome(module, fitted)
        finally:
            handle.remove()
            seen.clear()

    watched = NTKMonitor(probe=6, every_n_steps=2, strict=True)
    assert run([watched]) == run([])
    assert watched.last is not None
    assert watched.last.status == "measured"
