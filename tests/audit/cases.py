"""All cases of the audit, by name, and how one is run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.audit.healthy import HEALTHY
from tests.audit.runs import Case, Outcome, load, read, saved
from tests.audit.sick import SICK

CASES = (*HEALTHY, *SICK)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def apart(name: str, folder: Path, seed: int = 0) -> Outcome:
    """Run one case in its own process, on one thread."""
    command = [sys.executable, "-m", "tests.audit", "--here", "--only", name, "--out", str(folder), "--seed", str(seed)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        case = named(name)
        return Outcome(name, case.kind, case.about, error=done.stderr[-2000:])
    return load(folder / f"{name}.json")


def again(name: str, folder: Path) -> Outcome:
    """Read the record of the last time anew."""
    case, outcome = named(name), load(folder / f"{name}.json")
    outcome.causes = case.causes
    outcome.bound = case.bound
    read(outcome, folder / name)
    saved(outcome, folder)
    return outcome
