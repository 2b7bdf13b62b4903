"""Every figure is JSON that plotly accepts, for any history, and shows the numbers it was given."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ntk_monitor import figures
from ntk_monitor.bands import NAMES, band_energy
from ntk_monitor.snapshot import Snapshot
from tests.snapshots import broken, skipped, snapshot, training, without_modes

History = list[Snapshot]

HISTORIES: dict[str, Callable[[], History]] = {
    "classification": lambda: training(12, 3),
    "regression": lambda: training(9, 1, loss="mse"),
    "one row": lambda: training(1, 1, probes=3),
    "one probe": lambda: training(4, 2, probes=1),
    "nothing": list,
    "skipped": lambda: [skipped(0), skipped(10)],
    "skipped between": lambda: [skipped(0), *training(5, 2, probes=2), skipped(99)],
    "without modes": lambda: [without_modes(taken) for taken in training(5, 2)],
    "modes lost": lambda: [*training(5, 2, probes=2), without_modes(replace(snapshot(5, 2), step=80))],
    "broken": lambda: [broken(taken) for taken in training(4, 2)],
    "bare": lambda: [Snapshot(step=3, wall_time=0.0)],
    "many modes": lambda: training(70, 2, probes=2),
}
FIGURES: dict[str, Callable[[History], figures.Figure]] = {
    "spectrum": figures.spectrum,
    "spectrum at a step": lambda history: figures.spectrum(history, step=45),
    "spectrum over training": figures.spectrum_over_training,
    "bands": figures.residual_bands,
    "modes": lambda history: figures.mode_decay(history, [1, 2, 1000]),
    "gram": lambda history: figures.gram(history[-1] if history else skipped()),
    "scalars": figures.scalars,
    "learning rate interval": figures.learning_rate_interval,
    "loss forecast": figures.loss_forecast,
    "forecast error": figures.forecast_error,
    "residual reach": figures.residual_reach,
    "layer updates": figures.layer_updates,
    "named residuals": figures.named_residuals,
    "runs": lambda history: figures.runs_compared({"a": history, "b": history[:1]}),
    "scalars in one column": lambda history: figures.scalars(history, columns=1),
}


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("history", HISTORIES)
def test_every_figure_is_json(figure: str, history: str) -> None:
    spec = FIGURES[figure](HISTORIES[history]())
    assert spec["layout"]["title"]["text"]
    assert len(spec["layout"]["title"]["text"]) <= 40
    assert spec["layout"]["meta"]["tooltip"]
    assert spec["data"] or spec["layout"]["annotations"][0]["text"]
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    # These need eval in the browser, which a strict content security policy forbids.
    assert not {trace["type"] for trace in spec["data"]} & {"scattergl", "parcoords", "splom"}


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("history", HISTORIES)
def test_plotly_accepts_every_figure(figure: str, history: str) -> None:
    plotly = pytest.importorskip("plotly.graph_objects")
    spec = FIGURES[figure](HISTORIES[history]())
    assert len(plotly.Figure(spec).data) == len(spec["data"])


def _trace(spec: figures.Figure, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(trace for trace in spec["data"] if trace["name"].startswith(name))
    return found


def test_spectrum_shows_the_eigenvalues_of_the_step_nearest_to_the_one_asked_for() -> None:
    history = training(6, 2)
    spec = figures.spectrum(history, step=history[2].step + 3)
    shown = _trace(spec, f"step {history[2].step}")
    assert shown["y"] == pytest.approx(history[2].eigenvalues, rel=1e-5)
    assert shown["x"] == list(range(1, 13))
    assert _trace(spec, "step 0")["line"]["dash"] == "dot"
    assert _trace(spec, "noise floor")["y"] == pytest.approx([history[2].noise_floor] * 2, rel=1e-5)
    assert "unnormalised K = J J^T, N = 6 samples, C = 2 outputs" in spec["layout"]["meta"]["tooltip"]


def test_spectrum_ghost_is_the_first_probe_of_the_same_samples() -> None:
    history = [replace(taken, probe=str(i > 1)) for i, taken in enumerate(training(6, 2))]
    names = [trace["name"] for trace in figures.spectrum(history)["data"]]
    assert names[:2] == [f"step {history[2].step}", f"step {history[-1].step}"]


def test_eigenvalues_that_are_not_positive_are_gaps() -> None:
    taken = replace(snapshot(2, 2), eigenvalues=np.array([2.0, 1.0, 0.0, -1e-9]))
    assert figures.spectrum([taken])["data"][0]["y"] == [2.0, 1.0, None, None]


def test_spectrum_over_training_is_log10_with_the_unresolved_blank() -> None:
    taken = replace(snapshot(2, 2), eigenvalues=np.array([100.0, 1.0, 1e-3, -1e-9]), noise_floor=1e-2)
    assert figures.spectrum_over_training([taken])["data"][0]["z"] == [[2.0], [0.0], [None], [None]]


def test_spectrum_over_training_stays_small() -> None:
    history = [replace(snapshot(100, 3), step=step) for step in range(2)] * 200
    heat = figures.spectrum_over_training(history)["data"][0]
    assert (len(heat["x"]), heat["y"][0], heat["y"][-1]) == (200, 1, 300)
    assert len(heat["y"]) == len(heat["z"]) <= 128


def test_bands_stack_to_one_at_every_step() -> None:
    history = training(8, 3)
    data = figures.residual_bands(history)["data"]
    assert [trace["name"] for trace in data] == list(NAMES)
    assert np.sum([trace["y"] for trace in data], axis=0) == pytest.approx(np.ones(len(history)), abs=1e-5)
    assert data[1]["y"] == pytest.approx([band_energy(taken)[NAMES[1]] for taken in history], rel=1e-5)


def test_bands_say_why_modes_are_off() -> None:
    off = without_modes(snapshot(), "no loss was given")
    assert "no loss was given" in figures.residual_bands([off])["layout"]["annotations"][0]["text"]
    note = figures.residual_bands([*training(4, 2, probes=2), off])["layout"]["annotations"][0]["text"]
    assert note.startswith("Modes are off at 1 of 3 probes")


def test_mode_decay_compares_both_ends_of_an_interval_in_one_basis() -> None:
    before, after = training(6, 2, probes=2, every=10)
    spec = figures.mode_decay([before, after], [2])
    start, end = before.coordinates[1], after.carried[1]
    followed = _trace(spec, "mode 2, followed")
    assert followed["x"] == [0, 10, None]
    assert followed["y"][:2] == pytest.approx([start**2, end**2], rel=1e-5)
    assert _trace(spec, "mode 2, decay")["y"][0] == pytest.approx(-np.log(abs(end / start)) / 10, rel=1e-5)


def test_mode_decay_draws_no_interval_whose_basis_belongs_to_another_probe() -> None:
    first, _, third = training(6, 2, probes=3)
    spec = figures.mode_decay([first, third], [1])
    assert _trace(spec, "mode 1, followed")["x"] == []
    assert len(_trace(spec, "mode 1")["x"]) == 2


def test_gram_draws_one_line_each_way_between_neighbouring_classes() -> None:
    taken = replace(snapshot(5, 3), labels=np.array([2.0, 0.0, 2.0, 0.0, 1.0]))
    layout = figures.gram(taken)["layout"]
    borders = [shape["x0"] for shape in layout["shapes"] if shape["x0"] == shape["x1"]]
    assert borders == [1.5, 2.5]
    assert len(layout["shapes"]) == 4
    assert (layout["xaxis"]["tickvals"], layout["xaxis"]["ticktext"]) == ([0.5, 2.0, 3.5], ["0", "1", "2"])


def test_gram_of_a_large_probe_keeps_its_class_borders() -> None:
    # 300 samples are thinned evenly to the 256 that are stored.
    taken = replace(snapshot(5, 2), gram=np.eye(256), labels=np.tile([0.0, 1.0], 150))
    borders = {shape["x0"] for shape in figures.gram(taken)["layout"]["shapes"] if shape["x0"] == shape["x1"]}
    assert borders == {127.5}


def test_gram_without_labels_for_its_rows_draws_no_classes() -> None:
    taken = snapshot(5, 3)
    assert figures.gram(replace(taken, labels=np.zeros(7)))["layout"]["shapes"] == []
    assert figures.gram(replace(taken, labels=np.empty(0)))["layout"]["shapes"] == []


def test_gram_colours_are_symmetric_and_can_be_fixed() -> None:
    taken = snapshot(5, 3)
    free, fixed = figures.gram(taken)["data"][0], figures.gram(taken, limit=2.0)["data"][0]
    assert free["zmin"] == -free["zmax"] < 0
    assert (fixed["zmin"], fixed["zmax"]) == (-2.0, 2.0)
    assert np.array(free["z"]) == pytest.approx(taken.gram, rel=1e-5)


def test_scalars_are_drawn_where_they_were_measured() -> None:
    history = training(5, 2, probes=3)
    data = figures.scalars(history)["data"]
    change = next(trace for trace in data if trace["name"] == "kernel_change")
    assert change["x"] == [40, 80]
    assert len({trace["xaxis"] for trace in data}) == len(data)
