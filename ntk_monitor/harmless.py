"""Did a probe leave a trace? Fingerprints of everything training depends on, taken before and after."""

import random
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """State of a module and of the global random generators, small and comparable."""

    parts: dict[str, Hashable]

    @staticmethod
    def of(module: nn.Module) -> "Fingerprint":
        """Read the state: parameters, their gradients and identity, buffers, flags, hooks, random generators.

        Values enter as bit sums, so that nothing is copied; an exchange of equal parts would go unseen. Cost: one pass
        over the memory of the parameters.
        """
        parts: dict[str, Hashable] = {}
        for name, p in module.named_parameters(remove_duplicate=False):
            parts[f"parameter {name}"] = (id(p), p.requires_grad, _bits(p))
            parts[f"gradient of {name}"] = None if p.grad is None else (id(p.grad), _bits(p.grad))
        for name, b in module.named_buffers(remove_duplicate=False):
            parts[f"buffer {name}"] = (id(b), _bits(b))
        for name, child in module.named_modules():
            hooks = (len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks))
            parts[f"training flag or hooks of {name or 'the module'}"] = (child.training, *hooks)
        # Not a sum: the generator's two counters move against each other.
        parts["torch's random state"] = hash(torch.get_rng_state().numpy().tobytes())
        parts["NumPy's random state"] = hash(str(np.random.get_state(legacy=False)["state"]))
        parts["Python's random state"] = hash(random.getstate())
        return Fingerprint(parts)

    def changes(self, after: "Fingerprint") -> list[str]:
        """Return the names of what differs."""
        names = list(self.parts) + [name for name in after.parts if name not in self.parts]
        return [name for name in names if self.parts.get(name) != after.parts.get(name)]


def _bits(t: Tensor) -> Hashable:
    """Return a sum over the raw bits of a tensor: equal bits, equal sum."""
    if t.is_meta or type(t).__name__ == "DTensor":
        return t._version
    values = t.detach()
    with torch.no_grad():
        plain = torch.view_as_real(values) if values.is_complex() else values
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()]
        return int(plain.contiguous().view(same_size).sum(dtype=torch.int64)) if plain.numel() else 0
