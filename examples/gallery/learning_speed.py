"""Learning speed: which parts of my target come first, and how many steps do the others take?

You learn to forecast, before the first step, how long a network needs for any function of your choice on its samples
(here: each digit, and a pattern of noise), and to check the forecast against training. On scikit-learn's digits.
Run it with `python examples/gallery/learning_speed.py`; it writes runs/gallery/learning_speed.png.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.applications import Report, learning_speed
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_digits(n_class=2, return_X_y=True)
    count, width, steps = (30, 64, 50) if quick else (100, 512, 400)
    x, y = torch.tensor(inputs[:count] / 16), torch.tensor(2.0 * labels[:count] - 1)[:, None]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 1)).double()

    # By hand: steps until a mode, and then a function, is down to a tenth.
    values, vectors = np.linalg.eigh(ntk.empirical_ntk(model, x).reshape(count, count).numpy())
    scale = learning_speed.squared_error_scale(count, 1)
    lr = 0.5 / (scale * values[-1])
    times = learning_speed.time_to_learn(values, lr, scale=scale)
    questions = {"is it a one": y.numpy(), "random labels": np.random.default_rng(0).standard_normal(count)}
    for name, function in questions.items():
        print(f"{name:15s} {learning_speed.component_steps(vectors, times, function):14,.0f} steps to a tenth")
    print()

    report = learning_speed.study(model, x, y, lr=lr, steps=steps, components=questions)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "learning_speed.png").write_bytes(png(report.figures["learning_speed"], 720, 450))
    return report


if __name__ == "__main__":
    main()
