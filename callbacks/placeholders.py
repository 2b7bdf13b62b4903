"""What stands for a scalar that is not measured yet, where early stopping, checkpoints and schedulers look for it.

They die on a missing key, and stop on NaN. Zero would do for those who only read; to whoever minimises it, zero would
be a best value that no measured one ever beats. Those who watch a scalar see the worst finite number of their direction
until there is a real one: it is never the best, crosses no stopping threshold, and any measured value improves on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ntk_monitor.callbacks.lightning_base import Trainer, callbacks_of
from ntk_monitor.metrics import NAMES

_LARGE = float(torch.finfo(torch.float32).max)
_WORST = {"min": _LARGE, "max": -_LARGE}


def placeholders(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Return the value that stands for each scalar of ours that somebody in this Trainer watches, by its key.

    Where two watch the same scalar in opposite directions, early stopping decides, since it alone can end the run.
    """
    found: dict[str, float] = {}
    for watcher in sorted(_watchers(trainer), key=lambda watcher: not watcher.stops):
        found.setdefault(watcher.key, watcher.worst)
    # A misspelt key must go on being missed: whoever watches it says so.
    return {key: found[key] for key in (f"{prefix}/{name}" for name in NAMES) if key in found}


@dataclass(frozen=True, slots=True)
class _Watcher:
    key: str
    worst: float
    stops: bool = False


def _watchers(trainer: Trainer) -> Iterator[_Watcher]:
    for callback in callbacks_of(trainer):
        key, worst = getattr(callback, "monitor", None), _WORST.get(str(getattr(callback, "mode", "")))
        if isinstance(key, str) and worst is not None:
            # What lies beyond a divergence threshold ends the run; the threshold itself is the worst it lets pass.
            limit = getattr(callback, "divergence_threshold", None)
            yield _Watcher(key, worst if limit is None else float(limit), hasattr(callback, "divergence_threshold"))
    for config in trainer.lr_scheduler_configs:
        worst = _WORST.get(str(getattr(config.scheduler, "mode", "")))
        if config.reduce_on_plateau and isinstance(config.monitor, str) and worst is not None:
            yield _Watcher(config.monitor, worst)
