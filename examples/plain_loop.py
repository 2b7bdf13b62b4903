"""No trainer at all: a plain PyTorch loop with ntk.Monitor, and ntk.Recorder for the record.

You learn the three calls of a loop: `observe` after each step, `due` to ask for the cadence, `snapshot` to measure.
Run it with `python examples/plain_loop.py`; then `tensorboard --logdir runs/plain_loop`.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import ntk_monitor as ntk


def main(epochs: int = 10, out: str | Path = "runs/plain_loop") -> list[ntk.Snapshot]:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    classes = torch.tensor(digits.target)

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_function = nn.CrossEntropyLoss()

    # The probe: 100 samples that stay the same for the whole run. Monitor only reads the model.
    probe = (images[:100], classes[:100])
    monitor = ntk.Monitor(model, optimizer, probe, loss_function, every_n_steps=50)

    taken: list[ntk.Snapshot] = []
    # Not strict: a full disk costs the record, never the run.
    with ntk.Recorder(out, strict=False) as recorder:

        def look(epoch: int) -> None:
            snapshot = monitor.snapshot(epoch=epoch)
            recorder.write(snapshot)
            taken.append(snapshot)
            if snapshot.status != "measured":
                return  # a skipped probe says why in `reason`
            print(
                f"step {snapshot.step:4d}  loss {snapshot.loss_value:.3f}  largest eigenvalue "
                f"{snapshot.eigenvalues[0]:.4g}  resolved {snapshot.rank} of {snapshot.eigenvalues.size} modes"
            )

        look(0)  # the weights that training starts from
        for epoch in range(epochs):
            for batch in torch.randperm(len(images)).split(64):
                loss = loss_function(model(images[batch]), classes[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.observe()  # a learning-rate schedule would step after this
                if monitor.due():
                    look(epoch)
    return taken


if __name__ == "__main__":
    main()
