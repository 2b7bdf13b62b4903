"""Figures of single samples, layers and the kernel's map, against loops over what they show."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ntk_monitor import figures
from ntk_monitor.figures.gram import centred_cosines
from ntk_monitor.figures.kernel_map import coordinates, turned
from ntk_monitor.render import png
from ntk_monitor.snapshot import shown_order
from tests.histories import HEALTHY

STORED = [one for one in HEALTHY if one.gram.size]
LAST = STORED[-1]


def _features(samples: int = 30, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(samples, 6)) * np.array([5, 3, 1, 0.5, 0.3, 0.2])


def test_cosines_are_those_of_centred_features() -> None:
    features = _features()
    cosines = centred_cosines(features @ features.T)
    mean = features.mean(axis=0)
    for i in range(5):
        for j in range(5):
            a, b = features[i] - mean, features[j] - mean
            assert cosines[i, j] == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)), rel=1e-9)


def test_the_map_is_the_best_plane_for_the_cosines() -> None:
    features = _features()
    cosines = centred_cosines(features @ features.T)
    points, share = coordinates(features @ features.T)
    left, values, _ = np.linalg.svd(cosines)
    best = (left[:, :2] * values[:2]) @ left[:, :2].T
    assert points @ points.T == pytest.approx(best, abs=1e-9)
    assert share == pytest.approx(values[:2].sum() / values.sum(), rel=1e-9)
    assert np.linalg.norm(points, axis=1).max() <= 1 + 1e-9


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_a_turned_or_mirrored_map_is_turned_back(mirror: float) -> None:
    points = _features()[:, :2]
    angle = 2.0
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * np.array([1, mirror])
    assert turned(points @ turn, points) == pytest.approx(points, abs=1e-9)
    found = turned(_features(seed=1)[:, :2], points)
    by_angle = [
        np.linalg.norm(_features(seed=1)[:, :2] @ _rotation(a, flip) - points)
        for a in np.linspace(0, 2 * math.pi, 721)
        for flip in (1, -1)
    ]
    assert np.linalg.norm(found - points) <= min(by_angle) + 1e-9


def _rotation(angle: float, flip: int) -> Any:
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn * np.array([1, flip])


def _places(figure: figures.Figure) -> dict[int, tuple[float, float]]:
    return {
        sample: (x, y)
        for trace in figure["data"]
        for sample, x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True)
    }


def test_points_of_the_map_stay_where_they_are_from_step_to_step() -> None:
    maps = [_places(figures.kernel_map(HEALTHY, one.step)) for one in STORED]
    for before, after in pairwise(maps):
        a, b = (np.array([m[i] for i in sorted(m)]) for m in (before, after))
        # As near to each other as if each had been turned to its neighbour, but for a little.
        assert (a * b).sum() > 0.9 * (a * turned(b, a)).sum()


def test_the_map_colours_each_sample_by_its_own_class() -> None:
    figure = figures.kernel_map(HEALTHY)
    for trace in figure["data"]:
        assert {f"class {LAST.labels[i]}" for i in trace["customdata"]} == {trace["name"]}
    many = [replace(one, labels=np.arange(64)) for one in HEALTHY]
    (cloud,) = figures.kernel_map(many)["data"]
    assert cloud["marker"]["color"] == sorted(cloud["marker"]["color"])


def test_a_row_is_the_sample_s_own() -> None:
    figure = figures.sample_row(HEALTHY, 40)
    order = shown_order(LAST.labels, 64).tolist()
    row = centred_cosines(LAST.gram)[order.index(40)]
    found = {
        sample: y
        for trace in figure["data"]
        if "customdata" in trace
        for sample, y in zip(trace["customdata"], trace["y"], strict=True)
    }
    assert [found[i] for i in order] == pytest.approx(row, abs=1e-4)
    same = next(trace for trace in figure["data"] if trace["name"] == "same class")
    assert {int(LAST.labels[i]) for i in same["customdata"]} == {int(LAST.labels[40])}


def test_without_a_choice_the_worst_learned_sample_is_shown() -> None:
    worst = int(np.argmax(HEALTHY[-1].sample_residual))
    assert figures.sample_row(HEALTHY)["layout"]["meta"]["sample"] == worst
    followed = [trace for trace in figures.sample_residual(HEALTHY)["data"] if trace["name"].startswith("sample ")]
    assert followed[0]["customdata"][0] == worst
    ranks = np.argsort(-HEALTHY[-1].sample_residual)[:5].tolist()
    assert [trace["customdata"][0] for trace in followed] == ranks
    assert followed[0]["y"] == pytest.approx([one.sample_residual[worst] for one in HEALTHY], rel=1e-5)


def test_bars_are_the_largest_loadings_of_either_sign() -> None:
    (bars,) = figures.mode_samples(HEALTHY, 2)["data"]
    pattern = HEALTHY[-1].mode_samples[1]
    order = np.argsort(pattern).tolist()
    assert bars["customdata"] == order[:10] + order[-10:]
    assert bars["x"] == pytest.approx(pattern[bars["customdata"]], rel=1e-5)


def test_a_mode_of_one_sign_has_bars_of_one_sign() -> None:
    patterns = np.abs(HEALTHY[-1].mode_samples)
    (bars,) = figures.mode_samples([replace(HEALTHY[-1], mode_samples=patterns)])["data"]
    assert min(bars["x"]) > 0
    assert len(bars["x"]) == 10


def test_layers_stack_to_one_and_bars_are_those_of_the_step() -> None:
    shares = [np.array([0.1, 0.2, 0.3, 0.4]) if k % 2 else np.array([0.4, 0.3, 0.2, 0.1]) for k in range(12)]
    run = [replace(one, layer_update=share) for one, share in zip(HEALTHY, shares, strict=True)]
    figure = figures.layer_updates(run, HEALTHY[4].step)
    areas, bars = figure["data"][:-1], figure["data"][-1]
    assert np.sum([trace["y"] for trace in areas], axis=0) == pytest.approx(1, abs=1e-5)
    assert bars["x"] == pytest.approx(shares[4])
    assert bars["marker"]["color"] == [trace["fillcolor"] for trace in areas]


def test_of_many_layers_the_largest_are_named_and_the_rest_is_one() -> None:
    names = tuple(f"model.encoder.layers.{k}.attention" for k in range(30))
    share = np.arange(1, 31) / np.arange(1, 31).sum()
    run = [replace(one, layers=names, layer_share=share) for one in HEALTHY]
    data = figures.layer_share(run)["data"]
    assert [trace["name"] for trace in data] == [f"…r.layers.{k}.attention" for k in range(20, 30)] + ["20 others"]
    assert data[-1]["y"][0] == pytest.approx(share[:20].sum(), rel=1e-5)


def test_colours_behind_the_learning_rate_say_where_it_lies() -> None:
    """Green up to the lower bound, amber up to the upper one, red above."""
    data = figures.learning_rate_interval(HEALTHY)["data"]
    filled = [(trace["fillcolor"], trace["y"][0]) for trace in data if "fill" in trace]
    assert [value for _, value in filled] == pytest.approx([3.0, 8.0, 82.0])
    low, middle, high = (np.array(colour[5:-1].split(",")[:3], dtype=float) for colour, _ in filled)
    assert low.argmax() == 1
    assert high.argmax() == 0
    assert middle[:2].min() > 100 > middle[2]
    assert high[0] > 2 * high[1]


@pytest.mark.parametrize(
    "figure",
    [
        lambda: figures.kernel_map(HEALTHY),
        lambda: figures.mode_samples(HEALTHY),
        lambda: figures.sample_residual(HEALTHY),
        lambda: figures.layer_updates(HEALTHY, 100),
        lambda: figures.residual_reach(HEALTHY, 100),
    ],
)
def test_new_figures_are_drawn_without_a_browser_too(figure: Any) -> None:
    assert png(figure(), 340, 280).startswith(b"\x89PNG")
