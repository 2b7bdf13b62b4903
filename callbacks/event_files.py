"""Records in the event file of somebody else's SummaryWriter, without its queue and its thread.

TensorBoard follows one file per directory, so that ours belong into the file of the user's logger. Its writer keeps
what it is given in a queue, which a killed process loses; and its thread ends at the first failed write, after which
the user's own logging raises. A full disk met by one of our records would then end the run. So we append ourselves.
"""

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard.writer import SummaryWriter

from ntk_monitor import board
from ntk_monitor.recorder import append

# A file larger than this is not searched for a layout of the user's.
_SEARCHED = 2**26


def local_file(writer: SummaryWriter) -> Path | None:
    """Return the file that a writer appends to; None where it writes in another way: object stores, TensorFlow's files.

    TensorFlow keeps the file open and writes at its own position, over what others appended.
    """
    inner = getattr(writer._get_file_writer(), "event_writer", None)
    name, file = getattr(inner, "_file_name", None), getattr(inner, "_general_file_writer", None)
    appends = type(file).__module__.startswith("tensorboard.compat.tensorflow_stub")
    return Path(str(name)) if appends and name is not None and "://" not in str(name) else None


def layout(file: Path | None, prefix: str) -> list[Summary.Value]:
    """Return our layout of custom scalars, unless a user's own may be in the file, whose place it would take."""
    if file is None or not file.exists():
        return [board.layout(prefix)]
    taken = file.stat().st_size > _SEARCHED or CONFIG_SUMMARY_TAG.encode() in file.read_bytes()
    return [] if taken else [board.layout(prefix)]


def add(writer: SummaryWriter, record: Event) -> None:
    """Append one record to the file of a writer, on disk when this returns.

    Raises:
        OSError: the file cannot be written to; the writer itself is none the worse for it.
    """
    path = local_file(writer)
    if path is not None:
        append(path, record)
        return
    writer._get_file_writer().add_event(record, step=record.step, walltime=record.wall_time)
    writer.flush()
