"""Borrow global state and give it back: random generators here, torch's switches in `settings`.

Whatever happens inside `undisturbed`, an exception or Ctrl-C included, everything below is restored on the way out.
"""

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from ntk_monitor.settings import measuring


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

    Inside: what `settings.measuring` sets (gradients, plain float32, nothing compiled), and, with `seed`, freshly
    seeded generators, so that a network that draws random numbers is the same at every probe.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state(*owners))
        stack.enter_context(measuring())
        # Warnings raised by the user's forward belong to training, where they have been shown already; under
        # `-W error` they would also abort the measurement.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if seed is not None:
            seeded(seed)
        yield


def seeded(seed: int) -> None:
    """Seed the generators that `random_state` restores, and no other.

    `torch.manual_seed` would also queue a seed for a CUDA that is not in use yet, and so change what is drawn there.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def generators(owner: object, depth: int = 5) -> list[Generator]:
    """Return the random generators an object holds in its attributes and containers, `depth` levels down.

    Datasets and transforms often own one; drawing a probe through them must not advance it.
    """
    found: list[Generator] = []
    seen: set[int] = set()
    level: list[object] = [owner]
    for _ in range(depth + 1):  # breadth first: what lies near is not hidden behind a long way to it
        level = [value for value in {id(v): v for v in level}.values() if id(value) not in seen]
        seen.update(map(id, level))
        found += [value for value in level if isinstance(value, get_args(Generator))]
        level = [item for value in level for item in _held(value)]
    return found


def _held(value: object) -> list[object]:
    if isinstance(value, (*get_args(Generator), type, torch.Tensor)):
        return []
    if isinstance(value, (list, tuple, set)):
        return list(value) if len(value) <= 64 else []
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= 64 else []
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


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
