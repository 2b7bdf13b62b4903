"""Balance of a physics-informed network: does one term of its loss starve, and do the kernel's weights help?

You learn to write a loss as named terms (here the heat equation with its second derivative, its boundary and its first
moment), to see how fast each can learn, and to compare training with and without the weights that this suggests.
Run it with `python examples/gallery/pinn_balance.py`; it writes runs/gallery/pinn_balance.png.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ntk_monitor.applications import Report, pinn_balance
from ntk_monitor.render import png

DIFFUSION = 0.1


def heat(model: nn.Module, at: Tensor) -> dict[str, Tensor]:
    """u_t = D u_xx at (x, t); u = 0 at both ends; u = sin πx at t = 0. `at` asks for its gradients already."""
    u = model(at)
    slopes = torch.autograd.grad(u.sum(), at, create_graph=True)[0]
    bend = torch.autograd.grad(slopes[:, 0].sum(), at, create_graph=True)[0][:, 0]
    x, t = at[:, :1].detach(), at[:, 1:].detach()
    left, right = (torch.cat([torch.full_like(t, end), t], dim=1) for end in (0.0, 1.0))
    start = torch.cat([x, torch.zeros_like(x)], dim=1)
    return {
        "equation": slopes[:, 1] - DIFFUSION * bend,
        "ends": torch.cat([model(left), model(right)]),
        "start": model(start) - torch.sin(math.pi * x),
    }


def solution(at: Tensor) -> Tensor:
    return torch.exp(-DIFFUSION * math.pi**2 * at[:, 1:]) * torch.sin(math.pi * at[:, :1])


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    points = torch.rand(12 if quick else 60, 2, dtype=torch.float64)

    report = pinn_balance.study(model, points, terms=heat, solution=solution, steps=20 if quick else 800)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "pinn_balance.png").write_bytes(png(report.figures["judged"], 720, 450))
    return report


if __name__ == "__main__":
    main()
