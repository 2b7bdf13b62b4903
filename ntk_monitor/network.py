"""Network: a read-only functional view of a live module, from a batch of inputs to outputs of shape (N, C).

N samples, C outputs per sample (everything behind the leading axis, flattened), P selected parameters. A Network is
made anew for each probe: it sees the weights of that moment and holds nothing afterwards.
"""

import contextlib
import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ntk_monitor.batch import Batch, moved, size, take
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.hooks import isolated_hooks
from ntk_monitor.shadow import Shadow, unwrapped

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
Selection: TypeAlias = Callable[[str, nn.Parameter], bool] | str | Sequence[str]
Mode: TypeAlias = Literal["eval", "train", "live"]

# Layers that drop whole residual branches, in torchvision, timm and transformers.
_DROPS_PATHS = ("DropPath", "StochasticDepth")


class Network:
    """A read-only view of `module`: selected parameters, evaluation policy, output function.

    The live module is never run and never changed (see `ntk_monitor.shadow`).

    Args:
        module: any eager `nn.Module`.
        params: which trainable parameters enter the kernel: a predicate (name, parameter), a regular expression that
            must match somewhere in the name, or names; None: all with `requires_grad`. Shared parameters count once.
        forward: callable (module, inputs) → tensor; None: `module(inputs)` (tuples are spread over positional
            arguments, dicts over keywords), then `.logits` or the only floating tensor of the output.
        mode: "eval": every module in evaluation mode. "train": training mode (flags as they are if the module is
            training, so that layers frozen in eval stay frozen) with dropout off: batch-coupled under BatchNorm.
            "live": exactly as the module is now, dropout and precision included.
        device: where to measure; None: where the parameters are.
        detached: work on a copy of the parameters (see `careful`).

    Raises:
        NetworkError: no trainable parameter selected, several devices, or a module that cannot be followed.
        InputError: `params` names a parameter that does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        params: Selection | None = None,
        forward: Forward | None = None,
        mode: Mode = "eval",
        device: torch.device | str | None = None,
        detached: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(f"wanted a torch.nn.Module, got {type(module).__name__}")
        live = unwrapped(module)
        if mode not in ("eval", "train", "live"):
            raise InputError(f'mode must be "eval" or "train", got {mode!r}')
        self._forward = forward or call
        self._mode: Mode = mode
        self.promoted = mode != "live" and _low_precision(live)
        promote = torch.float32 if self.promoted else None
        self._shadow = Shadow(live, promote=promote, detached=detached)
        self._module = self._shadow.module
        _set_training(self._module, live, mode)
        self.parameters = self._selected(live, params)
        devices = {p.device for p in self.parameters.values()}
        if len(devices) > 1:
            raise NetworkError(f"all selected parameters must be on one device, got {sorted(map(str, devices))}")
        self.device = devices.pop()
        if device is not None and torch.device(device) != self.device:
            self._module.to(device)
            self.device = next(iter(self.parameters.values())).device
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self._module.modules())
        self._live = {id(p) for p in live.parameters()}

    @staticmethod
    def careful(module: nn.Module, inputs: Batch, **options: Any) -> "Network":
        """Return a Network for these inputs, on a copy of the parameters if a forward pass would rewrite them.

        `Embedding(max_norm=...)` and `self.weight.data.clamp_()` in forward change values in place; only a copy may be
        changed. Found out by one pass of two samples over a copy. Takes the options of `Network`.
        """
        trial = Network(module, **options, detached=True)
        live = unwrapped(module)
        # Which rows of an embedding are rewritten depends on the samples, so two of them prove nothing there.
        rewrites = any(getattr(m, "max_norm", None) is not None for m in live.modules())
        if not rewrites and not trial.promoted:
            with torch.enable_grad():  # a forward may take gradients itself
                trial.raw(trial.prepared(take(inputs, slice(0, 2))))
            same = ((p, trial._shadow.of(p)) for p in live.parameters())
            rewrites = not all(torch.equal(p, copied.to(p.device)) for p, copied in same)
        return Network(module, **options, detached=rewrites)

    def _selected(self, live: nn.Module, params: Selection | None) -> dict[str, Tensor]:
        trainable = {name: p for name, p in live.named_parameters() if p.requires_grad}
        chosen = [name for name in trainable if _wanted(params, name, trainable[name])]
        if params is not None and not callable(params) and not isinstance(params, str):
            unknown = sorted(set(params) - set(dict(live.named_parameters(remove_duplicate=False))))
            if unknown:
                raise InputError(f"params names unknown parameters {unknown}; known are {sorted(trainable)[:20]}")
        if not chosen:
            raise NetworkError(
                f"{type(live).__name__} has no trainable parameter to measure "
                f"({sum(1 for _ in live.parameters())} in all, {len(trainable)} with requires_grad); "
                "unfreeze some or widen params"
            )
        parameters = {name: self._shadow.of(trainable[name]) for name in chosen}
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters

    @property
    def parameter_count(self) -> int:
        """P, the number of scalars in the selected parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating dtype among the selected parameters, hence of the Jacobian."""
        dtypes = [p.dtype for p in self.parameters.values()]
        widest = dtypes[0]
        for other in dtypes[1:]:
            widest = torch.promote_types(widest, other)
        return widest

    def prepared(self, inputs: Batch) -> Batch:
        """Return the inputs on the network's device, floating ones at least as wide as its narrowest parameter."""
        # Complex parameters may take real inputs (a spectral filter behind a Fourier transform).
        narrowest = min({p.dtype.to_real() for p in self.parameters.values()}, key=lambda dtype: dtype.itemsize)
        return moved(inputs, self.device, narrowest)

    def outputs(self, inputs: Batch) -> Tensor:
        """Return the outputs (N, C) of one pass over the whole batch, differentiable in `parameters`.

        Raises:
            InputError: no usable tensor comes out, or its leading axis is not N.
            NetworkError: the output depends on live parameters that the shadow could not redirect.
        """
        return _rows(self.raw(inputs))

    def raw(self, inputs: Batch) -> Tensor:
        """Return the outputs (N, ...) in the shape the module gives them, which is what a loss expects."""
        output = self._run(inputs)
        reentrant = False
        for node in _nodes(output):
            reentrant = reentrant or node.name() == "CheckpointFunctionBackward"
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) in self._live:
                raise NetworkError(
                    f"{type(self._module).__name__} reaches a parameter of shape {tuple(leaf.shape)} through an object "
                    "that is no module (a helper, a partial or a global); register it as a submodule"
                )
        if reentrant:
            raise NetworkError(self._reentrant(self.reached(output)))
        return output

    def reached(self, output: Tensor) -> frozenset[str]:
        """Return the names of the selected parameters in the graph of an output of `raw` or `outputs`."""
        leaves = {id(getattr(node, "variable", None)) for node in _nodes(output)}
        return frozenset(name for name, p in self.parameters.items() if id(p) in leaves)

    def _reentrant(self, reached: Collection[str]) -> str:
        """Say which parameters a reentrant checkpoint hides: those that the graph does not reach."""
        hidden = [name for name in self.parameters if name not in reached]
        more = f" and {len(hidden) - 6} more" if len(hidden) > 6 else ""
        which = f" ({', '.join(hidden[:6])}{more})" if hidden else ""
        return (
            f"parameters inside torch.utils.checkpoint with use_reentrant=True{which} are out of reach of "
            "torch.autograd.grad; pass use_reentrant=False"
        )

    def function(self, parameters: Mapping[str, Tensor], inputs: Batch) -> Tensor:
        """Return the outputs (N, C) as a pure function of the parameters, for `torch.func` transforms."""
        return _rows(self._run(inputs, {p: parameters[name] for name, p in self.parameters.items()}))

    def _run(self, inputs: Batch, replaced: Mapping[Tensor, Tensor] = MappingProxyType({})) -> Tensor:
        with contextlib.ExitStack() as stack:
            if self._mode == "train":
                stack.enter_context(_NoDropout())
            if self._recurrent and self.device.type == "cuda":
                # cuDNN has no backward for recurrent layers in evaluation mode.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(isolated_hooks(self._shadow.hook))
            # The last line of defence: a live module reached behind the shadow's back is refused before it runs.
            stack.callback(register_module_forward_pre_hook(self._refuse_live).remove)
            uses: dict[bool, set[int]] = {True: set(), False: set()}
            stack.callback(register_module_forward_pre_hook(lambda m, _: _note(m, uses)).remove)
            heard = stack.enter_context(_heard("None of the inputs have requires_grad"))
            output = only_tensor(self._called(self._shadow.fresh(replaced), inputs))
        # A reentrant checkpoint whose inputs require no gradient runs without gradients. Harmless around frozen layers.
        seen = uses[True] - uses[False]
        if heard and not replaced and not {id(p) for p in self.parameters.values()} <= seen:
            raise NetworkError(self._reentrant([name for name, p in self.parameters.items() if id(p) in seen]))
        samples = size(inputs)
        if output.dim() == 0 or output.shape[0] != samples:
            raise InputError(
                f"the output must have one row per sample (N = {samples}), got shape {tuple(output.shape)}; "
                "pass forward=callable(module, inputs) that returns one"
            )
        return output

    def _called(self, module: nn.Module, inputs: Batch) -> Any:
        try:
            return self._forward(module, inputs)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise InputError(
                f"{str(error).strip()}: the inputs do not fit the call; pass forward=callable(module, inputs)"
            ) from error

    def _refuse_live(self, module: nn.Module, _: Any) -> None:
        if self._shadow.knows(module):
            raise NetworkError(
                f"the forward pass reaches a live {type(module).__name__} through an object that cannot be followed; "
                "register it as a submodule and call it as self.name"
            )


