"""Initialisation: which rule should draw the weights of my network, one of the known ones or my own?

You learn to compare draws of a kernel under any rules, yours included, and to set them against the closed form that
exists for ReLU networks. On scikit-learn's digits.
Run it with `python examples/gallery/initialization.py`; it writes runs/gallery/initialization.png.
"""

from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_monitor.applications import Report, initialization
from ntk_monitor.applications.initializers import INITS
from ntk_monitor.render import png

SIZES = (64, 64, 64, 1)


def network() -> nn.Module:
    one, two, three = (nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairwise(SIZES))
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three)


def small(module: nn.Module) -> None:
    """A rule of one's own: He's, and a last layer a tenth as large."""
    INITS["he"](module)
    with torch.no_grad():
        list(module.parameters())[-1].mul_(0.1)


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, _ = load_digits(return_X_y=True)
    x = torch.tensor(inputs[: 16 if quick else 32] / 16, dtype=torch.float32)

    he = [2 / size for size in SIZES[:-1]]
    exact = initialization.expected_trace_relu_mlp(SIZES, he, x)
    print(f"expected trace under He's rule, in closed form: {exact:.1f}\n")

    rules = {name: INITS[name] for name in ("xavier", "he", "pytorch")} | {"small head": small}
    report = initialization.study(network(), x, inits=rules, count=4 if quick else 150)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "initialization.png").write_bytes(png(report.figures["initialization"], 720, 450))
    return report


if __name__ == "__main__":
    main()
