"""empirical_ntk: the kernel of a network on samples, exact. K = J Jᵀ, unnormalised, outputs flattened sample-major.

Model → Network → engine → float64 Gram. Which engine ran, and why, is part of the answer (`measured`).
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ntk_monitor.batch import Batch, size, tensors
from ntk_monitor.engines.batched import BatchedJacobian
from ntk_monitor.engines.contract import Jacobian, Layout, gram
from ntk_monitor.engines.operator import NTKOperator
from ntk_monitor.engines.reference import ReferenceJacobian
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.engines.structured.blocks import structured_blocks
from ntk_monitor.engines.structured.engine import Line
from ntk_monitor.engines.structured.tap import UnfollowedError
from ntk_monitor.errors import InputError, NetworkError, NTKMonitorError, said
from ntk_monitor.guard import undisturbed
from ntk_monitor.losses import recognised
from ntk_monitor.network import Forward, Mode, Network, Selection, call, layer, only_tensor
from ntk_monitor.selfcheck import disagreement, structured_disagreement

Outputs: TypeAlias = Literal["full", "trace", "sum", "per_output", "loss"]
Engine: TypeAlias = Literal["auto", "structured", "reference", "rows", "operator"]

MEMORY_LIMIT = 2**30
"""Default bytes for blocks of a Jacobian. Fixed, so that the same call always takes the same route."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and how it was computed."""

    values: Tensor
    layers: dict[str, Tensor]
    engine: str
    reason: str
    parameters: int
    jacobian_dtype: torch.dtype
    lines: tuple[Line, ...] = ()
    """How the structured engine treated each parameter."""


def empirical_ntk(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    x2: Batch | None = None,
    *,
    outputs: Outputs = "full",
    params: Selection | None = None,
    forward: Forward | None = None,
    engine: Engine = "auto",
    by_layer: bool = False,
    preconditioner: Mapping[str, Tensor] | None = None,
    targets: Any = None,
    loss: Any = None,
    mode: Mode = "eval",
    dtype: torch.dtype = torch.float64,
    memory_limit: int | None = None,
) -> Any:
    """Return the empirical neural tangent kernel K[n, c, m, d] = ⟨∂f_c(x_n)/∂θ, ∂f_d(x2_m)/∂θ⟩, exactly.

    The model is only read: no parameter, gradient, buffer, training flag, hook or random state of it changes.

    Args:
        model: any eager module.
        x: N samples: a tensor, a tuple (positional arguments) or a dict (keyword arguments), leading axis N.
        x2: M samples for the cross kernel; None: the same as `x`.
        outputs: "full" → (N, C, M, C). "trace" → (N, M), sum over outputs. "sum" → (N, M), kernel of Σ_c f_c / √C
            (pseudo-NTK, Mohamadi et al. 2023). "per_output" → (C, N, M), its diagonal blocks. "loss" → (N, M), kernel
            of the per-sample losses (needs `targets`, `loss`).
        params: predicate (name, parameter), regular expression or names; None: all with requires_grad.
        forward: callable (module, inputs) → tensor with one row per sample; None: `module(inputs)`, its `.logits`, or
            its only floating tensor.
        engine: "auto": "structured" where it is exact, else rows of the Jacobian by plain autograd, several at a time
            ("batched") or one by one ("rows"). "structured": layer by layer, never holding a Jacobian. "reference":
            torch.func's vmap(jacrev), per sample. "rows": plain autograd over the whole batch. "operator": column by
            column from products with vectors, for what fits in no other way. The structured and the reference engine
            are compared with autograd rows when they first meet a model.
        by_layer: return a dict layer name → kernel; the kernels sum to the whole.
        preconditioner: parameter name → non-negative tensor D of its shape: K = J D Jᵀ.
        targets: targets of `x` (and of `x2` as a pair, for the cross kernel) for outputs="loss".
        loss: name, torch loss or callable (outputs, targets) → scalar, applied to one sample at a time. Of token losses
            the sum over the tokens of a sequence, divided by the mean number of tokens per sequence of `x`.
        mode: "eval", or "train": the batch-coupled function of training (BatchNorm over this batch, dropout off).
        dtype: of the result. Products are computed and accumulated in float64; with torch.float32 the structured
            engine multiplies in float32 and sums in float64, 1.1 to 1.8 times as fast on a CPU and exact to about
            1e-7 of the largest entry, which eigenvalues below 1e-7 of the largest do not survive.
        memory_limit: bytes for blocks of a Jacobian, or for gradients of activations; None: 1 GiB. Less is slower,
            never different beyond rounding.

    Raises:
        InputError: empty or inconsistent batches, outputs that are no single floating tensor, unknown options.
        NetworkError: nothing trainable, or a module that cannot be followed exactly.

    Cost: about C backward passes over the batch, and the products of each layer; see `ntk_monitor.plan`.

    Source: Jacot, Gabriel and Hongler 2018; Novak, Sohl-Dickstein and Schoenholz 2022 (implementations).
    """
    found = measured(
        model,
        x,
        x2,
        outputs=outputs,
        params=params,
        forward=forward,
        engine=engine,
        by_layer=by_layer,
        preconditioner=preconditioner,
        targets=targets,
        loss=loss,
        mode=mode,
        memory_limit=memory_limit,
        work=torch.float32 if dtype == torch.float32 else torch.float64,
    )
    if by_layer:
        return {name: kernel.to(dtype) for name, kernel in found.layers.items()}
    return found.values.to(dtype)


