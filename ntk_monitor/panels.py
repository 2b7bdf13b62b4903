"""Which figures a run is shown by, in which order, what each of them tells, and one way to draw any of them.

The tab, the report and a notebook draw the same panels: a name, some histories and a View give a plain plotly dict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ntk_monitor import figures
from ntk_monitor.errors import InputError
from ntk_monitor.figures import Figure
from ntk_monitor.figures.abscissa import Unit, abscissa, recorded_rates
from ntk_monitor.figures.style import empty, kernel_words, nearest
from ntk_monitor.history import History
from ntk_monitor.snapshot import Snapshot

GROUPS: dict[str, str] = {
    "learning rate": "Can my learning rate be kept, raised, or must it come down?",
    "loss": "Where is the loss going, and can that forecast be believed?",
    "residual": "What is learned already, and what will be learned in the steps that are left?",
    "layers": "Which layers do the work?",
    "kernel": "Is the kernel still moving, and what does it see?",
    "numbers": "Every number that the loggers receive.",
}
"""Groups of panels and the question that each answers; the first five are the `panel` of health findings."""


MODES = (1, 2, 4, 8)
"""Single modes that are drawn when none is chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a reader has chosen to look at."""

    step: int | None = None
    """Optimizer step that is shown, at the probe nearest to it; None: the last probe."""
    launch: int | None = None
    """Step whose forecast is drawn; None: the last forecast that has probes after it, else the last one."""
    unit: Unit = "step"
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


def _first(runs: Runs) -> Sequence[Snapshot]:
    return next((history.snapshots for history in runs.values()), ())


def _all(runs: Runs) -> dict[str, Sequence[Snapshot]]:
    return {name: history.snapshots for name, history in runs.items()}


def _rates(runs: Runs, view: View) -> Figure:
    probes = _first(runs)
    steps, rates = recorded_rates(probes)
    at = abscissa(probes, view.unit)
    return figures.learning_rates(steps, rates, probes[-1].step if probes else 0, at)


def _decay(runs: Runs, view: View) -> Figure:
    modes = MODES if view.mode is None else (view.mode,)
    return figures.mode_decay(_first(runs), modes, view.unit, log=view.log)


def _gram(runs: Runs, view: View) -> Figure:
    stored = [snapshot for snapshot in _first(runs) if snapshot.gram.size]
    if not stored:
        return empty("Kernel between samples", "No Gram matrix was stored.")
    return figures.gram(nearest(stored, view.step), cosine=True)


def _entry(name: str, draw: Draw, tells: str, depends: str = "", **more: bool) -> Entry:
    return Entry(name=name, group=_GROUP[name], draw=draw, tells=tells, depends=frozenset(depends.split()), **more)


_GROUP = {
    name: group
    for group, names in {
        "learning rate": "learning-rate-interval learning-rates",
        "loss": "loss-forecast forecast-error",
        "residual": "residual-reach named-residuals residual-bands mode-decay mode-samples sample-residual",
        "layers": "layer-updates layer-share",
        "kernel": "spectrum spectrum-over-training alignment kernel-drift gram kernel-map sample-row",
        "numbers": "scalars",
    }.items()
    for name in names.split()
}

CATALOGUE: tuple[Entry, ...] = (
    _entry(
        "learning-rate-interval",
        lambda runs, view: figures.learning_rate_intervals(_all(runs), view.unit, log=view.log),
        "Where the dashed line lies in the green, the learning rate could be raised; in the red for long, lower it.",
        "unit log",
        several=True,
    ),
    _entry("learning-rates", _rates, "The learning rates that the steps really used.", "unit"),
    _entry(
        "loss-forecast",
        lambda runs, view: figures.loss_forecast(_first(runs), view.launch, view.unit, log=view.log),
        "Where the loss goes if the kernel stays as it was at the launch; dots show whether it did.",
        "launch unit log",
    ),
    _entry(
        "forecast-error",
        lambda runs, view: figures.forecast_error(_first(runs), view.unit, log=view.log),
        "How far forecasts can be believed: 20 % is good, 100 % is no better than forecasting no change.",
        "unit log",
    ),
    _entry(
        "residual-reach",
        lambda runs, view: figures.residual_reach(_first(runs), view.launch, view.unit, log=view.log),
        "How much of what is not yet learned the steps that are left will learn, and what they will not.",
        "launch unit log",
    ),
    _entry(
        "named-residuals",
        lambda runs, view: figures.named_residuals(_first(runs), view.launch, view.unit, log=view.log),
        "Which classes or directions are learned, and which lag behind.",
        "launch unit log",
    ),
    _entry(
        "residual-bands",
        lambda runs, view: figures.residual_bands(_first(runs), view.unit),
        "Fast parts of the residual go first: what is left moves into slower bands.",
        "unit",
    ),
    _entry(
        "mode-decay",
        _decay,
        "How fast single modes decay between probes, beside what the simulation said.",
        "mode unit log",
    ),
    _entry(
        "mode-samples",
        lambda runs, view: figures.mode_samples(_first(runs), view.mode, view.step),
        "Which samples a mode tells apart: the bars of one colour against those of the other.",
        "mode step",
    ),
    _entry(
        "sample-residual",
        lambda runs, view: figures.sample_residual(_first(runs), view.sample, view.unit, log=view.log),
        "A sample that stays high while the others fall is hard, or its label is wrong.",
        "sample unit log",
    ),
    _entry(
        "layer-updates",
        lambda runs, view: figures.layer_updates(_first(runs), view.step, view.unit),
        "Which layers' steps really moved the outputs, whatever the optimizer did.",
        "step unit",
    ),
    _entry(
        "layer-share",
        lambda runs, view: figures.layer_share(_first(runs), view.unit),
        "Which layers the optimizer's steps could move the outputs by.",
        "unit",
    ),
    _entry(
        "spectrum",
        lambda runs, view: figures.spectra(_all(runs), view.step, log=view.log),
        "How unevenly the kernel spreads its strength: steep is a few fast directions and many slow ones.",
        "step log",
        several=True,
    ),
    _entry(
        "spectrum-over-training",
        lambda runs, view: figures.spectrum_over_training(_first(runs), view.step, view.unit),
        "Whether the kernel grows, and which directions stand above rounding noise.",
        "step unit",
    ),
    _entry(
        "alignment",
        lambda runs, view: figures.alignment(_all(runs), view.unit),
        "Rising: the network learns features in which samples of one target belong together.",
        "unit",
        several=True,
    ),
    _entry(
        "kernel-drift",
        lambda runs, view: figures.kernel_drift(_all(runs), view.unit, log=view.log),
        "Near 0 the kernel is frozen and forecasts hold long; large values are features being learned.",
        "unit log",
        several=True,
    ),
    _entry("gram", _gram, "Red: samples that learn together. Blocks along the diagonal are classes.", "step"),
    _entry(
        "kernel-map",
        lambda runs, view: figures.kernel_map(_first(runs), view.step),
        "Clouds of one colour that come apart: the kernel tells the classes apart.",
        "step",
        heavy=True,
    ),
    _entry(
        "sample-row",
        lambda runs, view: figures.sample_row(_first(runs), view.sample, view.step),
        "Who learns with this sample: above 0 a step on one helps the other.",
        "sample step",
    ),
    _entry(
        "scalars",
        lambda runs, view: figures.scalars(_first(runs), view.unit),
        "The numbers that loggers and callbacks see.",
        "unit",
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
    with np.errstate(all="ignore"):  # numbers of a run that broke may overflow here too
        figure = _BY_NAME[name].draw(runs, view or View())
    last = next((one for one in reversed(_first(runs)) if one.status == "measured"), None)
    figure["layout"]["meta"] = {"kernel": kernel_words(last) if last else ""} | figure["layout"].get("meta", {})
    return figure
