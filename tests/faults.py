"""Fault points: every function of ours that a probe calls, found by watching one run, and made to fail at will.

`watched` counts the calls of all of them; `failing` makes one raise, at its k-th call or from then on, before or after
it has done its work. Both replace the function wherever one of our modules holds it under a name of its own.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

# Doors that a trainer knocks at, and what stands right behind them to catch what others raise.
DOORS = (
    "ntk_monitor.callbacks.monitor.NTKMonitor.__init__",
    "ntk_monitor.callbacks.monitor.NTKMonitor._reset",
    "ntk_monitor.callbacks.monitor.NTKMonitor.on_",
    "ntk_monitor.callbacks.monitor.NTKMonitor.state_dict",
    "ntk_monitor.callbacks.monitor.NTKMonitor.load_state_dict",
    "ntk_monitor.callbacks.monitor.NTKMonitor._finish",
    "ntk_monitor.callbacks.monitor.NTKMonitor._probe_if_due",
    "ntk_monitor.callbacks.monitor.NTKMonitor._steps",
    "ntk_monitor.callbacks.monitor.NTKMonitor._told",
    "ntk_monitor.recipe.",
    "ntk_monitor.session.Session.__init__",
    "ntk_monitor.session.Session._contained",
    "ntk_monitor.session.Session._paid",
    "ntk_monitor.session.Session.charge",
    "ntk_monitor.session.Session.close",
    "ntk_monitor.session.Session.due",
    "ntk_monitor.session.Session.ending",
    "ntk_monitor.session.Session.guarded",
    "ntk_monitor.session.Session.noted",
    "ntk_monitor.session.Session.observe",
    "ntk_monitor.session.Session.rest",
    "ntk_monitor.errors.",
    "ntk_monitor.say.",
)

# What others wrote and our probes call, but neither a training step nor the Trainer does.
FOREIGN = (
    "torch.autograd.grad",
    "torch.func.vjp",
    "torch.func.vmap",
    "torch.linalg.eigh",
    "torch.linalg.eigvalsh",
    "numpy.linalg.eigh",
    "numpy.linalg.eigvalsh",
    "numpy.linalg.norm",
    "numpy.linalg.svd",
    "numpy.linalg.solve",
    "scipy.linalg.eigh",
    "scipy.linalg.eigvalsh",
    "scipy.linalg.solve",
    "torch.autograd.graph.get_gradient_edge",
    "ntk_monitor.recorder.RecordWriter",
    "ntk_monitor.recorder.os.fsync",
)

_PLAIN = ("__repr__", "__eq__", "__hash__", "__getattr__", "__class_getitem__", "__init_subclass__", "__replace__")


class UnspeakableError(Exception):
    """An error that fails even at describing itself."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS: tuple[Exception, ...] = (
    RuntimeError("boom"),
    MemoryError("boom"),
    torch.OutOfMemoryError("boom: out of memory"),
    np.linalg.LinAlgError("boom"),
    OSError(28, "No space left on device"),
    KeyError("boom"),
    RecursionError("boom"),
    UnspeakableError(),
)


class Halt(BaseException):
    """Ends a process, like KeyboardInterrupt and SystemExit."""


ENDINGS: tuple[BaseException, ...] = (KeyboardInterrupt("boom"), SystemExit("boom"), Halt("boom"))


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to fail: `name` raises `error` at call number `first`, or at each call from there on."""

    name: str
    error: BaseException
    first: int = 1
    always: bool = False
    late: bool = False
    """After the work instead of before it."""

    def __str__(self) -> str:
        when = f"{'from' if self.always else 'at'} call {self.first}{', late' if self.late else ''}"
        return f"{type(self.error).__name__} in {self.name} {when}"


def names() -> list[str]:
    """Return every function and method of ours that is loaded, doors excepted, and the foreign ones, sorted."""
    found = [f"{module.__name__}.{name}" for module in _modules() for name in _functions(module)]
    return sorted(name for name in found if not name.startswith(DOORS)) + [n for n in FOREIGN if _loaded(n)]


@contextmanager
def watched(wanted: list[str]) -> Iterator[dict[str, int]]:
    """Count the calls of functions while the block runs."""
    calls = dict.fromkeys(wanted, 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        return counted

    with ExitStack() as stack:
        held = _holders()
        for name in wanted:
            stack.enter_context(_replaced(name, functools.partial(counting, name), held))
        yield calls


@contextmanager
def failing(fault: Fault) -> Iterator[list[str]]:
    """Make one function fail while the block runs; the list gets an entry for each time it did."""
    calls, fired = [0], list[str]()

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def fails(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            hit = calls[0] == fault.first or (fault.always and calls[0] > fault.first)
            if hit and not fault.late:
                fired.append(fault.name)
                raise fault.error
            result = function(*arguments, **options)
            if hit:
                fired.append(fault.name)
                raise fault.error
            return result

        return fails

    with _replaced(fault.name, broken, _holders()):
        yield fired
    fault.error.__traceback__ = fault.error.__context__ = None  # it would keep alive what the failed frames held


def _modules() -> list[ModuleType]:
    return [m for n, m in sorted(sys.modules.items()) if n.startswith("ntk_monitor.") and isinstance(m, ModuleType)]


def _functions(module: ModuleType) -> Iterator[str]:
    """Yield the names of a module's own functions and of the methods of its own classes, properties excepted."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            yield name
        elif isinstance(value, type) and not getattr(value, "_is_protocol", False):
            for method, held in vars(value).items():
                if isinstance(getattr(held, "__func__", held), FunctionType) and method not in _PLAIN:
                    yield f"{name}.{method}"


def _loaded(name: str) -> bool:
    try:
        _found(name)
    except (AttributeError, ImportError):
        return False
    return True


def _found(name: str) -> tuple[Any, str]:
    """Return the module or class that holds a function, and the last part of its name."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        if module in sys.modules or _imported(module):
            owner: Any = sys.modules[module]
            for part in parts[length:-1]:
                owner = getattr(owner, part)
            getattr(owner, parts[-1])
            return owner, parts[-1]
    raise ImportError(name)


def _imported(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _holders() -> dict[int, list[tuple[Any, str]]]:
    """Return, by identity of a value, our modules that hold it and the names they hold it under."""
    held: dict[int, list[tuple[Any, str]]] = {}
    for module in _modules():
        for name, value in vars(module).items():
            if callable(value):
                held.setdefault(id(value), []).append((module, name))
    return held


@contextmanager
def _replaced(name: str, wrap: Wrap, holders: dict[int, list[tuple[Any, str]]]) -> Iterator[None]:
    """Put a wrapped function in the place of a function, in its own module and wherever it was imported by name."""
    owner, last = _found(name)
    held = vars(owner)[last]
    kind = type(held) if isinstance(held, (staticmethod, classmethod)) else None
    new = wrap(held.__func__) if kind else wrap(held)
    places = [(owner, last)]
    if isinstance(owner, ModuleType):
        places += [place for place in holders.get(id(held), []) if place != (owner, last)]
    for place, key in places:
        setattr(place, key, kind(new) if kind else new)
    try:
        yield
    finally:
        for place, key in places:
            setattr(place, key, held)
