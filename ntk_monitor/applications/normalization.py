"""What normalisation layers do to the kernel: they project, free weights of their scale, and may couple samples.

Of each layer: the spectrum of the kernel of its input, before and behind it (`norm_projection_report`); whether the
weights that feed it are scale-free and their biases dead, and the learning rate that then acts on them (`scale_test`,
`effective_lr`). Of a network with BatchNorm: the kernel of evaluation against that of training (`batch_coupling`).
Scale-free weights belong to all layers but BatchNorm in evaluation, dead biases to InstanceNorm and BatchNorm in
training alone: LayerNorm and GroupNorm remove no more of a bias than its mean over a group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntk_monitor.applications.batch_coupling import Coupling, batch_coupling, has_batch_norm
from ntk_monitor.applications.norm_layers import Norm, norms_of
from ntk_monitor.applications.norm_projection import Projection, norm_projection_report
from ntk_monitor.applications.norm_scale import Optimizer, ScaleTest, effective_lr, equilibrium_step, scale_test
from ntk_monitor.applications.normalization_words import Rates, told
from ntk_monitor.applications.report import Report
from ntk_monitor.applications.skips import twin
from ntk_monitor.batch import Batch, size, take
from ntk_monitor.errors import InputError, NetworkError, said
from ntk_monitor.network import Forward

__all__ = [
    "EXAMPLE",
    "Coupling",
    "Norm",
    "Projection",
    "ScaleTest",
    "batch_coupling",
    "effective_lr",
    "equilibrium_step",
    "example",
    "norm_projection_report",
    "norms_of",
    "scale_test",
    "study",
]

EXAMPLE = "a small convolutional network with BatchNorm, GroupNorm and LayerNorm that has half learned scanned digits"

_MOST_PROJECTIONS, _MOST_TESTS, _SAMPLES = 4, 16, 12


def study(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    y: Any = None,
    *,
    modules: Sequence[str] | None = None,
    lr: float = 1.0,
    optimizer: Optimizer = "sgd",
    weight_decay: float = 0.0,
    forward: Forward | None = None,
) -> Report:
    """Return what the normalisation layers of a network do to its kernel, and which textbook statements hold there.

    Args:
        model: a network with normalisation layers; only read.
        x: N samples, at least four; the first twelve are used, and are the batch where statistics couple them.
        y: not used.
        modules: names of the layers that are meant; None: all, of which sixteen are tested and four projected.
        lr: learning rate, for effective ones; 1: relative to it.
        optimizer: "sgd", "adam" or "adamw".
        weight_decay: of the optimizer; above 0 the report has the step of equilibrium.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: fewer than four samples, or a name that is no normalisation layer.
        NetworkError: no normalisation layer.

    Cost: two kernels for each test, two of at most 256 rows for each projection, four for BatchNorm.
    """
    if size(x) < 4:
        raise InputError(f"wanted at least four samples, got {size(x)}")
    norms = _chosen(norms_of(model, x, forward=forward), modules)
    notes: list[str] = []
    network, samples = twin(model, take(x, slice(0, _SAMPLES)))
    tests = []
    for norm in _spread([norm for norm in norms if norm.weights], _MOST_TESTS):
        for mode in ("eval", "train") if norm.batch else ("eval",):
            try:
                tests.append(scale_test(network, samples, norm, mode=mode, forward=forward))
            except InputError as error:
                notes.append(said(error))
    projections = {}
    for norm in _spread(list(norms), _MOST_PROJECTIONS):
        for batch in (False, True) if norm.batch else (False,):
            try:
                projections[norm, batch] = norm_projection_report(
                    model, samples, norm.name, batch=batch, forward=forward
                )
            except InputError as error:
                notes.append(said(error))
    coupling = None
    if has_batch_norm(model):
        try:
            coupling = batch_coupling(model, samples, forward=forward)
        except NetworkError as error:
            notes.append(said(error))
    decayed = equilibrium_step(lr, weight_decay) if weight_decay else None
    rates = Rates([effective_lr(test.length, lr, optimizer) for test in tests], lr, optimizer, decayed)
    return told(norms, tests, projections, coupling, rates, tuple(dict.fromkeys(notes)))


def _chosen(norms: tuple[Norm, ...], modules: Sequence[str] | None) -> tuple[Norm, ...]:
    if modules is None:
        return norms
    wanted = [modules] if isinstance(modules, str) else list(modules)
    if unknown := sorted(set(wanted) - {norm.name for norm in norms}):
        raise InputError(f"{', '.join(unknown)}: no normalisation layer; there are {', '.join(n.name for n in norms)}")
    return tuple(norm for norm in norms if norm.name in wanted)


def _spread(norms: Sequence[Norm], most: int) -> list[Norm]:
    if len(norms) <= most:
        return list(norms)
    return [norms[round(k * (len(norms) - 1) / (most - 1))] for k in range(most)]


class _Digits(nn.Module):
    """Convolutions with BatchNorm and GroupNorm, then a layer with LayerNorm."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.one, self.batch_norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.group_norm = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.three, self.layer_norm, self.last = nn.Linear(side * side, 32), nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = torch.max_pool2d(torch.relu(self.batch_norm(self.one(images))), 2)
        h = torch.max_pool2d(torch.relu(self.group_norm(self.two(h))), 2)
        logits: Tensor = self.last(torch.relu(self.layer_norm(self.three(h.flatten(1)))))
        return logits


def example(quick: bool = False) -> Report:
    """Return the study of a convolutional network that has half learned scanned digits; `quick`: small ones."""
    from sklearn.datasets import load_digits

    from ntk_monitor.guard import undisturbed

    digits = load_digits()
    images = digits.images[:, ::2, ::2] if quick else digits.images
    x, y = torch.as_tensor(images / 16.0).unsqueeze(1), torch.as_tensor(digits.target).long()
    with undisturbed(seed=0):
        model = _Digits(images.shape[1]).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(5 if quick else 60):
            rows = slice(64 * step % 1024, 64 * step % 1024 + 64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return study(model, x[: 4 if quick else 12], lr=0.05)
