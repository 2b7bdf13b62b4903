"""Forward hooks of users fire on a shadow as they do in training, and leave no trace of it.

A hook may be part of the function (old-style weight_norm is one), so it must fire. What it collects belongs to
training: `activations = []` at the top of a notebook, a counter, a recorder. So a copy of the hook fires, which writes
to copies of the globals it names; `ntk_monitor.shadow` copies what it closes over.
"""

import contextlib
import copy
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.nn.modules import module as registries

# Registries of hooks for all modules. Those that see gradients belong to training and stay silent.
_FORWARD = ("_global_forward_pre_hooks", "_global_forward_hooks")
_SILENT = ("_global_backward_pre_hooks", "_global_backward_hooks")

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


def isolated(hook: Any, copied: Callable[[Any], Any]) -> Any:
    """Return a function with globals of its own; anything but a plain function as it is.

    Containers are copied one level deep, objects of classes that the hook's own file defines by `copied`; numbers that
    it assigns stay in the copy. Functions of the same file that it calls are copied with it.
    """
    if not isinstance(hook, types.FunctionType):
        return hook
    named = _named(hook)
    own = {name: value for name, value in named.items() if _written(value, hook)}
    if not own:
        return hook
    held = {**hook.__globals__, **{n: copy.copy(v) if type(v) in _CONTAINERS else copied(v) for n, v in own.items()}}
    held |= {name: _twin(f, held) for name, f in named.items() if isinstance(f, types.FunctionType)}
    return _twin(hook, held)


def _twin(function: types.FunctionType, held: dict[str, Any]) -> types.FunctionType:
    """Return the same function on other globals."""
    defaults, closure = function.__defaults__, function.__closure__
    twin = types.FunctionType(function.__code__, held, function.__name__, defaults, closure)
    twin.__kwdefaults__, twin.__module__ = function.__kwdefaults__, function.__module__
    return twin


def _named(hook: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function names, and those that the functions of its file among them name."""
    found: dict[str, Any] = {}
    waiting = [hook]
    while waiting:
        for name in _names(waiting.pop().__code__) & set(hook.__globals__) - set(found):
            value = found[name] = hook.__globals__[name]
            if isinstance(value, types.FunctionType) and value.__globals__ is hook.__globals__:
                waiting.append(value)
            elif isinstance(value, types.FunctionType):
                del found[name]  # imported
    return found


@contextlib.contextmanager
def isolated_hooks(copied: Callable[[Any], Any]) -> Iterator[None]:
    """Let copies of the forward hooks for all modules fire inside, and no backward hooks.

    Args:
        copied: hook → its copy.
    """
    before = {name: dict(getattr(registries, name)) for name in _FORWARD + _SILENT}
    if not any(before.values()):
        yield
        return
    try:
        for name, hooks in before.items():
            copies = {key: hook if _ours(hook) else copied(hook) for key, hook in hooks.items()}
            _replace(name, copies if name in _FORWARD else {})
        yield
    finally:
        for name, hooks in before.items():
            _replace(name, hooks)


def _ours(hook: Any) -> bool:
    """True for a hook by which a measurement around this pass takes notes, which it must find afterwards."""
    return str(getattr(hook, "__module__", "")).startswith("ntk_monitor.")


def _replace(name: str, hooks: dict[int, Any]) -> None:
    registry = getattr(registries, name)
    registry.clear()
    registry.update(hooks)


def _names(code: types.CodeType) -> set[str]:
    """Return the globals that a function and the functions inside it name."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _written(value: Any, hook: types.FunctionType) -> bool:
    """True for what a hook may change: containers, numbers it may assign anew, objects of its own file's classes."""
    kind = type(value)
    return kind in (*_CONTAINERS, int, float, bool) or kind.__module__ == hook.__module__