def measured(  # noqa: PLR0913 - the same door
    model: nn.Module,
    x: Batch,
    x2: Batch | None = None,
    *,
    outputs: Outputs = "full",
    params: Selection | None = None,
    forward: Forward | None = None,
    engine: Engine = "auto",
    by_layer: bool = False,
    preconditioner: Mapping[str, Tensor] | None = None,
    targets: Any = None,
    loss: Any = None,
    mode: Mode = "eval",
    memory_limit: int | None = None,
    work: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    seed: int = 0,
    group: Callable[[str], str] | None = None,
) -> Kernel:
    """Return the kernel of `empirical_ntk` in float64 together with how it was computed; same arguments and errors.

    With `group`, a function of a parameter's name, `layers` holds a kernel for each of its values.
    """
    _check(outputs, engine, targets, loss)
    batches = [x] if x2 is None else [x, x2]
    for batch in batches:
        size(batch)
    head = _headed(forward, outputs, loss, targets if x2 is None else targets and targets[0])
    if outputs == "loss":
        pairs = [targets] if x2 is None else list(targets)
        batches = [(batch, target) for batch, target in zip(batches, pairs, strict=True)]
    with undisturbed(seed=seed):
        network = Network.careful(model, batches[0], params=params, forward=head, mode=mode, device=device)
        batches = [network.prepared(batch) for batch in batches]
        layout: Layout = outputs if outputs in ("trace", "per_output") else "full"
        job = _Job(
            model,
            network,
            batches,
            layout,
            _scale(network, preconditioner),
            group or (layer if by_layer else _whole),
            memory_limit or MEMORY_LIMIT,
            torch.float64 if network.dtype == torch.float64 else work,
            preconditioner,
            head,
            seed,
            (forward, mode, outputs, None if loss is None else recognised(loss).function),
        )
        layers, used, reason, lines = job.run(engine, mode)
    if outputs in ("sum", "loss"):
        layers = {name: kernel[:, 0, :, 0] for name, kernel in layers.items()}
    return Kernel(sum_of(layers), layers, used, reason, network.parameter_count, network.dtype, tuple(lines))


def sum_of(layers: Mapping[str, Tensor]) -> Tensor:
    """Return the whole kernel from the kernels of its layers."""
    kernels = list(layers.values())
    return kernels[0] if len(kernels) == 1 else torch.stack(kernels).sum(0)


