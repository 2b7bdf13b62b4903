"""Borrow global state and give it back: random generators, gradient mode, autocast, matmul precision.

Whatever happens inside `undisturbed`, an exception or Ctrl-C included, everything below is restored on the way out.
"""

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch


@contextlib.contextmanager
def random_state(*owners: object) -> Iterator[None]:
    """Restore, on exit, the state of every global random generator and of the generators that `owners` hold.

    Global: Python's `random`, NumPy's legacy generator, torch on the CPU and on every CUDA device already in use.
    """
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking an unused CUDA for its generators would initialise it, which is itself a disturbance.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    private = [(g, _state(g)) for owner in owners for g in generators(owner)]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in private:
            _restore(generator, state)


@contextlib.contextmanager
def undisturbed(*owners: object, seed: int | None = None) -> Iterator[None]:
    """Measure in a fixed numerical environment and leave no trace of it.

    Inside: gradients on, inference mode off, autocast off, float32 products in full precision (no TF32), and, with
    `seed`, freshly seeded torch generators, so that a network that draws random numbers is the same at every probe.
    """
    devices = [d for d in ("cuda", "cpu", "mps", "xpu") if torch.is_autocast_enabled(d)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state(*owners))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_full_precision())
        # Warnings raised by the user's forward belong to training, where they have been shown already; under
        # `-W error` they would also abort the measurement.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products in float32: with TF32 or bfloat16 inside, eigenvalues below 1e-8 of the largest are lost.

    torch >= 2.9 has one switch per backend; older versions have the two TF32 flags. Mixing both kinds makes torch raise,
    so only one kind is ever touched.
    """
    backends = torch.backends
    switches: list[tuple[Any, str, Any]]
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        owners = (
            backends.cuda.matmul,
            backends.cudnn.conv,  # type: ignore[attr-defined]
            backends.cudnn.rnn,
            backends.mkldnn.matmul,  # type: ignore[attr-defined]
            backends.mkldnn.conv,  # type: ignore[attr-defined]
            backends.mkldnn.rnn,  # type: ignore[attr-defined]
        )
        switches = [(owner, "fp32_precision", "ieee") for owner in owners]
    else:
        switches = [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def generators(owner: object, depth: int = 5) -> list[Generator]:
    """Return the random generators an object holds in its attributes and containers, `depth` levels down.

    Datasets and transforms often own one; drawing a probe through them must not advance it.
    """
    found: dict[int, Generator] = {}
    seen: set[int] = set()

    def visit(value: object, left: int) -> None:
        if left < 0 or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found[id(value)] = value
        elif isinstance(value, (list, tuple, set)) and len(value) <= 64:
            for item in value:
                visit(item, left - 1)
        elif isinstance(value, dict) and len(value) <= 64:
            for item in value.values():
                visit(item, left - 1)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.Tensor)):
            for item in vars(value).values():
                visit(item, left - 1)

    visit(owner, depth)
    return list(found.values())


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _restore(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
