"""Time travel: the history of a run from its checkpoints, by the same Monitor that measures a live one.

Every record depends on its checkpoint, the one before and the first, and on nothing else: not on what was computed in
which process, before or after an interruption. So finished records are kept, and several processes can share the work.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ntk_monitor import rebuild, weights
from ntk_monitor.checkpoints import Checkpoint, digest
from ntk_monitor.errors import CheckpointError, InputError, NTKMonitorError, NumericsError, said
from ntk_monitor.given import rates_of
from ntk_monitor.guard import undisturbed
from ntk_monitor.handover import load, save
from ntk_monitor.kernel import MEMORY_LIMIT
from ntk_monitor.look import Place
from ntk_monitor.losses import from_name
from ntk_monitor.memory import free
from ntk_monitor.monitor import Monitor
from ntk_monitor.network import Network
from ntk_monitor.outlook import EARLY
from ntk_monitor.planner import Plan, plan
from ntk_monitor.probe import Probe, default_samples
from ntk_monitor.reading import read
from ntk_monitor.rebuild import Wish
from ntk_monitor.recipe import Recipe
from ntk_monitor.restored import optimizers
from ntk_monitor.running import LearningRates
from ntk_monitor.series import Entry, Ledger, Survey, names
from ntk_monitor.snapshot import Snapshot
from ntk_monitor.tiers import skipped_record


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
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(slots=True)
class Outcome:
    """What became of the checkpoints."""

    computed: list[Path] = field(default_factory=list)
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
        CheckpointError: no checkpoint fits the model.
    """

    def __init__(self, found: Survey, request: Request, directory: Path) -> None:
        self.request, self.found = request, found.entries
        self.outcome = Outcome(failures=list(found.failures), notes=list(found.notes))
        self.ledger = Ledger(directory)
        paths = [entry.path for entry in found.entries]
        config, notes = rebuild.configuration(request.config, paths)
        first = self._typical(found.entries)
        self.model, more = rebuild.model(request.model, first, config)
        self.model.to(request.device)
        self.entries = self._fitting(found.entries)
        weights.apply(self.model, weights.chosen(first, key=request.key, average=request.average), str(first.path))
        self._loss, words = _loss(request.recipe.loss, rebuild.saved_manifest(paths))
        samples, where = rebuild.data(request.data, paths, config, drawn=request.probe is not None, trust=request.trust)
        self.outcome.notes += [*notes, *more, *words, *where]
        self.monitor = self._monitor(samples)
        self._refuse()
        self._known(first, config, samples)
        self._built = _plainly([request.model.name, request.model.words, config.get("model"), first.hyper_parameters])
        self._blank = self.monitor.handed()
        self._at: Entry | None = None
        self._name()

    def _typical(self, entries: Sequence[Entry]) -> Checkpoint:
        """Return the first checkpoint of the kind that most are of, from which the model is built."""
        counts = Counter(entry.layout for entry in entries)
        best = max(counts.values())
        for entry in entries:
            if counts[entry.layout] == best:
                with suppress(CheckpointError):  # it may have gone since
                    return read(entry.path, trust=self.request.trust)
        raise CheckpointError(f"none of the checkpoints at {entries[0].path.parent} is there any more")

    def _fitting(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        kept = []
        for entry in entries:
            try:
                weights.matched(self.model, entry.weights, str(entry.path))
                kept.append(entry)
            except CheckpointError as error:
                self.outcome.failures.append((entry.path, str(error)))
        if not kept:
            raise CheckpointError("; ".join(sentence for _, sentence in self.outcome.failures))
        return tuple(kept)

    def _monitor(self, samples: rebuild.Samples) -> Monitor:
        recipe, count = self.request.recipe, self.request.probe
        if isinstance(samples.probe, Probe):
            probe = samples.probe
        else:
            wanted = count or default_samples(_outputs(self.model, samples.probe, recipe))
            probe = Probe.of(samples.probe, wanted, recipe.seed)
        return Monitor(self.model, None, probe, self._loss, reference=samples.training, recipe=_plain(recipe))

    def _known(self, first: Checkpoint, config: Mapping[str, Any], samples: rebuild.Samples) -> None:
        """Tell the monitor what is known of the run: its length, batches and clipping."""
        trainer, monitor = config.get("trainer"), self.monitor
        trainer = trainer if isinstance(trainer, Mapping) else {}
        planned = trainer.get("max_steps")
        if monitor.total_steps is None and isinstance(planned, int) and planned > 0:
            monitor.total_steps = planned
        monitor.total_steps = monitor.total_steps or first.total_steps
        if trainer.get("gradient_clip_val") and trainer.get("gradient_clip_algorithm") in (None, "norm"):
            monitor.clip = float(trainer["gradient_clip_val"])
        if monitor.batch_size is None and isinstance(batch := getattr(samples.training, "batch_size", None), int):
            monitor.batch_size = batch * int(trainer.get("accumulate_grad_batches") or 1)
        self._planned = monitor.total_steps
        if monitor.total_steps is None:
            monitor.total_steps = self.entries[-1].step

    def _options(self) -> Mapping[str, Any]:
        recipe, monitor = self.request.recipe, self.monitor
        shown = ("outputs", "engine", "memory_limit", "reference", "forecast_every", "seed", "params", "gram_every")
        options = {name: repr(getattr(recipe, name)) for name in shown}
        return options | {
            "probe": monitor.probe.hash,
            "training": "" if monitor.reference is None else monitor.reference.hash,
            "population": monitor.population,
            "loss": "" if monitor.loss is None else monitor.loss.name,
            "model": [type(self.model).__qualname__, self._built],
            "forward": getattr(recipe.forward, "__qualname__", repr(recipe.forward)),
            "prefix": recipe.log_prefix,
            "planned": [self._planned, monitor.batch_size, monitor.clip],
            "version": 2,
        }

    def _name(self) -> None:
        recipe = self.request.recipe

        def turn(i: int) -> tuple[int, bool, bool]:
            return min(i, EARLY), self._foretells(i), _every(recipe.gram_every, i)

        self.names = names(self.entries, self._options(), turn)

    def _foretells(self, i: int) -> bool:
        recipe = self.request.recipe
        return recipe.reference > 0 and _every(recipe.forecast_every, i)

    def pending(self) -> tuple[Entry, ...]:
        """Return the checkpoints whose record is not there yet."""
        return tuple(one for one, name in zip(self.entries, self.names, strict=True) if not self.ledger.has(name))

    def run(
        self, wanted: Sequence[Entry], done: Callable[[Entry], None] | None = None, *, publish: bool = True
    ) -> None:
        """Measure these checkpoints, in increasing order, and keep each record as soon as it is finished.

        One that cannot be measured leaves the series, so that the next is compared with the one before it.

        Args:
            wanted: of `entries`.
            done: called after each.
            publish: write the event file after each; one process of several does it at the end instead.
        """
        for entry in wanted:
            try:
                # A failure before it may have given it a name whose record is there.
                if not self.ledger.has(self.names[self.entries.index(entry)]):
                    self._measure(self.entries.index(entry))
                    self.outcome.computed.append(entry.path)
            except NTKMonitorError as error:
                self._drop(entry, str(error))
            if publish:
                self.publish()
            if done is not None:
                done(entry)

    def _drop(self, entry: Entry, sentence: str) -> None:
        self.outcome.failures.append((entry.path, sentence))
        self.entries = tuple(one for one in self.entries if one is not entry)
        self._at = None
        self._name()

    def publish(self) -> Path | None:
        """Write the event file from the finished records; None: there is none."""
        return self.ledger.publish(self.names)

    def _refuse(self) -> None:
        """Raise where the kernel cannot fit, with the options that would."""
        recipe, samples = self.request.recipe, self.monitor.probe.samples
        outputs = _outputs(self.model, self.monitor.probe, recipe)
        rows = samples * (outputs if self._layout(outputs) == "full" else 1)
        room, needed = free(torch.device("cpu")), _COPIES * 8 * rows**2
        if room is None or needed <= room:
            return
        fewer = int(math.sqrt(room / (8 * _COPIES)) * samples / rows)
        least = [f"--probe {fewer}"] if fewer else []
        known = self.monitor.loss is not None and self.monitor.probe.targets is not None
        least += [f"--outputs {'loss' if known else 'trace'}"] if rows > samples else []
        raise InputError(
            f"a kernel of {rows:,} x {rows:,} and what is made of it take {_gib(needed)}, {_gib(room)} are free; "
            f"{' or '.join(least) or 'a machine with more memory'} would fit"
        )

    def _layout(self, outputs: int) -> Literal["full", "trace", "sum", "loss"]:
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return self.request.recipe.layout(self.monitor.probe.samples, outputs, parameters)

    def plan(self) -> Plan:
        """Return what the kernel of one probe costs, by route."""
        monitor, recipe = self.monitor, self.request.recipe
        options = {"params": recipe.params, "forward": recipe.forward, "memory_limit": recipe.memory_limit}
        layout = self._layout(_outputs(self.model, monitor.probe, recipe))
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
        entry, ledger = self.entries[i], self.ledger
        self._prepare(i)
        notes, snapshot = self._probed(i)
        self.outcome.notes += [note for note in notes if note not in self.outcome.notes]
        # The cost of a probe is a fact about this machine; the share of a run that is over is none at all.
        metrics = {name: value for name, value in snapshot.metrics.items() if name != "overhead"}
        facts = {name: value for name, value in snapshot.facts.items() if name != "startup_seconds"}
        # The state first: where there is a record, the next one can be made.
        save({"interval": self._interval(i), **self.monitor.handed()}, ledger.state(self.names[i]))
        ledger.write(self.names[i], replace(snapshot, metrics=metrics, facts=facts), self.request.recipe.log_prefix)
        if i:
            ledger.state(self.names[i - 1]).unlink(missing_ok=True)  # it holds two copies of the weights
        self._at = entry

    def _prepare(self, i: int) -> None:
        """Put the monitor where it stands after the record before this one."""
        if i == 0:
            self.monitor.take(self._blank)
        elif self._at is not self.entries[i - 1]:
            kept = self._kept(i - 1)
            if kept is None or (self._foretells(i - 1) and kept["interval"] != self._interval(i - 1)):
                self._again(i, kept)
            else:
                self.monitor.take(kept)

    def _kept(self, i: int) -> dict[str, Any] | None:
        with suppress(CheckpointError):
            found: dict[str, Any] = load(self.ledger.state(self.names[i]))
            return found
        return None

    def _again(self, i: int, kept: dict[str, Any] | None) -> None:
        """Measure what this record compares with once more, and record nothing of it."""
        self._at = None
        try:
            self.monitor.take(self._blank)
            if i > 1:
                self._load(0)
                with suppress(NumericsError):
                    self.monitor.begin(self.monitor.measure(self.entries[0].step))
            self._probed(i - 1)
        except NTKMonitorError:
            if kept is None:
                raise
            # Its file is gone: the forecast may be of another length, everything else is right.
            self.monitor.take(kept)

    def _probed(self, i: int) -> tuple[tuple[str, ...], Snapshot]:
        """Measure a checkpoint; what it hands on depends on this one and the first alone."""
        entry, monitor = self.entries[i], self.monitor
        begun, notes = monitor.handed(), tuple[str, ...]()
        try:
            notes = self._load(i)
            snapshot = monitor.finish(monitor.measure(entry.step, entry.epoch))
        except NumericsError as error:  # a diverged network: as in a live run, that is its record
            snapshot = skipped_record(entry.step, entry.epoch, monitor.probe, said(error))
            monitor.take(self._blank | {name: begun[name] for name in _FIRST})
        except NTKMonitorError:
            raise
        except Exception as error:
            raise InputError(f"{entry.path} cannot be measured: {said(error)}") from error
        if i and begun["first"] is None:
            monitor.take(monitor.handed() | dict.fromkeys(_FIRST))
        return notes, snapshot

    def _interval(self, i: int) -> int | None:
        after = self.entries[i + 1 : i + 2]
        return after[0].step - self.entries[i].step if after else None

    def _load(self, i: int) -> tuple[str, ...]:
        request, entry = self.request, self.entries[i]
        whole = read(entry.path, trust=request.trust)
        chosen = weights.chosen(whole, key=request.key, average=request.average)
        if digest(chosen) != entry.digest:
            raise CheckpointError(f"{entry.path} has been written to since it was first read; start again")
        notes = weights.apply(self.model, chosen, str(entry.path))
        made, more = optimizers(self.model, whole)
        monitor = self.monitor
        monitor.place = Place(i, self._interval(i))
        monitor.optimizers, monitor.steps = made, entry.step
        monitor.learning_rates = LearningRates()
        if rates := tuple(rates_of(made)):
            monitor.learning_rates.record(entry.step, rates)
        constant = (_CONSTANT,) if made and whole.schedulers else ()
        return (*whole.notes, *notes, *more, *constant)


_CONSTANT = "forecasts keep the learning rate of their checkpoint, as its schedule cannot be followed without the run"

# What a monitor hands on of its first probe.
_FIRST = ("first", "first_values")


# A kernel in float64, its eigenvectors, the kernel of the probe before, and what eigensolvers work in.
_COPIES = 4


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**27 else f"{count:,} bytes"


def _plainly(value: Any) -> Any:
    """Return a nest of plain values; of an object only its type, whose name is the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plainly(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [_plainly(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__qualname__


def _every(period: int, i: int) -> bool:
    return period > 0 and i % period == 0


def _plain(recipe: Recipe) -> Recipe:
    # Blocks of one size on every machine: the last bits of a kernel depend on it.
    return replace(recipe, loss=None, verify=False, memory_limit=recipe.memory_limit or MEMORY_LIMIT)


def _loss(given: Any, manifest: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    if given is not None:
        return (from_name(given) or given if isinstance(given, str) else given), ()
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
