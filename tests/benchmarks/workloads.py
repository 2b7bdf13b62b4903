"""What is timed: networks by name, each with a random batch. The cost of a kernel does not depend on the numbers.

N samples, C outputs, P parameters, T tokens. A name may carry options: "mlp:width=1024,classes=20".
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from tests.benchmarks.networks import GPT, ResNet18, ViT


def mlp(width: int = 512, depth: int = 3, classes: int = 10) -> nn.Module:
    """P = 563,722: wide layers on few features, where the Jacobian is far larger than the activations."""
    widths = (64, *[width] * depth)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def cnn() -> nn.Module:
    """P = 56,970: convolutions at full resolution, where the forward and backward passes are what costs."""
    widths = (3, 32, 64, 64)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def demo() -> nn.Module:
    """The network of `ntk-monitor demo`."""
    from ntk_monitor.cli.digits import network

    return network()


NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (64,)),
    "cnn": (cnn, (3, 32, 32)),
    "resnet18": (ResNet18, (3, 32, 32)),
    "vit": (ViT, (3, 32, 32)),
    "gpt": (GPT, (64,)),
    "demo": (demo, (1, 8, 8)),
}
"""By name: how it is built, and the shape of one sample."""


def parsed(name: str) -> tuple[str, dict[str, int]]:
    """Return the network's name and its options."""
    base, _, options = name.partition(":")
    pairs = (option.partition("=") for option in options.split(",") if option)
    return base, {key: int(value) for key, _, value in pairs}


def problem(name: str, samples: int, device: str) -> tuple[nn.Module, Tensor]:
    """Return network and batch, the same ones in every process."""
    torch.manual_seed(0)
    base, options = parsed(name)
    build, shape = NETWORKS[base]
    model = build(**options).eval().to(device)
    if base == "gpt":
        return model, torch.randint(1000, (samples, options.get("tokens", shape[0]))).to(device)
    return model, torch.randn(samples, *shape).to(device)


def checked(name: str) -> int:
    """Return for how many samples the float64 twin is computed; an entry of the kernel depends on two samples only."""
    return 6 if parsed(name)[0] in ("mlp", "cnn") else 2
