"""Measure the kernel of checkpoints that a run left on disk.

CHECKPOINT is a file (.ckpt, .pt, .pth, .safetensors), a Hugging Face checkpoint
directory, a sharded one, or any directory that holds some of them. Model and
data are rebuilt from --model and --data, else from the config.yaml that
LightningCLI saved, a Hugging Face config.json, the hyper-parameters in the
checkpoint and the probe that the run's own monitor stored. Arguments of the
classes follow as --model.NAME VALUE and --data.NAME VALUE. Checkpoints that
were measured before with the same options are not measured again.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntk_monitor.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from ntk_monitor.analysis import Analysis, Request
    from ntk_monitor.series import Entry, Lookout, Survey

EXAMPLE = "ntk-monitor analyze lightning_logs/version_0 --model shop.Net --data shop.Data"

WORDS = ("model", "data")
"""Options whose own arguments follow as --model.NAME VALUE."""

_PAUSE = 2.0
"""Seconds between two looks; a file that changes from one to the next is still being written."""


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files or directories")
    add_source(parser)
    parser.add_argument("--out", type=str, default=None, metavar="DIR", help="default: ntk_analysis beside the first")
    parser.add_argument("--strict", action="store_true", help="exit with 1 on a failure or an error that health finds")
    parser.add_argument(
        "--watch", type=float, default=None, metavar="SECONDS", help="wait for new checkpoints, at most so long"
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="processes or GPUs that share the work")
    parser.add_argument("--num-nodes", type=int, default=1, metavar="N", help="machines")
    parser.add_argument("--strategy", type=str, default="ddp", help="how Fabric starts them")
    parser.add_argument("--no-report", action="store_true", help="write no report.html")


def add_source(parser: "ArgumentParser") -> None:
    """Declare what `analyze` and `plan` share: model, data, what to measure."""
    parser.add_argument("--model", type=str, default=None, metavar="NAME", help="pkg.Class or pkg:function")
    parser.add_argument("--data", type=str, default=None, metavar="NAME", help="pkg.DataModule, pkg:function or a file")
    parser.add_argument("--config", type=str, default=None, metavar="FILE", help="config.yaml of LightningCLI")
    parser.add_argument("--probe", type=int, default=None, metavar="N", help="samples; default: the run's own probe")
    parser.add_argument(
        "--loss",
        type=str,
        default=None,
        metavar="NAME",
        help="mse, cross_entropy, bce_with_logits, huber, token_cross_entropy, or as a record shows it with options: "
        "'token_cross_entropy(mean, shifted)'",
    )
    parser.add_argument("--outputs", type=str, default="auto", help="auto, full, trace, sum or loss")
    parser.add_argument("--params", type=str, default=None, metavar="REGEX", help="parameters to measure")
    parser.add_argument(
        "--forward", type=str, default=None, metavar="NAME", help="pkg:function(module, inputs) → outputs"
    )
    parser.add_argument("--engine", type=str, default="auto", help="auto, structured, reference or rows")
    parser.add_argument("--memory-limit", type=int, default=None, metavar="BYTES", help="for blocks of gradients")
    parser.add_argument("--reference", type=int, default=512, metavar="N", help="training samples behind forecasts")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--batch-size", type=int, default=None, metavar="N", help="samples of one optimizer step")
    parser.add_argument("--total-steps", type=int, default=None, metavar="N", help="planned length of the run")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--prefix", type=str, default="ntk", help="of the tags")
    parser.add_argument("--average", action="store_true", help="measure averaged weights (EMA, SWA)")
    parser.add_argument("--state-dict-key", type=str, default=None, metavar="KEY", help="which weights of a checkpoint")
    parser.add_argument("--trust-checkpoint", action="store_true", help="unpickle what needs it: your own files only")


def requested(options: dict[str, Any]) -> "Request":
    """Return what the options ask for.

    Raises:
        InputError: a value outside its range, or a function that cannot be imported.
    """
    from ntk_monitor.analysis import Request
    from ntk_monitor.rebuild import Wish, imported
    from ntk_monitor.recipe import Recipe

    if options["probe"] is not None and options["probe"] < 1:
        raise InputError(f"--probe must be at least 1, got {options['probe']}")
    recipe = Recipe(
        outputs=options["outputs"],
        loss=options["loss"],
        params=options["params"],
        forward=None if options["forward"] is None else imported(options["forward"]),
        engine=options["engine"],
        memory_limit=options["memory_limit"],
        reference=options["reference"],
        seed=options["seed"],
        log_prefix=options["prefix"],
        gram_every=1,
        batch_size=options["batch_size"],
        total_steps=options["total_steps"],
    )
    config = options["config"]
    return Request(
        model=Wish(options["model"], tuple(options.get("model_words", ()))),
        data=Wish(options["data"], tuple(options.get("data_words", ()))),
        config=None if config is None else Path(config),
        probe=options["probe"],
        key=options["state_dict_key"],
        average=options["average"],
        trust=options["trust_checkpoint"],
        device=_device(options["device"]),
        recipe=recipe,
    )


def lookout(options: dict[str, Any], request: "Request") -> "Lookout":
    """Return what looks for the checkpoints."""
    from ntk_monitor.series import Lookout

    return Lookout(
        options["checkpoints"],
        key=request.key,
        average=request.average,
        trust=request.trust,
        but=() if request.data.name is None else (Path(request.data.name),),
    )


def run(**options: Any) -> int:
    """Measure, publish, say what was found; returns the exit code."""
    if options["devices"] > 1 or options["num_nodes"] > 1 or _launched():
        from ntk_monitor.cli.shared import shared

        return shared(options, alone)
    return alone(options)


def alone(options: dict[str, Any], rank: int = 0, world: int = 1, meet: "Callable[[], None] | None" = None) -> int:
    """Do the share of one process; the first of several publishes what all have found."""
    from rich.console import Console

    console, request, seconds = Console(highlight=False, quiet=rank > 0), requested(options), options["watch"]
    eyes = lookout(options, request)
    analysis = prepared(request, eyes.look() if seconds is None else _awaited(eyes, seconds), _directory(options))
    together = meet or (lambda: None)
    before = len(analysis.entries) - len(analysis.pending())
    try:
        mine = share(analysis.pending(), rank, world)
        together()  # nothing may be finished before all have seen what is pending
        _go(analysis, mine, console, publish=world == 1)
        together()
        if rank > 0:
            return 0
        _go(analysis, analysis.pending(), console)  # what another process could not measure
        if seconds is not None:
            analysis = _watched(analysis, eyes, seconds, console)
    except KeyboardInterrupt:
        analysis.publish()
        console.print(f"interrupted: {len(analysis.pending())} checkpoints to go, by the same command", markup=False)
        raise
    if analysis.publish() is None:
        raise InputError("; ".join(sentence for _, sentence in analysis.outcome.failures) or "nothing was measured")
    return _said(analysis, before, options, console)


def prepared(request: "Request", found: "Survey", directory: Path) -> "Analysis":
    """Return the analysis of what was found.

    Raises:
        InputError: nothing was found, or model or data cannot be built.
    """
    from ntk_monitor.analysis import Analysis

    if not found.entries:
        raise InputError("; ".join(sentence for _, sentence in found.failures) or "no checkpoint can be read")
    return Analysis(found, request, directory)


# What a process measures again before its first record: the record before it, and the first kernel.
_AGAIN = 1.5


def share(pending: "Sequence[Entry]", rank: int, world: int) -> "Sequence[Entry]":
    """Return the part of one process of several: neighbours, since a record needs what the one before hands on.

    The first process has nothing to measure again, and so takes more of them.
    """
    most = (len(pending) + _AGAIN * (world - 1)) / world
    bounds = [0, *(min(len(pending), round(most + k * (most - _AGAIN))) for k in range(world - 1)), len(pending)]
    return pending[bounds[rank] : max(bounds[rank], bounds[rank + 1])]


def _awaited(eyes: "Lookout", seconds: float) -> "Survey":
    """Return what is there once it no longer changes."""
    deadline = time.monotonic() + seconds
    eyes.look(growing=True)
    while True:
        time.sleep(_PAUSE)
        found = eyes.look(growing=True)
        if found.entries or time.monotonic() > deadline:
            return found


def _watched(analysis: "Analysis", eyes: "Lookout", seconds: float, console: "Console") -> "Analysis":
    """Measure what appears, until nothing has for so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(_PAUSE)
        found = eyes.look(growing=True)
        if found.entries != analysis.found:
            analysis = analysis.extended(found)
            _go(analysis, analysis.pending(), console)
            deadline = time.monotonic() + seconds
    return analysis


