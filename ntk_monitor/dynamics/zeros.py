"""Structural zeros: layers whose kernel is zero by construction, which is no fault of training.

Found by trying, not by names of classes. Behind a factor that is still zero (LoRA's A while B is 0, a residual branch
with γ = 0 or LayerScale 0, anything under a zero head): a small value in place of every zero tensor wakes the layer. A
bias that a norm or a softmax takes out again: a large shift of it changes no output. A module that the measured forward
pass does not call (an auxiliary head). A layer of dead ReLU units is none of these.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ntk_monitor.batch import Batch, owned
from ntk_monitor.engines.products import environment
from ntk_monitor.guard import seeded
from ntk_monitor.network import Forward, Mode, Network, Selection, layer

BEHIND_ZERO = "behind a factor that is still zero"
TAKEN_OUT = "a norm or a softmax takes this bias out again"
NOT_CALLED = "not called by the measured forward pass"

_WAKING = 1e-2
"""Small against weights, so that it does not reach into a dead unit's range; large against rounding."""
_CANCELLED = {4: 1e-4, 8: 1e-9}
"""A bias whose gradient is below this share of its weight's may have been cancelled: sums over positions cancel to
about 1e-6 in float32. Inputs of size 1e4 give as little; the trial tells."""
_UNCHANGED = {4: 1e-3, 8: 1e-7}
"""Outputs that differ by less, relative to themselves, are equal: a shift of 1 costs a norm some digits."""


def structural_zeros(  # noqa: PLR0913 - options of a Network, by keyword
    module: nn.Module,
    inputs: Batch,
    *,
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "eval",
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Return what has a zero kernel by construction, and why: modules, or single parameters where the rest is alive.

    Args:
        module: the live module, only read.
        inputs: N samples; a few are enough.
        params: as for `empirical_ntk`.
        forward: as for `empirical_ntk`.
        mode: as for `empirical_ntk`; a bias before BatchNorm has a kernel in evaluation mode, none in training mode.
        device: where to measure; None: where the parameters are.
        seed: of random numbers that a forward pass may draw, and of the cotangents.

    Raises:
        NetworkError: nothing trainable, or a module that cannot be followed.

    Cost: about seven passes, one more for each bias that only seems to be taken out.
    """
    with environment(seed):
        batch = owned(inputs)
        network = Network(module, params=params, forward=forward, mode=mode, device=device, detached=True)
        trial = _Trial(network, network.prepared(batch), seed)
        found = trial.not_called() | trial.taken_out() | trial.behind_zeros()
    return _by_layer(found, network.parameters)


class _Trial:
    """A network of its own parameters, which may be changed, on one batch."""

    def __init__(self, network: Network, inputs: Batch, seed: int) -> None:
        self._network, self._inputs, self._seed = network, inputs, seed
        self._called: set[int] = set()
        handle = register_module_forward_pre_hook(self._note)
        try:
            self._outputs, self._gradients = self._run()
        finally:
            handle.remove()
        self._digits = 8 if network.dtype.itemsize == 8 else 4

    def not_called(self) -> dict[str, str]:
        """Return parameters that no output depends on, of modules that were never called."""
        silent = (name for name, g in self._gradients.items() if g is None)
        return {name: NOT_CALLED for name in silent if id(self._network.parameters[name]) not in self._called}

    def behind_zeros(self) -> dict[str, str]:
        """Return parameters without gradient that have one once no tensor of zeros is left. Changes parameters."""
        zero = [name for name, g in self._gradients.items() if g is not None and not bool(g.any())]
        if not zero:
            return {}
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for name, p in self._network._module.named_parameters():
                # A shift could wake a unit that is dead; a factor only undoes a product.
                if p.is_floating_point() and not _additive(name) and not bool(p.any()):
                    p.copy_(_WAKING * torch.randn(p.shape, generator=generator))
        _, gradients = self._run()
        return {name: BEHIND_ZERO for name in zero if (g := gradients[name]) is not None and bool(g.any())}

    def taken_out(self) -> dict[str, str]:
        """Return biases with a gradient of rounding's size whose large shift changes nothing."""
        candidates = [name for name in self._network.parameters if _additive(name) and self._cancelled(name)]
        if not candidates:
            return {}
        # One pass for all; only when they are not all without effect is each tried alone.
        if self._indifferent(candidates):
            return dict.fromkeys(candidates, TAKEN_OUT)
        return {name: TAKEN_OUT for name in candidates if self._indifferent([name])}

    def _cancelled(self, name: str) -> bool:
        own = self._gradients[name]
        siblings = [g for other, g in self._gradients.items() if layer(other) == layer(name) and not _additive(other)]
        scale = max((_norm(g) for g in siblings if g is not None), default=0.0)
        return own is not None and scale > 0 and _norm(own) <= _CANCELLED[self._digits] * scale

    def _indifferent(self, names: Sequence[str]) -> bool:
        generator = torch.Generator().manual_seed(self._seed)
        values = {name: p.detach() for name, p in self._network.parameters.items()}
        for name in names:
            p = values[name]
            values[name] = p + (1 + p.abs().max()) * torch.randn(p.shape, generator=generator).to(p)
        seeded(self._seed)
        shifted = self._network.function(values, self._inputs).detach()
        return _norm(shifted - self._outputs) <= _UNCHANGED[self._digits] * _norm(self._outputs)

    def _run(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the outputs (N, C) and the gradient of one random combination of them, None where none reaches."""
        seeded(self._seed)
        outputs = self._network.outputs(self._inputs)
        parameters = self._network.parameters
        if not outputs.requires_grad:
            return outputs, dict.fromkeys(parameters)
        generator = torch.Generator().manual_seed(self._seed)
        w = torch.randn(outputs.shape, generator=generator).to(outputs)
        found: Sequence[Tensor | None] = torch.autograd.grad(outputs, list(parameters.values()), w, allow_unused=True)
        return outputs.detach(), {n: g if g is None else g.to_dense() for n, g in zip(parameters, found, strict=True)}

    def _note(self, module: nn.Module, _: Any) -> None:
        self._called.update(id(p) for p in module._parameters.values() if p is not None)


def _additive(parameter: str) -> bool:
    return "bias" in parameter.rpartition(".")[2]


def _norm(t: Tensor) -> float:
    return float(t.abs().double().norm())


def _by_layer(found: Mapping[str, str], parameters: Iterable[str]) -> dict[str, str]:
    """Name a module instead of its parameters where all of them are in it for one reason."""
    members: dict[str, list[str]] = {}
    for name in parameters:
        members.setdefault(layer(name), []).append(name)
    named: dict[str, str] = {}
    for owner, names in members.items():
        reasons = [found.get(name, "") for name in names]
        if all(reasons):
            named[owner] = "; ".join(dict.fromkeys(reasons))
        else:
            named |= {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    return named
