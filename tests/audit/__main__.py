"""Run the alarm audit: every case in a process of its own; prints and writes the table and all that was recorded."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.audit import report
from tests.audit.cases import CASES, again, apart, named
from tests.audit.runs import run, saved


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__)
    parser.add_argument("--only", default="", help="names or parts of them, with commas between, or healthy or sick")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and dropout")
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), help="directory of records and table")
    parser.add_argument("--again", action="store_true", help="apply today's rules to the records of the last time")
    parser.add_argument("--here", action="store_true", help="in this process, without a table; names must be whole")
    options = parser.parse_args(argv)
    wanted = [part for part in options.only.split(",") if part]
    if options.here:
        for name in wanted:
            saved(run(named(name), options.out / name, options.seed), options.out)
        return 0
    names = [c.name for c in CASES if not wanted or any(w in c.name or w == c.kind for w in wanted)]
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        step = (
            partial(again, folder=options.out)
            if options.again
            else partial(apart, folder=options.out, seed=options.seed)
        )
        for outcome in pool.map(step, names):
            say(report.line(outcome))
            for problem in filter(None, (*outcome.warnings, *outcome.skipped, outcome.error)):
                say(f"    {problem}")
            outcomes.append(outcome)
    text = report.table(outcomes)
    (options.out / "audit.md").write_text(text, "utf-8")
    say(f"\n{text}\n{options.out / 'audit.md'}")
    return 0 if all(o.quiet if o.kind == "healthy" else o.named for o in outcomes) else 1


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
