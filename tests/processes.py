"""Work in a process of its own that may be limited or killed: a fork, which needs no second import of everything."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable


def in_child(work: Callable[[], None], *, seconds: float = 120.0) -> int:
    """Run `work` in a fork of this process; return its exit code, negative where a signal ended it."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; the child uses none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - nothing of the parent may go on in the child
            traceback.print_exc()
        finally:
            os._exit(code)
    return _ended(child, time.monotonic() + seconds)


def _ended(child: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError("the child took too long")
