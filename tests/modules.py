"""LightningModules and data for tests of the callback: small, real, each with one thing that goes wrong elsewhere."""

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset


def digits(samples: int = 320) -> TensorDataset:
    data = load_digits()
    x = torch.tensor(data.images[:samples], dtype=torch.float32)[:, None] / 16
    return TensorDataset(x, torch.tensor(data.target[:samples]))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Digits with noise from all three global generators."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        x = x + 0.01 * torch.randn_like(x)
        return x * (1 + 0.01 * random.random()) + 0.01 * float(np.random.randn()), y


class Classifier(L.LightningModule):
    """Cross-entropy on whatever network it is given."""

    def __init__(self, net: nn.Module, *, optimizer: str = "sgd", lr: float = 0.05) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.lr = optimizer, lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(float(loss.detach()))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Validated(Classifier):
    """The same, with a validation loop."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class FrozenNorm(nn.Module):
    """A BatchNorm that stays in evaluation mode while everything else trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


class TwoPaths(nn.Module):
    """One layer reachable as `trunk` and as `body[1]`: the functional-call trap."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.trunk = self.body[1]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        again: Tensor = self.trunk(x.flatten(1))
        return y + 0.1 * again[:, :10]


class Tied(nn.Module):
    """Two layers that share one weight, and a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 12)
        self.decode = nn.Linear(12, 64)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().T.clone())
        self.mix = nn.Linear(12, 64)
        self.again = nn.Linear(12, 64)
        self.again.weight = self.mix.weight
        self.head = nn.Parameter(0.1 * torch.randn(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encode(x.flatten(1)))
        y: Tensor = (self.mix(h) + torch.tanh(self.again(h)) + self.decode(h)) @ self.head
        return y


class Recurrent(nn.Module):
    """Rows of the image as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x.squeeze(1))[0][:, -1])
        return y


class Attention(nn.Module):
    """A transformer encoder layer over the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x.squeeze(1)).mean(1))
        return y


NETWORKS = {
    "mlp": mlp,
    "cnn+batchnorm+dropout": cnn,
    "frozen batchnorm": FrozenNorm,
    "two paths": TwoPaths,
    "tied weights": Tied,
    "lstm": Recurrent,
    "transformer": Attention,
}


def loader(data: Dataset[Any], *, workers: int = 0, own_generator: bool = False, batch: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7) if own_generator else None
    return DataLoader(data, batch, shuffle=True, num_workers=workers, generator=generator)
