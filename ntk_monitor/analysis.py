"""Time travel: the history of a run from its checkpoints, by the same Monitor that measures a live one.

Every record depends on its checkpoint, the one before and the first, and on nothing else: not on what was computed in
which process, before or after an interruption. So finished records are kept, and several processes can share the work.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from ntk_monitor import rebuild, weights
from ntk_monitor.errors import CheckpointError, InputError, NTKMonitorError, said
from ntk_monitor.given import rates_of
from ntk_monitor.guard import undisturbed
from ntk_monitor.handover import load, save
from ntk_monitor.look import Place
from ntk_monitor.losses import from_name
from ntk_monitor.monitor import Monitor
from ntk_monitor.network import Network
from ntk_monitor.planner import Plan, plan
from ntk_monitor.probe import Probe, default_samples
from ntk_monitor.reading import read
from ntk_monitor.rebuild import Wish
from ntk_monitor.recipe import Recipe
from ntk_monitor.restored import optimizers
from ntk_monitor.running import LearningRates
from ntk_monitor.series import Entry, Ledger, Survey, names
from ntk_monitor.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for: how to build model and data, what to measure, where to write."""

    model: Wish = field(default_factory=Wish)
    data: Wish = field(default_factory=Wish)
    config: Path | None = None
    probe: int | None = None
    key: str | None = None
    average: bool = False
    trust: bool = False
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(slots=True)
class Outcome:
    """What became of the checkpoints."""

    computed: list[Path] = field(default_factory=list)
    reused: list[Path] = field(default_factory=list)
    failures: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Analysis:
    """A series of checkpoints, a model to put them into, and a Monitor that measures them.

    Args:
        found: the checkpoints, in order.
        request: options.
        directory: where records are kept.

    Raises:
        InputError: model or data cannot be built from what is known.
        CheckpointError: the first checkpoint cannot be read any more.
    """

    def __init__(self, found: Survey, request: Request, directory: Path) -> None:
        self.entries, self.request = found.entries, request
        self.outcome = Outcome(failures=list(found.failures), notes=list(found.notes))
        self.ledger = Ledger(directory)
        paths = [entry.path for entry in found.entries]
        first = read(paths[0], trust=request.trust)
        config, notes = rebuild.configuration(request.config, paths)
        self.model, more = rebuild.model(request.model, first, config)
        self._loss, words = _loss(request.recipe.loss, rebuild.saved_manifest(paths))
        source, where = rebuild.data(request.data, paths, config, trust=request.trust)
        self.outcome.notes += [*notes, *more, *words, *where]
        weights.apply(self.model, weights.chosen(first, key=request.key, average=request.average), str(paths[0]))
        self.monitor = self._monitor(source)
        self.names = names(self.entries, self._options())
        self._at: int | None = None

    def _monitor(self, source: Any) -> Monitor:
        recipe = self.request.recipe
        samples = self.request.probe
        probe = source if isinstance(source, Probe) and samples is None else None
        if probe is None:
            wanted = samples or default_samples(_outputs(self.model, source, recipe))
            probe = Probe.of(source, wanted, recipe.seed)
        several = isinstance(source, (Dataset, DataLoader))
        monitor = Monitor(
            self.model, None, probe, self._loss, reference=source if several else None, recipe=_plain(recipe)
        )
        if isinstance(source, DataLoader) and monitor.batch_size is None:
            monitor.batch_size = source.batch_size
        if monitor.total_steps is None:
            monitor.total_steps = self.entries[-1].step
        return monitor

    def _options(self) -> Mapping[str, Any]:
        recipe = self.request.recipe
        shown = ("outputs", "engine", "memory_limit", "reference", "forecast_every", "seed", "params", "gram_every")
        options = {name: repr(getattr(recipe, name)) for name in shown}
        return options | {
            "probe": self.monitor.probe.hash,
            "loss": "" if self.monitor.loss is None else self.monitor.loss.name,
            "model": type(self.model).__qualname__,
            "forward": getattr(recipe.forward, "__qualname__", repr(recipe.forward)),
            "key": self.request.key,
            "average": self.request.average,
            "version": 1,
        }

    def pending(self) -> tuple[int, ...]:
        """Return the places of checkpoints whose record is not there yet."""
        return tuple(i for i, name in enumerate(self.names) if not self.ledger.has(name))

    def run(self, places: Sequence[int], done: Callable[[Entry], None] | None = None, *, publish: bool = True) -> None:
        """Measure these checkpoints, in increasing order, and keep each record as soon as it is finished.

        Args:
            places: in `entries`.
            done: called after each.
            publish: write the event file after each; one process of several does it at the end instead.
        """
        for i in places:
            entry = self.entries[i]
            try:
                self._measure(i)
                self.outcome.computed.append(entry.path)
            except NTKMonitorError as error:
                self.outcome.failures.append((entry.path, said(error)))
            if publish:
                self.publish()
            if done is not None:
                done(entry)

    def publish(self) -> Path | None:
        """Write the event file from the finished records."""
        return self.ledger.publish(self.names)

    def plan(self) -> Plan:
        """Return what the kernel of one probe costs, by route."""
        monitor, recipe = self.monitor, self.request.recipe
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        outputs = _outputs(self.model, monitor.probe, recipe)
        options = {"params": recipe.params, "forward": recipe.forward, "memory_limit": recipe.memory_limit}
        layout = recipe.layout(monitor.probe.samples, outputs, parameters)
        if layout == "loss":
            options |= {"targets": monitor.probe.targets, "loss": monitor.loss}
        return plan(self.model, monitor.probe.inputs, outputs=layout, **options)

    def extended(self, found: Survey) -> "Analysis":
        """Return the analysis of a series that has grown, with what this one has already said."""
        newer = Analysis(found, self.request, self.ledger.directory)
        newer.outcome.computed = self.outcome.computed
        newer.outcome.notes = list(dict.fromkeys([*self.outcome.notes, *newer.outcome.notes]))
        return newer

    def _measure(self, i: int) -> None:
        self._prepare(i)
        notes, snapshot = self._probed(i)
        if snapshot.status == "skipped":
            raise InputError(f"{self.entries[i].path} cannot be measured: {snapshot.reason}")
        for note in notes:
            if note not in self.outcome.notes:
                self.outcome.notes.append(note)
        # The cost of a probe is a fact about this machine; the share of a run that is over is none at all.
        metrics = {name: value for name, value in snapshot.metrics.items() if name != "overhead"}
        self.ledger.write(self.names[i], replace(snapshot, metrics=metrics), self.request.recipe.log_prefix)
        save(self.monitor.handed(), self.ledger.state(self.names[i]))
        self.ledger.forget(but=(self.names[i],))
        self._at = i

    def _probed(self, i: int) -> tuple[tuple[str, ...], Snapshot]:
        notes = self._load(i)
        return notes, self.monitor.snapshot(self.entries[i].step, self.entries[i].epoch, tier="full")

    def _prepare(self, i: int) -> None:
        """Put the monitor where it stands after the record before this one."""
        if i == 0 or self._at == i - 1:
            return
        state = self.ledger.state(self.names[i - 1])
        with suppress(CheckpointError, KeyError):
            self.monitor.take(load(state))
            return
        # Nothing is kept of the record before: measured again, for what this one compares with, and not recorded.
        self._load(0)
        self.monitor.begin(self.monitor.measure(self.entries[0].step))
        if i > 1:
            self._probed(i - 1)

    def _load(self, i: int) -> tuple[str, ...]:
        request, entry = self.request, self.entries[i]
        whole = read(entry.path, trust=request.trust)
        chosen = weights.chosen(whole, key=request.key, average=request.average)
        notes = weights.apply(self.model, chosen, str(entry.path))
        made, more = optimizers(self.model, whole)
        monitor, after = self.monitor, self.entries[i + 1 : i + 2]
        monitor.place = Place(i, after[0].step - entry.step if after else None)
        monitor.optimizers, monitor.steps = made, entry.step
        monitor.learning_rates = LearningRates()
        if rates := tuple(rates_of(made)):
            monitor.learning_rates.record(entry.step, rates)
        return (*whole.notes, *notes, *more)


def _plain(recipe: Recipe) -> Recipe:
    return replace(recipe, loss=None, verify=False)


def _loss(given: Any, manifest: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    if given is not None:
        return given, ()
    known = str(manifest.get("loss", ""))
    found = from_name(known) if known else None
    if found is not None:
        return found, (f"the loss is {known}, as the run itself found",)
    return None, ("the loss is not known: no modes, no learning-rate bound, no forecast; pass --loss cross_entropy",)


def _outputs(model: nn.Module, source: Any, recipe: Recipe) -> int:
    """Return C, by one forward pass of a few samples."""
    few = Probe.of(source, 2, recipe.seed)
    with undisturbed(seed=recipe.seed):
        network = Network.careful(model, few.inputs, params=recipe.params, forward=recipe.forward)
        return int(network.outputs(network.prepared(few.inputs)).shape[1])
