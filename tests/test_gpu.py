"""On a GPU: the same kernels as on the CPU, and a run that ends to the bit where it would have ended.

Needs pytest, torch, lightning, tensorboard and numpy only; skipped without CUDA.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from tests.training import outcome, seeded, state_hash, trainer

# cuBLAS reads it when CUDA starts; without it deterministic algorithms refuse matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

N = 6


class _Recurrent(nn.Module):
    """cuDNN has no backward pass for recurrent layers in evaluation mode, which is where kernels are measured."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(4, 8, num_layers=2, dropout=0.2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x)[0][:, -1])
        return y


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def _cnn() -> nn.Module:
    # Strides instead of adaptive pooling, whose backward pass has no deterministic version on CUDA.
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.LazyLinear(3),
    )


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(5 * 8, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (5,)),
    "cnn": (_cnn, (1, 8, 8)),
    "transformer": (_transformer, (5, 8)),
    "lstm": (_Recurrent, (7, 4)),
}


def _problem(name: str, dtype: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(N, *shape)
    model(x)  # lazy layers learn their shape, BatchNorm its statistics
    return model.to(dtype), x.to(dtype)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.cpu() - wanted).abs().max() / wanted.abs().max())


@contextlib.contextmanager
def _tf32() -> Iterator[Callable[[], list[Any]]]:
    """Allow TF32 globally, in the words that this torch prefers, and yield how to read what is allowed."""
    matmul, cudnn = torch.backends.cuda.matmul, cast("Any", torch.backends.cudnn)
    new = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    places = [(owner, name) for owner in ((matmul, cudnn.conv, cudnn.rnn) if new else (matmul, cudnn))]
    before = [getattr(*place) for place in places]
    try:
        for place in places:
            setattr(*place, value)
        yield lambda: [getattr(*place) for place in places]
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(*place, old)


@pytest.mark.parametrize("outputs", ["full", "trace"])
@pytest.mark.parametrize("engine", ["auto", "reference", "rows"])
@pytest.mark.parametrize("name", NETWORKS)
def test_double_precision_kernel_is_that_of_the_cpu(name: str, engine: Any, outputs: Any) -> None:
    if (name, engine) == ("lstm", "reference"):
        pytest.skip("torch.func cannot transform recurrent layers")
    model, x = _problem(name, torch.float64)
    wanted = ntk.empirical_ntk(model, x, engine=engine, outputs=outputs)
    got = ntk.empirical_ntk(model.cuda(), x.cuda(), engine=engine, outputs=outputs)
    assert _error(got, wanted) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_tf32_is_not_used_for_kernels_and_allowed_again_afterwards(name: str) -> None:
    model, x = _problem(name, torch.float32)
    wanted = ntk.empirical_ntk(model, x)
    with _tf32() as allowed:
        before = allowed()
        got = ntk.empirical_ntk(model.cuda(), x.cuda())
        assert allowed() == before
    assert _error(got, wanted) < 1e-5


def test_older_switch_of_tf32_is_respected_too() -> None:
    model, x = _problem("mlp", torch.float32)
    wanted = ntk.empirical_ntk(model, x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        got = ntk.empirical_ntk(model.cuda(), x.cuda())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert _error(got, wanted) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_probe_and_network_may_lie_on_different_devices(name: str) -> None:
    model, x = _problem(name, torch.float64)
    wanted = ntk.empirical_ntk(model, x)
    assert _error(ntk.empirical_ntk(model.cuda(), x), wanted) < 1e-10


@pytest.mark.parametrize("device", [None, "cpu"])
def test_monitor_measures_a_network_on_the_gpu(device: str | None) -> None:
    model, x = _problem("cnn", torch.float64)
    probe = (x, torch.arange(N) % 3)
    wanted = ntk.Monitor(model, None, probe, "cross_entropy", gram_every=0, strict=True).snapshot(0)
    model.cuda()
    monitor = ntk.Monitor(model, None, probe, "cross_entropy", gram_every=0, strict=True, device=device)
    got = monitor.snapshot(0)
    tolerance = 1e-9 * wanted.eigenvalues[0]
    assert abs(got.eigenvalues - wanted.eigenvalues).max() < tolerance
    assert got.loss_value == pytest.approx(wanted.loss_value, rel=1e-9)
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_random_numbers_of_the_gpu_are_left_alone() -> None:
    model, x = _problem("cnn", torch.float32)
    model.cuda().train()
    torch.cuda.manual_seed(3)
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    for mode in ("eval", "train"):
        ntk.empirical_ntk(model, x.cuda(), mode=mode)
    ntk.Monitor(model, None, (x, torch.arange(N) % 3), "cross_entropy", gram_every=0, strict=True).snapshot(0)
    assert torch.equal(states[0], torch.cuda.get_rng_state())
    assert torch.equal(states[1], torch.get_rng_state())


class _Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = _problem("cnn", torch.float32)[0]
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Take back what Trainer(deterministic=True) sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def _trained(root: Path, callbacks: list[Any], precision: Any) -> dict[str, str]:
    seeded()
    module = _Module()
    data = TensorDataset(torch.randn(96, 1, 8, 8), torch.randint(3, (96,)))
    options: dict[str, Any] = {"accelerator": "gpu", "deterministic": True, "precision": precision}
    fitted = trainer(root, callbacks, max_epochs=4, **options)
    fitted.fit(module, DataLoader(data, 16, shuffle=True))
    return outcome(module, fitted) | {"cuda": state_hash(torch.cuda.get_rng_state())}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_run_on_the_gpu_ends_where_it_would(precision: str, tmp_path: Path) -> None:
    first, second = (_trained(tmp_path / name, [], precision) for name in "ab")
    assert first == second, "the run itself is not repeatable here, so it cannot show what a monitor changes"
    watched = NTKMonitor(probe=12, every_n_steps=5, gram_every=0, log_dir=str(tmp_path / "log"), strict=True)
    assert _trained(tmp_path / "c", [watched], precision) == first
    history = ntk.load_history(tmp_path / "log")
    assert history.steps.tolist() == [0, 5, 10, 15, 20, 24]
    assert {snapshot.loss_status for snapshot in history} == {"matched"}
