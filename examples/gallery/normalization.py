"""Normalisation: what do my norm layers take out of the kernel, and which learning rate is left behind them?

You learn to see a norm as a projection, to find weights whose length no longer matters and biases that are dead, and
what BatchNorm's coupling of samples does to the kernel. On scikit-learn's digits.
Run it with `python examples/gallery/normalization.py`; it writes runs/gallery/normalization.png.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_monitor.applications import Report, normalization
from ntk_monitor.applications.batch_coupling import batch_coupling
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    digits = load_digits()
    images, classes = torch.tensor(digits.images / 16).unsqueeze(1), torch.tensor(digits.target)
    x, width = (images[:4], 4) if quick else (images[:12], 8)

    torch.manual_seed(0)
    layers = {"conv1": nn.Conv2d(1, width, 3), "batch norm": nn.BatchNorm2d(width), "relu1": nn.ReLU()}
    layers |= {"conv2": nn.Conv2d(width, width, 3), "group norm": nn.GroupNorm(2, width), "relu2": nn.ReLU()}
    model = nn.Sequential(OrderedDict(layers, flat=nn.Flatten(), head=nn.Linear(16 * width, 10))).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.arange(256 if quick else 1024).split(64):
        loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # In training, samples of a batch move each other through BatchNorm's statistics; in evaluation they do not.
    coupled = batch_coupling(model, x)
    print(f"the kernel of evaluation is {coupled.evaluation_gap:.0%} off the one that a training step feels;")
    print(f"with the batch's own statistics, but held fixed, {coupled.statistics_gap:.0%}\n")

    # One of the two alone, where there is little time.
    report = normalization.study(model, x, modules=["batch norm"] if quick else None, lr=0.05)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "normalization.png").write_bytes(png(report.figures["projection"], 720, 450))
    return report


if __name__ == "__main__":
    main()
