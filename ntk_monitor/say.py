"""Say one sentence to the person who trains, and never anything worse: a warning here must not become an exception."""

import contextlib
import sys
import warnings


class NTKWarning(UserWarning):
    """Something about the monitor, never about the training: the run goes on unchanged."""


def say(message: str) -> None:
    """Warn once per distinct message and place; under `-W error` write to stderr instead of raising. Never raises."""
    try:
        warnings.warn(f"ntk_monitor: {message}", NTKWarning, stacklevel=3)
    except Exception:  # noqa: BLE001 - a filter that makes errors of warnings, or a hook for warnings that is broken
        with contextlib.suppress(Exception):  # no stderr, or one that nobody reads any more
            sys.stderr.write(f"ntk_monitor: {message}\n")
