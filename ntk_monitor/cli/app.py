"""Ask what NTK theory says about a network, and whether it holds for this one.

NAME is one of the applications listed by --list. Without --model, --checkpoint
and --history it answers for its built-in example on real data. With them it
builds your model and data as analyze does; arguments of your classes follow as
--model.NAME VALUE and --data.NAME VALUE, options of the application's study as
--set NAME=VALUE. Prints numbers and verdicts; writes figures (PNG, JSON), one
HTML page and report.json. Answers about a run go into its directory, where
ntk-monitor report finds them.
"""

import ast
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ntk_monitor.errors import InputError, NTKMonitorError, said

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from ntk_monitor.applications.report import Report

EXAMPLE = "ntk-monitor app kernel_regression --model shop.Net --data samples.npz"

WORDS = ("model", "data")
"""Options whose own arguments follow as --model.NAME VALUE."""

_SOURCE = ("data", "config", "probe")
"""Options that describe a model of the user's and mean nothing without one."""


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", default=None, metavar="NAME", help="application; see --list")
    parser.add_argument("--list", action="store_true", help="say which applications there are, and what each asks")
    parser.add_argument("--example", action="store_true", help="the built-in example, on real data")
    parser.add_argument("--quick", action="store_true", help="a smaller example, in about two seconds")
    parser.add_argument("--model", type=str, default=None, metavar="NAME", help="pkg.Class or pkg:function")
    parser.add_argument("--data", type=str, default=None, metavar="NAME", help="pkg.DataModule, pkg:function or a file")
    parser.add_argument(
        "--checkpoint", type=str, nargs="+", default=None, metavar="CHECKPOINT", help="weights; of several, the last"
    )
    parser.add_argument("--history", type=str, default=None, metavar="RUN", help="records of a run, where they do")
    parser.add_argument("--config", type=str, default=None, metavar="FILE", help="config.yaml of LightningCLI")
    parser.add_argument("--probe", type=int, default=None, metavar="N", help="samples; default: a saved probe, or 64")
    parser.add_argument(
        "--loss", type=str, default=None, metavar="NAME", help="mse, cross_entropy, bce_with_logits, huber"
    )
    parser.add_argument("--params", type=str, default=None, metavar="REGEX", help="parameters to measure")
    parser.add_argument(
        "--forward", type=str, default=None, metavar="NAME", help="pkg:function(module, inputs) → outputs"
    )
    parser.add_argument("--set", type=str, nargs="+", default=None, metavar="NAME=VALUE", help="options of the study")
    parser.add_argument("--seed", type=int, default=0, help="of fresh weights and of the choice of samples")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--average", action="store_true", help="measure averaged weights (EMA, SWA)")
    parser.add_argument("--state-dict-key", type=str, default=None, metavar="KEY", help="which weights of a checkpoint")
    parser.add_argument("--trust-checkpoint", action="store_true", help="unpickle what needs it: your own files only")
    parser.add_argument(
        "--out", type=str, default=None, metavar="DIR", help="default: ntk_apps/NAME in the run, else here"
    )


def run(name: str | None, out: str | None, **options: Any) -> int:
    """Answer, print, draw; returns the exit code."""
    from ntk_monitor.applications import APPLICATIONS
    from ntk_monitor.applications.recorded import FOLDER

    if options["list"]:
        print("\n".join(_listed(APPLICATIONS, min(shutil.get_terminal_size().columns, 120))))
        return 0
    if name not in APPLICATIONS:
        got = "none" if name is None else name
        raise InputError(f"wanted an application ({', '.join(APPLICATIONS)}), got {got}")
    module = _module(name)
    report = _answer(name, module, options)
    print(report.text(min(shutil.get_terminal_size().columns, 100)))
    print()
    for line in written(report, Path(out) if out is not None else _run_of(options) / FOLDER / name):
        print(line)
    return 0


