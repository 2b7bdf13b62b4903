"""A rendered figure is a PNG of the size asked for, with the data where the axes say it is."""

import io
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from ntk_monitor.render import png
from tests.test_figures import FIGURES, HISTORIES

Pixels = NDArray[np.float64]


def _pixels(figure: dict[str, Any], width: int = 480, height: int = 300) -> Pixels:
    """Return (height, width, 3) colours between 0 and 1."""
    raw = png(figure, width=width, height=height)
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    return np.asarray(matplotlib.image.imread(io.BytesIO(raw), format="png"), dtype=np.float64)[:, :, :3]


def _where(image: Pixels, colour: tuple[float, float, float]) -> NDArray[np.intp]:
    """Return the (row, column) of the pixels of one colour, up to antialiasing."""
    return np.argwhere(np.abs(image - np.array(colour)).max(axis=2) < 0.05)


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("history", HISTORIES)
def test_every_figure_renders(figure: str, history: str) -> None:
    image = _pixels(FIGURES[figure](HISTORIES[history]()), width=340, height=280)
    assert image.shape == (280, 340, 3)
    assert image.std() > 0.005


@pytest.mark.parametrize("figure", FIGURES)
def test_nothing_touches_the_border(figure: str) -> None:
    for width, height in ((960, 600), (340, 300)):
        image = _pixels(FIGURES[figure](HISTORIES["classification"]()), width, height)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert border.min() == 1.0


def test_a_rising_line_rises_on_the_page() -> None:
    red = {"color": "#ff0000", "width": 2}
    points = _where(
        _pixels({"data": [{"type": "scatter", "x": [0, 1], "y": [0, 1], "line": red}], "layout": {}}), (1, 0, 0)
    )
    left, right = points[points[:, 1].argmin()], points[points[:, 1].argmax()]
    assert right[0] < left[0] - 100
    assert right[1] > left[1] + 200


def test_a_power_law_is_straight_on_logarithmic_axes() -> None:
    x = np.arange(1, 101)
    line = {"type": "scatter", "x": x.tolist(), "y": (1.0 / x**2).tolist(), "line": {"color": "#ff0000", "width": 2}}
    axes = {"xaxis": {"type": "log"}, "yaxis": {"type": "log"}}
    points = _where(_pixels({"data": [line], "layout": axes}), (1, 0, 0))
    # The line is two pixels thick, so its pixels stay within two of the straight line through them.
    slope, offset = np.polyfit(points[:, 1], points[:, 0], 1)
    assert slope > 0
    assert np.abs(points[:, 0] - slope * points[:, 1] - offset).max() <= 2


def test_a_gap_stays_a_gap() -> None:
    red = {"color": "#ff0000", "width": 4}
    line = {"type": "scatter", "x": [0, 1, 2, 3, 4], "y": [1, 1, None, 1, 1], "line": red}
    columns = np.unique(_where(_pixels({"data": [line], "layout": {}}), (1, 0, 0))[:, 1])
    assert np.diff(columns).max() > 100


def test_heat_map_cells_have_their_colours_and_places() -> None:
    # Green ends, so that the colour bar shows hardly any of the pure red and blue of the cells.
    scale = [[0.0, "#00ff00"], [0.25, "#0000ff"], [0.75, "#ff0000"], [1.0, "#00ff00"]]
    heat: dict[str, Any] = {"type": "heatmap", "x": [0, 1], "y": [0, 1], "z": [[1, 1], [1, 3]], "colorscale": scale}
    image = _pixels({"data": [heat | {"zmin": 0, "zmax": 4}], "layout": {}})
    red, blue = _where(image, (1, 0, 0)), _where(image, (0, 0, 1))
    assert len(blue) == pytest.approx(3 * len(red), rel=0.05)
    assert np.median(red[:, 0]) < np.median(blue[:, 0]) - 50
    assert np.median(red[:, 1]) > np.median(blue[:, 1]) + 50


def test_stacked_areas_share_the_height_by_their_values() -> None:
    shares = (("#ff0000", 0.25), ("#0000ff", 0.75))
    data = [
        {"type": "scatter", "stackgroup": "s", "fillcolor": colour, "x": [0, 1], "y": [share, share], "name": colour}
        for colour, share in shares
    ]
    image = _pixels({"data": data, "layout": {"yaxis": {"range": [0, 1]}}})
    red, blue = _where(image, (1, 0, 0)), _where(image, (0, 0, 1))
    assert len(blue) == pytest.approx(3 * len(red), rel=0.05)
    assert red[:, 0].min() >= blue[:, 0].max()


def test_bars_stack_like_areas() -> None:
    shares = (("#ff0000", 0.25), ("#0000ff", 0.75))
    data = [{"type": "bar", "marker": {"color": colour}, "x": ["a"], "y": [share]} for colour, share in shares]
    image = _pixels({"data": data, "layout": {"yaxis": {"range": [0, 1]}}})
    assert len(_where(image, (0, 0, 1))) == pytest.approx(3 * len(_where(image, (1, 0, 0))), rel=0.05)


def test_unknown_traces_and_shapes_are_ignored() -> None:
    figure = {"data": [{"type": "violin"}], "layout": {"shapes": [{"type": "circle"}]}}
    assert png(figure, width=200, height=200).startswith(b"\x89PNG")


def test_rendering_changes_no_global_setting_and_repeats_itself() -> None:
    before = dict(mpl.rcParams)
    spec = FIGURES["gram"](HISTORIES["classification"]())
    assert png(spec) == png(spec)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        ({}, ["0", "1"]),
        ({"tickformat": "~g"}, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ({"tickformat": ".0%"}, ["0%", "20%", "40%", "60%", "80%", "100%"]),
        ({"dtick": 0.5}, ["0.0", "0.5", "1.0"]),
    ],
    ids=["steps", "numbers", "percent", "every half"],
)
def test_an_axis_has_the_ticks_it_asks_for(
    axis: dict[str, Any], labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    seen: list[Axes] = []
    original = Axes.get_tightbbox

    def noted(self: Axes, *words: Any, **options: Any) -> Any:
        seen.append(self)
        return original(self, *words, **options)

    monkeypatch.setattr(Axes, "get_tightbbox", noted)
    png({"data": [{"type": "scatter", "x": [0, 1], "y": [0, 1]}], "layout": {"xaxis": axis}})
    places, texts = seen[-1].get_xticks(), seen[-1].get_xticklabels()
    inside = [text.get_text() for at, text in zip(places, texts, strict=True) if -1e-9 <= at <= 1 + 1e-9]
    assert inside == labels
