"""Kernel regression: is my network a kernel machine with the kernel that it was born with?

You learn to solve the regression that an infinitely wide network would perform, from `empirical_ntk` alone, and to ask
`study` how far networks that are really trained end from it, wide and narrow. On scikit-learn's diabetes data.
Run it with `python examples/gallery/kernel_regression.py`; it writes runs/gallery/kernel_regression.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, kernel_regression
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    features, targets = load_diabetes(return_X_y=True)
    x = torch.tensor(features / features.std(axis=0))
    y = torch.tensor((targets - targets.mean()) / targets.std())[:, None]
    count, width = (40, 64) if quick else (240, 512)
    train, test = slice(0, count * 3 // 4), slice(count * 3 // 4, count)

    def network(units: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, units), nn.Tanh(), nn.Linear(units, 1)).double()

    # By hand: kernel of the training samples, cross kernel, and the outputs that the untrained network already has.
    model = network(width)
    K, cross = ntk.empirical_ntk(model, x[train]), ntk.empirical_ntk(model, x[test], x[train])
    with torch.no_grad():
        f0, f0_test = model(x[train]).numpy(), model(x[test]).numpy()
    ridge, expected = kernel_regression.best_ridge(K.reshape(len(f0), -1), y[train].numpy() - f0)
    fitted = kernel_regression.kernel_regression(K, y[train], f0, ridge)
    error = ((fitted.predict(cross, f0_test) - y[test].numpy()) ** 2).mean()
    print(f"ridge {ridge:.3g}: {fitted.dof():.1f} degrees of freedom, leave-one-out error {expected:.3f}")
    print(f"held-out error of kernel regression {error:.3f}; of the mean target {y[test].var():.3f}")

    # And the question itself: the same, against networks that are trained with a penalty.
    steps = 100 if quick else 2000
    wide = kernel_regression.study(model, x[:count], y[:count], steps=steps)
    print(f"width {width}: training ends {wide.number('gap'):.1%} of its way from kernel regression\n")
    report = kernel_regression.study(network(4), x[:count], y[:count], steps=steps)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "kernel_regression.png").write_bytes(png(report.figures["predictions"], 720, 450))
    return report


if __name__ == "__main__":
    main()
