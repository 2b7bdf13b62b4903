"""Every panel of every history is a plain figure: no NaN, words around it, and small however long the run was."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ntk_monitor.errors import InputError
from ntk_monitor.history import History
from ntk_monitor.panels import CATALOGUE, GROUPS, View, draw
from ntk_monitor.snapshot import ARRAYS, Snapshot
from tests.histories import EVERY, HEALTHY
from tests.snapshots import broken, skipped, training, without_modes

EVIL = "<img src=x onerror=alert(1)>"
NAMES = [entry.name for entry in CATALOGUE]


def _mangled(value: float) -> tuple[Snapshot, ...]:
    """The healthy run with every floating number of every probe replaced."""

    def arrays(one: Snapshot) -> dict[str, Any]:
        return {name: np.full(a.shape, value) for name in ARRAYS if (a := getattr(one, name)).dtype.kind == "f"}

    return tuple(
        replace(
            one,
            loss_value=value,
            noise_floor=value,
            metrics=dict.fromkeys(one.metrics, value),
            facts=dict.fromkeys(one.facts, value),
            **arrays(one),
        )
        for one in HEALTHY
    )


HISTORIES: dict[str, Callable[[], tuple[Snapshot, ...]]] = {
    "healthy": lambda: HEALTHY,
    "classification": lambda: tuple(training(6, 3)),
    "regression": lambda: tuple(training(5, 1)),
    "one probe": lambda: HEALTHY[:1],
    "nothing": lambda: (),
    "skipped": lambda: (skipped(0), skipped(10)),
    "without modes": lambda: tuple(without_modes(one) for one in training(5, 2)),
    "bare": lambda: (Snapshot(step=3, wall_time=0.0),),
    "broken": lambda: tuple(broken(one) for one in HEALTHY),
    "nan": lambda: _mangled(np.nan),
    "inf": lambda: _mangled(np.inf),
    "zero": lambda: _mangled(0.0),
    "late": lambda: tuple(replace(one, step=one.step + 2**62) for one in HEALTHY),
}


@functools.cache
def _history(name: str) -> History:
    return History(HISTORIES[name]())


VIEWS = {
    "default": View(),
    "chosen": View(step=100, launch=60, unit="time", mode=2, sample=3),
    "beyond": View(step=10**6, launch=-5, unit="epoch", log=False, mode=999, sample=999),
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_panel_of_every_history_is_json(name: str, history: str) -> None:
    runs = {"a": _history(history)}
    for view in VIEWS.values():
        figure = draw(name, runs, view)
        assert json.loads(json.dumps(figure, allow_nan=False)) == figure
        assert 0 < len(figure["layout"]["title"]["text"]) <= (60 if history == "late" else 40)
        assert figure["layout"]["meta"]["tooltip"]
        assert figure["data"] or figure["layout"]["annotations"][0]["text"]
        # These need eval in the browser, which a strict content security policy forbids.
        assert not {trace["type"] for trace in figure["data"]} & {"scattergl", "parcoords", "splom"}


@pytest.mark.parametrize("name", NAMES)
def test_the_healthy_run_leaves_no_panel_empty(name: str) -> None:
    figure = draw(name, {"a": History(HEALTHY)})
    assert figure["data"]
    assert "N = 64 samples, C = 3 outputs" in figure["layout"]["meta"]["kernel"]
    for axis in (one for key, one in figure["layout"].items() if key.startswith(("xaxis", "yaxis"))):
        assert (
            axis.get("title", {}).get("text")
            or {"domain", "showticklabels"} & axis.keys()
            or axis.get("type") == "category"
        )


@pytest.mark.parametrize("name", NAMES)
def test_plotly_accepts_every_panel(name: str) -> None:
    plotly = pytest.importorskip("plotly.graph_objects")
    figure = draw(name, {"a": History(HEALTHY)})
    assert len(plotly.Figure(figure).data) == len(figure["data"])


@pytest.mark.parametrize("entry", CATALOGUE, ids=NAMES)
def test_a_panel_depends_on_what_it_says_and_on_nothing_else(entry: Any) -> None:
    runs = {"a": History(tuple(replace(one, epoch=one.step // 100) for one in HEALTHY))}
    first = draw(entry.name, runs)
    changes: dict[str, Any] = {"step": 30, "launch": 30, "unit": "epoch", "log": False, "mode": 3, "sample": 5}
    found = {name for name, value in changes.items() if draw(entry.name, runs, View(**{name: value})) != first}
    assert found == entry.depends
    assert entry.group in GROUPS
    assert entry.tells.endswith(".")


@pytest.mark.parametrize("entry", [one for one in CATALOGUE if one.several], ids=lambda one: one.name)
def test_several_runs_have_colours_of_their_own(entry: Any) -> None:
    other = History(tuple(replace(one, step=2 * one.step) for one in HEALTHY))
    figure = draw(entry.name, {"one": History(HEALTHY), EVIL: other})
    named = {trace["name"]: trace["line"]["color"] for trace in figure["data"] if trace.get("showlegend", True)}
    ours = [colour for name, colour in named.items() if name.startswith(("one", "&lt;img"))]
    assert len(ours) == len(set(ours)) == 2
    assert max(x for trace in figure["data"] for x in trace["x"]) >= (10 if "spectrum" in entry.name else 550)


def test_the_others_draw_the_first_run_alone() -> None:
    second = History(tuple(training(5, 2)))
    for entry in CATALOGUE:
        if not entry.several:
            both = draw(entry.name, {"a": History(HEALTHY), "b": second})
            assert both == draw(entry.name, {"a": History(HEALTHY)})


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_user_are_text(name: str) -> None:
    run = History(
        tuple(
            replace(one, layers=(EVIL, *one.layers[1:]), directions=(EVIL, *one.directions[1:]))
            for one in (replace(one, sample_texts=(EVIL,) * 64) for one in HEALTHY)
        )
    )
    figure = draw(name, {EVIL: run, f"{EVIL} 2": run})
    assert "<img" not in json.dumps(figure)


def test_a_step_between_probes_shows_the_nearest() -> None:
    run = {"a": History(HEALTHY)}
    assert draw("spectrum", run, View(step=EVERY + 3)) == draw("spectrum", run, View(step=EVERY))
    # Gram matrices are stored at every third probe.
    assert "step 75" in draw("gram", run, View(step=100))["layout"]["title"]["text"]


@pytest.mark.parametrize("name", NAMES)
def test_a_panel_of_a_thousand_probes_is_small(name: str, thousand: tuple[Snapshot, ...]) -> None:
    runs = {f"run {k}": History(thousand) for k in range(3)}
    shown = runs if next(one for one in CATALOGUE if one.name == name).several else {"run": History(thousand)}
    figure = draw(name, shown, View(step=10_000))
    assert len(json.dumps(figure, separators=(",", ":"))) < 150_000


@pytest.fixture(scope="module")
def thousand() -> tuple[Snapshot, ...]:
    """A thousand probes of 640 modes with numbers that take all their digits, and a spike in one of them."""
    generator = np.random.default_rng(0)
    rates = np.sort(generator.lognormal(size=640))[::-1]
    return tuple(
        replace(
            HEALTHY[k % len(HEALTHY)],
            step=20 * k,
            eigenvalues=rates * (1 + k / 300),
            rates=rates,
            coordinates=generator.normal(size=640),
            carried=generator.normal(size=640),
            previous_step=20 * k - 20,
            time_to_learn=10 / rates,
            lr_steps=20 * k + np.arange(20),
            lr_values=generator.random((20, 2)),
            metrics={name: float(generator.lognormal()) for name in HEALTHY[0].metrics}
            | ({"alignment": 77.0} if k == 501 else {}),
        )
        for k in range(1000)
    )


def test_no_spike_is_thinned_away(thousand: tuple[Snapshot, ...]) -> None:
    (line,) = draw("alignment", {"a": History(thousand)})["data"]
    assert len(line["x"]) <= 360
    assert dict(zip(line["x"], line["y"], strict=True))[20 * 501] == 77.0


def test_a_panel_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"no panel is called 'nothing'; choose one of learning-rate-interval, "):
        draw("nothing", {})
