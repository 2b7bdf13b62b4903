"""The command line: parse, call, print. One file per command; `COMMANDS` lists them.

A command's module has a docstring (first line: what it does), an `EXAMPLE`, `add(parser)` that declares its options and
`run(**options)` that returns the exit code; `WORDS` where options have arguments of their own that follow. It imports
torch and Lightning inside `run`, so that --help is quick.
Exit codes: 0 done, 1 findings of severity error with --strict, 2 bad input (one sentence on stderr; --debug shows the
traceback), 130 interrupted.
"""

import importlib
import re
import sys
import textwrap
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ntk_monitor import __version__
from ntk_monitor.errors import InputError, NTKMonitorError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROGRAM = "ntk-monitor"
COMMANDS = ("demo", "analyze", "plan", "report", "compare", "export", "app")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is what follows the program's name, None: as in the shell."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        words, taken = _taken(words)
        parser = _parser()
        options = parser.parse_args(words)
        if options.print_completion is not None:
            from ntk_monitor.cli.completion import script

            sys.stdout.write(script(parser, options.print_completion))
            return 0
        if options.command is None:
            raise InputError(f"wanted a command ({', '.join(COMMANDS)}), got none; see {PROGRAM} --help")
        known = vars(options[options.command])
        return int(_module(options.command).run(**{name: known[name] for name in known if name != "debug"}, **taken))
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


def _taken(words: list[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Take out the arguments of classes that only the command can parse, such as --model.width 64.

    A command names them in `WORDS`; "model" gives the option `model_words`.
    """
    command = next((word for word in words if word in COMMANDS), None)
    prefixes = getattr(_module(command), "WORDS", ()) if command else ()
    kept: list[str] = []
    taken: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    rest = iter(words)
    for word in rest:
        prefix = next((p for p in prefixes if word.startswith(f"--{p}.")), None)
        if prefix is None:
            kept.append(word)
            continue
        taken[prefix].append(word)
        if "=" not in word and (value := next(rest, None)) is not None:
            taken[prefix].append(value)
    return kept, {f"{prefix}_words": tuple(found) for prefix, found in taken.items() if found}


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"ntk_monitor.cli.{command}")


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from ntk_monitor.cli.completion import complete_paths

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """jsonargparse's help, paragraphs of descriptions filled, indented lines (examples) kept as they are."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            paragraphs = (part for part in text.strip().split("\n\n"))
            return "\n\n".join(
                part if "\n  " in part else textwrap.fill(" ".join(part.split()), width) for part in paragraphs
            )

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
    whole.add_argument(
        "--print-completion", type=str, default=None, metavar="SHELL", help="completion script for bash, zsh or tcsh"
    )
    commands = whole.add_subcommands(
        required=False, dest="command", metavar="COMMAND", title="commands", description=None
    )
    for name in COMMANDS:
        module = _module(name)
        text = (module.__doc__ or "").strip()
        one = parser(text, module.EXAMPLE)
        module.add(one)
        complete_paths(one)
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
