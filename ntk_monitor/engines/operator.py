"""NTKOperator: the kernel as a linear map, for what is too large to be written down. K = J D Jᵀ, or M = Sᵀ K S.

J (N·C, P) is the Jacobian of all outputs of one batch in the selected parameters, outputs flattened sample-major; D is
an optional diagonal preconditioner; S Sᵀ = H is the curvature of a loss in the outputs. A product costs two passes over
the batch whatever C is. How J is applied: `products`; S: `curvature`; eigenvalues: `lanczos`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import Batch, owned, size
from ntk_monitor.engines.curvature import Root, root_of
from ntk_monitor.engines.lanczos import leading
from ntk_monitor.engines.products import Products, Route, Weights, environment, real, routes
from ntk_monitor.errors import InputError, NumericsError
from ntk_monitor.losses import recognised
from ntk_monitor.network import Forward, Mode, Network, Selection

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """A trace by random probes."""

    value: float
    """Squared output units, like the trace itself."""
    standard_error: float
    """Of the value, from the spread of the probes."""
    probes: int


class NTKOperator:
    """The kernel of a network on a batch as a symmetric positive semi-definite linear map on its N·C outputs.

    `op @ v` computes in the network's dtype and returns float64. The operator describes the weights of the moment it
    was made: it shares them with the live module, which it never changes, and refuses to go on when they have changed.

    Args:
        model: any eager module.
        x: N samples: a tensor, a tuple (positional arguments) or a dict (keyword arguments), leading axis N; copied.
        params: predicate (name, parameter), regular expression or names; None: all with requires_grad.
        forward: callable (module, inputs) → tensor with one row per sample; None: as for `empirical_ntk`.
        mode: "eval", or "train": the training operator, whose samples are coupled by BatchNorm over this batch (dropout
            off). The latter is what gradient descent on this batch feels.
        preconditioner: parameter name → non-negative tensor D of its shape.
        loss: name or torch loss; with `targets` the operator is M = Sᵀ K S, the Gauss-Newton matrix seen from the
            outputs: its non-zero eigenvalues are those of Jᵀ H J. H holds the loss's own 1/N; no further factor is due.
            Mean squares, (token) cross-entropy, binary cross-entropy with logits, Huber.
        targets: of the N samples, as the loss takes them.
        route: how J u is computed, see `engines.products`; "auto": the cheaper one, or else the one that is exact here.
        device: where to compute; None: where the parameters are.
        seed: of random numbers that a forward pass may draw, and of the probes of `trace_estimate`.

    Attributes:
        shape: (N·C, N·C).
        dtype: float64, of results.
        samples, outputs: N and C.
        route, reason: how J u is computed, and why.

    Raises:
        InputError: an empty batch, an unsupported loss, targets or a preconditioner that do not fit.
        NetworkError: nothing trainable, a module that cannot be followed, or one without the derivatives needed.

    Memory: the graph of one forward pass over the batch is kept, with route "double-vjp" that of its backward pass too.

    Sources: Pearlmutter 1994 (products by forward mode); Schraudolph 2002 (Gauss-Newton products).
    """

    def __init__(  # noqa: PLR0913 - the public door
        self,
        model: nn.Module,
        x: Batch,
        *,
        params: Selection | None = None,
        forward: Forward | None = None,
        mode: Mode = "eval",
        preconditioner: Mapping[str, Tensor] | None = None,
        loss: Any = None,
        targets: Any = None,
        route: Literal["auto"] | Route = "auto",
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        if (loss is None) != (targets is None):
            raise InputError("loss= and targets= belong together; pass both for Sᵀ K S, neither for K")
        self.samples, self._seed = size(x), seed
        with environment(seed):
            batch = owned(x)
            network = Network.careful(model, batch, params=params, forward=forward, mode=mode, device=device)
            self._scale = _diagonal(network, preconditioner)
            self._products = Products(network, network.prepared(batch), _routes(model, route), seed)
            raw = self._products.raw
            self._root: Root | None = None if loss is None else root_of(recognised(loss), raw, targets)
        self._weights = Weights(network, model)
        self._eps = torch.finfo(network.dtype).eps
        self.outputs = raw[0].numel()
        self.shape = (raw.numel(), raw.numel())
        self.dtype = torch.float64
        self.route, self.reason = self._products.route, self._products.reason
        self._start = np.empty((raw.numel(), 0))

    @property
    def passes(self) -> int:
        """Passes over the batch so far, those of construction included: two for each product."""
        return self._products.passes

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, v: NDArray[Any]) -> Array: ...

    def __matmul__(self, v: Tensor | NDArray[Any]) -> Tensor | Array:
        """Return the product with v of shape (N·C,), (N, C) or (N·C, k), of the same kind and shape, in float64.

        Costs two passes over the batch for each column.

        Raises:
            InputError: another shape.
            NetworkError: the weights have changed since the operator was made.
        """
        given = v.detach() if isinstance(v, Tensor) else torch.from_numpy(np.array(v, dtype=np.float64))
        shape, n = tuple(given.shape), self.shape[0]
        if given.is_complex():
            raise InputError("the kernel is real: wanted a real vector, got a complex one; pass its two parts")
        if shape != (self.samples, self.outputs) and not (given.dim() in (1, 2) and shape[0] == n):
            raise InputError(
                f"wanted a vector of shape ({n},), ({self.samples}, {self.outputs}) or ({n}, k), got {shape}; "
                "outputs are flattened sample-major"
            )
        product = self._applied(given.cpu().double().reshape(n, -1)).reshape(shape)
        return product.to(given.device) if isinstance(v, Tensor) else product.numpy()

    def dense(self) -> Float64[Tensor, "n n"]:
        """Return the whole matrix, symmetrised, in float64 on the CPU. Costs N·C products, (N·C)² numbers."""
        matrix = self._applied(torch.eye(self.shape[0], dtype=torch.float64))
        return (matrix + matrix.T) / 2

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` of float64, for SciPy's own solvers."""
        from scipy.sparse.linalg import LinearOperator

        def product(v: NDArray[Any]) -> Array:
            return self @ v

        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=np.float64)

    @overload
    def eigsh(self, k: int, *, tolerance: float = ..., start: Any = ..., vectors: Literal[False] = False) -> Array: ...

    @overload
    def eigsh(
        self, k: int, *, tolerance: float = ..., start: Any = ..., vectors: Literal[True]
    ) -> tuple[Array, Array]: ...

    def eigsh(
        self, k: int, *, tolerance: float = 1e-6, start: Any = None, vectors: bool = False
    ) -> Array | tuple[Array, Array]:
        """Return the k largest eigenvalues, descending: (k,), and with `vectors` their eigenvectors (N·C, k) too.

        Each has an eigenvalue within `tolerance` times the largest, but not closer than the rounding of products (64 ε
        of the network's dtype: 8e-6 in float32). Costs about 10 to 30 products for one eigenvalue, fewer from a good
        start; for k ≥ N·C the whole matrix is formed.

        Args:
            k: how many, at least 1.
            tolerance: relative to the largest.
            start: guesses of eigenvectors, (N·C,), (N, C) or (N·C, m), e.g. those of an operator at earlier weights;
                None: those found by this operator's previous call.
            vectors: return the eigenvectors too.

        Raises:
            NumericsError: a product that is not finite, or no convergence.
        """
        n = self.shape[0]
        if k < 1:
            raise InputError(f"wanted at least one eigenvalue, got k={k}")
        guesses = self._start if start is None else np.asarray(torch.as_tensor(start).cpu(), dtype=np.float64)
        if guesses.size % n or not np.isfinite(guesses).all():
            raise InputError(f"start must hold finite vectors of {n} numbers, got shape {guesses.shape}")
        if k >= n:
            matrix = self.dense().numpy()
            if not np.isfinite(matrix).all():
                raise NumericsError(
                    "the kernel is not finite, so that no eigenvalue exists; look at weights and inputs"
                )
            found = np.linalg.eigh(matrix)
            values, basis = found.eigenvalues[::-1].copy(), found.eigenvectors[:, ::-1].copy()
        else:
            self._weights.check()
            with environment(self._seed):
                product = self._one
                values, basis = leading(
                    lambda v: product(torch.from_numpy(v)).numpy(),
                    guesses.reshape(n, -1),
                    k,
                    max(tolerance, 64 * self._eps),
                )
        self._start = basis
        return (values, basis) if vectors else values

    def trace_estimate(self, probes: int = 16) -> TraceEstimate:
        """Return the trace by Hutchinson's estimator: the mean of |√D Jᵀ S z|² over random signs z.

        Unbiased. Costs one pass over the batch for each probe, half a product. The same probes at each call.

        Raises:
            NumericsError: an estimate that is not finite.

        Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
        """
        if probes < 2:
            raise InputError(f"a standard error needs at least two probes, got {probes}")
        self._weights.check()
        generator = torch.Generator().manual_seed(self._seed)
        signs = torch.randint(2, (probes, self.shape[0]), generator=generator).double() * 2 - 1
        with environment(self._seed):
            found = np.array([self._squared(z) for z in signs])
        if not np.isfinite(found).all():
            raise NumericsError("the trace is not finite; look for NaN or infinity in the weights or the inputs")
        return TraceEstimate(float(found.mean()), float(found.std(ddof=1) / probes**0.5), probes)

    def quadratic(self, v: Tensor | NDArray[Any]) -> float:
        """Return vᵀ (operator) v for one v of N·C numbers. Costs one pass over the batch, half a product.

        Raises:
            InputError: another size.
            NetworkError: the weights have changed since the operator was made.
        """
        given = torch.as_tensor(v).detach().cpu().double().reshape(-1)
        if given.numel() != self.shape[0]:
            raise InputError(f"wanted a vector of {self.shape[0]} numbers, got {given.numel()}")
        self._weights.check()
        with environment(self._seed):
            return self._squared(given)

    def __repr__(self) -> str:
        return f"NTKOperator({self.samples} samples, {self.outputs} outputs, route={self.route!r})"

    def _applied(self, columns: Float64[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
        self._weights.check()
        product = torch.empty_like(columns)
        with environment(self._seed):
            for j in range(columns.shape[1]):
                product[:, j] = self._one(columns[:, j])
        return product

    def _one(self, v: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Return the product with one vector on the CPU; inside `environment`."""
        pulled = self._products.pull(self._weighted(v))
        if self._scale:
            pulled = [d.square() * g for d, g in zip(self._scale, pulled, strict=True)]
        product = real(self._products.push(pulled))
        return (product if self._root is None else self._root.transposed(product)).cpu()

    def _squared(self, v: Float64[Tensor, " n"]) -> float:
        """Return vᵀ (operator) v from one pass."""
        pulled = self._products.pull(self._weighted(v))
        if self._scale:
            pulled = [d * g for d, g in zip(self._scale, pulled, strict=True)]
        return sum(float(real(g).square().sum()) for g in pulled)

    def _weighted(self, v: Float64[Tensor, " n"]) -> Tensor:
        """Return S v in the shape and dtype of the outputs."""
        rows = self._products.raw.reshape(self.samples, -1)
        on_device = v if rows.device.type == "mps" else v.to(rows.device)
        return (on_device if self._root is None else self._root.times(on_device)).to(rows).reshape(rows.shape)


def _routes(model: nn.Module, asked: str) -> list[Route]:
    both = routes(model)
    if asked == "auto":
        return both
    if asked not in both:
        raise InputError(f'route must be "auto" or one of {sorted(both)}, got {asked!r}')
    return [route for route in both if route == asked]


def _diagonal(network: Network, preconditioner: Mapping[str, Tensor] | None) -> list[Tensor]:
    """Return √D for each selected parameter; nothing where there is no D."""
    if preconditioner is None:
        return []
    missing = sorted(set(network.parameters) - set(preconditioner))
    if missing:
        raise InputError(f"preconditioner must hold every selected parameter, got none for {missing[:5]}")
    scale = []
    for name, p in network.parameters.items():
        d = preconditioner[name].detach().to(p.device, p.dtype.to_real())
        if d.shape != p.shape or not bool((d >= 0).all()):
            raise InputError(f"preconditioner of {name} must be non-negative, of shape {tuple(p.shape)}")
        scale.append(d.sqrt())
    return scale
