"""Early stopping: when should I stop, and is stopping the same as a ridge?

You learn to read off the spectrum of a kernel what a number of steps does to every mode, and to ask `study` for the
step at which to stop, from training samples alone. On scikit-learn's diabetes data.
Run it with `python examples/gallery/early_stopping.py`; it writes runs/gallery/early_stopping.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, early_stopping
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    features, targets = load_diabetes(return_X_y=True)
    x = torch.tensor(features / features.std(axis=0))
    y = torch.tensor((targets - targets.mean()) / targets.std())
    count, steps = (80, 300) if quick else (300, 3000)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 128), nn.Tanh(), nn.Linear(128, 1)).double()

    # By hand: what 20 steps of SGD do to each mode, and which ridge each of them would need.
    spectrum = ntk.Spectrum.of(ntk.empirical_ntk(model, x[:count]))
    lr = 0.1 * count / float(spectrum.eigenvalues[0])
    stopped = early_stopping.early_stopping_ridge(spectrum.eigenvalues, lr, 20, samples=count)
    for mode in (0, 5, 20):
        learned, ridge = stopped.filter[mode], stopped.ridge[mode]
        print(f"mode {mode + 1:2d} is learned to {learned:5.1%}, as by a ridge of {ridge:.3g}")
    print(f"the nearest single ridge, {stopped.best:.3g}, misses by {stopped.mismatch:.1%}\n")

    report = early_stopping.study(model, x[:count], y[:count], steps=steps, held_out=0.5)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "early_stopping.png").write_bytes(png(report.figures["errors"], 720, 450))
    return report


if __name__ == "__main__":
    main()
