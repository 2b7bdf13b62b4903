"""Callbacks for trainers. Each trainer is imported only when its callback is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_monitor.callbacks.monitor import NTKMonitor as NTKMonitor

__all__ = ["NTKMonitor"]


def __getattr__(name: str) -> Any:
    if name != "NTKMonitor":
        raise AttributeError(f"module 'ntk_monitor.callbacks' has no attribute {name!r}")
    from ntk_monitor.callbacks.monitor import NTKMonitor

    return NTKMonitor
