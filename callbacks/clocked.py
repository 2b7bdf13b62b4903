"""The time of a callback's hook, all of it, belongs to the monitor's budget."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

_Hook = TypeVar("_Hook", bound=Callable[..., None])


def clocked(hook: _Hook) -> _Hook:
    """Decorate a hook that is called at every step: what its own parts have not accounted for is paid at its end.

    The callback has an attribute `monitor`, a Monitor or None, and `_session`, its Session.
    """

    @wraps(hook)
    def timed(self: Any, *arguments: Any, **named: Any) -> None:
        start, monitor = time.perf_counter(), self.monitor
        if monitor is None:
            hook(self, *arguments, **named)
            return
        schedule = monitor.schedule
        accounted = schedule.spent + schedule.excused
        try:
            hook(self, *arguments, **named)
        finally:
            accounted -= schedule.spent + schedule.excused
            self._session.charge(schedule, max(0.0, time.perf_counter() - start + accounted))

    return cast(_Hook, timed)
