"""What NTK theory says about a network, one question per module, each able to answer no.

Every module has pure functions on kernels or models, `study(...)` for a user's own network and data, and `example()` on
real data. They are imported when they are asked for.
"""

import importlib
from typing import Any

from ntk_monitor.applications.report import Number as Number
from ntk_monitor.applications.report import Report as Report
from ntk_monitor.applications.report import Table as Table
from ntk_monitor.applications.report import Verdict as Verdict

APPLICATIONS: tuple[str, ...] = (
    "kernel_regression",
    "early_stopping",
    "learning_speed",
    "initialization",
    "activations",
    "residual",
    "normalization",
    "dropout",
    "geometry",
    "task_overlap",
    "saliency",
    "neural_ode",
    "lazy_or_rich",
    "class_interference",
    "generalization",
    "pinn_balance",
)
"""Names of the modules that exist, in the order of the chapter they come from."""

__all__ = ["APPLICATIONS", "Number", "Report", "Table", "Verdict"]


def __getattr__(name: str) -> Any:
    if name not in APPLICATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
