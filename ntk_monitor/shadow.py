"""A shadow of a live module: new module objects around the same parameter storage.

Forward passes run on the shadow, so whatever they do to a module (buffers, caches, counters, training flags, a
Parameter swapped by a functional call) they do to the shadow. The live module keeps its Parameters, `.grad`, hooks and
flags by construction, not by being repaired afterwards.

Parameters become new leaf tensors that share the live storage, so tensor hooks and gradient accumulators of the live
ones never fire. Buffers and other small tensors are cloned, and so is whatever else a forward pass may write to:
containers, generators, closures, objects of the user's own. Code is shared.
"""

import copy
import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, Dataset

from ntk_monitor.errors import NetworkError
from ntk_monitor.guard import Generator
from ntk_monitor.hooks import isolated

# Hooks that see gradients belong to training; forward hooks may be part of the function (old-style weight_norm is one).
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

# Where the hooks of `fully_shard` are defined, in torch 2.8 and later.
_SHARDING = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")

# A tensor that is neither parameter nor buffer and larger than this is data kept on the module, not state: shared, so
# that a data set held as an attribute is not copied at every probe.
_STATE_BYTES = 64 * 2**20


# Values without state, shared without a look.
_ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device, type})

# Objects of these packages belong to the machinery around the model; their state is not the model's.
_FOREIGN = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "numpy", "builtins"}
    | {"logging", "threading", "multiprocessing", "concurrent", "asyncio", "pathlib", "re", "io", "collections"}
)
# Nor these: identity is their meaning, or they hold the training data or the optimizer.
_IDENTITIES = (enum.Enum, type, types.ModuleType, Dataset, DataLoader, torch.optim.Optimizer)


class Shadow:
    """A shadow module and the map from live objects to their shadows.

    Args:
        module: any eager module; `torch.compile` and data-parallel wrappers are looked through.
        promote: cast floating parameters and buffers to this dtype, which copies them.
        detached: copy parameters too, for modules that rewrite their parameters in forward.
        values: Parameters that stand for those sharded over processes; with them the shadow of a module under FSDP2
            (`fully_shard`) is the plain module that was sharded.

    Raises:
        NetworkError: TorchScript, sharded or uninitialised parameters, named in the message.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        promote: torch.dtype | None = None,
        detached: bool = False,
        values: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self._promote = promote
        self._detached = detached
        self._values = values
        self._memo: dict[int, Any] = {}
        self._live = module  # kept alive, or its parts' ids could be given to new objects
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

    def knows(self, live: nn.Module) -> bool:
        """True for a live module that has a shadow, which must run in its place."""
        return id(live) in self._memo and self._memo[id(live)] is not live

    def hook(self, live: Any) -> Any:
        """Return the shadow of a forward hook, which writes to copies of all it can reach."""
        return isolated(self._value(live), self._value)

    def _shadow(self, module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if id(module) in self._memo:
            found: nn.Module = self._memo[id(module)]
            return found
        if reason := _refusal(module, gathered=self._values is not None):
            raise NetworkError(f"{type(module).__name__}: {reason}")
        kind = _kind(module)
        new = kind.__new__(kind)
        self._memo[id(module)] = new
        state = new.__dict__
        for name, value in module.__dict__.items():
            if name in _BACKWARD_HOOKS:
                state[name] = type(value)()
            elif name in _FORWARD_HOOKS:
                state[name] = type(value)((key, self.hook(hook)) for key, hook in _own_hooks(value).items())
            else:
                state[name] = self._value(value)
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
        """Return the shadow of one attribute value: whatever may hold or be state is copied, everything else shared."""
        if type(value) in _ATOMS:
            return value
        if id(value) not in self._memo:
            kind = next((kind for kind in _RULES if isinstance(value, kind)), object)
            new = _RULES.get(kind, Shadow._object)(self, value)
            self._memo[id(value)] = new
        return self._memo[id(value)]

    def _tensor(self, value: Tensor) -> Tensor:
        new = self._parameter(value) if isinstance(value, nn.Parameter) else _cloned(value)
        if self._promote is not None and new.is_floating_point() and new.dtype != self._promote:
            return self._cast(new)
        return new

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        try:
            new = copy.copy(value)  # keeps ordered, default and attribute dicts what they are
        except Exception:  # noqa: BLE001 - a dict that cannot be copied is shared
            return value
        self._memo[id(value)] = new
        if not _plain(value.values()):
            for key, item in value.items():
                new[key] = self._value(item)
        return new

    def _list(self, value: list[Any]) -> list[Any]:
        new = copy.copy(value)
        self._memo[id(value)] = new
        if not _plain(value):
            new[:] = [self._value(item) for item in value]
        return new

    def _collection(self, value: Any) -> Any:
        """Rebuild a tuple, named tuple, set or deque."""
        items = list(value) if _plain(value) else [self._value(item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)

    def _generator(self, value: Any) -> Any:
        return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)

    def _method(self, value: types.MethodType) -> types.MethodType:
        return types.MethodType(value.__func__, self._value(value.__self__))

    def _partial(self, value: "functools.partial[Any]") -> "functools.partial[Any]":
        return functools.partial(
            self._value(value.func),
            *(self._value(item) for item in value.args),
            **{key: self._value(item) for key, item in value.keywords.items()},
        )

    def _reference(self, value: "weakref.ref[Any]") -> Any:
        target = value()
        return weakref.ref(self._value(target)) if isinstance(target, nn.Module) else value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Rebind what a function closes over or has as defaults: `self.block = lambda x: self.layer(x)`."""
        cells = function.__closure__ or ()
        held = [_contents(cell) for cell in cells]
        rebound = [self._value(value) for value in held]
        defaults = self._value(function.__defaults__)
        keywords = self._value(function.__kwdefaults__)
        same = all(new is old for new, old in zip(rebound, held, strict=True))
        if same and _plain(function.__defaults__ or ()) and _plain((function.__kwdefaults__ or {}).values()):
            return function
        closure = tuple(
            cell if new is old else types.CellType(new) for cell, new, old in zip(cells, rebound, held, strict=True)
        )
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
        new.__kwdefaults__ = keywords
        return new

    def _object(self, value: Any) -> Any:
        """Copy an object of the user's own: a schedule stepped in forward, a hook that collects, a configuration."""
        kind = type(value)
        foreign = kind.__module__.partition(".")[0] in _FOREIGN or isinstance(value, _IDENTITIES)
        # A second object whose destructor runs would close what the first one still uses.
        if foreign or not getattr(value, "__dict__", None) or hasattr(kind, "__del__"):
            return value
        try:
            new = object.__new__(kind)
        except TypeError:  # state outside of Python: shared
            return value
        self._memo[id(value)] = new
        for name in (n for base in kind.__mro__ for n in getattr(base, "__slots__", ()) if hasattr(value, n)):
            if name not in ("__dict__", "__weakref__"):
                object.__setattr__(new, name, self._value(getattr(value, name)))
        new.__dict__.update({name: self._value(item) for name, item in value.__dict__.items()})
        return new

    def _parameter(self, value: nn.Parameter) -> Tensor:
        if isinstance(value, UninitializedTensorMixin):
            raise NetworkError("a lazy parameter has no shape yet; run one forward pass before measuring")
        if self._values is not None and value in self._values:
            return self._values[value]
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


