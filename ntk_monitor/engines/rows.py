"""The rows engine: plain autograd, one backward pass of the whole batch per output. The oracle, and the last resort.

Works on whatever autograd works on, batch-coupled networks included: row (n, c) is the gradient of output c of sample n
*within this batch*. Costs N·C backward passes over N samples.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_monitor.batch import Batch
from ntk_monitor.network import Network


class RowsJacobian:
    """Jacobian of a network on a batch, row by row, from one forward pass of the whole batch."""

    def __init__(self, network: Network, inputs: Batch) -> None:
        self._network = network
        self._y = network.outputs(inputs)
        self.samples, self.outputs = self._y.shape
        element = torch.empty((), dtype=network.dtype).element_size()
        self.bytes_per_sample = self.outputs * network.parameter_count * element

    def block(self, rows: slice) -> dict[str, Float[Tensor, "n c p"]]:
        """Return the Jacobian rows of these samples, by parameter name."""
        samples = range(*rows.indices(self.samples))
        parameters = self._network.parameters
        found = {
            name: real_part(p.detach()).new_empty(len(samples), self.outputs, real_part(p.detach()).numel())
            for name, p in parameters.items()
        }
        for i, n in enumerate(samples):
            for c in range(self.outputs):
                for name, gradient in self.row(n, c).items():
                    found[name][i, c] = gradient
        return found

    def row(self, sample: int, output: int) -> dict[str, Float[Tensor, " p"]]:
        """Return the gradient of one output of one sample; parameters it does not reach have a zero gradient."""
        parameters = self._network.parameters
        y = self._y[sample, output]
        if not y.requires_grad:
            return {name: real_part(torch.zeros_like(p)) for name, p in parameters.items()}
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            y, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        return {
            name: real_part(torch.zeros_like(p) if g is None else g.to_dense())
            for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }


def real_part(gradient: Tensor) -> Tensor:
    """Return a gradient as one real vector: a complex parameter counts as its real and its imaginary part."""
    return torch.view_as_real(gradient.resolve_conj()).flatten() if gradient.is_complex() else gradient.flatten()
