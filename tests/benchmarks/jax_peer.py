"""neural-tangents, structured derivatives, in its own process and its own virtual environment, which has no torch.

Speaks the protocol of `worker.py`. The networks are those of `workloads.py` with the same weights, read from a file, as
plain functions of a dict of parameters; images and convolutions are channels-last, which XLA prefers on a CPU.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Arrays = dict[str, Any]


class Peer:
    """The kernels of one network on one batch, compiled before anything is timed."""

    def __init__(self, workload: str, arrays: Arrays) -> None:
        self._jax: Any = importlib.import_module("jax")
        self._np: Any = importlib.import_module("jax.numpy")
        self._lax: Any = importlib.import_module("jax.lax")
        nt: Any = importlib.import_module("neural_tangents")
        x = arrays.pop("batch")
        self.batch = self._np.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)
        arrays = {name: self._np.asarray(_layout(value)) for name, value in arrays.items()}
        self.constants = {name: value for name, value in arrays.items() if "running" in name}
        self.parameters = {
            name: value for name, value in arrays.items() if name not in self.constants and "num_batches" not in name
        }
        network: Callable[[Arrays, Any], Any] = getattr(self, workload)
        self.outputs = int(network(self.parameters, self.batch[:1]).shape[1])
        self.kernels = {}
        for quantity, traced in (("trace", (-1,)), ("full", ())):
            kernel = nt.empirical_ntk_fn(
                network,
                trace_axes=traced,
                vmap_axes=0,
                implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
            )
            self.kernels[quantity] = (
                self._jax.jit(lambda x, p, kernel=kernel: kernel(x, None, p))
                .lower(self.batch, self.parameters)
                .compile()
            )

    def run(self, quantity: str) -> Any:
        """Return the kernel: (N, N) or (N, C, N, C)."""
        kernel = self.kernels[quantity](self.batch, self.parameters).block_until_ready()
        # It averages over the outputs it traces, and keeps the two samples in front.
        return kernel * self.outputs if quantity == "trace" else kernel.transpose(0, 2, 1, 3)

    def linear(self, p: Arrays, name: str, x: Any) -> Any:
        """A linear layer."""
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def conv(self, p: Arrays, name: str, x: Any, stride: int = 1) -> Any:
        """A convolution with the padding that keeps the resolution at stride 1."""
        weight = p[f"{name}.weight"]
        pad = weight.shape[0] // 2
        y = self._lax.conv_general_dilated(
            x, weight, (stride, stride), [(pad, pad), (pad, pad)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(self, p: Arrays, name: str, x: Any) -> Any:
        """BatchNorm in eval mode."""
        scale = self._lax.rsqrt(self.constants[f"{name}.running_var"] + 1e-5)
        standard = (x - self.constants[f"{name}.running_mean"]) * scale
        return standard * p[f"{name}.weight"] + p[f"{name}.bias"]

    def relu(self, x: Any) -> Any:
        """max(x, 0)."""
        return self._np.maximum(x, 0)

    def mlp(self, p: Arrays, x: Any) -> Any:
        """The mlp of the workloads."""
        for name in ("0", "2", "4"):
            x = self.relu(self.linear(p, name, x))
        return self.linear(p, "6", x)

    def cnn(self, p: Arrays, x: Any) -> Any:
        """The cnn of the workloads."""
        for name in ("0", "2", "4"):
            x = self.relu(self.conv(p, name, x))
        return self.linear(p, "8", x.mean((1, 2)))

    def resnet18(self, p: Arrays, x: Any) -> Any:
        """The ResNet-18 of the workloads."""
        x = self.relu(self.norm(p, "norm", self.conv(p, "stem", x)))
        for i in range(8):
            name = f"blocks.{i}"
            stride = 2 if i in (2, 4, 6) else 1
            h = self.relu(self.norm(p, f"{name}.norm1", self.conv(p, f"{name}.conv1", x, stride)))
            h = self.norm(p, f"{name}.norm2", self.conv(p, f"{name}.conv2", h))
            if stride == 2:
                x = self.norm(p, f"{name}.shortcut.1", self.conv(p, f"{name}.shortcut.0", x, stride))
            x = self.relu(h + x)
        return self.linear(p, "head", x.mean((1, 2)))


def _layout(value: Any) -> Any:
    """Return a weight as JAX wants it: (in, out), or (height, width, in, out)."""
    if value.ndim == 2:
        return value.T
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(task: dict[str, Any]) -> None:
    """Compile, then run what stdin asks for until it closes."""
    if hasattr(os, "sched_setaffinity"):
        # XLA sizes its thread pool by the cores that the process may use, and has no option for it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
    numpy: Any = importlib.import_module("numpy")
    with numpy.load(task["weights"]) as file:
        peer = Peer(task["workload"], dict(file))
    baseline = _status("VmRSS")
    _say({"ready": True})
    blocks: dict[str, Any] = {}
    for line in sys.stdin:
        request, _, quantity = line.strip().rpartition(" ")
        if request:
            _say({"kernel": blocks.get(quantity)} if request == "check" else {})
            continue
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        start, cpu = time.perf_counter(), time.process_time()
        kernel = peer.run(quantity)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        _say(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "peak_mb": max(0, _status("VmHWM") - baseline) / 2**20,
            }
        )
        n = task["checked"]
        blocks[quantity] = (kernel[:n, :n] if quantity == "trace" else kernel[:n, :, :n]).tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