# What each kind of value becomes; the first that fits. Anything else goes to `_object`.
_RULES: dict[Any, Any] = {
    nn.Module: Shadow._shadow,
    Tensor: Shadow._tensor,
    dict: Shadow._dict,
    list: Shadow._list,
    (tuple, set, deque): Shadow._collection,
    get_args(Generator): Shadow._generator,
    types.MethodType: Shadow._method,
    types.FunctionType: Shadow._function,
    functools.partial: Shadow._partial,
    weakref.ref: Shadow._reference,
}


def _plain(values: Iterable[Any]) -> bool:
    """True when nothing in here can be or hold state, so that a copy of the container is enough."""
    return all(type(value) in _ATOMS for value in values)


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the class of a shadow: that of the module, but for classes that would talk to other processes."""
    kind = type(module)
    if _fully_sharded(module):  # a class made from FSDPModule and the module's own
        return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
    return _LocalBatchNorm if kind is nn.SyncBatchNorm else kind


class _LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm over the samples at hand: a probe runs on one process, and the others would not answer."""

    def _check_input_dim(self, _: Tensor) -> None:
        """Any: SyncBatchNorm has one class for all of them."""


def _fully_sharded(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _own_hooks(hooks: Any) -> Any:
    """Return the forward hooks of a module without those by which FSDP2 gathers its parameters."""
    foreign = [key for key, hook in hooks.items() if _of_module(hook).startswith(_SHARDING)]
    if not foreign:
        return hooks
    kept = copy.copy(hooks)
    for key in foreign:
        del kept[key]
    return kept


def _of_module(hook: Any) -> str:
    return str(getattr(hook, "__module__", ""))


def _refusal(module: nn.Module, *, gathered: bool = False) -> str | None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(_of_module(h).startswith("torch.distributed") and not _of_module(h).startswith(_SHARDING) for h in hooks):
        return "its outputs are computed by several processes together (tensor parallel), which cannot be measured"
    if gathered and _fully_sharded(module):
        return None
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
