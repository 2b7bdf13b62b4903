"""What the demo trains: a small convolutional network on the 1,797 scanned digits that come with scikit-learn.

Images are (1, 8, 8) in [0, 1], classes 0 to 9. A norm and dropout are there because real networks have them; GroupNorm,
because samples that BatchNorm couples have no forecast that is cheap enough for every probe.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

BATCH = 64


def network() -> nn.Sequential:
    """Return the network, 6,122 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 10),
    )


def loaders(seed: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return training (1,437 samples, shuffled) and validation data (360), split with each class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(digits.target)
    train, held_out = train_test_split(
        torch.arange(len(classes)), test_size=360, stratify=classes.numpy(), random_state=seed
    )
    order = torch.Generator().manual_seed(seed)
    return (
        DataLoader(TensorDataset(images[train], classes[train]), BATCH, shuffle=True, generator=order),
        DataLoader(TensorDataset(images[held_out], classes[held_out]), 360),
    )


class Digits(pl.LightningModule):
    """The network with cross-entropy, AdamW, and a learning rate that falls along a cosine."""

    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.network = network()
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        """Return one logit per class."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, classes = batch
        loss = functional.cross_entropy(self(images), classes)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Log the share of held-out digits that are read correctly."""
        images, classes = batch
        self.log("val_accuracy", (self(images).argmax(dim=1) == classes).float().mean())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and its schedule, stepped at every batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
