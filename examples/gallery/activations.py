"""Activations: what does my network's kernel do when inputs grow, and which patterns can it learn at all?

You learn the exact kernel of an infinitely wide ReLU network and of any activation of your own, and what biases change
in a real network. On scikit-learn's digits.
Run it with `python examples/gallery/activations.py`; it writes runs/gallery/activations.png.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ntk_monitor.applications import Report, activations
from ntk_monitor.applications.arccosine import relu_ntk
from ntk_monitor.render import png


def squared_relu(x: Tensor) -> Tensor:
    """An activation of one's own."""
    return torch.relu(x) ** 2


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, _ = load_digits(return_X_y=True)
    x = torch.tensor(inputs[: 6 if quick else 24] / 16)

    # Three times the input: nine times the kernel, for ReLU without biases. It is not scale invariant.
    pair = x[:2].numpy()
    print(f"relu_ntk: K(3x, 3x') / K(x, x') = {np.mean(relu_ntk(3 * pair) / relu_ntk(pair)):.6f}")
    print(f"squared ReLU: smooth where inputs meet? exponent {activations.profile(squared_relu).smoothness:.2f}\n")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1)).double()  # with biases
    shown = {"ReLU": torch.relu, "squared ReLU": squared_relu} | ({} if quick else {"tanh": torch.tanh})
    report = activations.study(model, x, activations=shown)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "activations.png").write_bytes(png(report.figures["activations"], 720, 450))
    return report


if __name__ == "__main__":
    main()
