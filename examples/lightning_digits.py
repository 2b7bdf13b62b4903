"""Watch a Lightning run: one callback, no other change to the training code.

You learn how to add NTKMonitor to a Trainer, where its numbers go, and how to read them back as arrays.
Run it with `python examples/lightning_digits.py`; then `tensorboard --logdir runs/lightning_digits`.
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor


class Classifier(pl.LightningModule):
    """A small fully connected network for 8 x 8 images. Nothing in it knows of the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        images, classes = batch
        loss = nn.functional.cross_entropy(self(images), classes)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(epochs: int = 10, out: str | Path = "runs/lightning_digits") -> ntk.History:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    data = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)

    # A probe every 50 steps. Without every_n_steps the monitor probes as often as 2 % of the wall time allow.
    monitor = NTKMonitor(every_n_steps=50)
    trainer = pl.Trainer(
        max_epochs=epochs,
        default_root_dir=out,
        callbacks=[monitor],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), data)

    # Everything that was measured is in the logger's event file, beside the scalars that TensorBoard shows.
    assert trainer.log_dir is not None
    history = ntk.load_history(trainer.log_dir)
    print(" step  largest eigenvalue  effective rank  alignment")
    columns = (history.steps, history.eigenvalues[:, 0], history.scalar("effective_rank"), history.scalar("alignment"))
    for step, largest, rank, alignment in zip(*columns, strict=True):
        print(f"{step:5d}  {largest:18.4g}  {rank:14.1f}  {alignment:9.2f}")
    return history


if __name__ == "__main__":
    main()
