"""Python's garbage collector, paused while a question is answered.

Reading a run makes hundreds of thousands of objects and no cycles among them: all go, or stay, by counting references.
The collector would look through everything the process holds whenever that has grown by a quarter, which took a third
of the time to open a run of ten thousand probes.
"""

import contextlib
import gc
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()
_waiting = {"answers": 0, "enabled": 0}


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Collect no cycles within this block, nor while any other thread is within one. Leaves a disabled one disabled."""
    with _LOCK:
        if not _waiting["answers"]:
            _waiting["enabled"] = gc.isenabled()
            gc.disable()
        _waiting["answers"] += 1
    try:
        yield
    finally:
        with _LOCK:
            _waiting["answers"] -= 1
            if _waiting["enabled"] and not _waiting["answers"]:
                gc.enable()
