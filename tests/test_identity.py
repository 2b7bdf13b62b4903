"""What the matrix of identity (tests/test_matrix.py) leaves out: precisions, engines, forwards that write to things."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.settings import kept
from tests.modules import Classifier, Validated, cnn, digits, loader, mlp
from tests.training import outcome, seeded, trainer

STEPS = 8


def run(build: Callable[[], nn.Module], root: Path, callbacks: list[Any], **setting: Any) -> dict[str, str]:
    seeded()
    validate = setting.pop("validate", False)
    module = (Validated if validate else Classifier)(build(), optimizer=setting.pop("optimizer", "sgd"))
    fitted = trainer(root, callbacks, max_steps=STEPS, max_epochs=-1, **setting)
    fitted.fit(module, loader(digits()), DataLoader(digits(64), 32) if validate else None)
    assert fitted.global_step == STEPS
    return outcome(module, fitted)


def monitor(**options: Any) -> NTKMonitor:
    return NTKMonitor(**{"probe": 8, "every_n_steps": 4, "strict": True, **options})


SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "validation and clipping": {
        "validate": True,
        "val_check_interval": 4,
        "gradient_clip_val": 0.5,
        "num_sanity_val_steps": 2,
    },
    "adamw": {"optimizer": "adamw"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_ends_where_it_would(name: str, tmp_path: Path) -> None:
    watched = monitor()
    assert run(cnn, tmp_path / "b", [watched], **SETTINGS[name]) == run(cnn, tmp_path / "a", [], **SETTINGS[name])
    assert watched.last is not None
    assert watched.last.status == "measured"


def test_rows_engine_and_loss_kernel_are_harmless_too(tmp_path: Path) -> None:
    plain = run(cnn, tmp_path / "a", [])
    assert run(cnn, tmp_path / "b", [monitor(engine="rows", probe=6)]) == plain
    assert run(cnn, tmp_path / "c", [monitor(outputs="loss", loss="cross_entropy")]) == plain


def test_two_monitors_and_a_budget_are_harmless_too(tmp_path: Path) -> None:
    two = [NTKMonitor(probe=8, max_overhead=0.5), monitor(log_prefix="second", outputs="trace")]
    assert run(cnn, tmp_path / "b", two) == run(cnn, tmp_path / "a", [])


class Rewrites(nn.Module):
    """Every pass writes to parameters: rows of an embedding, and a weight kept in bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 4, max_norm=0.5)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.head.weight.data.clamp_(-0.1, 0.1)
        y: Tensor = self.head(self.embed((16 * x).long().flatten(1)[:, ::4]).flatten(1))
        return y


class Counts(nn.Module):
    """What a pass sees depends on how many there were: a hidden state, a counter and a buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Linear(64, 10), 0
        self.last: Tensor | None = None
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.flatten(1).mean(0)
        y: Tensor = self.body((x.flatten(1) - self.mean) / (1 + 0.01 * self.calls))
        y = y if self.last is None else y + 0.1 * self.last
        self.last = y.detach().mean(0)
        return y


class Switches(nn.Module):
    """Every pass leaves torch's switches turned, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.set_float32_matmul_precision("high" if torch.backends.cudnn.benchmark else "highest")
        y: Tensor = self.body(x.flatten(1) + 0.01 * torch.rand(()) + 0.01 * torch.backends.cudnn.benchmark)
        return y


@pytest.mark.parametrize("net", [Rewrites, Counts, Switches])
def test_forwards_that_write_end_where_they_would(net: Callable[[], nn.Module], tmp_path: Path) -> None:
    watched = monitor()
    with kept():
        plain = run(net, tmp_path / "a", [])
    with kept():
        assert run(net, tmp_path / "b", [watched]) == plain
    assert watched.last is not None
    assert watched.last.status == "measured"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_a_compiled_function_in_forward_costs_no_graph(tmp_path: Path) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    halved = torch.compile(lambda x: x / 2, backend=backend)

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = halved(self.body(x))
            return y

    plain = run(Halves, tmp_path / "a", [])
    alone = len(graphs)
    torch.compiler.reset()
    assert run(Halves, tmp_path / "b", [monitor()]) == plain
    assert (alone, len(graphs)) == (1, 2)
    torch.compiler.reset()
