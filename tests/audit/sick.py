"""Twelve runs with one thing wrong each, otherwise like the healthy ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from tests.audit import data, networks, training
from tests.audit.healthy import images, table
from tests.audit.runs import Case, Job, accuracy, determination
from tests.audit.training import Task, adamw, sgd

BatchNorm = nn.BatchNorm2d


def _dead() -> nn.Module:
    """A bias that someone initialised far below zero: no sample passes the second ReLU."""
    net = networks.cnn(None)
    convolution = net[2]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    nn.init.constant_(convolution.bias, -5.0)
    return net


def _head_only(net: nn.Module) -> Optimizer:
    """The optimizer was given the head, and the body was forgotten."""
    assert isinstance(net, nn.Sequential)
    return torch.optim.SGD(net[-1].parameters(), lr=0.05, momentum=0.9)


def _narrow() -> nn.Sequential:
    """A deep body in front of 12 features."""
    body = list(networks.cnn(BatchNorm))[:-1]
    return nn.Sequential(*body, nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 10))


def shuffled() -> Job:
    """Labels in random order against the images: an index gone wrong in the data set."""
    split = data.digits()
    order = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(0))
    loader = data.shuffled(TensorDataset(split.x, split.y[order]), 64)
    task = Task(networks.mlp([64, 256, 256, 10]), F.cross_entropy, adamw(3e-3), None)
    return Job(task, loader, 40 * len(loader), accuracy(split.held_x, split.held_y))


def duplicates() -> Job:
    """The data set returns the same 40 images over and over."""
    split = data.digits()
    same = torch.arange(len(split.y)) % 40
    loader = data.shuffled(TensorDataset(split.x[same], split.y[same]), 64)
    task = Task(networks.cnn(BatchNorm), F.cross_entropy, adamw(2e-3), training.cosine)
    return Job(task, loader, 8 * len(loader), accuracy(split.held_x, split.held_y))


def _vanishing() -> nn.Module:
    """All weights of eight layers drawn with a standard deviation of 0.02."""
    net = networks.mlp([64, *[64] * 7, 10])
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return net


class _OneHead(nn.Module):
    """Two tasks that read the same single feature."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = networks.mlp([10, 64, 64, 1], nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        feature: Tensor = self.trunk(x)
        return torch.cat([feature, feature], 1)


def conflicting() -> Job:
    """Two opposite targets share one head."""
    split = data.friedman()
    noise = 0.1 * torch.randn(len(split.y), 1, generator=torch.Generator().manual_seed(0))
    y = torch.cat([split.y, noise - split.y], 1)
    held = torch.cat([split.held_y, -split.held_y], 1)
    loader = data.shuffled(TensorDataset(split.x, y), 32)
    task = Task(_OneHead(), F.mse_loss, adamw(2e-3), training.cosine)
    return Job(task, loader, 14 * len(loader), determination(split.held_x, held))


SICK = (
    Case("rate-too-high", "learning rate 1.5 instead of 0.05 (CNN, SGD)",
         images(lambda: networks.cnn(None), sgd(0.05 * 30), None, 64, 6), "accuracy", 0.5, ("lr_too_high",)),
    Case("rate-too-low", "learning rate 0.00017 instead of 0.05 (CNN, BatchNorm, SGD)",
         images(lambda: networks.cnn(BatchNorm), sgd(0.05 / 300, weight_decay=5e-4), training.cosine, 64, 8),
         "accuracy", 0.85, ("lr_too_low",)),
    Case("dead-layer", "a layer of ReLUs that no sample passes (CNN, AdamW)",
         images(_dead, adamw(2e-3), training.cosine, 128, 12), "accuracy", 0.5, ("dead_layer",)),
    Case("frozen-by-mistake", "the optimizer holds the head only (CNN, BatchNorm, SGD)",
         images(_narrow, _head_only, None, 64, 10), "accuracy", 0.85, ("uncovered_parameters",)),
    Case("shuffled-labels", "labels in random order (MLP, AdamW)", shuffled, "accuracy", 0.3, ("labels_look_random",)),
    Case("duplicate-data", "the data set repeats 40 images (CNN, BatchNorm, AdamW)", duplicates, "accuracy", 0.9,
         ("duplicate_samples",)),
    Case("unscaled-target", "targets of 25 to 346 as they come (MLP, AdamW)",
         table(lambda: data.diabetes(scaled_target=False), lambda: networks.mlp([10, 32, 32, 1]), F.mse_loss,
               adamw(1e-3, weight_decay=0.1), None, batch=32, epochs=25), "R²", 0.3, ("unscaled_target",)),
    Case("loss-summed", "loss summed over the batch, rate made for its mean (CNN, SGD)",
         images(lambda: networks.cnn(None), sgd(0.05), None, 64, 6, reduction="sum"), "accuracy", 0.5,
         ("summed_loss",)),
    Case("inputs-raw", "features of 0.001 to 4,000 as they come (MLP, SGD)",
         table(lambda: data.cancer(scaled=False), lambda: networks.mlp([30, 32, 1]),
               F.binary_cross_entropy_with_logits, sgd(0.05), None, batch=32, epochs=15), "accuracy", 0.9,
         ("unnormalised_input",)),
    Case("vanishing-start", "weights of eight layers start at 0.02 (MLP, SGD)",
         images(_vanishing, sgd(0.05), None, 64, 8), "accuracy", 0.5, ("vanishing_signal",)),
    Case("collapsed-outputs", "SGD with the weight decay of an AdamW recipe, 0.1 (MLP)",
         images(lambda: networks.mlp([64, 128, 128, 10]), sgd(0.05, weight_decay=0.1), None, 64, 8), "accuracy", 0.5,
         ("collapsed_outputs",)),
    Case("conflicting-tasks", "two opposite targets share one head (MLP, AdamW)", conflicting, "R²", 0.3,
         ("conflicting_tasks",)),
)  # fmt: skip
