"""Short training runs, with and without a callback, and everything that must not differ between them."""

import hashlib
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
}


def trainer(root: Path, callbacks: list[Any], **options: Any) -> L.Trainer:
    return L.Trainer(default_root_dir=root, callbacks=callbacks, **{**QUIET, "logger": False, **options})


def state_hash(value: Any) -> str:
    """Hash of tensors, arrays and plain values in any nest, to the bit."""
    found = hashlib.sha256()

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            found.update(item.tobytes())
        elif isinstance(item, dict):
            for key in item:
                found.update(str(key).encode())
                visit(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                visit(part)
        else:
            found.update(repr(item).encode())

    visit(value)
    return found.hexdigest()


def outcome(module: L.LightningModule, run: L.Trainer) -> dict[str, str]:
    """What a run leaves behind: weights and buffers, optimizer state, loss sequence, flags, random states."""
    return {
        "weights": state_hash(module.state_dict()),
        "gradients": state_hash([p.grad for p in module.parameters()]),
        "optimizers": state_hash([o.state_dict() for o in run.optimizers]),
        "losses": state_hash(getattr(module, "losses", [])),
        "flags": state_hash([m.training for m in module.modules()]),
        "torch": state_hash(torch.get_rng_state()),
        "numpy": state_hash(np.random.get_state(legacy=False)),
        "python": state_hash(random.getstate()),
    }


def seeded(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
