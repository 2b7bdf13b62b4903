"""A shadow of a live module: new module objects around the same parameter storage.

Forward passes run on the shadow, so whatever they do to a module (buffers, caches, counters, training flags, a
Parameter swapped by a functional call) they do to the shadow. The live module keeps its Parameters, `.grad`, hooks and
flags by construction, not by being repaired afterwards.

Parameters become new leaf tensors that share the live storage, so tensor hooks and gradient accumulators of the live
ones never fire. Buffers and other small tensors are cloned. Code is shared.
"""

import copy
import types
from collections import deque
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ntk_monitor.errors import NetworkError
from ntk_monitor.guard import Generator

# Hooks that see gradients belong to training; forward hooks may be part of the function (old-style weight_norm is one).
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

# A tensor that is neither parameter nor buffer and larger than this is data kept on the module, not state: shared, so
# that a data set held as an attribute is not copied at every probe.
_STATE_BYTES = 64 * 2**20


class Shadow:
    """A shadow module and the map from live objects to their shadows.

    Args:
        module: any eager module; `torch.compile` and data-parallel wrappers are looked through.
        promote: cast floating parameters and buffers to this dtype, which copies them.
        detached: copy parameters too, for modules that rewrite their parameters in forward.

    Raises:
        NetworkError: TorchScript, sharded or uninitialised parameters, named in the message.
    """

    def __init__(self, module: nn.Module, *, promote: torch.dtype | None = None, detached: bool = False) -> None:
        self._promote = promote
        self._detached = detached
        self._memo: dict[int, Any] = {}
        self.module = self._shadow(module)

    def fresh(self, replaced: Mapping[Tensor, Tensor]) -> nn.Module:
        """Return a module in the state this shadow has now, on the same parameters but for those `replaced`.

        One pass runs on each: what a forward leaves behind (counters, hidden states, tensors of a transform) is gone
        before the next, so that every pass sees the state of the live module.
        """
        copied = copy.copy(self)
        copied._promote, copied._detached = None, False
        copied._memo = {id(p): p for p in self._memo.values() if isinstance(p, nn.Parameter)}
        copied._memo |= {id(p): value for p, value in replaced.items()}
        return copied._shadow(self.module)

    def of(self, live: nn.Module | Tensor) -> Any:
        """Return the shadow of a live module or tensor, or None when it has none."""
        return self._memo.get(id(live))

    def _shadow(self, module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if id(module) in self._memo:
            found: nn.Module = self._memo[id(module)]
            return found
        if reason := _refusal(module):
            raise NetworkError(f"{type(module).__name__}: {reason}")
        new = type(module).__new__(type(module))
        self._memo[id(module)] = new
        state = new.__dict__
        for name, value in module.__dict__.items():
            state[name] = type(value)() if name in _BACKWARD_HOOKS else self._value(value)
        for name, buffer in module._buffers.items():
            if buffer is not None and state["_buffers"][name] is buffer:  # larger than `_STATE_BYTES`
                state["_buffers"][name] = buffer.detach().clone()
        # `module.compile()` keeps its compiled call here; measuring through it would cost a new graph.
        state["_compiled_call_impl"] = None
        for quiet in ("log", "log_dict"):
            # A LightningModule that logs inside forward would log the probe as if it were training.
            if callable(getattr(type(module), quiet, None)):
                state[quiet] = _nothing
        return new

    def _value(self, value: Any) -> Any:
        """Return the shadow of one attribute value; objects that hold no module or tensor are shared."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, nn.Module):
            return self._shadow(value)
        if isinstance(value, dict):
            return self._dict(value)
        if type(value) is list:
            self._memo[id(value)] = items = []
            items += [self._value(item) for item in value]
            return items
        self._memo[id(value)] = new = self._tensor(value) if isinstance(value, Tensor) else self._other(value)
        return new

    def _tensor(self, value: Tensor) -> Tensor:
        new = self._parameter(value) if isinstance(value, nn.Parameter) else _cloned(value)
        if self._promote is not None and new.is_floating_point() and new.dtype != self._promote:
            return self._cast(new)
        return new

    def _other(self, value: Any) -> Any:
        if type(value) in (tuple, set):
            return type(value)(self._value(item) for item in value)
        if type(value) is deque:
            return deque((self._value(item) for item in value), value.maxlen)
        if isinstance(value, get_args(Generator)):
            return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._shadow(value.__self__))
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._closure(value)
        return value

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        try:
            new = copy.copy(value)  # keeps ordered, default and attribute dicts what they are
        except Exception:  # noqa: BLE001 - a dict that cannot be copied is shared
            return value
        self._memo[id(value)] = new
        for key, item in value.items():
            new[key] = self._value(item)
        return new

    def _closure(self, function: types.FunctionType) -> types.FunctionType:
        """Rebind a function that closes over a module or parameter, such as `self.block = lambda x: self.layer(x)`."""
        cells = function.__closure__ or ()
        held = [_contents(cell) for cell in cells]
        if not any(isinstance(value, (nn.Module, nn.Parameter)) for value in held):
            return function
        rebound = tuple(
            types.CellType(self._value(value)) if isinstance(value, (nn.Module, nn.Parameter)) else cell
            for cell, value in zip(cells, held, strict=True)
        )
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, rebound
        )
        new.__kwdefaults__ = function.__kwdefaults__
        return new

    def _parameter(self, value: nn.Parameter) -> Tensor:
        if isinstance(value, UninitializedTensorMixin):
            raise NetworkError("a lazy parameter has no shape yet; run one forward pass before measuring")
        if nn.Parameter not in type(value).__mro__:  # DTensor and other wrappers: storage is not the values
            raise NetworkError(
                f"a parameter is a {type(value).__name__}, whose values are sharded or packed; "
                "gather them into a plain copy of the model first"
            )
        if type(value) is not nn.Parameter and not value.requires_grad:
            return value  # quantised and other special frozen parameters: constants of the function
        values = value.detach().clone() if self._detached else value.detach()
        return nn.Parameter(values, requires_grad=value.requires_grad)

    def _cast(self, value: Tensor) -> Tensor:
        cast = value.detach().to(self._promote)
        return nn.Parameter(cast, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else cast


def unwrapped(module: nn.Module) -> nn.Module:
    """Look through wrappers that change only how a module runs: torch.compile and data-parallel ones."""
    while True:
        inner = None
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module._modules["module"]
        elif type(module).__name__ == "OptimizedModule":
            inner = module._modules.get("_orig_mod")
        if inner is None:
            return module
        module = inner


def _refusal(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript hides its operations and cannot be measured; pass the eager module it was made from"
    if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
        return "its parameters are sharded over processes; gather them into a plain copy of the model first"
    return None


def _cloned(value: Tensor) -> Tensor:
    return value.detach().clone() if value.numel() * value.element_size() <= _STATE_BYTES else value


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that is not filled yet
        return None


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a logging call."""
