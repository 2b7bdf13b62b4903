"""The reference engine: `vmap(jacrev)` of torch.func, one Jacobian per sample, in chunks that fit in memory.

Per sample by construction: it refuses (raises from torch.func) train-mode BatchNorm, data-dependent control flow and
operators without a batching rule. Costs C backward passes per sample, and N·C·P numbers of memory.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, vmap

from ntk_monitor.batch import Batch, Flat, size, take
from ntk_monitor.network import Network


class ReferenceJacobian:
    """Per-sample Jacobian of a network on a batch, by torch.func.

    Raises, when a block is asked for, whatever torch.func raises on operations it cannot transform.
    """

    def __init__(self, network: Network, inputs: Batch, memory_limit: int) -> None:
        self._network = network
        self._inputs = inputs
        self.samples = size(inputs)
        with torch.enable_grad():  # a forward may take gradients itself
            self.outputs = network.outputs(take(inputs, slice(0, 1))).shape[1]
        element = torch.empty((), dtype=network.dtype).element_size()
        self.bytes_per_sample = self.outputs * network.parameter_count * element
        # Inside one chunk torch.func holds the chunk's Jacobian and about as much again in cotangents.
        self._chunk = max(1, memory_limit // (4 * self.bytes_per_sample))

    def block(self, rows: slice) -> dict[str, Float[Tensor, "n c p"]]:
        """Return the Jacobian rows of these samples, by parameter name."""
        flat = Flat.of(take(self._inputs, rows))
        parameters = {name: p.detach() for name, p in self._network.parameters.items()}

        def one(values: dict[str, Tensor], *leaves: Tensor) -> Tensor:
            sample = flat.rebuild([leaf.unsqueeze(0) for leaf in leaves])
            return self._network.function(values, sample).squeeze(0)

        in_dims = (None, *(0 for _ in flat.leaves))
        jacobian = vmap(jacrev(one), in_dims=in_dims, chunk_size=self._chunk)(parameters, *flat.leaves)
        return {name: value.flatten(2) for name, value in jacobian.items()}
