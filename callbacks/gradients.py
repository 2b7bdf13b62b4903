"""How much clipping shortens the gradients of a step, before the Trainer clips them."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def clip_coefficient(optimizers: Iterable[Optimizer], clip: float) -> Tensor | None:
    """Return the factor min(1, clip / (norm + 1e-6)) that clipping by norm is about to apply, as torch computes it.

    A tensor on the device of the gradients, which nobody waits for. None without gradients, and where they are sharded:
    their norm would take a message to the other ranks. Costs one pass over the gradients.
    """
    grads = [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    if not grads or any(type(g).__name__ == "DTensor" for g in grads):
        return None
    norm = torch.nn.utils.get_total_norm([g.detach() for g in grads])
    return (clip / (norm + 1e-6)).clamp(max=1.0)
