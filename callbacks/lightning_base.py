"""The Callback class of whichever Lightning is in use: `lightning.pytorch` and `pytorch_lightning` both accept ours."""

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Base", "LightningModule", "Trainer", "callbacks_of"]

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    Base = Callback
else:

    def _bases() -> tuple[type, ...]:
        # Importing the second package costs seconds, so only what is loaded already is served besides the first.
        loaded = [sys.modules[name] for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
        if not loaded:
            import lightning.pytorch

            loaded = [lightning.pytorch]
        return tuple(module.Callback for module in loaded)

    Base = type("Base", _bases(), {"__doc__": "Callback of every Lightning package that is loaded."})
    Trainer = LightningModule = Any


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the callbacks of a Trainer in the order of their hooks. Lightning's own types do not tell of the list."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]