def _check(outputs: str, engine: str, targets: Any, loss: Any) -> None:
    layouts = ("full", "trace", "sum", "per_output", "loss")
    if outputs not in layouts:
        raise InputError(f"outputs must be one of {layouts}, got {outputs!r}")
    if engine not in get_args(Engine):
        raise InputError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
    if outputs == "loss" and (targets is None or loss is None):
        raise InputError('outputs="loss" needs targets= and loss=')


Found: TypeAlias = tuple[dict[str, Tensor], str, str, Sequence[Line]]
"""Kernels by group, engine, reason, and what the structured engine did."""

_CHECKED: "WeakKeyDictionary[nn.Module, set[Any]]" = WeakKeyDictionary()
"""Routes through a live module on which the structured engine has been found exact."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One kernel, and the ways to it."""

    model: nn.Module
    network: Network
    batches: list[Batch]
    layout: Layout
    scale: dict[str, Tensor]
    group: Callable[[str], str]
    limit: int
    work: torch.dtype
    preconditioner: Mapping[str, Tensor] | None
    forward: Forward
    seed: int
    asked: tuple[Any, ...]
    """What the function differs in from call to call on the same module."""

    def run(self, engine: str, mode: str) -> Found:
        """Return the kernel by the asked engine, or by the first of the ladder that is exact."""
        if engine == "rows":
            return self._rows("asked for")
        if engine == "operator":
            return self._operator(mode)
        if engine == "reference":
            return self._reference()
        if engine == "auto" and mode == "train":
            return self._autograd("training mode may couple the samples of a batch")
        try:
            found, lines = self._structured()
        except NTKMonitorError as error:
            if not isinstance(error, UnfollowedError):
                raise
            if engine == "structured":
                raise NetworkError(f'engine="structured" is not exact here: {error}; use engine="auto"') from error
            return self._autograd(str(error))
        except Exception as error:
            # Whatever a user's forward does to a mode that it does not expect.
            if engine == "structured":
                raise
            return self._autograd(f"{said(error, kind=True)}")
        return found, "structured", "agrees with plain autograd on the rows compared", lines

    def _structured(self) -> tuple[dict[str, Tensor], list[Line]]:
        other = self.batches[1] if len(self.batches) > 1 else None
        found, lines = structured_blocks(
            self.network,
            self.batches[0],
            other,
            self.layout,
            group=self.group,
            scale=self.scale,
            work=self.work,
            memory_limit=self.limit,
        )
        shapes = tuple((tuple(t.shape), t.dtype) for batch in self.batches for t in tensors(batch))
        seen = (tuple((line.parameter, line.operations) for line in lines), shapes, self.network.dtype, self.asked)
        checked = _CHECKED.setdefault(self.model, set())
        known = all(isinstance(part, Hashable) for part in self.asked)
        if not known or seen not in checked:
            if problem := structured_disagreement(self.network, self.batches[0], other):
                raise UnfollowedError(problem)
            if known:
                checked.add(seen)
        return found, lines

    def _autograd(self, reason: str) -> Found:
        """Rows by plain autograd: vectorised where that works, else one by one."""
        try:
            jacobians = [BatchedJacobian(self.network, batch) for batch in self.batches]
            if not (problem := disagreement(jacobians[0], self.network, self.batches[0])):
                return self._gram(jacobians), "batched", reason, ()
        except NTKMonitorError:
            raise
        except Exception as error:  # noqa: BLE001 - vectorised backward passes refuse with any kind of error
            problem = f"vectorised: {said(error, kind=True)}"
        return self._rows(f"{reason}; {problem}")

    def _rows(self, reason: str) -> Found:
        return self._gram([RowsJacobian(self.network, batch) for batch in self.batches]), "rows", reason, ()

    def _reference(self) -> Found:
        advice = 'use engine="auto"'
        try:
            jacobians = [ReferenceJacobian(self.network, batch, self.limit) for batch in self.batches]
            # In blocks as wide as the kernel's: torch.func's rule for PReLU mixes samples up where N = C.
            width = max(1, self.limit // (3 * jacobians[0].bytes_per_sample))
            problem = disagreement(jacobians[0], self.network, self.batches[0], width=width)
            kernels = {} if problem else self._gram(jacobians)
        except NTKMonitorError:
            raise
        except Exception as error:
            # torch.func raises RuntimeError, NotImplementedError, ValueError or a user's error from inside transforms.
            why = f"torch.func refused: {said(error, kind=True)}"
            raise NetworkError(f'engine="reference" cannot measure this model; {why}; {advice}') from error
        if problem:
            raise NetworkError(f'engine="reference" is not exact here: {problem}; {advice}')
        return kernels, "reference", "agrees with plain autograd on the rows compared", ()

    def _operator(self, mode: Any) -> Found:
        if len(self.batches) > 1 or self.group is not _whole:
            raise InputError('engine="operator" has the kernel of one batch as a whole; leave x2 and by_layer out')
        operator = NTKOperator(
            self.model,
            self.batches[0],
            params=list(self.network.parameters),
            forward=self.forward,
            mode=mode,
            preconditioner=self.preconditioner,
            device=self.network.device,
            seed=self.seed,
        )
        n, c = operator.samples, operator.outputs
        kernel = torch.as_tensor(operator.dense()).reshape(n, c, n, c)
        if self.layout != "full":
            kernel = torch.einsum("ncmc->cnm", kernel)
            kernel = kernel.sum(0) if self.layout == "trace" else kernel
        return {"": kernel}, "operator", f"asked for; {operator.route}", ()

    def _gram(self, jacobians: Sequence[Jacobian]) -> dict[str, Tensor]:
        sources = [_Scaled(j, self.scale) if self.scale else j for j in jacobians]
        right = sources[1] if len(sources) > 1 else None
        return gram(sources[0], right, self.layout, group=self.group, memory_limit=self.limit)


def _headed(forward: Forward | None, outputs: str, loss: Any, targets: Any) -> Forward:
    """Return the function whose Jacobian is contracted: the outputs, their sum, or the per-sample losses."""
    base = forward or call
    if outputs == "sum":

        def total(module: nn.Module, inputs: Batch) -> Tensor:
            f = only_tensor(base(module, inputs))
            f = f.reshape(len(f), -1)
            return f.sum(dim=1, keepdim=True) / math.sqrt(f.shape[1])

        return total
    if outputs == "loss":
        function = recognised(loss).singly(targets)

        def losses(module: nn.Module, inputs: Batch) -> Tensor:
            samples, target = inputs
            f = only_tensor(base(module, samples))
            return torch.stack([function(f[n : n + 1], target[n : n + 1]).reshape(1) for n in range(len(f))])

        return losses
    return base


def _whole(_: str) -> str:
    return ""


def _scale(network: Network, preconditioner: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if preconditioner is None:
        return {}
    missing = sorted(set(network.parameters) - set(preconditioner))
    if missing:
        raise InputError(f"preconditioner must hold every selected parameter, got none for {missing[:5]}")
    scale = {}
    for name, p in network.parameters.items():
        d = preconditioner[name].detach().to(p)
        if d.shape != p.shape or not bool((d >= 0).all()):
            raise InputError(f"preconditioner of {name} must be non-negative, of shape {tuple(p.shape)}")
        scale[name] = d.sqrt().flatten()
    return scale


class _Scaled:
    """A Jacobian with its columns multiplied by the square root of a diagonal preconditioner."""

    def __init__(self, jacobian: Jacobian, scale: dict[str, Tensor]) -> None:
        self._jacobian, self._scale = jacobian, scale
        self.samples, self.outputs = jacobian.samples, jacobian.outputs
        self.bytes_per_sample = jacobian.bytes_per_sample

    def block(self, rows: slice) -> dict[str, Tensor]:
        return {name: block * self._scale[name] for name, block in self._jacobian.block(rows).items()}
