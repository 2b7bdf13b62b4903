"""The command line: the demo leaves a whole record, bad input is one sentence, help is quick and fits a terminal."""

import contextlib
import io
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ntk_monitor as ntk
from ntk_monitor.cli import COMMANDS, main
from ntk_monitor.errors import InputError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit code, output and directory of a demo of one epoch: 23 batches, a probe at every second."""
    out, said = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["demo", "--epochs", "1", "--every", "2", "--out", str(out)])
    return code, said.getvalue(), out


def test_demo_leaves_a_history(demo: tuple[int, str, Path]) -> None:
    code, _, out = demo
    assert code == 0
    history = ntk.load_history(out)
    assert len(history.measured) == len(history) >= 10
    assert not history.notes
    assert np.isfinite(history.eigenvalues).all()
    for name in ("trace", "condition_number", "effective_rank", "alignment", "loss_value"):
        assert np.isfinite(history.scalar(name)).all(), name
    assert {snapshot.loss_status for snapshot in history} == {"matched"}


def test_demo_says_what_it_found_and_where(demo: tuple[int, str, Path]) -> None:
    _, said, out = demo
    for words in ("Validation accuracy: ", "condition number", f"--logdir {out}", "http://localhost:6006/?tagFilter="):
        assert words in said
    # Nothing but the demo's own words: no tips, no device lines, no warnings.
    assert not any(word in said for word in ("Tip", "GPU", "Warning", "`Trainer"))


def test_demo_draws_the_figures(demo: tuple[int, str, Path]) -> None:
    drawn = {path.stem: path.read_bytes() for path in (demo[2] / "figures").iterdir()}
    kernel = {"spectrum", "spectrum_over_training", "residual_bands", "scalars", "gram"}
    assert set(drawn) == kernel | {"learning_rate_interval", "loss_forecast", "layer_updates"}
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())


def test_demo_ends_with_a_report(demo: tuple[int, str, Path]) -> None:
    _, said, out = demo
    assert str(out / "report.html") in said
    assert "<h2>run</h2>" in (out / "report.html").read_text()


def test_a_second_demo_does_not_continue_the_first(demo: tuple[int, str, Path]) -> None:
    from ntk_monitor.cli.demo import _free

    assert _free(demo[2]).name == "run-2"


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ntk_monitor.cli.digits import Digits

    step = Digits.training_step

    def interrupted(self: Digits, batch: Any, index: int) -> object:
        if index == 5:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(Digits, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["demo", "--epochs", "1", "--every", "4", "--out", str(tmp_path)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert ntk.load_history(tmp_path).steps.tolist() == [0, 4]
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "wanted a command"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--epochs", "many"], "--epochs must be a whole number, got many"),
        (["demo", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["demo", "--every", "-3"], "--every must be at least 1, got -3"),
        (["demo", "--seed", "-1"], "--seed must be between"),
        (["demo", "--out", __file__], "--out must be a directory, got the file"),
        (["demo", "--loud"], "--loud"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ntk-monitor: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err


def test_debug_shows_the_error_itself() -> None:
    with pytest.raises(InputError, match="--epochs"):
        main(["demo", "--epochs", "0", "--debug"])


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_fits_a_terminal_and_ends_with_an_example(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2] == "example:"
    assert lines[-1].startswith("  ntk-monitor ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ntk-monitor {ntk.__version__}\n"


def test_the_program_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="ntk-monitor")
    assert script.load() is main


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['ntk-monitor', 'demo', '--help']\n"
        "try: runpy.run_module('ntk_monitor.cli', run_name='__main__')\n"
        "except SystemExit as done: assert done.code == 0, done.code\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'scipy', 'sklearn', 'matplotlib', 'tensorboard'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
