"""What a Lightning Trainer knows about the run ahead: its length, its batches, its learning rates."""

import contextlib
import copy
import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ntk_monitor.batch import size
from ntk_monitor.callbacks.lightning_base import Trainer

Array = NDArray[np.float64]


def planned_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps the run will take, or None when nobody knows (max_time, endless data)."""
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # noqa: BLE001 - loaders of users; a length that cannot be told is no length
        return None
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def effective_batch(trainer: Trainer, batch: Any) -> int | None:
    """Return the samples whose mean loss one optimizer step follows, over accumulation and ranks."""
    with contextlib.suppress(Exception):
        return size(batch) * int(trainer.accumulate_grad_batches) * int(trainer.world_size)
    return None


def clipping(trainer: Trainer) -> float | None:
    """Return the norm that gradients are clipped to, or None when they are not clipped by norm."""
    value = trainer.gradient_clip_val
    by_norm = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
    return float(value) if value and by_norm else None


def rates_ahead(trainer: Trainer, steps: int) -> Array | None:
    """Return the learning rates of the coming steps, (steps, groups), by running copies of the schedulers ahead.

    The live schedulers are not touched. One that waits for a metric (ReduceLROnPlateau) is taken as constant; None when
    a scheduler cannot be copied.
    """
    optimizers = list(trainer.optimizers)
    stubs = [_stub(optimizer) for optimizer in optimizers]
    # A copied scheduler drives the stub in place of its optimizer.
    memo: dict[int, Any] = {id(live): stub for live, stub in zip(optimizers, stubs, strict=True)}
    per_epoch = max(1, math.ceil(_batches(trainer) / int(trainer.accumulate_grad_batches)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch counts optimizer steps, and stubs take none
            copies = [
                (copy.deepcopy(config.scheduler, memo), per_epoch if config.interval == "epoch" else 1, config)
                for config in trainer.lr_scheduler_configs
                if not isinstance(config.scheduler, ReduceLROnPlateau)
            ]
            rows = []
            for step in range(trainer.global_step + 1, trainer.global_step + steps + 1):
                rows.append([float(g["lr"]) for stub in stubs for g in stub.param_groups if "lr" in g])
                for scheduler, every, config in copies:
                    if step % (every * int(config.frequency)) == 0:
                        scheduler.step()
    except Exception:  # noqa: BLE001 - schedulers are users' code
        return None
    return np.asarray(rows)


def _batches(trainer: Trainer) -> float:
    batches = float(trainer.num_training_batches)
    return batches if math.isfinite(batches) else 1e9


def _stub(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and options and no real parameters."""
    groups: list[Any] = []
    for group in optimizer.param_groups:
        options = {key: copy.copy(value) for key, value in group.items() if key != "params"}
        groups.append({**options, "params": [torch.nn.Parameter(torch.zeros(1))]})
    return torch.optim.SGD(groups, lr=0.0)
