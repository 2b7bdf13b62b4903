"""History, the probes of a run as arrays over steps, and load_history, which reads it from event files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import HistoryError, InputError
from ntk_monitor.metrics import NAMES, SCALARS
from ntk_monitor.runs import read
from ntk_monitor.snapshot import ARRAYS, SCHEMA, Floats, Integers, Snapshot

if TYPE_CHECKING:
    import pandas as pd
    import xarray

Path = str | os.PathLike[str]
Steps = NDArray[np.int64]

_NUMBERS = tuple(field.name for field in fields(Snapshot) if field.type in (int, float, int | None))
_FIELDS = tuple(field.name for field in fields(Snapshot) if field.name not in (*ARRAYS, "metrics", "seconds"))


@dataclass(frozen=True, slots=True)
class History:
    """All probes of a run in increasing order of step. Arrays run over the measured ones and are padded with NaN.

    Light probes are neither measured nor skipped: they hold scalars only (`light`, `series`).
    """

    snapshots: tuple[Snapshot, ...]
    """Every probe, light and skipped ones included."""
    notes: tuple[str, ...] = ()
    """Sentences about what was lost, replaced, or makes probes incomparable."""
    prefix: str = "ntk"

    def __repr__(self) -> str:
        steps = f", steps {self.snapshots[0].step} to {self.snapshots[-1].step}" if self.snapshots else ""
        return f"History({len(self.snapshots)} probes{steps}, {len(self.notes)} notes)"

    def __len__(self) -> int:
        return len(self.snapshots)

    def __getitem__(self, index: int) -> Snapshot:
        return self.snapshots[index]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.snapshots)

    @property
    def measured(self) -> tuple[Snapshot, ...]:
        """The full probes that were not skipped."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.status == "measured")

    @property
    def light(self) -> tuple[Snapshot, ...]:
        """The light probes between them, which hold scalars and no spectrum."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.status == "light")

    def series(self, name: str) -> tuple[Steps, Floats]:
        """Return a logged scalar at every probe that has it, full or light: steps (k,) and finite values (k,).

        Raises:
            InputError: no scalar has this name.
        """
        self.scalar(name)
        found = [s for s in self.snapshots if s.status != "skipped" and np.isfinite(_number(s, name))]
        return np.array([s.step for s in found], dtype=np.int64), np.array([_number(s, name) for s in found])

    @property
    def steps(self) -> Steps:
        """Optimizer steps of the measured probes, (step,)."""
        return np.array([snapshot.step for snapshot in self.measured], dtype=np.int64)

    @property
    def eigenvalues(self) -> Floats:
        """Eigenvalues of K, descending, in squared output units, (step, mode)."""
        return self._over_steps("eigenvalues", 1)

    @property
    def rates(self) -> Floats:
        """Eigenvalues of the loss-weighted kernel M, descending, in 1 / learning rate, (step, mode)."""
        return self._over_steps("rates", 1)

    @property
    def coordinates(self) -> Floats:
        """Residual along the eigenvectors of each probe's own M, in sqrt(loss units), (step, mode)."""
        return self._over_steps("coordinates", 1)

    @property
    def carried(self) -> Floats:
        """The same residual along the eigenvectors of the previous probe's M, in sqrt(loss units), (step, mode)."""
        return self._over_steps("carried", 1)

    @property
    def residual_energy(self) -> Floats:
        """Share of the residual's energy in each mode of each probe's own M, from 0 to 1, (step, mode)."""
        return self._over_steps("residual_energy", 1)

    @property
    def learning_rates(self) -> tuple[Steps, Floats]:
        """Steps at which a learning rate changed, (change,), and the rates from there on, (change, group)."""
        sized = ((s, min(len(s.lr_steps), len(s.lr_values))) for s in self.snapshots)
        rows = [(s.lr_steps[:count], s.lr_values[:count].reshape(count, -1)) for s, count in sized if count]
        if not rows:
            return np.empty(0, np.int64), np.empty((0, 0))
        groups = max(values.shape[1] for _, values in rows)
        every = np.concatenate(
            [values if values.shape[1] == groups else _padded(values, (len(values), groups)) for _, values in rows]
        )
        # What a later probe says of a step counts.
        steps, last = np.unique(np.concatenate([steps for steps, _ in rows])[::-1], return_index=True)
        values = every[::-1][last].astype(np.float64)
        # Each probe may repeat the rates it started with; only a difference to the row before is a change.
        same = (values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1]))
        new = np.concatenate([[True], ~same.all(axis=1)])
        return steps[new].astype(np.int64), values[new]

    @property
    def variables(self) -> dict[str, Any]:
        """Every array and scalar of the measured probes: name → (dimensions, values, unit and meaning)."""
        return self._array_variables() | self._number_variables()

    def scalar(self, name: str) -> Floats:
        """Return a logged scalar, or a number of the Snapshot such as "loss_value", over the measured steps, (step,).

        Raises:
            InputError: no scalar has this name.
        """
        known = dict.fromkeys((*NAMES, *(key for snapshot in self.snapshots for key in snapshot.metrics), *_NUMBERS))
        if name not in known:
            raise InputError(f"no scalar is called {name!r}; choose one of {', '.join(known)}")
        return np.array([_number(snapshot, name) for snapshot in self.measured], dtype=np.float64)

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row per probe, skipped ones included: every number and text, and what the probe cost by stage.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(_missing("to_pandas", "pandas")) from error
        rows = [
            {name: getattr(snapshot, name) for name in _FIELDS}
            | snapshot.metrics
            | {f"seconds_{stage}": value for stage, value in snapshot.seconds.items()}
            for snapshot in self.snapshots
        ]
        return pd.DataFrame(rows)

    def to_xarray(self) -> "xarray.Dataset":
        """Return all arrays and scalars of the measured probes over (step, mode, ...) with units and meanings.

        Arrays that were written at some probes only have steps and dimensions of their own (gram_step, ...).

        Raises:
            ImportError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError(_missing("to_xarray", "xarray")) from error
        attributes = {"schema": SCHEMA, "prefix": self.prefix, "notes": "\n".join(self.notes)}
        for last in self.measured[-1:]:
            attributes |= {name: getattr(last, name) for name in ("kernel", "mode", "loss", "probe", "probe_source")}
        return xarray.Dataset(self.variables, coords={"step": self.steps}, attrs=attributes)

    def _array_variables(self) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        for name, stored in ARRAYS.items():
            about = {"units": stored.unit, "meaning": stored.meaning}
            holders = [snapshot for snapshot in self.measured if getattr(snapshot, name).size]
            if not holders or "change" in stored.dims:
                continue
            if stored.blob:
                steps, dims = f"{name}_step", tuple(f"{name}_{dim}" for dim in stored.dims)
                written = np.array([snapshot.step for snapshot in holders])
                variables[steps] = ((steps,), written, {"units": "optimizer steps"})
                arrays = _stacked([getattr(snapshot, name) for snapshot in holders], len(dims))
                variables[name] = ((steps, *dims), arrays, about)
            else:
                variables[name] = (("step", *stored.dims), self._over_steps(name, len(stored.dims)), about)
        if "coordinates" in variables:
            about = {"units": "share of the residual's energy", "meaning": "coordinates squared, summing to 1"}
            variables["residual_energy"] = (("step", "mode"), self.residual_energy, about)
        # Two arrays over modes, or over samples when the probe changed, may differ in length; a dimension has one.
        lengths: dict[str, int] = {}
        for dims, values, _ in variables.values():
            lengths |= {dim: max(size, lengths.get(dim, 0)) for dim, size in zip(dims, values.shape, strict=True)}
        return {
            name: (dims, _padded(values, tuple(lengths[dim] for dim in dims)), about)
            for name, (dims, values, about) in variables.items()
        }

    def _number_variables(self) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        changes, rates = self.learning_rates
        if changes.size:
            variables["lr_steps"] = ("change", changes, {"units": ARRAYS["lr_steps"].unit})
            variables["lr_values"] = (("change", "group"), rates, {"units": ARRAYS["lr_values"].unit})
        scalars = {scalar.name: {"units": scalar.unit, "meaning": scalar.meaning} for scalar in SCALARS}
        for name in dict.fromkeys((*_NUMBERS, *(key for snapshot in self.measured for key in snapshot.metrics))):
            if name != "step":
                variables[name] = ("step", self.scalar(name), scalars.get(name, {}))
        return variables

    def _over_steps(self, name: str, ndim: int) -> Floats:
        return _stacked([getattr(snapshot, name) for snapshot in self.measured], ndim)


def load_history(*runs: Path | Sequence[Path], prefix: str | None = None) -> History:
    """Return the History in the directory of a run, an event file, or several of either that continue one another.

    A later record replaces earlier ones at the same or a later step, so that a resumed run reads as one; `notes` says
    what was replaced. Costs about 0.3 ms per probe.

    Args:
        runs: directories that hold event files (or hold one run further down), event files, or one list of them.
        prefix: what the monitor's tags begin with; None when there is only one in the files.

    Raises:
        HistoryError: no event files, no probes, several runs or prefixes to choose from, or probes of a newer schema.
    """
    paths: list[Path] = []
    for run in runs:
        paths += [run] if isinstance(run, str | os.PathLike) else list(run)
    if not paths:
        raise HistoryError("wanted the directory of a run, got nothing; pass one such as lightning_logs/version_0")
    found = read(paths, prefix)
    return History(found.snapshots, found.notes, found.prefix)


def _number(snapshot: Snapshot, name: str) -> float:
    """Return a scalar, or a number of the Snapshot; NaN where it was not measured."""
    value = snapshot.metrics.get(name, getattr(snapshot, name) if name in _NUMBERS else None)
    return np.nan if value is None else float(value)


def _stacked(arrays: Sequence[Floats | Integers], ndim: int) -> Floats:
    """Return arrays of `ndim` dimensions stacked along a new first one, padded to the largest with NaN."""
    filled = [array for array in arrays if array.size]
    shape = tuple(max((array.shape[i] for array in filled), default=0) for i in range(ndim))
    stacked = np.full((len(arrays), *shape), np.nan)
    for row, array in zip(stacked, arrays, strict=True):
        if array.size:
            row[...] = _padded(array, shape)
    return stacked


def _padded(array: Floats | Integers, shape: tuple[int, ...]) -> Floats | Integers:
    if array.shape == shape:
        return array
    padded = np.full(shape, np.nan)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def _missing(method: str, package: str) -> str:
    return f"History.{method} needs {package}, which is not installed; run: pip install ntk-monitor[export]"
