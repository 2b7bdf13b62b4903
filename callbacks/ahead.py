"""What a Lightning Trainer knows about the run ahead: its length, its batches, its learning rates."""

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
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


def training_samples(trainer: Trainer) -> int | None:
    """Return how many samples the batches are drawn from, or None when the data do not tell."""
    try:
        return len(getattr(trainer.train_dataloader, "dataset", None))  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - data sets are users' code
        return None


def clipping(trainer: Trainer) -> float | None:
    """Return the norm that gradients are clipped to, or None when they are not clipped by norm."""
    value = trainer.gradient_clip_val
    by_norm = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
    return float(value) if value and by_norm else None


def rates_ahead(trainer: Trainer, steps: int) -> Array | None:
    """Return the learning rates of the coming steps, (steps, groups), by running copies of the schedulers ahead.

    The live schedulers and optimizers are not touched. A scheduler that waits for a metric (ReduceLROnPlateau) is taken
    as constant. None where nobody knows: a scheduler that cannot be copied, or that the user's own code steps (manual
    optimization, `lr_scheduler_step`).
    """
    module = trainer.lightning_module
    if trainer.lr_scheduler_configs and not (module.automatic_optimization and _plain(module)):
        return None
    optimizers = list(trainer.optimizers)
    try:
        stubs = [_stub(optimizer) for optimizer in optimizers]
        # A copied scheduler drives the stub in place of its optimizer. One that holds a method of the module copies
        # neither module nor trainer.
        memo: dict[int, Any] = {id(live): stub for live, stub in zip(optimizers, stubs, strict=True)}
        memo |= {id(trainer): trainer} | {id(part): part for part in module.modules()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch counts optimizer steps, and stubs take none
            copies = [
                (copy.deepcopy(config.scheduler, memo), config)
                for config in trainer.lr_scheduler_configs
                if not isinstance(config.scheduler, ReduceLROnPlateau)
            ]
            rows = []
            for ends in _walk(trainer, steps):
                rows.append([float(g["lr"]) for stub in stubs for g in stub.param_groups if "lr" in g])
                for scheduler, config in copies:
                    count = ends[config.interval]
                    if count and count % int(config.frequency) == 0:
                        scheduler.step()
    except Exception:  # noqa: BLE001 - schedulers are users' code
        return None
    return np.asarray(rows)


def _plain(module: Any) -> bool:
    """True when Lightning itself steps the schedulers."""
    return bool(type(module).lr_scheduler_step.__qualname__.startswith("LightningModule."))


def _walk(trainer: Trainer, steps: int) -> Iterator[dict[str, int]]:
    """Yield for each coming step what Lightning compares with a scheduler's frequency after it.

    "step": the batch of the epoch, from 1. "epoch": the epoch, from 1, or 0 where the step does not end one.
    """
    batches, together = _batches(trainer), int(trainer.accumulate_grad_batches)
    per_epoch = max(1, math.ceil(batches / together))
    for step in range(trainer.global_step, trainer.global_step + steps):
        epoch, place = divmod(step, per_epoch)
        last = place + 1 == per_epoch
        yield {"step": int(batches) if last else (place + 1) * together, "epoch": epoch + 1 if last else 0}


def _batches(trainer: Trainer) -> float:
    batches = float(trainer.num_training_batches)
    return batches if math.isfinite(batches) else 1e9


def _stub(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and options and no real parameters."""
    groups: list[Any] = []
    for group in optimizer.param_groups:
        # Deep: schedulers write into a learning rate that is a tensor.
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        groups.append({**options, "params": [torch.nn.Parameter(torch.zeros(1))]})
    return torch.optim.SGD(groups, lr=0.0)
