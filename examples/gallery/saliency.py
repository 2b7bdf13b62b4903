"""Saliency: does the kernel know at which samples my network is sensitive to its input?

You learn to correlate input gradients with the kernel's diagonal, with intervals, before and after training. Often they
have nothing to do with each other, and the output says so. On scikit-learn's breast cancer data.
Run it with `python examples/gallery/saliency.py`; it writes runs/gallery/saliency.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from ntk_monitor.applications import Report, saliency
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor((inputs - inputs.mean(axis=0)) / inputs.std(axis=0))
    y = torch.tensor(labels).double()[:, None]
    shown, resamples = (x[:60], 200) if quick else (x[:300], 2000)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 32), nn.GELU(), nn.Linear(32, 1)).double()
    before = saliency.saliency_report(model, shown, resamples=resamples).pearson
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"before training: Pearson {before.value:.2f}, 95 % interval {before.low:.2f} to {before.high:.2f}\n")

    report = saliency.study(model, shown, resamples=resamples)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "saliency.png").write_bytes(png(report.figures["saliency"], 720, 450))
    return report


if __name__ == "__main__":
    main()
