"""Which figures a run is shown by, in which order, what each of them tells, and one way to draw any of them.

The tab, the report and a notebook draw the same panels: a name, some histories and a View give a plain plotly dict.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ntk_monitor import figures
from ntk_monitor.errors import InputError
from ntk_monitor.figures import Figure
from ntk_monitor.figures.style import empty, kernel_words
from ntk_monitor.history import History

GROUPS: dict[str, str] = {
    "learning rate": "Can my learning rate be kept, raised, or must it come down?",
    "loss": "Where is the loss going, and can that forecast be believed?",
    "residual": "What is learned already, and what will be learned in the steps that are left?",
    "layers": "Which layers do the work?",
    "kernel": "Is the kernel still moving, and what does it see?",
    "numbers": "Every number that the loggers receive.",
}
"""Groups of panels and the question that each answers; the first five are the `panel` of health findings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a reader has chosen to look at."""

    step: int | None = None
    """Optimizer step that is shown, at the probe nearest to it; None: the last probe."""
    launch: int | None = None
    """Step whose forecast is drawn; None: the last forecast that has probes after it, else the last one."""
    unit: Literal["step", "epoch", "time"] = "step"
    """What runs along horizontal axes; "time" is the sum of the learning rates so far."""
    log: bool = True
    mode: int | None = None
    """Rank of one mode, 1 the fastest; None: a few of them."""
    sample: int | None = None
    """Index of one sample in the probe."""


Runs: TypeAlias = Mapping[str, History]
Draw: TypeAlias = Callable[[Runs, View], Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One panel of the catalogue."""

    name: str
    group: str
    draw: Draw
    tells: str
    """How to read it, in a sentence."""
    depends: frozenset[str] = frozenset()
    """Fields of the View that change the figure."""
    wide: bool = False
    several: bool = False
    """True: it draws every run it is given. Otherwise the first."""
    heavy: bool = False
    """True: drawing takes longer than 20 ms on a long history."""


def _first(runs: Runs) -> History:
    return next(iter(runs.values()), History(()))


def _entry(name: str, group: str, draw: Draw, tells: str, depends: str = "", **more: bool) -> Entry:
    return Entry(name=name, group=group, draw=draw, tells=tells, depends=frozenset(depends.split()), **more)


def _rates(runs: Runs, _: View) -> Figure:
    history = _first(runs)
    steps, rates = history.learning_rates
    return figures.learning_rates(steps.tolist(), rates.tolist(), history[-1].step if len(history) else 0)


def _decay(runs: Runs, view: View) -> Figure:
    return figures.mode_decay(_first(runs).snapshots, (1, 2, 3, 5, 9, 16) if view.mode is None else (view.mode,))


def _gram(runs: Runs, view: View) -> Figure:
    stored = [snapshot for snapshot in _first(runs).measured if snapshot.gram.size]
    if not stored:
        return empty("Kernel between samples", "No Gram matrix was stored.")
    shown = stored[-1] if view.step is None else min(stored, key=lambda one: abs(one.step - (view.step or 0)))
    return figures.gram(shown, cosine=True)


CATALOGUE: tuple[Entry, ...] = (
    _entry(
        "learning-rate-interval",
        "learning rate",
        lambda runs, view: figures.learning_rate_interval(_first(runs).snapshots),
        "By what the learning rate could be multiplied before steps become unstable.",
    ),
    _entry("learning-rates", "learning rate", _rates, "The learning rates that the steps really used."),
    _entry(
        "loss-forecast",
        "loss",
        lambda runs, view: figures.loss_forecast(_first(runs).snapshots),
        "Where the loss goes if the kernel stays as it was at the launch.",
    ),
    _entry(
        "forecast-error",
        "loss",
        lambda runs, view: figures.forecast_error(_first(runs).snapshots),
        "How far forecasts can be believed: 20 % is good, 100 % is no better than forecasting no change.",
    ),
    _entry(
        "residual-reach",
        "residual",
        lambda runs, view: figures.residual_reach(_first(runs).snapshots),
        "How much of what is not yet learned the remaining steps will learn.",
    ),
    _entry(
        "residual-bands",
        "residual",
        lambda runs, view: figures.residual_bands(_first(runs).snapshots),
        "Fast parts of the residual go first: what is left moves into slower bands.",
    ),
    _entry(
        "named-residuals",
        "residual",
        lambda runs, view: figures.named_residuals(_first(runs).snapshots),
        "Which classes or directions are learned, and which lag behind.",
    ),
    _entry("mode-decay", "residual", _decay, "How fast single modes really decay.", "mode"),
    _entry(
        "layer-updates",
        "layers",
        lambda runs, view: figures.layer_updates(_first(runs).snapshots),
        "Which layers' steps moved the outputs.",
    ),
    _entry(
        "spectrum",
        "kernel",
        lambda runs, view: figures.spectrum(_first(runs).snapshots, view.step),
        "How unevenly the kernel spreads its strength over directions.",
        "step",
    ),
    _entry(
        "spectrum-over-training",
        "kernel",
        lambda runs, view: figures.spectrum_over_training(_first(runs).snapshots),
        "Whether the kernel grows, and which directions stand above rounding noise.",
    ),
    _entry("gram", "kernel", _gram, "Which samples learn together, and which against each other.", "step"),
    _entry(
        "scalars",
        "numbers",
        lambda runs, view: figures.scalars(_first(runs).snapshots),
        "The numbers that loggers and callbacks see.",
        wide=True,
    ),
)
"""Every panel in the order of the page."""

_BY_NAME = {entry.name: entry for entry in CATALOGUE}


def draw(name: str, runs: Runs, view: View | None = None) -> Figure:
    """Return one panel as a plain plotly dict.

    `layout.meta` holds "tooltip", what the figure says, and "kernel", which kernel it is about and how normalised.

    Args:
        name: of an entry of `CATALOGUE`.
        runs: name → history; panels of one run draw the first.
        view: what to look at; default: the last probe, in steps.

    Raises:
        InputError: no panel has this name.
    """
    if name not in _BY_NAME:
        raise InputError(f"no panel is called {name!r}; choose one of {', '.join(_BY_NAME)}")
    figure = _BY_NAME[name].draw(runs, view or View())
    last = next((one for one in reversed(_first(runs).snapshots) if one.status == "measured"), None)
    figure["layout"]["meta"] = {"kernel": kernel_words(last) if last else ""} | figure["layout"].get("meta", {})
    return figure
