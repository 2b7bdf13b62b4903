"""Class interference: a step on images of one class: which other classes does it help, which does it hurt?

You learn to forecast from the kernel what one step on each class does to the loss of every other, and to see by the
step that was really taken how far to believe it. On scikit-learn's digits.
Run it with `python examples/gallery/class_interference.py`; it writes runs/gallery/class_interference.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, class_interference
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16), torch.tensor(labels)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x[:1000]), y[:1000])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # By hand, for threes and eights: K between their samples, and the gradients of their losses by the logits.
    rows = torch.cat([torch.nonzero(y == digit)[:8, 0] for digit in (3, 8)])
    logits = model(x[rows])
    gradients = logits.softmax(dim=1) - nn.functional.one_hot(y[rows], 10)
    change = class_interference.interference(
        ntk.empirical_ntk(model, x[rows]), gradients.detach(), (y[rows] == 8).long(), lr=0.01
    )
    print(f"a step of 0.01 on threes moves their loss by {change[0, 0]:+.4f}, that of eights by {change[0, 1]:+.4f}\n")

    report = class_interference.study(model, x, y, per_class=4 if quick else 32)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "class_interference.png").write_bytes(png(report.figures["foreseen"], 720, 450))
    return report


if __name__ == "__main__":
    main()
