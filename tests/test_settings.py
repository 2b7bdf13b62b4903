"""torch's global switches are set for a measurement and given back, whoever flipped them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntk_monitor as ntk
from ntk_monitor.guard import undisturbed
from ntk_monitor.settings import kept, measuring, settings

# What a user, or a forward pass, may flip: name → (flip, the name of the switch that differs then).
FLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    "gradients": (lambda: torch.set_grad_enabled(False), "gradient mode"),
    "cache": (lambda: torch.set_autocast_cache_enabled(False), "autocast's cache"),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), "autocast on cpu"),
    "autocast dtype": (lambda: torch.set_autocast_dtype("cpu", torch.float16), "autocast's dtype on cpu"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "default dtype"),
    "device": (lambda: torch.set_default_device("meta"), "default device"),
    "deterministic": (lambda: torch.set_deterministic_debug_mode("error"), "deterministic algorithms"),
    "warn only": (lambda: torch.set_deterministic_debug_mode("warn"), "deterministic algorithms"),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), "anomaly detection"),
    "anomaly without nan": (lambda: torch.autograd.set_detect_anomaly(True, check_nan=False), "anomaly detection"),
    "threads": (lambda: torch.set_num_threads(2), "threads"),
    "cudnn": (lambda: setattr(torch.backends.cudnn, "enabled", False), "cuDNN"),
    "benchmark": (lambda: setattr(torch.backends.cudnn, "benchmark", True), "cuDNN's search"),
    "cudnn deterministic": (lambda: setattr(torch.backends.cudnn, "deterministic", True), "cuDNN's determinism"),
    "onednn": (lambda: setattr(torch.backends.mkldnn, "enabled", False), "oneDNN"),
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with kept():
        yield


@pytest.mark.parametrize("name", FLIPS)
def test_a_switch_flipped_inside_is_flipped_back(name: str) -> None:
    flip, switch = FLIPS[name]
    before = settings()
    for guard in (kept, measuring):
        with guard():
            flip()
            assert settings()[switch] != before[switch]
        assert settings() == before


@pytest.mark.parametrize("name", FLIPS)
def test_a_switch_flipped_outside_stays_flipped_and_does_not_change_the_kernel(name: str) -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), torch.randn(4, 1, 4, 4)
    expected = ntk.empirical_ntk(net, x)
    FLIPS[name][0]()
    before = settings()
    found = ntk.empirical_ntk(net, x)
    assert settings() == before
    assert found.dtype == expected.dtype
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Flips(nn.Module):
    """A forward pass that leaves every switch changed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        for name in ("benchmark", "cudnn deterministic", "threads", "dtype", "cache", "warn only"):
            FLIPS[name][0]()
        torch.set_float32_matmul_precision("medium")
        return y


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_what_a_forward_pass_flips_is_flipped_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = settings()
    ntk.empirical_ntk(Flips(), torch.randn(4, 3))
    assert settings() == before


def test_a_measurement_has_the_switches_it_needs() -> None:
    for name in ("gradients", "autocast", "deterministic", "anomaly", "benchmark"):
        FLIPS[name][0]()
    with torch.inference_mode(), measuring():
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
        assert not torch.is_anomaly_enabled()
        assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.deterministic
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert settings()["precision of float32 products"] == ("ieee",) * 9


# Nodes of the tree of precisions that nobody has set, and all that inherit from the first.
NODES = ["", "cudnn", "cuda.matmul", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
READ = [*NODES, "cudnn.conv", "cudnn.rnn"]


def node(path: str) -> Any:
    found: Any = torch.backends
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def inherited() -> list[list[str]]:
    """What each node reads while torch's own switch, above them all, is turned."""
    before, found = torch.backends.fp32_precision, []  # type: ignore[attr-defined]
    for above in ("ieee", "tf32"):
        torch.backends.fp32_precision = above  # type: ignore[attr-defined]
        found.append([node(path).fp32_precision for path in READ])
    torch.backends.fp32_precision = before  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", NODES)
@pytest.mark.parametrize("value", ["none", "tf32", "ieee"])
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9 has no tree of precisions")
def test_a_precision_that_is_inherited_is_inherited_afterwards(path: str, value: str) -> None:
    assert node(path).fp32_precision == "none"
    node(path).fp32_precision = value
    try:
        before = inherited()
        with undisturbed():
            assert {node(p).fp32_precision for p in READ} == {"ieee"}
        assert node(path).fp32_precision == value
        assert inherited() == before
    finally:
        node(path).fp32_precision = "none"


def test_a_compiled_function_runs_as_written_inside() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    doubled = torch.compile(lambda x: 2 * x, backend=backend)
    x = torch.ones(3)
    with measuring():
        assert torch.equal(doubled(x), 2 * x)
        assert graphs == []
    doubled(x)
    assert len(graphs) == 1
    with measuring():
        doubled(torch.ones(3, 4, 5))
    assert len(graphs) == 1
    torch.compiler.reset()
