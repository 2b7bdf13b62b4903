"""Every panel of a run, drawn for a file: at the end, and at the few stops between which a reader can choose.

A file cannot ask for another step, so a panel that depends on one is drawn at several; the tab draws any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ntk_monitor.figures import Figure
from ntk_monitor.figures.style import thinned
from ntk_monitor.history import History
from ntk_monitor.panels import CATALOGUE, Entry, View, draw
from ntk_monitor.snapshot import Snapshot

STOPS = 8
"""Steps, forecasts, modes or samples between which a reader can choose, where the file has room."""
_CELLS = 130_000
"""Entries of all Gram matrices in the file, five bytes each."""

_WORDS = {"step": "step", "launch": "forecast from step", "mode": "mode", "sample": "sample"}
# Of two things that a panel depends on, the one that a reader of a file would rather choose.
_CHOSEN = ("sample", "mode", "launch", "step")


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure of a page."""

    name: str
    group: str
    figure: Figure
    tells: str
    """How to read it, in a sentence."""
    wide: bool = False
    axis: str = ""
    """What can be chosen: a field of the View, or nothing."""
    others: tuple[Figure, ...] = ()
    """The figure at every stop of its axis."""

    @property
    def about(self) -> str:
        """What the figure shows, in detail."""
        return str(self.figure["layout"].get("meta", {}).get("tooltip", ""))

    @property
    def kernel(self) -> str:
        """Which kernel it is about, and how that is normalised."""
        return str(self.figure["layout"].get("meta", {}).get("kernel", ""))


@dataclass(frozen=True, slots=True)
class Choice:
    """What a reader can choose for all panels of a run at once."""

    axis: str
    word: str
    stops: tuple[int, ...]


def panels(history: History, most: int = STOPS) -> tuple[Panel, ...]:
    """Return the panels of one run. A figure without data keeps its place and says why it is empty."""
    stops = {choice.axis: choice.stops for choice in choices(history, most)}
    return tuple(_drawn(entry, history, stops) for entry in CATALOGUE)


def several(runs: Mapping[str, History]) -> tuple[Panel, ...]:
    """Return the panels that draw many runs in one figure."""
    shared = (entry for entry in CATALOGUE if entry.several)
    return tuple(Panel(one.name, one.group, draw(one.name, runs), one.tells, one.wide) for one in shared)


def choices(history: History, most: int = STOPS) -> tuple[Choice, ...]:
    """Return what can be chosen of a run, two to `most` stops each; every panel begins at a stop of its own."""
    probes = history.measured
    stored = [s for s in probes if s.gram.size]
    launches = [s.step for s in probes if s.forecast_steps.size]
    modes = next((len(s.mode_samples) for s in reversed(probes) if s.mode_samples.size), 0)
    found = {
        "step": _evenly([s.step for s in (stored if len(stored) > 2 else probes)], _room(stored, most)),
        "launch": _evenly(launches, most),
        "mode": tuple(range(1, min(modes, most) + 1)),
        "sample": _samples(probes, most),
    }
    return tuple(Choice(axis, _WORDS[axis], stops) for axis, stops in found.items() if len(stops) > 1)


def _evenly(steps: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(steps[i] for i in thinned(len(steps), most)) if steps else ()


def _room(stored: Sequence[Snapshot], most: int) -> int:
    """Return at how many steps Gram matrices fit into the file."""
    largest = max((s.gram.size for s in stored), default=1)
    return max(2, min(most, _CELLS // largest))


def _samples(probes: Sequence[Snapshot], most: int) -> tuple[int, ...]:
    """Return the sample that is learned best and those that are learned worst, by the last residuals."""
    held = [s.sample_residual for s in probes if s.sample_residual.size]
    if not held:
        return ()
    order = held[-1].argsort(kind="stable").tolist()
    return tuple(dict.fromkeys([*order[:1], *order[1 - most :]]))


def _drawn(entry: Entry, history: History, stops: Mapping[str, tuple[int, ...]]) -> Panel:
    runs = {"": history}
    figure = _still(draw(entry.name, runs))
    axis = next((one for one in _CHOSEN if one in entry.depends and one in stops), "")
    # The heat map is the same at every step, but for a line.
    if not axis or not figure["data"] or entry.name == "spectrum-over-training":
        return Panel(entry.name, entry.group, figure, entry.tells, entry.wide)
    views: list[dict[str, Any]] = [{axis: stop} for stop in stops[axis]]
    others = tuple(_still(draw(entry.name, runs, View(**view))) for view in views)
    return Panel(entry.name, entry.group, figure, entry.tells, entry.wide, axis, others)


def _still(figure: Figure) -> Figure:
    """Return a figure without what only a page that can ask for others needs."""
    figure["layout"]["meta"].pop("launches", None)
    return figure