def _rows(output: Tensor) -> Tensor:
    return output.reshape(output.shape[0], -1)


class _NoDropout(TorchFunctionMode):
    """Switch functional dropout off in training mode; dropout modules are in evaluation mode already."""

    _DROPOUTS = frozenset(
        getattr(nn.functional, name)
        for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    )

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in self._DROPOUTS:
            return args[0] if args else options["input"]
        if func is nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            options = {**options, "dropout_p": 0.0} if len(args) <= 4 else options
        if func is nn.functional.multi_head_attention_forward:
            # dropout_p is the eleventh argument of this function; nn.MultiheadAttention passes it by position.
            args = (*args[:10], 0.0, *args[11:]) if len(args) > 10 else args
        return func(*args, **options)


def call(module: nn.Module, inputs: Batch) -> Any:
    """Call the module as its users do: dicts over keywords, tuples over positions, tensors alone.

    A dict of one entry whose name `forward` does not know is passed by position.
    """
    if isinstance(inputs, Mapping):
        if len(inputs) == 1 and not _knows(module, next(iter(inputs))):
            return module(next(iter(inputs.values())))
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def _knows(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _wanted(params: Selection | None, name: str, parameter: nn.Parameter) -> bool:
    if params is None:
        return True
    if callable(params):
        return bool(params(name, parameter))
    return re.search(params, name) is not None if isinstance(params, str) else name in params


def _low_precision(module: nn.Module) -> bool:
    """True when parameters are kept in half precision: their Jacobian would have three digits."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())


def _set_training(module: nn.Module, live: nn.Module, mode: Mode) -> None:
    # Only `training` flags are set, by hand: a user's `train()` may do more (frozen BatchNorm layers override it).
    if mode == "live":
        return
    for child in module.modules():
        if mode == "eval":
            child.training = False
        elif not live.training:
            child.training = True
        if isinstance(child, nn.modules.dropout._DropoutNd) or type(child).__name__.endswith(_DROPS_PATHS):
            child.training = False
        if isinstance(child, nn.RNNBase):
            child.dropout = 0.0


def only_tensor(raw: Any) -> Tensor:
    """Return the tensor to differentiate: the output itself, its `.logits`, or the only floating tensor in it."""
    named = _named_tensors(raw)
    logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", None)
    if isinstance(raw, Tensor):
        chosen = raw
    elif isinstance(logits, Tensor):
        chosen = logits
    elif len(named) == 1:
        chosen = next(iter(named.values()))
    else:
        found = f"several floating tensors {sorted(named)}" if named else f"no floating tensor in {type(raw).__name__}"
        raise InputError(f"the output must be one floating tensor, got {found}; pass forward=callable(module, inputs)")
    if not chosen.is_floating_point():
        raise InputError(
            f"the output must be real and floating, got {chosen.dtype}; pass forward=callable(module, inputs)"
        )
    return chosen


def _named_tensors(raw: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(raw, Tensor):
        return {prefix or "output": raw} if raw.is_floating_point() else {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(raw, Mapping):
        items = raw.items()
    elif isinstance(raw, (tuple, list)):
        items = enumerate(raw)
    elif dataclasses.is_dataclass(raw):
        items = [(f.name, getattr(raw, f.name)) for f in dataclasses.fields(raw)]
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= _named_tensors(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _nodes(output: Tensor) -> Iterator[Any]:
    """Yield every node of the graph that gradients of the output would pass."""
    stack: list[Any] = [output.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def _note(module: nn.Module, uses: dict[bool, set[int]]) -> None:
    """Note the parameters of a module that is called, by whether gradients are enabled; those of torch's own only.

    Which of its parameters a module of the user's uses, and where, is not known.
    """
    if type(module).__module__.startswith("torch.nn."):
        uses[torch.is_grad_enabled()] |= {id(p) for p in module._parameters.values() if p is not None}


@contextlib.contextmanager
def _heard(message: str) -> Iterator[list[str]]:
    """Yield a list that will hold the warnings that begin with `message`; show the others as they would be shown."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=message)
        yield heard
        heard += [str(w.message) for w in caught if str(w.message).startswith(message)]
    for w in caught:
        if not str(w.message).startswith(message):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)


def layer(parameter: str) -> str:
    """Return the module a parameter belongs to; a loose parameter of the root stands for itself."""
    return parameter.rpartition(".")[0] or parameter
