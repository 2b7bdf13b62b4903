"""Why does the loss stop falling? Ask which share of the residual lies in modes that are learned slowly.

Regression on scikit-learn's diabetes data. You learn that each probe splits the residual into the eigenvectors (modes)
of the kernel, that plain gradient descent shrinks mode i by 1 - lr·rate_i per step, and how to read both back.
Run it with `python examples/regression_diabetes.py`.
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor

LEARNING_RATE = 0.05


class Regressor(pl.LightningModule):
    """Ten standardised features to one standardised target."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the prediction, (N, 1)."""
        prediction: Tensor = self.network(features)
        return prediction

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the mean squared error of a batch."""
        features, targets = batch
        return nn.functional.mse_loss(self(features), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD, for which rates mean what they say."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def standardised(values: Tensor) -> Tensor:
    return (values - values.mean(dim=0)) / values.std(dim=0)


def main(epochs: int = 60, out: str | Path = "runs/regression_diabetes") -> list[float]:
    torch.manual_seed(0)
    features, targets = load_diabetes(return_X_y=True)
    x = standardised(torch.tensor(features, dtype=torch.float32))
    y = standardised(torch.tensor(targets, dtype=torch.float32).unsqueeze(1))
    trainer = pl.Trainer(
        max_epochs=epochs,
        default_root_dir=out,
        callbacks=[NTKMonitor(probe=256, every_n_steps=60)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regressor(), DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))

    assert trainer.log_dir is not None
    slow = []
    print(" step  loss on the probe  share of the residual in modes that need over 1,000 more steps")
    for probe in ntk.load_history(trainer.log_dir).measured:
        # A mode shrinks to 1/e in 1 / (lr·rate) steps of plain gradient descent on a fixed kernel.
        slow.append(float(probe.residual_energy[LEARNING_RATE * probe.rates < 1 / 1000].sum()))
        print(f"{probe.step:5d}  {probe.loss_value:17.3f}  {slow[-1]:.0%}")
    return slow


if __name__ == "__main__":
    main()