def written(report: "Report", directory: Path) -> list[str]:
    """Write every figure as PNG and JSON, the page, and the report as JSON; returns a line about each kind."""
    from ntk_monitor.applications.recorded import FILE
    from ntk_monitor.atomic import whole
    from ntk_monitor.render import png
    from ntk_monitor.report.applied import write_application

    directory.mkdir(parents=True, exist_ok=True)
    with whole(directory / FILE) as part:
        part.write_text(report.json(), encoding="utf-8")
    lines = []
    for name, figure in report.figures.items():
        (directory / f"{name}.json").write_text(json.dumps(figure, allow_nan=False), encoding="utf-8")
        try:
            (directory / f"{name}.png").write_bytes(png(figure, caption=True))
        except ImportError:
            lines = ["no PNG files: matplotlib is not installed"]
    names = ", ".join(report.figures)
    lines.append(f"figures  {directory} ({names})")
    lines.append(f"record   {directory / FILE}")
    try:
        lines.append(f"page     {write_application(report, directory / f'{report.name}.html')}")
    except InputError as error:
        lines.append(f"no page: {error}")
    return lines


def _run_of(options: Mapping[str, Any]) -> Path:
    """Return the directory of the run that was asked about: of its history, or the one that its checkpoint lies in."""
    if options["history"] is not None:
        run = Path(options["history"])
        return run if run.is_dir() else run.parent
    for path in (options["checkpoint"] or ())[-1:]:
        for folder in list(Path(path).resolve().parents)[:3]:
            if any(folder.glob("*tfevents*")):
                return folder
    return Path()


def _listed(names: Sequence[str], width: int) -> Iterator[str]:
    wide = max(map(len, names)) + 2
    for name in names:
        question = _question(_module(name))
        yield textwrap.fill(question, width, initial_indent=f"{name:<{wide}}", subsequent_indent=" " * wide)
    yield ""
    yield "Without more, `ntk-monitor app NAME` answers for a built-in example on real data."


def _module(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"ntk_monitor.applications.{name}")


def _question(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0]


def _answer(name: str, module: ModuleType, options: dict[str, Any]) -> "Report":
    own = any(options[key] for key in ("model", "checkpoint", "history"))
    if options["example"] and own:
        raise InputError("--example has a model of its own; leave --model, --checkpoint and --history out")
    if not own:
        idle = [key for key in _SOURCE if options[key] is not None] if not options["example"] else []
        if idle:
            raise InputError(f"--{idle[0]} needs --model or --checkpoint")
        print(f"built-in example: {module.EXAMPLE}\n")
        machine = {} if options["quick"] else _machine()
        return _asked(name, module.example, _settings(options) | {"quick": options["quick"]}, machine)
    if options["history"] is not None:
        if not hasattr(module, "from_history"):
            raise InputError(f"{name} cannot be answered from a history; pass --model and --data")
        from ntk_monitor.history import load_history

        return _asked(name, module.from_history, {"history": load_history(options["history"]), **_settings(options)})
    if "model" not in inspect.signature(module.study).parameters:
        raise InputError(f"{name} has no place for a --model; call ntk_monitor.applications.{name}.study from Python")
    given = {key: options[key] for key in ("loss", "params") if options[key] is not None}
    if options["forward"] is not None:
        from ntk_monitor.rebuild import imported

        given["forward"] = imported(options["forward"])
    _refuse_unknown(name, module.study, given)
    subject, samples, states = _subject(options)
    offered = {"seed": options["seed"], **_machine(), **({"states": states} if len(states) > 1 else {})}
    values = {"model": subject, "x": _bare(subject, samples.inputs), "y": samples.targets}
    return _asked(name, module.study, values | given | _settings(options), offered)


