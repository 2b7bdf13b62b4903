"""Faults anywhere: whichever function of a probe fails, training ends with the weights it has without the monitor."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.records import Records, records
from tests.faults import ENDINGS, ERRORS, Fault, failing, names, watched
from tests.modules import Classifier, digits, loader, mlp
from tests.training import outcome, seeded, trainer

pytestmark = pytest.mark.filterwarnings("default::ntk_monitor.say.NTKWarning")

_STEPS = 4


class States(L.Callback):
    """The state of a run at each of the hooks that NTKMonitor works in."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, str]] = set()

    def _see(self, trainer: Any, module: Any) -> None:
        self.seen.add((trainer.global_step, _state(module)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._see(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._see(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._see(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._see(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._see(trainer, pl_module)


def _state(module: Any) -> str:
    found = outcome(module, module.trainer)
    return "".join(found[part] for part in ("weights", "gradients", "flags", "torch", "numpy", "python"))


def _run(root: Path, callbacks: list[Any]) -> tuple[Classifier, L.Trainer, BaseException | None]:
    """Train a few steps, and return what the run dies of, if it does."""
    seeded()
    module = Classifier(mlp())
    fitted = trainer(root, callbacks, max_steps=_STEPS, max_epochs=-1, logger=TensorBoardLogger(root))
    try:
        fitted.fit(module, loader(digits(96)))
    except BaseException as error:  # noqa: BLE001 - what passes through is what is tested
        return module, fitted, error
    return module, fitted, None


def _monitor(number: int) -> NTKMonitor:
    """One of the configurations that between them reach most of our code; quick: few samples, no drawings."""
    options: dict[str, Any] = {"probe": 6, "reference": 12, "gram_every": 0, "forecast_every": 2}
    ways: tuple[dict[str, Any], ...] = (
        {"every_n_steps": 2},
        {"every_n_steps": 3, "engine": "rows", "loss": "cross_entropy"},
        {"every_n_steps": 1, "outputs": "loss"},
    )
    return NTKMonitor(**options, **ways[number])


class Plain:
    """What the run is without the monitor, and which functions it calls with it."""

    def __init__(self, root: Path) -> None:
        states = States()
        module, fitted, _ = _run(root / "plain", [states])
        self.outcome = outcome(module, fitted)
        self.states = states.seen
        self.calls: list[dict[str, int]] = []
        self.steps: list[list[int]] = []
        _run(root / "warm", [_monitor(0)])  # what is imported late is there to be found
        for way in range(3):
            monitor = _monitor(way)
            with watched(names()) as calls:
                _run(root / str(way), [monitor])
            self.calls.append({name: count for name, count in calls.items() if count})
            self.steps.append(ntk.load_history(root / str(way)).steps.tolist())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp("plain"))


def _survives(root: Path, way: int, fault: Fault, plain: Plain) -> bool:
    """Assert that a run with this fault ends as it does without the monitor, with a history that can be read.

    True when the fault occurred: what is cached from run to run is called in the first one only.
    """
    monitor = _monitor(way)
    with redirect_stderr(io.StringIO()) as said, failing(fault) as fired:
        module, fitted, ended = _run(root, [monitor])
    assert ended is None, f"{fault}: {ended!r}"
    assert outcome(module, fitted) == plain.outcome, fault
    _readable(root, [])
    assert "Traceback" not in said.getvalue(), fault
    return bool(fired)


def _readable(root: Path, wanted: list[int]) -> None:
    """Assert that every record can be read, and that those of the wanted steps are the first."""
    files = list(root.rglob("*tfevents*"))
    assert all(not records.stopped for records in map(_all_of, files))
    try:
        steps = [snapshot.step for snapshot in ntk.load_history(root)]
    except ntk.HistoryError:  # nothing was written
        steps = []
    assert steps == sorted(set(steps))
    assert steps[: len(wanted)] == wanted


def _all_of(path: Path) -> Records:
    found = records(path)
    assert all(event.wall_time for event in found)
    return found


def _fault(plain: Plain, way: int, index: int, **how: Any) -> Fault:
    calls = plain.calls[way]
    name = sorted(calls)[index % len(calls)]
    return Fault(name, **{**how, "first": 1 + (how["first"] - 1) % calls[name]})


def test_the_watch_sees_the_stages_of_a_probe(plain: Plain) -> None:
    for name in (
        "ntk_monitor.monitor.Monitor.measure",
        "ntk_monitor.callbacks.sink.Sink.write",
        "ntk_monitor.session.Session.probe",
        "ntk_monitor.kernel.measured",
        "torch.autograd.grad",
    ):
        assert all(calls.get(name) for calls in plain.calls), name
    assert len(plain.calls[0]) > 200


def test_a_fault_in_the_training_step_itself_is_seen(tmp_path: Path, plain: Plain) -> None:
    """The harness can fail: what is not ours ends the run."""
    with failing(Fault("tests.modules.Classifier.training_step", ERRORS[0], first=3)):
        _, _, ended = _run(tmp_path, [_monitor(0)])
    assert ended is ERRORS[0]


# The stages of a probe, from what draws it to what writes it.
STAGES = (
    "ntk_monitor.callbacks.sink.Sink.__init__",
    "ntk_monitor.callbacks.trainer_data.drawn",
    "ntk_monitor.callbacks.trainer_data.reference_samples",
    "ntk_monitor.monitor.Monitor.__init__",
    "ntk_monitor.losses.candidates",
    "ntk_monitor.callbacks.trainer_data.training_outputs",
    "ntk_monitor.callbacks.trainer_data.returned_loss",
    "ntk_monitor.harmless.Fingerprint.of",
    "ntk_monitor.monitor.Monitor.measure",
    "ntk_monitor.network.Network.__init__",
    "ntk_monitor.kernel.measured",
    "ntk_monitor.spectrum.Spectrum.of",
    "ntk_monitor.modes.Modes.of",
    "ntk_monitor.outlook.Watch.look",
    "ntk_monitor.monitor.Monitor.finish",
    "ntk_monitor.monitor.Monitor.observe",
    "ntk_monitor.monitor.Monitor.tier",
    "ntk_monitor.events.event",
    "ntk_monitor.board.pictures",
    "ntk_monitor.callbacks.sink.Sink.write",
    "ntk_monitor.callbacks.sink.Sink.flush",
    "ntk_monitor.recorder.append",
    "ntk_monitor.portrait.Portrait.show",
    "ntk_monitor.portrait.thumbnails",
    "ntk_monitor.monitor.full_record",
)


@pytest.mark.parametrize("number", range(len(STAGES)), ids=[stage.rpartition(".")[0][12:] for stage in STAGES])
def test_a_stage_that_always_fails_costs_at_most_the_monitor(number: int, tmp_path: Path, plain: Plain) -> None:
    assert _survives(tmp_path, 0, Fault(STAGES[number], ERRORS[number % len(ERRORS)], always=True), plain)


@pytest.mark.parametrize("number", range(14))
def test_faults_all_over_a_probe(number: int, tmp_path: Path, plain: Plain) -> None:
    way = number % 3
    how = {"first": number, "always": number % 4 == 3, "late": number % 2 == 1}
    fault = _fault(plain, way, number * len(plain.calls[way]) // 14, error=ERRORS[number % len(ERRORS)], **how)
    _survives(tmp_path, way, fault, plain)


def test_the_budget_may_fail_at_any_of_its_payments(tmp_path: Path, plain: Plain) -> None:
    """Hooks pay for themselves at their end, outside of what guards their steps."""
    name = "ntk_monitor.schedule.Schedule.pay"
    fired = [
        _survives(tmp_path / str(first), 0, Fault(name, ERRORS[0], first=first), plain)
        for first in range(1, plain.calls[0][name] + 1, 2)
    ]
    assert sum(fired) > 5


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    way=st.integers(0, 2),
    index=st.integers(0, 10**6),
    error=st.sampled_from(ERRORS),
    first=st.integers(1, 10**4),
    always=st.booleans(),
    late=st.booleans(),
)
def test_faults_anywhere(
    plain: Plain, tmp_path_factory: pytest.TempPathFactory, way: int, index: int, **how: Any
) -> None:
    assume(_survives(tmp_path_factory.mktemp("run"), way, _fault(plain, way, index, **how), plain))


def _ends(root: Path, way: int, fault: Fault, plain: Plain) -> bool:
    """Assert that a run ends by this signal, in a state that it also has without the monitor, its probes on disk."""
    monitor = _monitor(way)
    with redirect_stderr(io.StringIO()), failing(fault) as fired:
        module, fitted, ended = _run(root, [monitor])
    if not fired:
        return False
    # Lightning makes SystemExit of KeyboardInterrupt.
    assert ended is fault.error or isinstance(ended, SystemExit), f"{fault}: {ended!r}"
    assert (fitted.global_step, _state(module)) in plain.states, fault
    finished = monitor.last.step if monitor.last is not None else -1
    _readable(root, [step for step in plain.steps[way] if step < finished])
    return True


@pytest.mark.parametrize("number", range(4))
def test_what_ends_a_process_passes_through(number: int, tmp_path: Path, plain: Plain) -> None:
    way = number % 3
    stage = ("monitor.Monitor.measure", "outlook.Watch.look", "session.Session.probe", "kernel.measured")[number]
    assert _ends(tmp_path, way, Fault(f"ntk_monitor.{stage}", ENDINGS[way], 2, late=number % 2 == 1), plain)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    way=st.integers(0, 2),
    index=st.integers(0, 10**6),
    error=st.sampled_from(ENDINGS),
    first=st.integers(1, 10**4),
    late=st.booleans(),
)
def test_signals_anywhere(
    plain: Plain, tmp_path_factory: pytest.TempPathFactory, way: int, index: int, **how: Any
) -> None:
    assume(_ends(tmp_path_factory.mktemp("run"), way, _fault(plain, way, index, **how), plain))
