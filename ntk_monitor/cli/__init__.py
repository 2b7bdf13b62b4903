"""The command line: parse, call, print. One file per command; `COMMANDS` lists them.

A command's module has a docstring (first line: what it does), an `EXAMPLE`, `add(parser)` that declares its options and
`run(**options)` that returns the exit code. It imports torch and Lightning inside `run`, so that --help is quick.
Exit codes: 0 done, 1 findings of severity error with --strict, 2 bad input (one sentence on stderr; --debug shows the
traceback), 130 interrupted.
"""

import importlib
import re
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ntk_monitor import __version__
from ntk_monitor.errors import InputError, NTKMonitorError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROGRAM = "ntk-monitor"
COMMANDS = ("demo", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is what follows the program's name, None: as in the shell."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(words)
        if options.command is None:
            raise InputError(f"wanted a command ({', '.join(COMMANDS)}), got none; see {PROGRAM} --help")
        known = vars(options[options.command])
        return int(_module(options.command).run(**{name: known[name] for name in known if name != "debug"}))
    except SystemExit as done:
        # --help and --version end here.
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except (ArgumentError, NTKMonitorError, OSError) as error:
        if "--debug" in words:
            raise
        sys.stderr.write(f"{PROGRAM}: {_sentence(error)}\n")
        return 2


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"ntk_monitor.cli.{command}")


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """jsonargparse's help, with line breaks of descriptions and examples kept."""

    def parser(description: str, example: str, **more: Any) -> ArgumentParser:
        made = ArgumentParser(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=Formatter,
            exit_on_error=False,
            **more,
        )
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    about = "Watch the empirical neural tangent kernel of a network while it trains."
    whole = parser(about, f"{PROGRAM} demo", prog=PROGRAM, version=__version__)
    commands = whole.add_subcommands(
        required=False, dest="command", metavar="COMMAND", title="commands", description=None
    )
    for name in COMMANDS:
        module = _module(name)
        text = (module.__doc__ or "").strip()
        one = parser(text, module.EXAMPLE)
        module.add(one)
        commands.add_subcommand(name, one, help=text.splitlines()[0])
    return whole


def _sentence(error: Exception) -> str:
    """Return the error in one line, in the words of the command line."""
    line = " ".join(str(error).split())
    wanted = re.fullmatch(r"Parser key \"([\w.]+)\": Expected an? <class '(\w+)'>\. Got value: (.*)", line)
    if wanted:
        option, kind, value = wanted.groups()
        kind = {"int": "a whole number", "float": "a number"}.get(kind, kind)
        line = f"--{option.replace('_', '-')} must be {kind}, got {value}"
    if isinstance(error, ArgumentError):
        line = f"{line.rstrip('.')}; see {PROGRAM} --help"
    return line
