"""Seconds of counted work on the documented machines: speeds of products, of memory, and of calls.

Constants, never measured at run time, so that the same model has the same plan everywhere. Contractions have rates of
their own, in `engines.structured.costs`.
"""

from dataclasses import dataclass

import torch

from ntk_monitor.engines.work import Work


@dataclass(frozen=True, slots=True)
class Speeds:
    """What passes over the network cost beside matrix products. Defaults: two CPU cores, AVX-512, torch 2.13."""

    matmul: float = 62e9
    """Multiply-adds per second of matrix products, float32."""
    convolution: float = 50e9
    """Multiply-adds per second of convolutions, forward and backward, float32."""
    double: float = 0.4
    """Speed of products in float64 relative to float32."""
    memory: float = 7.8e9
    """Bytes of results per second of elementwise operations, which read their arguments and write once."""
    call: float = 8e-6
    """Seconds of one operation, however small."""
    tapped: float = 60e-6
    """Seconds of recording one operation, and of asking for its gradient."""
    module: float = 1.2e-3
    """Seconds of making one module ready: shadows of the network, states kept and given back."""
    vectorised: float = 0.75
    """Speed of vectorised backward passes relative to as many ordinary ones, calls aside."""
    single: float = 0.5
    """The same of per-sample passes by `vmap(jacrev)`."""


CPU = Speeds()
CUDA = Speeds(1e13, 1e13, 0.5, 1e12, 8e-6, 60e-6, 1.2e-3, 0.75, 0.5)


def speeds(device: torch.device) -> Speeds:
    """Return the documented speeds of a kind of device."""
    return CUDA if device.type == "cuda" else CPU


@dataclass(frozen=True, slots=True)
class Clock:
    """Tells the seconds of work on a network of this dtype."""

    speeds: Speeds
    dtype: torch.dtype

    @property
    def products(self) -> float:
        """Speed of the network's own products relative to float32."""
        return self.speeds.double if self.dtype == torch.float64 else 1.0

    def seconds(self, work: Work, share: float = 1.0) -> float:
        """Return the seconds of a share of the work, all calls included."""
        products = (work.matmul / self.speeds.matmul + work.convolution / self.speeds.convolution) / self.products
        return share * (products + work.bytes / self.speeds.memory) + work.calls * self.speeds.call

    def product(self, products: float, factors: float, results: float, work: torch.dtype) -> float:
        """Return the seconds of a product of two matrices in dtype `work` that is added to the kernel.

        Args:
            products: multiply-adds.
            factors: elements of both matrices.
            results: elements of the product.
            work: dtype of the product.
        """
        wide = work == torch.float64
        converted = 8 * factors if wide and self.dtype != torch.float64 else 0
        seconds = products / self.speeds.matmul / (self.speeds.double if wide else 1.0)
        return seconds + (converted + 3 * 8 * results) / self.speeds.memory + 4 * self.speeds.call
