"""torch's global switches: read them, set them for a measurement, give them back as they were.

A forward pass may flip any of them, and a measurement needs some of them set. Only those that differ are written on the
way out, since a few have side effects.
"""

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch

_Switch = tuple[Callable[[], Any], Callable[[Any], Any]]

# Where autocast may be on.
_DEVICES = ("cuda", "cpu", "mps", "xpu")


def _flag(owner: Any, name: str) -> _Switch:
    return partial(getattr, owner, name), partial(setattr, owner, name)


def _autocast(device: str) -> dict[str, _Switch]:
    return {
        f"autocast on {device}": (
            partial(torch.is_autocast_enabled, device),
            partial(torch.set_autocast_enabled, device),
        ),
        f"autocast's dtype on {device}": (
            partial(torch.get_autocast_dtype, device),
            partial(torch.set_autocast_dtype, device),
        ),
    }


def _set_deterministic(mode: int) -> None:
    """Set the mode (0: off, 1: warn only, 2: on), and tell the compiler's code generator if it is there.

    The public function would import it, which takes seconds.
    """
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)


def _default_device() -> Any:
    # torch.get_default_device() says "cpu" where none was set, and setting that would slow every call down.
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


_SWITCHES: dict[str, _Switch] = {
    "gradient mode": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "autocast's cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (_default_device, torch.set_default_device),
    "deterministic algorithms": (torch.get_deterministic_debug_mode, _set_deterministic),
    "anomaly detection": (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.autograd.set_detect_anomaly(*value),
    ),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "cuDNN": _flag(torch.backends.cudnn, "enabled"),
    "cuDNN's search": _flag(torch.backends.cudnn, "benchmark"),
    "cuDNN's determinism": _flag(torch.backends.cudnn, "deterministic"),
    "oneDNN": _flag(torch.backends.mkldnn, "enabled"),
}
for _device in _DEVICES:
    _SWITCHES |= _autocast(_device)


def settings() -> dict[str, Hashable]:
    """Return every switch that `kept` gives back, by name."""
    found: dict[str, Hashable] = {name: read() for name, (read, _) in _SWITCHES.items()}
    return found | {"precision of float32 products": tuple(read() for read, _ in _PRECISIONS)}


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Give back, on exit, every switch that differs by then, whoever flipped it."""
    before = {name: read() for name, (read, _) in _SWITCHES.items()}
    precisions = [read() for read, _ in _PRECISIONS]
    try:
        yield
    finally:
        for name, (read, write) in _SWITCHES.items():
            if read() != before[name]:
                write(before[name])
        for (read, write), value in zip(_PRECISIONS, precisions, strict=True):
            if read() != value:
                write(value)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Set what a measurement needs, and give everything back.

    Gradients on, inference mode and autocast off, float32 products in full precision; no search for the quickest
    convolution (its result would be kept, and used by training) and the same one every time; deterministic algorithms,
    where they are asked for, without an error where there is none; no anomaly detection; nothing is compiled.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(uncompiled())
        # A cast that is kept would belong to a parameter of ours.
        torch.set_autocast_cache_enabled(False)
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.are_deterministic_algorithms_enabled():
            _set_deterministic(1)
        if torch.is_anomaly_enabled():
            torch.autograd.set_detect_anomaly(False)
        # The kept choices of cuDNN are filed under its determinism, so that training never meets ours.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        stack.enter_context(_full_precision())
        yield


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run what `torch.compile` has wrapped as it is written: a probe must not cost a new graph."""
    # Where the compiler was never imported nothing is compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _precisions() -> list[_Switch]:
    """Return the switches of float32 products, what is inherited from before what inherits.

    torch >= 2.9 has a tree of them: torch's, each backend's, each operation's; older versions have two TF32 flags.
    Using both kinds makes torch raise, so only one kind is ever touched.
    """
    backends: Any = torch.backends
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        return [_flag(backends.cuda.matmul, "allow_tf32"), _flag(backends.cudnn, "allow_tf32")]
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    leaves = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
    nodes = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *leaves]
    return [(partial(read, *node), partial(write, *node)) for node in nodes]


_PRECISIONS = _precisions()
_FULL: Any = "ieee" if len(_PRECISIONS) > 2 else False


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products in float32: TF32 or bfloat16 inside would lose eigenvalues below 1e-8 of the largest.

    A switch that follows the one above it is not written: it would not follow any more.
    """
    before = []
    try:
        for read, write in _PRECISIONS:
            if read() != _FULL:
                before.append((write, read()))
                write(_FULL)
        yield
    finally:
        for write, value in reversed(before):
            write(value)
