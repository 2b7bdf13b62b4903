"""Precisions, compiled modules and adapters: the kernel is that of the weights, computed as the record says."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_monitor.callbacks import NTKMonitor
from tests.fitting import fit
from tests.modules import Classifier, mlp
from tests.training import outcome

PRECISIONS = {
    "32-true": ("float32", 1e-5),
    "64-true": ("float64", 1e-10),
    "bf16-mixed": ("float32", 1e-5),
    "bf16-true": ("", 2e-2),
    "16-mixed": ("float32", 1e-5),
    "16-true": ("", 5e-3),
}
"""dtype of the Jacobian, and the error of the eigenvalues relative to the largest."""


def watched(**options: Any) -> NTKMonitor:
    fixed: dict[str, Any] = {"probe": 6, "every_n_steps": 6, "loss": "cross_entropy", "reference": 0}
    return NTKMonitor(**{**fixed, **options})


def plain_kernel(module: Any, monitor: NTKMonitor) -> Any:
    """Eigenvalues of the kernel on the probe of the float64 copy of these weights, by plain autograd rows."""
    assert monitor.monitor is not None
    x = monitor.monitor.probe.inputs.double()
    model = copy.deepcopy(getattr(module.net, "_orig_mod", module.net)).double().eval()
    outputs = model(x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()), retain_graph=True)])
        for f in outputs.flatten()
    ]
    jacobian = torch.stack(rows)
    return torch.linalg.eigvalsh(jacobian @ jacobian.T).flip(0).numpy()


@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_measured_and_ends_where_it_would(precision: str, tmp_path: Path) -> None:
    monitor = watched()
    plain = fit(tmp_path / "a", [], lambda: Classifier(mlp()), precision=precision)
    seen = fit(tmp_path / "b", monitor, lambda: Classifier(mlp()), precision=precision)
    assert outcome(seen.lightning_module, seen) == outcome(plain.lightning_module, plain)
    last = monitor.last
    assert last is not None
    assert (last.status, last.step) == ("measured", 12)
    dtype, error = PRECISIONS[precision]
    assert last.precision.startswith(dtype)
    wanted = plain_kernel(seen.lightning_module, monitor)
    assert np.abs(last.eigenvalues - wanted).max() <= error * wanted[0]


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules_are_measured_without_new_graphs(whole: bool, tmp_path: Path) -> None:
    class Quiet(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])  # self.log in a compiled module is an error of Lightning's

    def build() -> Any:
        if whole:
            return torch.compile(Quiet(mlp()), backend="aot_eager")
        net: Any = torch.compile(mlp(), backend="aot_eager")
        return Quiet(net)

    def run(root: Path, callbacks: list[Any]) -> tuple[dict[str, str], int, Any]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        done = fit(root, callbacks, build)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return outcome(done.lightning_module, done), graphs, done.lightning_module

    monitor = watched()
    plain, graphs, _ = run(tmp_path / "a", [])
    seen, more, module = run(tmp_path / "b", [monitor])
    torch._dynamo.reset()
    assert graphs > 0
    assert (seen, more) == (plain, graphs)
    assert monitor.last is not None
    assert monitor.last.status == "measured"
    wanted = plain_kernel(module, monitor)
    assert np.abs(monitor.last.eigenvalues - wanted).max() <= 1e-5 * wanted[0]


def test_adapters_alone_are_measured(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def build() -> Classifier:
        adapted = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["1", "3"]))
        return Classifier(adapted, lr=0.5)

    monitor = watched()
    plain = fit(tmp_path / "a", [], build)
    seen = fit(tmp_path / "b", monitor, build)
    assert outcome(seen.lightning_module, seen) == outcome(plain.lightning_module, plain)
    last = monitor.last
    assert last is not None
    assert last.parameters == sum(p.numel() for p in seen.lightning_module.parameters() if p.requires_grad) == 212
    assert last.facts["frozen"] == 1210
    assert all("lora" in layer or layer.endswith(("1", "3")) for layer in last.layers)
