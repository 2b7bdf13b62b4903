"""What the page asks of runs, answered from their Histories."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any, TypeAlias

from ntk_monitor.cards import cards
from ntk_monitor.dashboard import drill, payload
from ntk_monitor.dashboard.bulk import Asked
from ntk_monitor.dashboard.query import Query
from ntk_monitor.dashboard.store import Store, nearest
from ntk_monitor.errors import HistoryError, InputError
from ntk_monitor.figures.abscissa import Unit, abscissa
from ntk_monitor.figures.launch import launched
from ntk_monitor.figures.style import kernel_words
from ntk_monitor.health import findings
from ntk_monitor.history import History
from ntk_monitor.mode_table import mode_table
from ntk_monitor.panels import CATALOGUE, GROUPS, Entry, View, draw

Answer: TypeAlias = Mapping[str, Any] | str
"""What becomes JSON, or is JSON already."""

ABOUT = (
    "K = J Jᵀ is the empirical neural tangent kernel of the network on the probe, unnormalised; every learning rate, "
    "batch size and loss factor is applied where it is used and named there. The numbers describe these probe samples."
)

UNITS = ("step", "epoch", "time")
"""What can run along horizontal axes, the default first."""
BLOBS = frozenset({"gram", "kernel-map", "mode-samples", "sample-row"})
"""Panels that draw what is stored at few probes and read one by one."""

_ENTRIES = {entry.name: entry for entry in CATALOGUE}
_KEPT = 128
"""Answers that are kept as text; the largest figures of long runs are of about 100 kB."""


class Answers:
    """The questions by name. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[tuple[Any, ...], str] = {}
        self._lock = threading.Lock()

    @property
    def routes(self) -> dict[str, Callable[[Asked, Query], Answer]]:
        """What answers each question."""
        return {
            "runs": self.runs,
            "catalogue": self.catalogue,
            "version": self.version,
            "manifest": self.manifest,
            "figure": self.figure,
            "findings": self.findings,
            "cards": self.cards,
            "modes": self.modes,
            "mode": self.mode,
            "sample": self.sample,
        }

    def runs(self, asked: Asked, _: Query) -> Answer:
        """Return the names of the runs that hold probes."""
        return {"runs": self._store.names(asked)}

    def catalogue(self, _: Asked, __: Query) -> Answer:
        """Return what can be drawn, and the conventions behind it."""
        panels = [
            {
                "name": entry.name,
                "group": entry.group,
                "wide": entry.wide,
                "several": entry.several,
                "depends": sorted(entry.depends),
                "tells": entry.tells,
            }
            for entry in CATALOGUE
        ]
        return {"groups": GROUPS, "panels": panels, "about": ABOUT, "version": metadata.version("ntk-monitor")}

    def version(self, asked: Asked, query: Query) -> Answer:
        """Return what changes when a run has grown, without reading it."""
        run = query.text("run")
        return {"run": run, "version": self._store.version(asked, run)}

    def manifest(self, asked: Asked, query: Query) -> Answer:
        """Return what the controls need to know of a run; of one that cannot be read, why."""
        run = query.text("run")
        unit = query.one_of("unit", *UNITS)
        try:
            reading = self._store.reading(asked, run)
        except HistoryError as error:
            return {"run": run, "version": "", **manifest(History(())), "error": str(error)}
        told = {"run": run, "version": reading.version}
        key = (asked.experiment, "manifest", run, reading.version, unit)
        return self._once(key, lambda: told | manifest(reading.history, unit))

    def figure(self, asked: Asked, query: Query) -> Answer:
        """Return one panel of the ticked runs."""
        entry = _entry(query.text("panel"))
        ticked = query.runs()
        focus = query.arguments.get("focus") or next(iter(ticked), "")
        names = ticked if entry.several and ticked else [focus]
        view = _view(query)
        readings = {name: self._store.reading(asked, name) for name in names}
        versions = [reading.version for reading in readings.values()]
        depends = [getattr(view, name) for name in sorted(entry.depends)]

        def drawn() -> Answer:
            heavy = entry.name in BLOBS
            shown = {name: one.opened(view.step) if heavy else one.history for name, one in readings.items()}
            return draw(entry.name, shown, _launched(view, shown[names[0]]) if "launch" in entry.depends else view)

        return self._once((asked.experiment, entry.name, *names, *versions, *depends), drawn)

    def findings(self, asked: Asked, query: Query) -> Answer:
        """Return what the rules of health find in a run."""
        run = query.text("run")
        reading = self._store.reading(asked, run)
        names = ("severity", "rule", "steps", "evidence", "meaning", "advice", "panel")

        def found() -> Answer:
            return {"findings": [{name: getattr(one, name) for name in names} for one in findings(reading.probes)]}

        return self._once((asked.experiment, "findings", run, reading.version), found)

    def cards(self, asked: Asked, query: Query) -> Answer:
        """Return a run in a few numbers with their lights, as it stood at a step."""
        run, view = query.text("run"), _view(query)
        reading = self._store.reading(asked, run)
        key = (asked.experiment, "cards", run, reading.version, view.step)
        return self._once(key, lambda: {"cards": [asdict(card) for card in cards(reading.history, view)]})

    def _once(self, key: tuple[Any, ...], made: Callable[[], Answer]) -> str:
        """Return an answer as text, made anew only if nobody has asked lately what the key says."""
        with self._lock:
            text = self._kept.pop(key, None)
        if text is None:
            text = payload.text(made())
        with self._lock:
            self._kept[key] = text
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return text

    def modes(self, asked: Asked, query: Query) -> Answer:
        """Return the table of modes of the probe nearest to a step."""
        history = self._store.reading(asked, query.text("run")).history
        measured = history.measured
        if not measured:
            return {"columns": [], "rows": [], "note": "No probe has been measured yet.", "step": None}
        place = nearest([s.step for s in measured], query.number("step"))
        table = mode_table(measured[place], measured[place - 1] if place else None, history)
        columns = [asdict(column) for column in table.columns]
        return {"columns": columns, "rows": table.rows, "note": table.note, "step": measured[place].step}

    def mode(self, asked: Asked, query: Query) -> Answer:
        """Return the samples that load most on a mode, on either side."""
        step, mode = query.number("step"), query.number("mode", 1) or 1
        return drill.mode(self._store.reading(asked, query.text("run")).opened(step), step, mode)

    def sample(self, asked: Asked, query: Query) -> Answer:
        """Return what is known of one sample of the probe."""
        index = query.number("sample")
        if index is None:
            raise InputError("wanted ?sample= the index of a sample in the probe, got nothing")
        return drill.sample(self._store.reading(asked, query.text("run")).opened(query.number("step")), index)


