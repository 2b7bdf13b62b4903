"""Residual connections: do the skips of my network lift its kernel's eigenvalues, and keep its scale over depth?

You learn to take a kernel apart into what the skips, the branches and their cross term contribute, and to see that the
textbook's floor for the eigenvalues need not hold. On scikit-learn's digits.
Run it with `python examples/gallery/residual.py`; it writes runs/gallery/residual.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ntk_monitor.applications import Report, residual
from ntk_monitor.render import png


class Block(nn.Module):
    """x + branch(x), as anybody writes it; `residual` finds the addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        added: Tensor = x + self.branch(x)
        return added


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, _ = load_digits(return_X_y=True)
    x = torch.tensor(inputs[: 6 if quick else 40] / 16)

    torch.manual_seed(0)
    blocks = [Block(32) for _ in range(1 if quick else 8)]
    model = nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10)).double()

    parts = residual.decompose_residual(model, x)
    print(f"cross term {parts.cross_ratio:.0%} of the kernel; skips alone reach {parts.skip_rank} directions")
    print(f"eigenvalues below the floor that skip and branch would give: {parts.fallen} of {len(parts.full)}\n")

    report = residual.study(model, x, levels=2 if quick else 5)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "residual.png").write_bytes(png(report.figures["spectra"], 720, 450))
    return report


if __name__ == "__main__":
    main()
