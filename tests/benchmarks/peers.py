"""Optional peers: packages that the project does not depend on. Each lives in bench/, never in our own environment.

A peer that is missing, or cannot run a workload, is skipped with a message; it never fails the benchmark.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
NNGEOMETRY = ROOT / "bench" / "nngeometry"
JAX = ROOT / "bench" / ".venv-jax"
JAX_PYTHON = JAX / "bin" / "python"
JAX_PACKAGES = ("jax==0.4.25", "jaxlib==0.4.25", "neural-tangents==0.6.5", "numpy<2", "scipy<1.13")
"""The last versions that neural-tangents, which is archived, still runs with."""

OPTIONAL = ("nngeometry", "neural-tangents")


def install_nngeometry() -> str:
    """Install nngeometry beside our packages, without its dependencies; return what went wrong."""
    return _pip([sys.executable, "-m", "pip"], ["--no-deps", "--target", str(NNGEOMETRY), "nngeometry==0.4"])


def install_jax() -> str:
    """Create a virtual environment for neural-tangents (2.6 GB); return what went wrong."""
    if not JAX_PYTHON.exists():
        made = subprocess.run([sys.executable, "-m", "venv", str(JAX)], capture_output=True, text=True, check=False)
        if made.returncode:
            return _last(made.stderr + made.stdout)
    return _pip([str(JAX_PYTHON), "-m", "pip"], list(JAX_PACKAGES))


def _pip(pip: list[str], arguments: list[str]) -> str:
    done = subprocess.run([*pip, "install", "--quiet", *arguments], capture_output=True, text=True, check=False)
    return _last(done.stderr) if done.returncode else ""


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def absent(method: str, workload: str, device: str) -> str:
    """Return why an optional peer cannot run here, "" when it can or is none."""
    if method == "nngeometry":
        if not NNGEOMETRY.exists():
            return "skipped: not installed (--nngeometry installs it)"
        if workload == "gpt":
            return "skipped: it differentiates by the input, which is integer here"
    if method == "neural-tangents":
        if workload not in ("mlp", "cnn", "resnet18"):
            return "skipped: crashes or runs out of memory on attention"
        if device != "cpu":
            return "skipped: compared on the CPU only"
        if not JAX_PYTHON.exists():
            return "skipped: not installed (--jax installs it)"
    return ""


def nngeometry(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
    """The dense Gram matrix of nngeometry, whole batch at once. It knows no trace kernel: the full one is reduced."""
    if str(NNGEOMETRY) not in sys.path:
        sys.path.insert(0, str(NNGEOMETRY))
    gram: Any = importlib.import_module("nngeometry.gram")
    layers: Any = importlib.import_module("nngeometry.layercollection")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=len(x))
    collection = layers.LayerCollection.from_model(model)
    kernel: Tensor = gram.GramMatrix(model, loader, layer_collection=collection).to_torch()
    kernel = kernel.detach().permute(1, 0, 3, 2)
    return kernel if outputs == "full" else torch.einsum("ncmc->nm", kernel)


def exported(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write weights, statistics and batch for the process of neural-tangents, which has no torch."""
    import numpy as np

    arrays = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    np.savez(path, **{"batch": x.cpu().numpy(), **arrays})


def wanted(flag: bool, variable: str) -> bool:
    """Return whether an installation was asked for, on the command line or in the environment."""
    return flag or os.environ.get(variable, "") not in ("", "0")
