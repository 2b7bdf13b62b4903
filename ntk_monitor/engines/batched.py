"""The batched engine: rows of the Jacobian several at a time, by vectorised backward passes of the whole batch.

The middle of the ladder: works where autograd's backward operations can be vectorised, for networks whose parameters
act in ways that the structured engine does not follow. The same rows as `rows`, at a fraction of the calls.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_monitor.batch import Batch
from ntk_monitor.engines.rows import RowsJacobian, real_part
from ntk_monitor.network import Network

_ROWS = 16
"""Rows at a time: the backward pass holds this many gradients of every activation."""


class BatchedJacobian(RowsJacobian):
    """Jacobian of a network on a batch, from one forward pass, in chunks of `_ROWS` rows.

    Raises, when a block is asked for, whatever torch raises on operations that cannot be vectorised.
    """

    def __init__(self, network: Network, inputs: Batch) -> None:
        super().__init__(network, inputs)
        if any(p.is_complex() for p in network.parameters.values()):
            raise RuntimeError("complex parameters")

    def block(self, rows: slice) -> dict[str, Float[Tensor, "n c p"]]:
        """Return the Jacobian rows of these samples, by parameter name."""
        samples, y = range(*rows.indices(self.samples)), self._y
        parameters = self._network.parameters
        places = [(n, c) for n in samples for c in range(self.outputs)]
        found = {name: p.detach().new_zeros(len(places), p.numel()) for name, p in parameters.items()}
        if y.requires_grad:
            for start in range(0, len(places), _ROWS):
                chunk = places[start : start + _ROWS]
                cotangents = y.detach().new_zeros(len(chunk), *y.shape)
                for i, (n, c) in enumerate(chunk):
                    cotangents[i, n, c] = 1
                gradients = torch.autograd.grad(
                    y,
                    list(parameters.values()),
                    cotangents,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
                for own, g in zip(found.values(), gradients, strict=True):
                    if g is not None:
                        own[start : start + len(chunk)] = real_part(g).view(len(chunk), -1)
        return {name: value.view(len(samples), self.outputs, -1) for name, value in found.items()}
