"""Geometry: how does my network arrange its samples, and how did training change that?

You learn to draw samples by their distances in the kernel, to test whether the inputs explain them (with a p-value that
is valid for distances), and to follow the picture over checkpoints. On scikit-learn's digits.
Run it with `python examples/gallery/geometry.py`; it writes runs/gallery/geometry.png.
"""

import copy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, geometry
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_digits(n_class=4, return_X_y=True)
    x, y = torch.tensor(inputs / 16), torch.tensor(labels)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    states = {}
    for step in range(101):
        if step in (0, 10, 30):
            states[f"step {step}"] = copy.deepcopy(model.state_dict())
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    shown = slice(0, 24 if quick else 100)
    K = ntk.empirical_ntk(model, x[shown], outputs="trace").numpy()
    picture = geometry.kernel_pca(K)
    print(f"two directions hold {picture.explained[:2].sum():.0%} of the kernel's variance")
    found = geometry.distance_correlation(K, x[shown], mantel=99)
    print(f"distances in it follow those between images: {found.value:.2f}, p = {found.p_value:.2g}\n")

    report = geometry.study(model, x[shown], y[shown], kernel=K, states=states, mantel=99 if quick else 999)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "geometry.png").write_bytes(png(report.figures["embedding"], 720, 450))
    return report


if __name__ == "__main__":
    main()