def manifest(history: History, unit: str = "step") -> dict[str, Any]:
    """Return what the controls of the page need: steps, axes, names; the axis of times only if that is the unit."""
    measured = history.measured
    last = measured[-1] if measured else None
    planned = (s.facts.get("total_steps", math.nan) for s in reversed(history.snapshots))
    total = next((steps for steps in planned if math.isfinite(steps)), None)
    return {
        "steps": [s.step for s in measured],
        "light_steps": [s.step for s in history.light],
        "launches": [s.step for s in measured if s.forecast_steps.size],
        "launch": _launched(View(), history).launch,
        "epochs": _places(history, "epoch"),
        # Learning rates of all steps are only read for those who look at them.
        "times": _places(history, "time") if unit == "time" else None,
        "total_steps": None if total is None else int(total),
        "kernel": kernel_words(last) if last else "",
        "samples": last.samples if last else 0,
        "outputs": last.outputs if last else 0,
        "modes": len(last.rates) or len(last.eigenvalues) if last else 0,
        "notes": list(history.notes),
        "error": None,
    }


def _launched(view: View, history: History) -> View:
    """Return the view with the launch that all figures share where the reader has chosen none."""
    found = None if view.launch is not None else launched(history.snapshots, holds="forecast_steps")
    return view if found is None else replace(view, launch=found.step)


def _places(history: History, unit: Unit) -> list[float | None]:
    """Return where figures draw the measured probes in a unit; None where that is not known."""
    axis = abscissa(history.snapshots, unit)
    steps = history.steps.tolist()
    return [None] * len(steps) if axis.steps is None else [*axis(steps)]


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        raise InputError(f"no panel is called {name[:40]!r}; choose one of {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def _view(query: Query) -> View:
    return View(
        step=query.number("step"),
        launch=query.number("launch"),
        unit=query.one_of("unit", *UNITS),  # type: ignore[arg-type]
        log=query.one_of("log", "1", "0") == "1",
        mode=query.number("mode", 1),
        sample=query.number("sample"),
    )