def _asked(
    name: str, function: Callable[..., "Report"], values: Mapping[str, Any], offered: Mapping[str, Any] | None = None
) -> "Report":
    """Call a study with what it takes: all of the values, and of what is offered the part that it knows."""
    taken = inspect.signature(function).parameters
    values = {key: value for key, value in (offered or {}).items() if key in taken} | dict(values)
    _refuse_unknown(name, function, {key: value for key, value in values.items() if key not in ("x", "y", "quick")})
    values = {key: value for key, value in values.items() if key in taken}
    empty = inspect.Parameter.empty
    missing = [one.name for one in taken.values() if one.default is empty and one.name not in values]
    if missing:
        raise InputError(
            f"{name} also needs {', '.join(missing)}, which the command line cannot give; call "
            f"ntk_monitor.applications.{name}.{getattr(function, '__name__', 'study')} from Python"
        )
    try:
        return function(**values)
    except NTKMonitorError:
        raise
    except Exception as error:  # a user's model may fail in any way
        raise InputError(f"{name} cannot be asked of this model and data: {said(error)}") from error


def _refuse_unknown(name: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    taken = inspect.signature(function).parameters
    if unknown := [key for key in values if key not in taken]:
        known = ", ".join(key for key in taken if key not in ("model", "x", "y", "history", "quick"))
        raise InputError(f"{name} has no option {unknown[0]}; it has {known or 'none'}")


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what --set says: Python literals, else words."""
    found: dict[str, Any] = {}
    for word in options["set"] or ():
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--set must be NAME=VALUE, got {word}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _machine() -> dict[str, Any]:
    return {"processes": os.cpu_count() or 1, "progress": _progress}


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total}" + ("\n" if done >= total else ""))


def _subject(options: dict[str, Any]) -> tuple[Any, Any, dict[str, Mapping[str, Any]]]:
    """Return the model, a probe, and the weights of every checkpoint by name, in the model's own names."""
    from ntk_monitor import rebuild, weights
    from ntk_monitor.cli.analyze import _device
    from ntk_monitor.guard import undisturbed
    from ntk_monitor.probe import Probe
    from ntk_monitor.reading import read

    if options["probe"] is not None and options["probe"] < 1:
        raise InputError(f"--probe must be at least 1, got {options['probe']}")
    trust, paths = options["trust_checkpoint"], [Path(path) for path in options["checkpoint"] or ()]
    config, notes = rebuild.configuration(None if options["config"] is None else Path(options["config"]), paths)
    states: dict[str, Mapping[str, Any]] = {}
    checkpoints = [read(path, trust=trust) for path in paths]
    with undisturbed(seed=options["seed"]):
        wish = rebuild.Wish(options["model"], tuple(options.get("model_words", ())))
        if checkpoints:
            model, more = rebuild.model(wish, checkpoints[-1], config)
        else:
            model, more = _fresh(wish)
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        chosen = weights.chosen(checkpoint, key=options["state_dict_key"], average=options["average"])
        states[str(path)] = weights.matched(model, chosen, str(path))[0]
        notes = (*notes, *(weights.apply(model, chosen, str(path)) if checkpoint is checkpoints[-1] else ()))
    model.to(_device(options["device"]))
    wish = rebuild.Wish(options["data"], tuple(options.get("data_words", ())))
    samples, where = rebuild.data(wish, paths, config, drawn=options["probe"] is not None, trust=trust)
    for note in dict.fromkeys((*notes, *more, *where)):
        print(f"note: {note}")
    probe = Probe.of(samples.probe, options["probe"] or _SAMPLES, options["seed"])
    return model, probe, states


_SAMPLES = 64


def _bare(model: Any, inputs: Any) -> Any:
    """Return the only tensor of a mapping by itself where the model takes it first: some studies move their inputs."""
    if not isinstance(inputs, Mapping) or len(inputs) != 1:
        return inputs
    name, value = next(iter(inputs.items()))
    return value if name == next(iter(inspect.signature(model.forward).parameters), None) else inputs


def _fresh(wish: Any) -> tuple[Any, tuple[str, ...]]:
    from torch import nn

    from ntk_monitor import rebuild

    made, notes = rebuild.instance(rebuild.imported(wish.name), {}, wish.words, "model")
    if not isinstance(made, nn.Module):
        raise InputError(f"--model must give a torch.nn.Module, got {type(made).__name__} from {wish.name}")
    return made, (*notes, "fresh weights, since no --checkpoint is given")
