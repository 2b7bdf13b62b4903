"""Completion of commands, options and paths in the shell, by shtab.

In bash: eval "$(ntk-monitor --print-completion bash)", in .bashrc or wherever completions are kept; likewise zsh, tcsh.
"""

import contextlib
import importlib.util
import io
from typing import TYPE_CHECKING

from ntk_monitor.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SHELLS = ("bash", "zsh", "tcsh")

# What shtab.FILE and shtab.DIRECTORY hold; here, because a parser is built where shtab is not installed.
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
_DIRECTORY = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}
_PATHS = {"RUN": _DIRECTORY, "DIR": _DIRECTORY, "FILE": _FILE, "CHECKPOINT": _FILE}


def complete_paths(parser: "ArgumentParser") -> None:
    """Mark the arguments of a command that are paths, which their metavar tells."""
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in _PATHS:
            action.complete = _PATHS[action.metavar]  # type: ignore[attr-defined]


def script(parser: "ArgumentParser", shell: str) -> str:
    """Return the script to be sourced by the shell. The parser cannot parse any more afterwards.

    Raises:
        InputError: an unknown shell, or shtab is not installed.
    """
    if shell not in SHELLS:
        raise InputError(f"--print-completion must be one of {', '.join(SHELLS)}, got {shell}")
    if importlib.util.find_spec("shtab") is None:
        raise InputError("completion in the shell needs shtab, which is not installed; run: pip install shtab")
    if hasattr(parser, "get_completion_script"):
        return str(parser.get_completion_script(f"shtab-{shell}")) + "\n"
    # Older jsonargparse prints the script and leaves.
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        parser.parse_args([f"--print_shtab={shell}"])
    return said.getvalue()
