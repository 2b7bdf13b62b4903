"""Dropout: does it slow learning down, or does it do something else?

You learn the mean kernel of a network under its own dropout masks, in the four ways in which masks can meet, and that
one training step sees K plus a ridge on the diagonal. On scikit-learn's digits.
Run it with `python examples/gallery/dropout.py`; it writes runs/gallery/dropout.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_monitor.applications import Report, dropout
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, _ = load_digits(return_X_y=True)
    x = torch.tensor(inputs[: 6 if quick else 16] / 16)
    draws = 60 if quick else 1000

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Dropout(0.2), nn.Linear(200, 1)).double()

    # What a step moves in evaluation mode, sample by sample: the kernel without dropout, not q² of it.
    plain = dropout.dropout_kernel(model, x)
    moved = dropout.dropout_kernel(model, x, "eval_vs_train", draws=draws)
    print(f"evaluation moves {(moved / plain).mean():.3f} times as in a network without dropout (q² = 0.64)\n")

    report = dropout.study(model, x, draws=draws)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "dropout.png").write_bytes(png(report.figures["dropout"], 720, 450))
    return report


if __name__ == "__main__":
    main()
