"""Did a probe leave a trace? Fingerprints of everything training depends on, taken before and after."""

import random
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registries

from ntk_monitor.settings import settings

# Bytes of one fingerprint that are read; more are sampled. Reading these takes 0.2 s on one core, 2 ms on a GPU.
READ = 2 * 2**30

# A large tensor is sampled in this many runs of neighbours, evenly spaced.
_RUNS = 16


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """State of a module, its optimizers and the process around them, small and comparable."""

    parts: dict[str, Hashable]
    read: int = READ

    @staticmethod
    def of(module: nn.Module, optimizers: Iterable[Any] = (), *, read: int = READ) -> "Fingerprint":
        """Read the state.

        Of the module: parameters, their gradients, identity and versions, buffers, flags, hooks, plain attributes. Of
        the optimizers: state and options of each group. Of the process: random generators, torch's switches, hooks for
        all modules.

        Values enter as bit sums, so that nothing is copied; an exchange of equal parts would go unseen. Every write
        that autograd can see raises a version besides, wherever it is.

        Cost: one pass over the memory of all this, at 10 GB/s on one core; at most `read` bytes of it, the rest is
        sampled: 0.2 s however large the model. With `read` 0 no values are read, which takes some microseconds for each
        tensor and module.
        """
        optimizers = list(optimizers)
        held = list(_held(module, optimizers))
        total = sum(t.numel() * t.element_size() for _, t in held)
        share = min(1.0, read / max(1, total))
        sums = _on_host([_bits(t, share) if read else None for _, t in held])
        parts: dict[str, Hashable] = {
            name: (id(t), t.requires_grad, _version(t), bits) for (name, t), bits in zip(held, sums, strict=True)
        }
        for name, child in module.named_modules():
            parts[f"training flag or hooks of {name or 'the module'}"] = (child.training, *_hooks(child))
            parts[f"attributes of {name or 'the module'}"] = _attributes(child)
        for i, optimizer in enumerate(optimizers):
            for j, group in enumerate(optimizer.param_groups):
                options = {key: value for key, value in group.items() if key != "params"}
                parts[f"options of group {j} of optimizer {i}"] = (len(group["params"]), _plain(options))
        return Fingerprint(parts | _process(), read)

    def changes(self, after: "Fingerprint") -> list[str]:
        """Return the names of what differs."""
        names = list(self.parts) + [name for name in after.parts if name not in self.parts]
        return [name for name in names if self.parts.get(name) != after.parts.get(name)]


def _held(module: nn.Module, optimizers: Iterable[Any]) -> Iterable[tuple[str, Tensor]]:
    names = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names[id(p)] = name
        yield f"parameter {name}", p
        if p.grad is not None:
            yield f"gradient of {name}", p.grad
    for name, b in module.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", b
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    yield f"{key} of {names.get(id(p), 'a parameter')}", value


def _process() -> dict[str, Hashable]:
    """Return the state of the process: generators as hashes, since their counters move against each other in a sum."""
    parts: dict[str, Hashable] = {
        "torch's random state": hash(torch.get_rng_state().numpy().tobytes()),
        "NumPy's random state": hash(str(np.random.get_state(legacy=False)["state"])),
        "Python's random state": hash(random.getstate()),
    }
    if torch.cuda.is_initialized():
        parts["CUDA's random state"] = tuple(hash(s.numpy().tobytes()) for s in torch.cuda.get_rng_state_all())
    for registry in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        parts[f"hooks of all modules ({registry})"] = tuple(getattr(registries, registry))
    return parts | {f"torch's {name}": value for name, value in settings().items()}


def _hooks(module: nn.Module) -> tuple[Hashable, ...]:
    """Return the keys of a module's hooks: unlike their number, they differ after an exchange."""
    return tuple(tuple(h) for h in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


def _attributes(module: nn.Module) -> Hashable:
    """Return what a forward pass could leave on a module, as far as it is plain: counters, hidden states, lists."""
    return tuple((name, _plain(value)) for name, value in vars(module).items() if not name.startswith("_"))


def _plain(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return id(value), _version(value)
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return value if value == value else "NaN"  # which differs from itself
    if isinstance(value, (list, tuple, dict, set)):
        items = list(value.items()) if isinstance(value, dict) else list(value)
        return type(value).__name__, len(items), tuple(map(_plain, items[:8]))
    return id(value)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _bits(t: Tensor, share: float = 1.0) -> Tensor | None:
    """Return a sum over the raw bits of a share of a tensor: equal bits, equal sum; None for one without storage."""
    if t.is_meta or t.is_quantized or type(t).__name__ == "DTensor" or t.layout != torch.strided or not t.numel():
        return None
    with torch.no_grad():
        flat = t.detach().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        length = max(1, int(share * flat.numel() / _RUNS))
        if share < 1 and length * _RUNS < flat.numel():
            starts = [i * (flat.numel() - length) // (_RUNS - 1) for i in range(_RUNS)]
            return torch.stack([_sum(flat[s : s + length]) for s in starts]).sum()
        return _sum(flat)


def _sum(flat: Tensor) -> Tensor:
    """Return the sum of a flat tensor's bits modulo 2^64, in words of eight bytes where they fit: ten times as fast."""
    size = flat.element_size()
    words = flat.numel() * size // 8 * (8 // size) if flat.data_ptr() % 8 == 0 else 0
    rest = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    total = flat[words:].contiguous().view(rest).sum(dtype=torch.int64)
    return total + flat[:words].contiguous().view(torch.int64).sum() if words else total


def _on_host(sums: list[Tensor | None]) -> list[int | None]:
    """Return the values, with one wait for each device rather than one for each tensor."""
    values: dict[int, int] = {}
    for device in {s.device for s in sums if s is not None}:
        here = [i for i, s in enumerate(sums) if s is not None and s.device == device]
        numbers = torch.stack([s for s in sums if s is not None and s.device == device]).tolist()
        values |= dict(zip(here, numbers, strict=True))
    return [values.get(i) for i in range(len(sums))]
