"""Monitors as they are written in an afternoon. Each is known to change some runs: they show that a test can fail."""

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch.nn import functional as F


class Careless(L.Callback):
    """Does one deed after every second batch."""

    def __init__(self, deed: str) -> None:
        self.deed = deed

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            DEEDS[self.deed](trainer, pl_module, batch)


def _forward(trainer: Any, module: Any, batch: Any) -> None:
    module(batch[0])


def _eval(trainer: Any, module: Any, batch: Any) -> None:
    module.eval()


def _eval_then_train(trainer: Any, module: Any, batch: Any) -> None:
    module.eval()
    with torch.no_grad():
        module(batch[0])
    module.train()


def _draw(trainer: Any, module: Any, batch: Any) -> None:
    torch.randn(3)


def _iterate(trainer: Any, module: Any, batch: Any) -> None:
    next(iter(trainer.train_dataloader))


def _iterate_restored(trainer: Any, module: Any, batch: Any) -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    next(iter(trainer.train_dataloader))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def _backward(trainer: Any, module: Any, batch: Any) -> None:
    flags = [m.training for m in module.modules()]
    module.eval()
    F.cross_entropy(module(batch[0]), batch[1]).backward()
    for m, flag in zip(module.modules(), flags, strict=True):
        m.training = flag


def _zero_grad(trainer: Any, module: Any, batch: Any) -> None:
    module.zero_grad()


DEEDS = {
    "forward in train mode": _forward,
    "eval and forget": _eval,
    "eval, then train": _eval_then_train,
    "draw a random number": _draw,
    "iterate the loader": _iterate,
    "iterate the loader, random state restored": _iterate_restored,
    "backward into .grad": _backward,
    "zero_grad": _zero_grad,
}
