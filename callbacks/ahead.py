"""What a Lightning Trainer knows about the run ahead: its length, its batches, its learning rates."""

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ntk_monitor.batch import size
from ntk_monitor.callbacks.averages import Averages
from ntk_monitor.callbacks.lightning_base import LightningModule, Trainer, callbacks_of

Array = NDArray[np.float64]


def planned_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps the run will take, or None when nobody knows (max_time, endless data).

    Where several optimizers take turns, only `max_steps` counts all of them.
    """
    try:
        if len(trainer.optimizers) > 1:
            return trainer.max_steps if trainer.max_steps > 0 else None
        steps = trainer.estimated_stepping_batches
        epochs = Averages(callbacks_of(trainer)).epochs(trainer)
        if epochs is not None and math.isfinite(_batches(trainer)):  # an epoch that only renews statistics has no steps
            steps = min(steps, epochs * _per_epoch(trainer))
    except Exception:  # noqa: BLE001 - loaders of users; a length that cannot be told is no length
        return None
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def ending(trainer: Trainer, averages: Averages) -> bool:
    """True after the last batch that trains, as far as it is fixed; early stopping and max_time end a run later."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    epochs = averages.epochs(trainer)
    return epochs is not None and trainer.is_last_batch and trainer.current_epoch + 1 >= epochs


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
    """Return the norm that gradients are clipped to, or None when they are not clipped by norm or by a user's rule."""
    value = trainer.gradient_clip_val
    by_norm = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
    return float(value) if value and by_norm and _inherited(trainer.lightning_module, _CLIPS) else None


def rates_ahead(trainer: Trainer, steps: int, *, of: Sequence[Optimizer] = ()) -> Array | None:
    """Return the learning rates of the coming steps, (steps, groups), by running copies of the schedulers ahead.

    The live schedulers and optimizers are not touched. A scheduler that waits for a metric (ReduceLROnPlateau) is taken
    as constant. None where nobody knows: a scheduler that cannot be copied, or that the user's own code steps (manual
    optimization, `lr_scheduler_step`).

    Args:
        trainer: in fit.
        steps: how many.
        of: the optimizers whose groups are wanted; none: those of the Trainer, one after the other.
    """
    module = trainer.lightning_module
    if trainer.lr_scheduler_configs and not (module.automatic_optimization and _inherited(module, _STEPS)):
        return None
    optimizers = list(trainer.optimizers)
    wanted = [not of or any(o is other for other in of) for o in optimizers]
    try:
        stubs = [_stub(optimizer) for optimizer in optimizers]
        # A copied scheduler drives the stub in place of its optimizer. One that holds a method of the module copies
        # neither module nor trainer.
        memo: dict[int, Any] = {id(live): stub for live, stub in zip(optimizers, stubs, strict=True)}
        shown = [stub for stub, seen in zip(stubs, wanted, strict=True) if seen]
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
                rows.append([float(g["lr"]) for stub in shown for g in stub.param_groups if "lr" in g])
                for scheduler, config in copies:
                    count = ends[config.interval]
                    if count and count % int(config.frequency) == 0:
                        scheduler.step()
    except Exception:  # noqa: BLE001 - schedulers are users' code
        return None
    return np.asarray(rows)


# What a module may override: how schedulers step, how gradients are clipped.
_STEPS, _CLIPS = "lr_scheduler_step", "configure_gradient_clipping"


def _inherited(module: LightningModule, hook: str) -> bool:
    """True when Lightning's own hook is in force."""
    return bool(getattr(type(module), hook).__qualname__.startswith("LightningModule."))


def _walk(trainer: Trainer, steps: int) -> Iterator[dict[str, int]]:
    """Yield for each coming step what Lightning compares with a scheduler's frequency after it.

    "step": the batch of the epoch, from 1. "epoch": the epoch, from 1, or 0 where the step does not end one.
    """
    batches, together = min(_batches(trainer), 1e9), int(trainer.accumulate_grad_batches)
    per_epoch = _per_epoch(trainer)
    for step in range(trainer.global_step, trainer.global_step + steps):
        epoch, place = divmod(step, per_epoch)
        last = place + 1 == per_epoch
        yield {"step": int(batches) if last else (place + 1) * together, "epoch": epoch + 1 if last else 0}


def _batches(trainer: Trainer) -> float:
    return float(trainer.num_training_batches)


def _per_epoch(trainer: Trainer) -> int:
    """Return the optimizer steps of an epoch; a number beyond any run where the data never end."""
    return max(1, math.ceil(min(_batches(trainer), 1e9) / int(trainer.accumulate_grad_batches)))


def _stub(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and options and no real parameters."""
    groups: list[Any] = []
    for group in optimizer.param_groups:
        # Deep: schedulers write into a learning rate that is a tensor.
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        groups.append({**options, "params": [torch.nn.Parameter(torch.zeros(1))]})
    return torch.optim.SGD(groups, lr=0.0)
