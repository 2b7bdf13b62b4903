"""Small pictures of the probe's samples: against a double loop over pixels, and what is no picture at all."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ntk_monitor.thumbnails import MOST, areas, thumbnails


def averaged(line: list[float], wanted: int) -> list[float]:
    """Return the mean of a line of pixels over equal stretches, piece by piece."""
    width, found = len(line) / wanted, []
    for i in range(wanted):
        total = 0.0
        for pixel, value in enumerate(line):
            piece = min((i + 1) * width, pixel + 1.0) - max(i * width, float(pixel))
            total += value * piece if piece > 0 else 0.0
        found.append(total / width)
    return found


def slow(batch: NDArray[Any], height: int, width: int, low: float, high: float) -> NDArray[Any]:
    """Return (N, height, width, channels) grey levels before rounding, from (N, channels, H, W)."""
    grey = (batch.astype(np.float64) - low) / (high - low) * 255
    pictures = np.empty((len(batch), height, width, batch.shape[1]))
    for n, picture in enumerate(grey):
        for c, channel in enumerate(picture):
            rows = np.array([averaged(row, width) for row in channel.tolist()])
            pictures[n, :, :, c] = np.array([averaged(column, height) for column in rows.T.tolist()]).T
    return pictures


@pytest.mark.parametrize(
    ("samples", "channels", "height", "width", "wanted"),
    [(3, 1, 8, 8, (8, 8)), (2, 3, 70, 40, (64, 37)), (65, 1, 30, 45, (19, 28))],
)
def test_pictures_are_averages_over_areas(
    samples: int, channels: int, height: int, width: int, wanted: tuple[int, int]
) -> None:
    batch = np.random.default_rng(0).normal(size=(samples, channels, height, width))
    found = thumbnails(torch.from_numpy(batch))
    assert found.dtype == np.uint8
    assert found.shape == (samples, *wanted, channels)
    exact = slow(batch[:1], *wanted, batch.min(), batch.max())
    assert np.abs(found[:1] - exact).max() <= 0.5 + 1e-9


@given(st.integers(4, 40), st.integers(1, 40))
def test_areas_average(size: int, wanted: int) -> None:
    wanted = min(size, wanted)
    matrix = areas(size, wanted)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    np.testing.assert_allclose(matrix.sum(axis=0), wanted / size)
    assert (matrix >= 0).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.sampled_from([1, 3]), st.integers(4, 60), st.integers(4, 60))
def test_all_pictures_together_stay_small(samples: int, channels: int, height: int, width: int) -> None:
    found = thumbnails(torch.rand(samples, channels, height, width))
    assert found.nbytes <= MOST
    if found.size:
        assert max(found.shape[1:3]) <= (64 if samples <= 64 else 28)


def test_many_samples_have_smaller_pictures() -> None:
    found = thumbnails(torch.rand(512, 3, 32, 32))
    assert found.shape == (512, 26, 26, 3)
    assert found.nbytes <= MOST
    assert thumbnails(torch.rand(70_000, 1, 4, 4)).size == 0


NOT = {
    "flat": torch.rand(5, 64),
    "a sequence of vectors": torch.rand(5, 12, 16),
    "two channels": torch.rand(5, 2, 8, 8),
    "channels last": torch.rand(5, 8, 8, 3),
    "a video": torch.rand(5, 3, 4, 8, 8),
    "tiny": torch.rand(5, 1, 3, 9),
    "a strip": torch.rand(5, 1, 4, 200),
    "complex": torch.rand(5, 1, 8, 8).to(torch.complex64),
    "two of them": (torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)),
    "words": {"input_ids": torch.arange(40).reshape(5, 8)},
}


@pytest.mark.parametrize("name", NOT)
def test_what_is_no_picture_has_none(name: str) -> None:
    assert thumbnails(NOT[name]).size == 0


def test_pictures_are_found_among_other_inputs() -> None:
    pictures = torch.rand(4, 3, 8, 8)
    wanted = thumbnails(pictures)
    for inputs in ({"pixel_values": pictures, "mask": torch.ones(4, 5)}, (torch.rand(4, 2), pictures)):
        np.testing.assert_array_equal(thumbnails(inputs), wanted)
    np.testing.assert_array_equal(thumbnails(pictures[:, 0]), thumbnails(pictures[:, :1]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_drawn_dark_or_light(value: float) -> None:
    pictures = torch.rand(3, 1, 8, 8)
    pictures[1, 0, 2, 3] = value
    found = thumbnails(pictures)
    assert found[1, 2, 3, 0] == (255 if value == math.inf else 0)
    other = pictures.clone()
    other[1, 0, 2, 3] = pictures[pictures.isfinite()].mean()
    kept = np.ones((8, 8), dtype=bool)
    kept[2, 3] = False
    np.testing.assert_array_equal(found[1, kept], thumbnails(other)[1, kept])


@pytest.mark.parametrize("batch", [torch.full((2, 1, 8, 8), math.nan), torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8)])
def test_one_grey_level_is_black(batch: Tensor) -> None:
    found = thumbnails(batch)
    assert found.shape[0] == 2
    assert not found.any()


def test_whole_numbers_are_pictures_too() -> None:
    batch = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
    np.testing.assert_array_equal(thumbnails(batch), thumbnails(batch.double()))
    assert (thumbnails(batch).min(), thumbnails(batch).max()) == (0, 255)
