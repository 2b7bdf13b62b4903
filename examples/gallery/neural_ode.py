"""Neural ODE: what can a flow learn, and did my solver take enough steps for its kernel?

You learn to make a trainable flow of any vector field, to take its kernel through a real solver, and to check both
against a field whose kernel is known in closed form. On scikit-learn's breast cancer data, in two components.
Run it with `python examples/gallery/neural_ode.py`; it writes runs/gallery/neural_ode.png.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from torch import nn

from ntk_monitor.applications import Report, neural_ode
from ntk_monitor.applications.flows import Flow, Solver
from ntk_monitor.render import png


def main(quick: bool = False, out: str | Path = "runs/gallery") -> Report:
    inputs, labels = load_breast_cancer(return_X_y=True)
    scaled = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    states, classes = torch.tensor(PCA(2).fit_transform(scaled) / 3), torch.tensor(labels)

    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    flow = Flow(field, time=1.0, solver=Solver("rk4", steps=5))  # the end of the flow: two logits
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(10 if quick else 80):
        loss = nn.functional.cross_entropy(flow(states), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = (flow(states).argmax(dim=1) == classes).double().mean()
    print(f"the flow tells {accuracy:.1%} of the tumours apart")
    exact = neural_ode.closed_form_tanh_ode([1.0], 2.0, 0.7, [2.5])[0, 0]
    print(f"closed form of θ·tanh(y): K(1, 2.5) = {exact:.6f} at θ = 0.7, T = 2\n")

    chosen = states[torch.argsort(classes[:24], stable=True)][:: 6 if quick else 1]
    scan, steps = ((2, 4), 5) if quick else ((5, 10, 20, 40), 40)
    report = neural_ode.study(field, chosen, time=1.0, solver=Solver(steps=steps), scan=scan)
    print(report.text())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "neural_ode.png").write_bytes(png(report.figures["solver"], 720, 450))
    return report


if __name__ == "__main__":
    main()
