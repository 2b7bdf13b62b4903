"""What is my model learning, how fast, and will it get there? Empirical neural tangent kernels while PyTorch trains.

Names are resolved on first use (PEP 562), so that `import ntk_monitor` loads neither torch nor any other heavy package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_monitor import errors as errors
    from ntk_monitor.dynamics.forecast import Forecast as Forecast
    from ntk_monitor.dynamics.forecast import forecast as forecast
    from ntk_monitor.dynamics.stability import Stability as Stability
    from ntk_monitor.dynamics.stability import max_stable_lr as max_stable_lr
    from ntk_monitor.dynamics.stability import stability as stability
    from ntk_monitor.engines.operator import NTKOperator as NTKOperator
    from ntk_monitor.errors import HistoryError as HistoryError
    from ntk_monitor.errors import InputError as InputError
    from ntk_monitor.errors import NetworkError as NetworkError
    from ntk_monitor.errors import NTKMonitorError as NTKMonitorError
    from ntk_monitor.errors import NumericsError as NumericsError
    from ntk_monitor.history import History as History
    from ntk_monitor.history import load_history as load_history
    from ntk_monitor.kernel import empirical_ntk as empirical_ntk
    from ntk_monitor.manifest import keep_probe as keep_probe
    from ntk_monitor.monitor import Monitor as Monitor
    from ntk_monitor.planner import Plan as Plan
    from ntk_monitor.planner import plan as plan
    from ntk_monitor.probe import Probe as Probe
    from ntk_monitor.recipe import Recipe as Recipe
    from ntk_monitor.recorder import Recorder as Recorder
    from ntk_monitor.snapshot import Snapshot as Snapshot
    from ntk_monitor.spectrum import Spectrum as Spectrum

__version__ = "0.1.0"

_HOMES = {
    "Forecast": "dynamics.forecast",
    "History": "history",
    "HistoryError": "errors",
    "InputError": "errors",
    "Monitor": "monitor",
    "NTKMonitorError": "errors",
    "NTKOperator": "engines.operator",
    "NetworkError": "errors",
    "NumericsError": "errors",
    "Plan": "planner",
    "Probe": "probe",
    "Recipe": "recipe",
    "Recorder": "recorder",
    "Snapshot": "snapshot",
    "Spectrum": "spectrum",
    "Stability": "dynamics.stability",
    "empirical_ntk": "kernel",
    "forecast": "dynamics.forecast",
    "keep_probe": "manifest",
    "load_history": "history",
    "max_stable_lr": "dynamics.stability",
    "plan": "planner",
    "stability": "dynamics.stability",
}

__all__ = [
    "Forecast",
    "History",
    "HistoryError",
    "InputError",
    "Monitor",
    "NTKMonitorError",
    "NTKOperator",
    "NetworkError",
    "NumericsError",
    "Plan",
    "Probe",
    "Recipe",
    "Recorder",
    "Snapshot",
    "Spectrum",
    "Stability",
    "empirical_ntk",
    "forecast",
    "keep_probe",
    "load_history",
    "max_stable_lr",
    "plan",
    "stability",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ntk_monitor' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ntk_monitor.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
