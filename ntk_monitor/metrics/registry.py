"""The registry of metrics: what each number is, what it costs, and when it lies; users add their own.

A metric is a function from `Measured` to a float. It raises `InputError` where something it needs was not measured,
and returns NaN where the number does not exist; `evaluate` then leaves it out.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ntk_monitor.errors import InputError
from ntk_monitor.metrics.measured import Measured

Function: TypeAlias = Callable[[Measured], float]
Tier: TypeAlias = Literal["S", "A", "B", "own"]
Cost: TypeAlias = Literal["free", "n^2", "n^3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number that can be computed at a probe, with what is needed to judge it."""

    name: str
    function: Function
    formula: str
    """In words or symbols, with the symbols of `ntk_monitor.metrics.measured`."""
    range: tuple[float, float]
    """Smallest and largest possible value, rounding aside."""
    unit: str
    source: str = ""
    """Author and year."""
    cost: Cost = "n^2"
    """On top of kernel and spectrum, n rows."""
    tier: Tier = "own"
    """S: always worth it. A: cheap. B: after the fact. own: a user's."""
    default: bool = True
    """Evaluated at every probe without being asked for."""
    lies_when: str = ""

    @property
    def meaning(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


METRICS: dict[str, Metric] = {}
"""Every registered metric by name."""


def metric(  # noqa: PLR0913 - what must be said about a number, all by keyword
    *,
    name: str = "",
    formula: str,
    range: tuple[float, float] = (-math.inf, math.inf),  # noqa: A002 - the word that fits
    unit: str,
    source: str = "",
    cost: Cost = "n^2",
    tier: Tier = "own",
    default: bool = True,
    lies_when: str = "",
) -> Callable[[Function], Function]:
    """Register the function below as a metric; it stays a plain function.

    Args:
        name: the key it is recorded under; default: the function's name.
        formula: what is computed, in one line.
        range: smallest and largest possible value.
        unit: of the value.
        source: author and year.
        cost: on top of kernel and spectrum.
        tier: leave it at "own".
        default: evaluated at every probe.
        lies_when: when the number misleads.

    Raises:
        InputError: another function has this name already.

    Example:
        >>> from ntk_monitor.metrics import METRICS, Measured, evaluate, metric
        >>> @metric(formula="min K_nn", unit="squared output units")
        ... def weakest(measured: Measured) -> float:
        ...     return float(measured.kernel.diagonal().min())
        >>> import numpy as np
        >>> evaluate(Measured(kernel=np.eye(3), samples=3), ["weakest"])
        {'weakest': 1.0}
        >>> METRICS.pop("weakest").tier
        'own'
    """

    def register(function: Function) -> Function:
        key = name or function.__name__
        known = METRICS.get(key)
        # A cell of a notebook run again defines the same function again.
        if known and (known.function.__module__, known.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise InputError(f"a metric must have a name of its own, {key!r} is {known.meaning!r}; pass another name=")
        METRICS[key] = Metric(
            name=key,
            function=function,
            formula=formula,
            range=range,
            unit=unit,
            source=source,
            cost=cost,
            tier=tier,
            default=default,
            lies_when=lies_when,
        )
        return function

    return register


def evaluate(measured: Measured, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return every metric that could be computed, by name; never raises for one that could not.

    Args:
        measured: the arrays of one probe.
        names: which ones; None: all that are on by default, a user's own included.

    A metric that raises, or whose value is NaN, is left out. Infinite values stay (a condition number).

    Raises:
        InputError: a name that is not registered.
    """
    wanted = [m.name for m in METRICS.values() if m.default] if names is None else list(names)
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise InputError(f"metrics must be registered, got {unknown}; known are {sorted(METRICS)}")
    found = {}
    for name in wanted:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                value = float(METRICS[name].function(measured))
            except Exception:  # noqa: BLE001 - a user's metric must not cost the probe, nor the run
                continue
        if not math.isnan(value):
            found[name] = value
    return found
