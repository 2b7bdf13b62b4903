"""Lazy or rich: does my network learn features, or only a linear function of those that it was born with?

You learn to train copies of a network at several output scales, from rich to lazy, to find where yours stands, and what
moving was good for. On scikit-learn's breast cancer data.
Run it with `python examples/gallery/lazy_or_rich.py`; it writes runs/gallery/lazy_or_rich.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, lazy_or_rich
from ntk_monitor.applications.regime import movement
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_breast_cancer(return_X_y=True)
    count, width, steps = (40, 16, 100) if quick else (160, 64, 2000)
    x = torch.tensor((inputs - inputs.mean(axis=0)) / inputs.std(axis=0))[:count]
    y = torch.tensor(2.0 * labels[:count] - 1)[:, None]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, width), nn.GELU(), nn.Linear(width, 1)).double()
    untrained = {key: value.clone() for key, value in model.state_dict().items()}

    # By hand: how far do the kernels of my own run lie apart, growth and rotation together?
    before = ntk.empirical_ntk(model, x, outputs="trace").numpy()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = movement(before, ntk.empirical_ntk(model, x, outputs="trace").numpy())
    print(f"100 steps of Adam moved the kernel by {moved:.0%} of its size\n")

    model.load_state_dict(untrained)
    scales = (0.3, 1.0, 3.0) if quick else (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    report = lazy_or_rich.study(model, x, y, scales=scales, held_out=0.5, steps=steps)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "lazy_or_rich.png").write_bytes(png(report.figures["scales"], 720, 450))
    return report


if __name__ == "__main__":
    main()