def _go(analysis: "Analysis", wanted: "Sequence[Entry]", console: "Console", *, publish: bool = True) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring checkpoints", total=len(wanted))
        analysis.run(wanted, lambda _: progress.advance(task), publish=publish)


def _said(analysis: "Analysis", before: int, options: dict[str, Any], console: "Console") -> int:
    from ntk_monitor.cli.words import print_summary
    from ntk_monitor.health import findings
    from ntk_monitor.history import load_history

    directory, outcome = _directory(options), analysis.outcome
    history = load_history(directory, prefix=options["prefix"])
    skipped = [f"step {snapshot.step}: {snapshot.reason}" for snapshot in history if snapshot.status == "skipped"]
    if not history.measured:
        raise InputError(f"no checkpoint can be measured: {skipped[0]}")
    print_summary(history, console)
    for note in dict.fromkeys(outcome.notes):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    missing = [f"{path.name}: {sentence}" for path, sentence in outcome.failures] + skipped
    for line in missing:
        console.print(f"not measured: {line}", markup=False, soft_wrap=True)
    console.print(f"{len(analysis.entries) - before} checkpoints measured, {before} were measured before")
    if not options["no_report"]:
        from ntk_monitor.report import write

        console.print(f"report       {write({directory.name: history}, directory / 'report.html')}", soft_wrap=True)
    console.print(f"TensorBoard  tensorboard --logdir {directory}", soft_wrap=True, markup=False)
    errors = any(one.severity == "error" for one in findings(history.snapshots))
    return 1 if options["strict"] and (missing or errors) else 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device must be auto, cpu or cuda with a number, got {name}: {error}") from error
    return name


def _directory(options: dict[str, Any]) -> Path:
    if options["out"] is not None:
        return Path(options["out"])
    first = Path(options["checkpoints"][0])
    return (first if first.is_dir() else first.parent) / "ntk_analysis"


def _launched() -> bool:
    """True inside a process that torchrun, SLURM or Fabric started as one of several."""
    import os

    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
