"""Answers about a run: those that lie beside it, and those that its history holds without the network."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ntk_monitor.applications import learning_run, regime_run, stopping_run
from ntk_monitor.applications.report import Report
from ntk_monitor.errors import InputError
from ntk_monitor.history import History

FOLDER = "ntk_apps"
"""Inside the directory of a run: one folder for each application."""
FILE = "report.json"

FROM_HISTORY: Mapping[str, Callable[[History], Report]] = {
    "early_stopping": stopping_run.from_history,
    "learning_speed": learning_run.from_history,
    "lazy_or_rich": regime_run.from_history,
}
"""Applications that can be asked of a history alone."""


def beside(directory: Path) -> tuple[list[Report], list[str]]:
    """Return what applications left in RUN/ntk_apps/NAME/report.json, and a sentence for each file that is none."""
    found, notes = [], []
    for path in sorted((directory / FOLDER).glob(f"*/{FILE}")):
        try:
            found.append(Report.from_json(path.read_text(encoding="utf-8")))
        except (OSError, InputError) as error:
            notes.append(f"{path} is left out: {error}")
    return found, notes


def answers(directory: Path, history: History) -> tuple[list[Report], list[str]]:
    """Return what is known about a run, and a sentence for each damaged record.

    What lies beside it comes first, and takes the place of the same answer from the history: it may have been asked
    with options of its own.
    """
    left, damaged = beside(directory)
    there = {(one.name, one.title) for one in left}
    return [*left, *(one for one in of_history(history)[0] if (one.name, one.title) not in there)], damaged


def of_history(history: History) -> tuple[list[Report], list[str]]:
    """Return what a history answers by itself, and a sentence for each question that it lacks the inputs of."""
    found, notes = [], []
    for name, question in FROM_HISTORY.items():
        try:
            found.append(question(history))
        except InputError as error:
            notes.append(f"{name} cannot be answered from this history: {error}")
    return found, notes
