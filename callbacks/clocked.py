"""The time of a callback's hook, all of it, belongs to the monitor's budget."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from ntk_monitor.monitor import Monitor

_P = ParamSpec("_P")


@runtime_checkable
class _Monitored(Protocol):
    @property
    def monitor(self) -> Monitor | None: ...


_C = TypeVar("_C", bound=_Monitored)


def clocked(hook: Callable[Concatenate[_C, _P], None]) -> Callable[Concatenate[_C, _P], None]:
    """Decorate a hook that is called at every step: what its own parts have not accounted for is paid at its end."""

    @wraps(hook)
    def timed(self: _C, *arguments: _P.args, **named: _P.kwargs) -> None:
        monitor: Any = self.monitor
        if monitor is None:
            hook(self, *arguments, **named)
            return
        schedule = monitor.schedule
        start, accounted = time.perf_counter(), schedule.accounted
        try:
            hook(self, *arguments, **named)
        finally:
            schedule.pay(max(0.0, time.perf_counter() - start - (schedule.accounted - accounted)))

    return timed  # type: ignore[return-value]  # mypy takes self of a wrapped method for a keyword
