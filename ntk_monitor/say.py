"""Say one sentence to the person who trains, and never anything worse: a warning here must not become an exception."""

import contextlib
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path


class NTKWarning(UserWarning):
    """Something about the monitor, never about the training: the run goes on unchanged."""


def say(message: str) -> None:
    """Warn once per distinct message and place; under `-W error` write to stderr instead of raising. Never raises."""
    try:
        warnings.warn(f"ntk_monitor: {message}", NTKWarning, stacklevel=3)
    except Exception:  # noqa: BLE001 - a filter that makes errors of warnings, or a hook for warnings that is broken
        with contextlib.suppress(Exception):  # no stderr, or one that nobody reads any more
            sys.stderr.write(f"ntk_monitor: {message}\n")


_LOGGER = logging.getLogger("ntk_monitor")
_told: set[str] = set()


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the standard error of the moment, which notebooks and tests exchange."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self.stream = sys.stderr
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: nobody reads it."""


def tell(message: str) -> None:
    """Tell something that is no warning, once per process. Never raises.

    It goes to the logger "ntk_monitor" at the level INFO, which is shown on stderr unless the program has set up
    logging of its own; `logging.getLogger("ntk_monitor").setLevel("WARNING")` silences it.
    """
    if message in _told:
        return
    _told.add(message)
    with contextlib.suppress(Exception):
        if _LOGGER.level == logging.NOTSET:
            _LOGGER.setLevel(logging.INFO)
        if not _LOGGER.hasHandlers():
            _LOGGER.addHandler(_Stderr())
        _LOGGER.info("ntk_monitor: %s", message)


def watching(directory: str | os.PathLike[str], prefix: str = "ntk") -> str:
    """Return how to watch the run in this directory: TensorBoard's command, and the addresses of tab and scalars.

    Directories of numbered versions are shown with their siblings.
    """
    run = Path(directory)
    shown = run.parent if run.name.startswith("version_") and run.parent.name else run
    with contextlib.suppress(ValueError, OSError):
        shown = shown.resolve().relative_to(Path.cwd())
    scalars = f"http://localhost:6006/?tagFilter={prefix.replace('/', '%2F')}%2F&smoothing=0#timeseries"
    return (
        f"watch this run with: tensorboard --logdir {shlex.quote(str(shown))}\n"
        f"    kernel: http://localhost:6006/#ntk    its scalars alone: {scalars}"
    )
