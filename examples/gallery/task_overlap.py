"""Task overlap: if I go on training on one task, which of the others will my network forget?

You learn how much of the parameter space two tasks share, why that does not say whether they help each other, and how
to forecast what training on one does to the other. On scikit-learn's digits: the network knows all, then sees eights.
Run it with `python examples/gallery/task_overlap.py`; it writes runs/gallery/task_overlap.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_monitor.applications import Report, task_overlap
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16), torch.tensor(labels)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x[:1000]), y[:1000])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # No order of the samples matters here; it would in Tr(K_A K_B), which is refused for different inputs.
    threes, eights, ones = (x[y == digit][:8] for digit in (3, 8, 1))
    for name, other in (("threes", threes), ("ones", ones)):
        print(f"eights and {name}: overlap {task_overlap.task_overlap(model, eights, other).normalised:.2f}")
    print()

    some = y[:400] < (5 if quick else 10)
    report = task_overlap.study(
        model, x[:400][some], y[:400][some], per_task=4 if quick else 10, steps=10 if quick else 50
    )
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "task_overlap.png").write_bytes(png(report.figures["interference"], 720, 450))
    return report


if __name__ == "__main__":
    main()
