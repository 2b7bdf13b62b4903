"""The Events of one event file, in the order of writing, up to where the file is sound.

A record is length (8 bytes), its checksum (4), payload, payload checksum (4). The first checksum is verified, so that
garbage is not taken for a length. The second is not: in pure Python it costs 0.2 s per MiB, and every probe carries
one of its own that does not (see `ntk_monitor.events`).
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c


class Records:
    """Iterate over the Events of one file, then ask how far that got."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.position = 0
        """Bytes of the file that hold complete records."""
        self.size = 0
        """Bytes of the file when it was opened; what is appended while reading is left for the next time."""
        self.stopped = ""
        """Why reading stopped before the end of the file; empty when it did not."""
        self.unreadable = 0
        """Records of sound length that are no Event and were passed over."""

    def __iter__(self) -> Iterator[Event]:
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            while self.position < self.size:
                header = file.read(12)
                if len(header) < 12:
                    self.stopped = "the last record has no complete header"
                    return
                length, check = struct.unpack("<QI", header)
                if masked_crc32c(header[:8]) != check:
                    self.stopped = "a record's length does not match its checksum"
                    return
                if self.position + length + 16 > self.size:
                    self.stopped = "the last record is incomplete"
                    return
                payload = file.read(length + 4)[:length]
                self.position += length + 16
                try:
                    event = Event.FromString(payload)
                except DecodeError:
                    self.unreadable += 1
                    continue
                yield event


def records(path: str | os.PathLike[str]) -> Records:
    """Return the Events of one file, to be iterated over once."""
    return Records(path)
