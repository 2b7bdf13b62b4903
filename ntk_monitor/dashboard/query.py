"""What a request asks for, read from its URL with bounds on everything."""

from dataclasses import dataclass

from werkzeug.datastructures import MultiDict

from ntk_monitor.errors import InputError

MOST_RUNS = 6
"""Runs that one figure overlays at most; the page ticks three."""
_LONGEST = 4096
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Query:
    """The arguments of one request; every reading of one checks it."""

    arguments: MultiDict[str, str]

    def text(self, name: str) -> str:
        """Return an argument that has to be there.

        Raises:
            InputError: it is missing, or absurdly long.
        """
        value = self.arguments.get(name)
        if not value or len(value) > _LONGEST:
            raise InputError(f"wanted ?{name}=..., got {'nothing' if not value else f'{len(value)} characters'}")
        return value

    def number(self, name: str, least: int = 0) -> int | None:
        """Return an integer argument, None where it is missing or empty.

        Raises:
            InputError: it is no integer, or out of bounds.
        """
        value = self.arguments.get(name)
        if not value:
            return None
        digits = value.removeprefix("-")
        sound = len(value) <= 20 and digits.isascii() and digits.isdecimal()
        if not (sound and least <= int(value) <= _LARGEST):
            raise InputError(f"wanted ?{name}= a whole number of at least {least}, got {value[:40]!r}")
        return int(value)

    def one_of(self, name: str, *choices: str) -> str:
        """Return an argument out of a few, the first where it is missing.

        Raises:
            InputError: it is another.
        """
        value = self.arguments.get(name) or choices[0]
        if value not in choices:
            raise InputError(f"wanted ?{name}= one of {', '.join(choices)}, got {value[:40]!r}")
        return value

    def runs(self) -> list[str]:
        """Return the runs of ?run=, in their order, without repetition.

        Raises:
            InputError: there are more than `MOST_RUNS`.
        """
        runs = list(dict.fromkeys(run[:_LONGEST] for run in self.arguments.getlist("run") if run))
        if len(runs) > MOST_RUNS:
            raise InputError(f"wanted at most {MOST_RUNS} runs at once, got {len(runs)}; untick some")
        return runs
