"""What every test gets: one thread and fixed seeds.

numpy and torch may be missing or half installed where only the gpu tests run, so both are optional here.
"""

import os
import random

import pytest

# Before torch is imported, and inherited by the processes that tests start. make exports it; this is for bare pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
