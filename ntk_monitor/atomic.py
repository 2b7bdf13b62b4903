"""Files that are whole whenever they can be seen: after a crash, on a full disk, and while they are being written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` once it is complete and on the disk.

    Raises:
        OSError: it cannot be written. Nothing is left behind, and what was at `path` stays.
    """
    # Hidden, and of this process: several may write the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
