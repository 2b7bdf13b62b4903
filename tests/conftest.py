"""What every test gets: one thread and fixed seeds.

numpy and torch may be missing or half installed where only the gpu tests run, so both are optional here.
"""

import contextlib
import os
import random
from collections.abc import Iterator

import pytest

with contextlib.suppress(ImportError):
    # The type checker of the Makefile's --jaxtyping-packages, which is looked up as an attribute of the package tests.
    import tests.typechecked  # noqa: F401

# Before torch is imported, and inherited by the processes that tests start. make exports it; this is for bare pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Whole runs of trainers and networks of libraries spend their time in other people's Python, which is a fifth slower
# while coverage looks for lines of ours. What they reach of ours, quicker tests count.
UNCOUNTED = {
    "test_distributed",
    "test_huggingface",
    "test_huggingface_faults",
    "test_huggingface_kernel",
    "test_identity",
    "test_matrix",
    "test_overhead",
    "test_structured",
    "test_tasks",
    "test_trainers",
    "test_trainers_averages",
    "test_trainers_optimizers",
    "test_trainers_precision",
    "test_zoo",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-cov pause in tests whose lines are not counted."""
    for item in items:
        if item.path.stem in UNCOUNTED:
            item.add_marker("no_cover")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the matrix of identity, where cells of it were run: the processes that run them have no terminal."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    cells = [value for r in reports for name, value in r.user_properties if name == "identity"]
    if cells:
        from tests.matrix import Cell, table

        terminalreporter.section("with and without the monitor: weights, optimizers, losses, random states")
        found = [(Cell(network, frozenset(settings)), changed) for network, settings, changed in cells]
        terminalreporter.write_line(table(found))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the run-time type checks off, for tests of what we say ourselves to arguments of the wrong type."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start each test from the same random state, whichever tests ran before it."""
    random.seed(0)
    try:
        import numpy as np
        import torch
    except ImportError:
        return
    np.random.seed(0)
    torch.manual_seed(0)
