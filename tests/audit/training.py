"""How the audit's runs train: one LightningModule, optimizers and schedules as people configure them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

Schedule: TypeAlias = Callable[[Optimizer, int], LRScheduler]
Optimize: TypeAlias = Callable[[nn.Module], Optimizer]


class Task(L.LightningModule):
    """A network, a loss, an optimizer, a schedule over the planned steps."""

    def __init__(
        self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimize: Optimize, schedule: Schedule | None
    ) -> None:
        super().__init__()
        self.net = net
        self.loss, self.optimize, self.schedule = loss, optimize, schedule
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        raw = self.net(inputs)
        outputs: Tensor = raw if isinstance(raw, Tensor) else raw.logits
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["input_ids"], batch["labels"]) if isinstance(batch, Mapping) else batch
        loss = self.loss(self(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimize(self.net)
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def sgd(lr: float, momentum: float = 0.9, **options: Any) -> Optimize:
    return lambda net: torch.optim.SGD(trained(net), lr=lr, momentum=momentum, **options)


def adamw(lr: float, **options: Any) -> Optimize:
    return lambda net: torch.optim.AdamW(trained(net), lr=lr, **options)


def adamw_without_decay_of_vectors(lr: float, weight_decay: float) -> Optimize:
    """The two groups of every transformer recipe: matrices decay, biases and norms do not."""

    def optimize(net: nn.Module) -> Optimizer:
        matrices = [p for p in trained(net) if p.dim() > 1]
        vectors = [p for p in trained(net) if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95))

    return optimize


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def warm_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Linear over the first tenth, then a cosine to zero."""
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (steps - warm))))

    return LambdaLR(optimizer, factor)


def warm_up(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Linear over the first tenth, then constant."""
    warm = max(1, steps // 10)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))


def stairs(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A tenth after three fifths of the run, a hundredth for its last sixth."""
    return LambdaLR(optimizer, lambda step: 0.1 ** ((step >= 0.6 * steps) + (step >= 5 / 6 * steps)))


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Rates rise and fall once, momentum does the reverse."""
    return OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps + 1)
