"""What is timed: networks with a batch, and the things that are done with them.

N samples, C outputs, P parameters. Weights and inputs are random; the cost of a kernel does not depend on them.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

import ntk_monitor as ntk

Run = Callable[[], Tensor | None]
Method: TypeAlias = Literal["backwards", "reference", "rows", "step", "probe"]


def mlp() -> nn.Module:
    """P = 562,698: wide layers on few features, where the Jacobian is far larger than the activations."""
    widths = (64, 512, 512, 512)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


def cnn() -> nn.Module:
    """P = 56,970: convolutions at full resolution, where the forward and backward passes are what costs."""
    widths = (3, 32, 64, 64)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def demo() -> nn.Module:
    """The network of `ntk-monitor demo`."""
    from ntk_monitor.cli.digits import network

    return network()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (64,)),
    "cnn": (cnn, (3, 32, 32)),
    "demo": (demo, (1, 8, 8)),
}
"""By name: how it is built, and the shape of one sample."""


def problem(name: str, samples: int, device: str) -> tuple[nn.Module, Tensor]:
    """Return network and batch, the same ones in every process."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return build().eval().to(device), torch.randn(samples, *shape).to(device)


def runs(method: Method, model: nn.Module, x: Tensor) -> dict[str, Run]:
    """Return what a method does, by the quantity it yields; a kernel is returned for the check of its error."""
    if method == "backwards":
        return dict.fromkeys(("trace", "full"), lambda: backwards(model, x))
    if method == "step":
        return {"monitor": training_step(model, x)}
    if method == "probe":
        return {"monitor": probe(model, x)}
    return {
        "trace": lambda: ntk.empirical_ntk(model, x, outputs="trace", engine=method),
        "full": lambda: ntk.empirical_ntk(model, x, outputs="full", engine=method),
    }


def backwards(model: nn.Module, x: Tensor) -> None:
    """C ordinary backward passes over the batch: the yardstick, and near the floor for an exact kernel."""
    y = model(x)
    for c in range(y.shape[1]):
        torch.autograd.grad(y[:, c].sum(), list(model.parameters()), retain_graph=True)


def training_step(model: nn.Module, x: Tensor) -> Run:
    """One step of the demo's training on a batch of 64: forward, cross-entropy, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    x = x[:64]
    classes = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), classes).backward()
        optimizer.step()

    return step


def probe(model: nn.Module, x: Tensor) -> Run:
    """What the monitor does at one due step, the Gram image and the writing left out."""
    classes = torch.arange(len(x), device=x.device) % 10
    monitor = ntk.Monitor(model, None, (x, classes), "cross_entropy", gram_every=0, strict=True)

    def take() -> None:
        monitor.snapshot(monitor.probes)

    return take
