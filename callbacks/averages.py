"""Which weights are in the module? Callbacks that average weights put the average there, for a while or for good.

Lightning's `WeightAveraging` (EMA among them) swaps it in for validation and copies it in when training ends;
`StochasticWeightAveraging` transfers it in a last epoch of its own, in which only BatchNorm statistics move, or when
training ends. The weights of the run's own steps are what is measured, never the average.
"""

import math
from collections.abc import Sequence
from typing import Any

from ntk_monitor.callbacks.lightning_base import Trainer, callbacks_of


class Averages:
    """Those of a Trainer's callbacks that average weights: Lightning's two and whatever derives from them."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._running = [c for c in callbacks if _is(c, "WeightAveraging")]
        self._stochastic = [c for c in callbacks if _is(c, "StochasticWeightAveraging")]

    @property
    def words(self) -> str:
        """Which weights are measured, in words; empty when there is only one kind."""
        names = [type(c).__name__ for c in [*self._running, *self._stochastic]]
        return f"the weights being trained, not the average that {' and '.join(names)} keeps" if names else ""

    def refreshing(self, trainer: Trainer) -> bool:
        """True in the epoch after the last one that trains, which renews BatchNorm statistics for the average."""
        return any(trainer.current_epoch > _end(c) for c in self._stochastic)

    def epochs(self, trainer: Trainer) -> int | None:
        """Return how many epochs train, or None when that is not fixed."""
        ends = [int(_end(c)) + 1 for c in self._stochastic if math.isfinite(_end(c))]
        planned = trainer.max_epochs
        return min([planned, *ends]) if planned is not None and planned > 0 else None

    def put_in_place(self, trainer: Trainer, observer: Any) -> str:
        """Return who has replaced the weights by an average when `observer` learns that training ended, or ""."""
        listed = callbacks_of(trainer)
        earlier = listed[: listed.index(observer)] if observer in listed else []
        last = trainer.current_epoch - 1  # the Trainer counts on before it says that training ended
        names = [type(c).__name__ for c in self._running if c in earlier]
        for c in self._stochastic:
            over = last >= _end(c) or math.isinf(_end(c))
            if last > _end(c) or (c in earlier and over):
                names.append(type(c).__name__)
        return " and ".join(names)


def _is(callback: Any, name: str) -> bool:
    # By name: `lightning.pytorch` and `pytorch_lightning` have a class each, and older releases lack one of them.
    return any(kind.__name__ == name for kind in type(callback).__mro__)


def _end(stochastic: Any) -> float:
    """Return the last epoch that trains, from 0; infinite in an endless run and before the fit starts."""
    return float(getattr(stochastic, "swa_end", math.inf))
