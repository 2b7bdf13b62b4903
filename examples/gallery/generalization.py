"""Generalisation: can the training samples alone tell how my network will do on others?

You learn to take the leave-one-out error of a kernel, which needs no held-out data, at the start of training and at
every moment of it, and to see when it stops being true. On scikit-learn's diabetes data.
Run it with `python examples/gallery/generalization.py`; it writes runs/gallery/generalization.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, generalization, kernel_regression
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    features, targets = load_diabetes(return_X_y=True)
    count, width, steps = (80, 16, 100) if quick else (400, 64, 3000)
    x = torch.tensor(features / features.std(axis=0))[:count]
    y = torch.tensor((targets - targets.mean()) / targets.std())[:count, None]

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1)).double()

    # By hand, before training: the first half's own forecast, and the error on the second half.
    half, rest = x[: count // 2], x[count // 2 :]
    K, cross = ntk.empirical_ntk(model, half), ntk.empirical_ntk(model, rest, half)
    with torch.no_grad():
        f0, f0_rest = model(half).numpy(), model(rest).numpy()
    fitted = kernel_regression.kernel_regression(K, y[: count // 2], f0, ridge=float(K.diagonal().mean()))
    promised = (fitted.leave_one_out() ** 2).mean()
    kept = ((fitted.predict(cross, f0_rest) - y[count // 2 :].numpy()) ** 2).mean()
    print(f"leave-one-out says {promised:.3f}, held-out samples say {kept:.3f}\n")

    report = generalization.study(model, x, y, held_out=0.5, steps=steps)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "generalization.png").write_bytes(png(report.figures["errors"], 720, 450))
    return report


if __name__ == "__main__":
    main()
