"""Help of every command: readable at 80 columns, with an example that parses; shells complete commands and paths."""

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ntk_monitor.cli import COMMANDS, PROGRAM, _parser, _taken, main
from ntk_monitor.cli.completion import SHELLS


def shown(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_fits_the_terminal(
    words: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(words, monkeypatch, capsys, columns).rstrip().splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0].startswith(f"usage: {PROGRAM}")
    assert lines[-2] == "example:"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_the_command_does_and_what_each_option_is(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"ntk_monitor.cli.{command}")
    text = shown([command, "--help"], monkeypatch, capsys, 80)
    flat = " ".join(text.split())
    assert module.__doc__ is not None
    assert " ".join(module.__doc__.split()) in flat
    assert module.__doc__.splitlines()[0].split()[0] in " ".join(shown(["--help"], monkeypatch, capsys, 80).split())
    subcommands = _parser()._subcommands_action
    assert subcommands is not None
    for action in subcommands._name_parser_map[command]._actions:
        assert action.help, action.option_strings or action.dest


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_parses(command: str) -> None:
    example = importlib.import_module(f"ntk_monitor.cli.{command}").EXAMPLE
    program, *words = shlex.split(example)
    assert program == PROGRAM
    words, _ = _taken(words)
    assert _parser().parse_args(words).command == command


def test_commands_that_read_records_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ntk_monitor.cli import main\n"
        "assert main(['compare', 'nowhere', '--steps', '0', '1']) == 2\n"
        "assert main(['export', 'nowhere', '--to', 'csv']) == 2\n"
        "import ntk_monitor.compare, ntk_monitor.export, ntk_monitor.report\n"
        "print(sorted({'torch', 'lightning', 'scipy', 'pandas', 'xarray', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_completion_without_shtab_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ntk_monitor.cli.completion.importlib.util.find_spec", lambda name: None)
    assert main(["--print-completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


def test_completion_for_an_unknown_shell_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "fish"]) == 2
    assert "bash, zsh, tcsh, got fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_know_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for command in COMMANDS:
        assert command in script


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["comp"], {"compare"}),
        (["export", "--t"], {"--to"}),
        (["compare", "ru"], {"runs"}),
        (["report", "--out", "note"], {"notes.txt"}),
    ],
    ids=" ".join,
)
def test_bash_completes_commands_options_and_paths(
    typed: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "runs").mkdir()
    (tmp_path / "notes.txt").touch()
    words = shlex.join([PROGRAM, *typed])
    # What readline does when the key is pressed.
    press = (
        f"source ./script; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; COMP_TYPE=9; "
        '$(complete -p ntk-monitor | sed "s/.*-F \\([^ ]*\\).*/\\1/") ntk-monitor "${COMP_WORDS[-1]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    press = press.replace("$(complete", "f=$(complete").replace(') ntk-monitor "$', '); $f ntk-monitor "$')
    done = subprocess.run(["bash", "-c", press], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {word.rstrip("/ ") for word in done.stdout.split()} == offered
