"""Thumbnails: the samples of a probe as small pictures, where its inputs are pictures.

A batch of pictures is a real tensor (N, channels, H, W) of 1 or 3 channels, or (N, H, W) with H = W, which a sequence
of vectors hardly ever is. Flat inputs are not guessed at. Grey levels run from the smallest to the largest value in the
whole probe, so that pictures can be compared with each other.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk_monitor.batch import tensors

Pictures = NDArray[np.uint8]

SIDE, LARGE, FEW = 28, 64, 64
"""Longest side in pixels, and of at most `FEW` samples."""

MOST = 2**20
"""Bytes of all pictures together; more samples have smaller pictures."""

# A picture with fewer pixels along a side says nothing.
_LEAST = 4


def thumbnails(inputs: Any) -> Pictures:
    """Return pictures (N, h, w, 1 or 3) of a batch's samples, averaged over areas; empty where inputs are no pictures.

    Of a mapping or a tuple the only tensor that could be pictures is taken; where there are several, none is.

    Cost: one pass over the inputs.
    """
    found = [t for t in map(_pictures, tensors(inputs)) if t is not None]
    if len(found) != 1:
        return np.empty(0, dtype=np.uint8)
    (batch,) = found
    n, channels, height, width = batch.shape
    side = min(LARGE if n <= FEW else SIDE, math.isqrt(MOST // (n * channels)))
    scale = min(1.0, side / max(height, width))
    h, w = (max(1, round(size * scale)) for size in (height, width))
    if min(h, w) < _LEAST:
        return np.empty(0, dtype=np.uint8)
    low, high = _limits(batch)
    down, across = torch.from_numpy(areas(height, h)), torch.from_numpy(areas(width, w))
    pictures = np.empty((n, h, w, channels), dtype=np.uint8)
    for row, picture in zip(pictures, batch, strict=True):
        grey = (picture.double().cpu().nan_to_num(low, high, low).clamp(low, high) - low) / (high - low)
        small = (down @ grey @ across.T).mul(255).round()
        row[...] = small.permute(1, 2, 0).to(torch.uint8).numpy()
    return pictures


def areas(size: int, wanted: int) -> NDArray[np.float64]:
    """Return the matrix (wanted, size) that averages a line of pixels into fewer, by the length each one covers."""
    edges = np.linspace(0, size, wanted + 1)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(covered, 0.0, None) * wanted / size)


def _pictures(t: Tensor) -> Tensor | None:
    """Return a tensor as (N, channels, H, W), or None when it is no batch of pictures."""
    if t.is_complex() or t.is_sparse or t.dtype == torch.bool or not len(t):
        return None
    if t.dim() == 3 and t.shape[1] == t.shape[2]:
        t = t[:, None]
    if t.dim() != 4 or t.shape[1] not in (1, 3) or min(t.shape[2:]) < _LEAST:
        return None
    return t.detach()


def _limits(batch: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest finite value, apart from each other."""
    low, high = math.inf, -math.inf
    for picture in batch:
        known = picture[picture.isfinite()].double()
        if known.numel():
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    if not low < high:
        low = low if math.isfinite(low) else 0.0
        high = low + 1.0
    return low, high
