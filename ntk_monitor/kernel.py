"""empirical_ntk: the kernel of a network on samples, exact. K = J Jᵀ, unnormalised, outputs flattened sample-major.

Model → Network → engine → float64 Gram. Which engine ran, and why, is part of the answer (`measured`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ntk_monitor.batch import Batch, size
from ntk_monitor.engines.contract import Jacobian, Layout, gram
from ntk_monitor.engines.reference import ReferenceJacobian
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.errors import InputError, NetworkError, NTKMonitorError
from ntk_monitor.guard import undisturbed
from ntk_monitor.losses import recognised
from ntk_monitor.network import Forward, Mode, Network, Selection, call, only_tensor
from ntk_monitor.selfcheck import disagreement

Outputs: TypeAlias = Literal["full", "trace", "sum", "per_output", "loss"]
Engine: TypeAlias = Literal["auto", "reference", "rows"]

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
        engine: "reference": torch.func's vmap(jacrev), per sample. "rows": plain autograd over the whole batch, for
            whatever vmap refuses. "auto": reference, checked against a few autograd rows, else rows.
        by_layer: return a dict layer name → kernel; the kernels sum to the whole.
        preconditioner: parameter name → non-negative tensor D of its shape: K = J D Jᵀ.
        targets: targets of `x` (and of `x2` as a pair, for the cross kernel) for outputs="loss".
        loss: name, torch loss or callable (outputs, targets) → scalar, applied to one sample at a time.
        mode: "eval", or "train": the batch-coupled function of training (BatchNorm over this batch, dropout off).
        dtype: of the result; products are always accumulated in float64.
        memory_limit: bytes for Jacobian blocks; None: 1 GiB. Less is slower, never different beyond rounding.

    Raises:
        InputError: empty or inconsistent batches, outputs that are no single floating tensor, unknown options.
        NetworkError: nothing trainable, or a module that cannot be followed exactly.

    Cost: C backward passes per sample, and N M C² P multiply-adds ("full") or N M C P (otherwise).

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
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Kernel:
    """Return the kernel of `empirical_ntk` in float64 together with how it was computed; same arguments and errors."""
    _check(outputs, engine, targets, loss)
    batches = [x] if x2 is None else [x, x2]
    for batch in batches:
        size(batch)
    head = _headed(forward, outputs, loss)
    if outputs == "loss":
        pairs = [targets] if x2 is None else list(targets)
        batches = [(batch, target) for batch, target in zip(batches, pairs, strict=True)]
    with undisturbed(seed=seed):
        network = Network.careful(model, batches[0], params=params, forward=head, mode=mode, device=device)
        batches = [network.prepared(batch) for batch in batches]
        scale = _scale(network, preconditioner)
        layout: Layout = outputs if outputs in ("trace", "per_output") else "full"
        group = _layer if by_layer else _whole
        limit = memory_limit or MEMORY_LIMIT

        def kernels(jacobians: Sequence[Jacobian]) -> dict[str, Tensor]:
            sources = [_Scaled(j, scale) if scale else j for j in jacobians]
            return gram(sources[0], sources[1] if x2 is not None else None, layout, group=group, memory_limit=limit)

        layers, used, reason = _routed(network, batches, engine, mode, limit, kernels)
    if outputs in ("sum", "loss"):
        layers = {name: kernel[:, 0, :, 0] for name, kernel in layers.items()}
    return Kernel(sum_of(layers), layers, used, reason, network.parameter_count, network.dtype)


def sum_of(layers: Mapping[str, Tensor]) -> Tensor:
    """Return the whole kernel from the kernels of its layers."""
    return torch.stack(list(layers.values())).sum(0)


def _check(outputs: str, engine: str, targets: Any, loss: Any) -> None:
    layouts = ("full", "trace", "sum", "per_output", "loss")
    if outputs not in layouts:
        raise InputError(f"outputs must be one of {layouts}, got {outputs!r}")
    if engine not in ("auto", "reference", "rows"):
        raise InputError(f'engine must be "auto", "reference" or "rows", got {engine!r}')
    if outputs == "loss" and (targets is None or loss is None):
        raise InputError('outputs="loss" needs targets= and loss=')


def _routed(
    network: Network, batches: list[Batch], engine: str, mode: str, limit: int, kernels: Any
) -> tuple[dict[str, Tensor], str, str]:
    """Return (kernels, engine, reason) by the asked engine, or by the first of the ladder that is exact."""
    if engine == "rows" or (engine == "auto" and mode == "train"):
        reason = "asked for" if engine == "rows" else "training mode may couple the samples of a batch"
        return kernels([RowsJacobian(network, batch) for batch in batches]), "rows", reason
    try:
        jacobians = [ReferenceJacobian(network, batch, limit) for batch in batches]
        problem = disagreement(jacobians[0], network, batches[0])
        if not problem:
            return kernels(jacobians), "reference", "agrees with plain autograd on the rows compared"
    except NTKMonitorError:
        raise
    except Exception as error:
        # torch.func raises RuntimeError, NotImplementedError, ValueError or a user's own error from inside transforms.
        problem = f"torch.func refused: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if engine == "reference":
            raise NetworkError(f'engine="reference" cannot measure this model; {problem}; use engine="rows"') from error
    if engine == "reference":
        raise NetworkError(f'engine="reference" is not exact here: {problem}; use engine="rows"')
    return kernels([RowsJacobian(network, batch) for batch in batches]), "rows", problem


def _headed(forward: Forward | None, outputs: str, loss: Any) -> Forward:
    """Return the function whose Jacobian is contracted: the outputs, their sum, or the per-sample losses."""
    base = forward or call
    if outputs == "sum":

        def total(module: nn.Module, inputs: Batch) -> Tensor:
            f = only_tensor(base(module, inputs))
            f = f.reshape(len(f), -1)
            return f.sum(dim=1, keepdim=True) / math.sqrt(f.shape[1])

        return total
    if outputs == "loss":
        function = recognised(loss).per_sample

        def losses(module: nn.Module, inputs: Batch) -> Tensor:
            samples, target = inputs
            f = only_tensor(base(module, samples))
            return torch.stack([function(f[n : n + 1], target[n : n + 1]).reshape(1) for n in range(len(f))])

        return losses
    return base


def _whole(_: str) -> str:
    return ""


def _layer(parameter: str) -> str:
    """Return the module a parameter belongs to; a loose parameter of the root stands for itself."""
    return parameter.rpartition(".")[0] or parameter


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
