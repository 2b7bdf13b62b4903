"""Small pictures of probe samples as PNG, written with nothing but zlib."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {1: 0, 3: 2}
"""PNG's colour type by number of channels: grey, RGB."""


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a picture, (height, width, channel) with one channel (grey) or three (RGB), as the bytes of a PNG file.

    Raises:
        ValueError: another shape, or nothing in it.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in _COLOURS or not pixels.size:
        raise ValueError(f"wanted pixels of (height, width, 1 or 3), got {pixels.shape}")
    height, width, channels = pixels.shape
    # Each row begins with the number of its filter; 0 is none.
    rows = np.pad(pixels.astype(np.uint8).reshape(height, width * channels), ((0, 0), (1, 0)))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(*one) for one in chunks)


def data_url(pixels: NDArray[np.uint8]) -> str:
    """Return a picture as a URL that holds it; see `png`."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
