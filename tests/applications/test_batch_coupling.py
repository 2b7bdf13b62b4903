"""BatchNorm: kernels of evaluation, of training and with fixed statistics, against autograd row by row."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.batch_coupling import batch_coupling
from ntk_monitor.errors import InputError, NetworkError

Array = NDArray[np.float64]


def samples(n: int = 8) -> Tensor:
    return torch.randn(n, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


def network(norm: Callable[[], nn.Module] = lambda: nn.BatchNorm1d(4)) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [
        nn.Conv1d(2, 4, 3),
        norm(),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv1d(4, 4, 2),
        norm(),
        nn.Tanh(),
        nn.Flatten(),
    ]
    return nn.Sequential(*parts, nn.Linear(12, 2)).double()


def by_hand(outputs: Tensor, model: nn.Module) -> Array:
    """The kernel of these outputs summed over columns, gradient by gradient."""
    weights, total = list(model.parameters()), np.zeros((len(outputs), len(outputs)))
    for column in outputs.T:
        grads = [torch.autograd.grad(f, weights, retain_graph=True) for f in column]
        rows = [torch.cat([g.flatten() for g in grad]) for grad in grads]
        total += np.array([[float(a @ b) for b in rows] for a in rows])
    return total


def run(model: nn.Sequential, x: Tensor, statistics: str) -> Tensor:
    """A pass in which every BatchNorm is written out."""
    for part in model:
        if isinstance(part, nn.Dropout):
            continue
        if not isinstance(part, nn.BatchNorm1d):
            x = part(x)
            continue
        assert part.running_mean is not None
        assert part.running_var is not None
        mean, variance = part.running_mean[:, None], part.running_var[:, None]
        if statistics != "eval":
            mean = x.mean((0, 2), keepdim=True)[0]
            variance = (x - mean).square().mean((0, 2), keepdim=True)[0]
        if statistics == "frozen":
            mean, variance = mean.detach(), variance.detach()
        u = (x - mean) / (variance + part.eps).sqrt()
        x = part.weight[:, None] * u + part.bias[:, None]
    return x


def test_kernels_are_those_of_networks_written_out() -> None:
    model, x = network(), samples()
    with torch.no_grad():
        for part in model:
            if isinstance(part, nn.BatchNorm1d):
                part.weight.uniform_(0.5, 2)
                part.running_mean.fill_(0.1)  # type: ignore[union-attr]
    found = batch_coupling(model, x)
    for kernel, statistics, inputs in (
        (found.evaluation, "eval", x),
        (found.batch, "batch", x),
        (found.frozen, "frozen", x),
        (found.alone, "batch", x[:4]),
    ):
        np.testing.assert_allclose(kernel, by_hand(run(model, inputs, statistics), model), rtol=1e-9, atol=1e-9)


def test_gaps_are_relative_to_training() -> None:
    found = batch_coupling(network(), samples())
    norm = np.linalg.norm(found.batch)
    assert found.evaluation_gap == pytest.approx(np.linalg.norm(found.evaluation - found.batch) / norm)
    assert found.statistics_gap == pytest.approx(np.linalg.norm(found.frozen - found.batch) / norm)
    # Fresh statistics, identical statistics and company all matter, as theory's example has it.
    assert found.evaluation_gap > 0.05
    assert found.statistics_gap > 0.05
    assert found.company > 0.05
    top = [np.linalg.eigvalsh(kernel)[-1] for kernel in (found.evaluation, found.batch)]
    assert found.top_ratio == pytest.approx(top[0] / top[1])


def test_layers_without_running_statistics_are_measured_too() -> None:
    model = network(lambda: nn.BatchNorm1d(4, track_running_stats=False))
    found = batch_coupling(model, samples())
    np.testing.assert_allclose(found.evaluation, found.batch, rtol=1e-9, atol=1e-9)
    assert found.statistics_gap > 0.05


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.norm(2 * self.norm(self.one(x)) + 1).sum(2)
        return total


def test_bad_input_is_named() -> None:
    with pytest.raises(NetworkError, match="no BatchNorm"):
        batch_coupling(network(lambda: nn.GroupNorm(2, 4)), samples())
    with pytest.raises(InputError, match="four samples"):
        batch_coupling(network(), samples(3))
    with pytest.raises(NetworkError, match="more than once"):
        batch_coupling(Twice(), samples())
