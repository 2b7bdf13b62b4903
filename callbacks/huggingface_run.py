"""What a Hugging Face Trainer knows of its run, and what its checkpoints remember of the monitor."""

import copy
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

Array = NDArray[np.float64]


def trainer_of() -> Any:
    """Return the Trainer among the callers, or None.

    Callbacks are not handed their Trainer, and it alone knows whether the loss is the model's own.
    """
    import transformers

    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, transformers.Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def refusal(args: Any) -> str:
    """Return why a run cannot be measured, or ""."""
    plugins = {"FSDP": getattr(args, "fsdp", None), "DeepSpeed": getattr(args, "deepspeed", None)}
    for name, used in plugins.items():
        if used:
            return f"{name} shards the parameters over processes, and no process holds the whole network to measure"
    return ""


def own_loss(trainer: Any) -> str:
    """Return why the loss that is trained may not be the model's own, or "" when it is."""
    import transformers

    if trainer is None:
        return "the Trainer could not be asked"
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "the Trainer was given a compute_loss_func"
    if type(trainer).compute_loss is not transformers.Trainer.compute_loss:
        return f"{type(trainer).__name__} computes the loss itself"
    return ""


def smoothing(trainer: Any, model: Any) -> Callable[..., Any] | None:
    """Return the Trainer's label smoothing as (outputs, labels) → scalar with its `epsilon`, or None without any."""
    smoother = getattr(trainer, "label_smoother", None)
    if smoother is None:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    shifted = type(plain).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def value(outputs: Any, labels: Any) -> Any:
        return smoother({"logits": outputs}, labels, shift_labels=shifted)

    value.epsilon = smoother.epsilon  # type: ignore[attr-defined]
    return value


def plain_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    found: Optimizer = optimizer
    return found


def effective_batch(args: Any) -> int:
    """Return the samples whose mean loss one optimizer step follows, over accumulation and processes."""
    return int(args.train_batch_size) * int(args.gradient_accumulation_steps) * max(1, int(args.world_size))


def rates_ahead(optimizer: Any, scheduler: Any, steps: int) -> Array | None:
    """Return the learning rates of the coming steps, (steps, groups), by running a copy of the scheduler ahead.

    A scheduler that waits for a metric is taken as constant; None for one that cannot be copied.
    """
    plain = plain_optimizer(optimizer)
    groups = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in plain.param_groups]
    stand_in = torch.optim.SGD([{**group, "params": [torch.nn.Parameter(torch.zeros(1))]} for group in groups], lr=0.0)
    rows = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch counts optimizer steps, and the stand-in takes none
            waits = scheduler is None or isinstance(scheduler, ReduceLROnPlateau)
            copied = None if waits else copy.deepcopy(scheduler, {id(plain): stand_in, id(optimizer): stand_in})
            for _ in range(steps):
                rows.append([float(group["lr"]) for group in stand_in.param_groups])
                if copied is not None:
                    copied.step()
    except Exception:  # noqa: BLE001 - schedulers are users' code
        return None
    return np.asarray(rows)


def remembered(checkpoint: Path, prefix: str) -> dict[str, Any]:
    """Return what a checkpoint of this run knows of its monitor, or an empty dict."""
    try:
        found: dict[str, Any] = json.loads((checkpoint / f"{prefix}_monitor.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def remember(checkpoint: Path, prefix: str, known: Mapping[str, Any]) -> None:
    """Write what a resumed run needs into its checkpoint, if there is one."""
    if checkpoint.is_dir():
        path = checkpoint / f"{prefix}_monitor.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(dict(known)))
        draft.replace(path)
