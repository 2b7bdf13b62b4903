"""Callbacks for trainers. Each trainer is imported only when its callback is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_monitor.callbacks.huggingface import NTKMonitorCallback as NTKMonitorCallback
    from ntk_monitor.callbacks.monitor import NTKMonitor as NTKMonitor

__all__ = ["NTKMonitor", "NTKMonitorCallback"]

_PLACES = {"NTKMonitor": "ntk_monitor.callbacks.monitor", "NTKMonitorCallback": "ntk_monitor.callbacks.huggingface"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ntk_monitor.callbacks' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
