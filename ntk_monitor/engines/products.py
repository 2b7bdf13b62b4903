"""J u and Jᵀ w without J: two passes over the batch, whatever N·C and P.

J is the Jacobian of all N·C outputs of one batch in the P selected parameters, at the weights of one moment. Jᵀ w is a
backward pass through a graph that is kept. J u is one of two routes, which agree:

| route | J u is | kept in memory |
|---|---|---|
| "double-vjp" | derivative of w → Jᵀ w, which is linear, by a second backward pass | graphs of both passes |
| "vjp+jvp" | the tangent of a new forward pass in forward mode | graph of the forward pass |

The first refuses backward passes without a derivative; the second, operations without a forward derivative, and
networks that hold by `no_grad` a function of what they train, which forward mode does not see as constant.

Milliseconds of a product, float32 on one CPU core, double-vjp and vjp+jvp: MLP 7.4 and 11.6, transformer 42 and 56,
CNN of two layers 40 and 59, ResNet of ten convolutions 505 and 366 (training mode) or 525 and 371 (evaluation). Hence
double-vjp comes first, except for networks with convolutions, whose graphs are also the largest.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk_monitor.batch import Batch
from ntk_monitor.errors import NetworkError, NTKMonitorError
from ntk_monitor.guard import seeded, undisturbed
from ntk_monitor.network import Network
from ntk_monitor.shadow import unwrapped

Route: TypeAlias = Literal["double-vjp", "vjp+jvp"]
Push: TypeAlias = Callable[[Sequence[Tensor]], Tensor]

# Rounding of two orders of summation in float32 is near 1e-6; a derivative that one route does not see, near 1.
_TOLERANCE = {4: 1e-3, 8: 1e-7}


@contextlib.contextmanager
def environment(seed: int) -> Iterator[None]:
    """Measure undisturbed, with attention in its plain form: the fused ones lack the derivatives that products need."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with undisturbed(seed=seed), sdpa_kernel(SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class Products:
    """Products with the Jacobian of a network on a batch; every call belongs inside `environment`.

    Args:
        network: what is differentiated; its parameters must keep their values while this object is used.
        inputs: the batch, prepared for the network.
        routes: how J u may be computed; the first that is exact is taken.
        seed: of the random numbers that a forward pass may draw, the same in each.

    Attributes:
        raw: the outputs (N, ...) as the module gives them, without graph.
        route, reason: what was chosen, and why.
        passes: passes over the batch so far, backward or in forward mode.

    Raises:
        NetworkError: neither route (or not the one asked for) is exact for this network, with the reason of each.
    """

    def __init__(self, network: Network, inputs: Batch, routes: Sequence[Route], seed: int) -> None:
        self._network, self._inputs, self._seed = network, inputs, seed
        self._parameters = list(network.parameters.values())
        seeded(seed)
        output = network.raw(inputs)
        self.raw = output.detach()
        self._outputs = output.reshape(output.shape[0], -1)
        self.passes = 0
        self.route, self.reason, self._push = self._chosen(routes)

    def pull(self, w: Float[Tensor, "n c"]) -> list[Tensor]:
        """Return Jᵀ w, one tensor for each selected parameter."""
        self.passes += 1
        if not self._outputs.requires_grad:  # nothing that was selected reaches the output
            return [torch.zeros_like(p) for p in self._parameters]
        gradients = torch.autograd.grad(
            self._outputs, self._parameters, w, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [g.to_dense() for g in gradients]

    def push(self, u: Sequence[Tensor]) -> Float[Tensor, "n c"]:
        """Return J u for one tensor u for each selected parameter."""
        self.passes += 1
        return self._push(u)

    def _chosen(self, routes: Sequence[Route]) -> tuple[Route, str, Push]:
        known: dict[Route, Callable[[], Push]] = {"double-vjp": self._twice_backward, "vjp+jvp": self._forward_mode}
        problems: list[str] = []
        for route in routes:
            try:
                push = known[route]()
                problem = self._disagreement(push)
            except NTKMonitorError:
                raise
            except Exception as error:  # noqa: BLE001 - RuntimeError, NotImplementedError or a user's own error
                problem = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
            else:
                if not problem:
                    return route, "; ".join(problems) or "agrees with the backward pass", push
            problems.append(f"{route} refused: {problem}")
        raise NetworkError(
            f"no product with this Jacobian is exact: {'; '.join(problems)}; "
            'use empirical_ntk(..., engine="rows"), which needs one derivative only'
        )

    # A push holds what it needs and not `self`, which holds it: a circle would keep the graph of a whole forward pass
    # in memory until the garbage collector comes by.

    def _twice_backward(self) -> Push:
        if not self._outputs.requires_grad:
            return self._zero()
        # Jᵀ w is linear in w, so that its derivative does not depend on the w it is taken at.
        w = torch.ones_like(self._outputs, requires_grad=True)
        gradients = torch.autograd.grad(
            self._outputs, self._parameters, w, create_graph=True, allow_unused=True, materialize_grads=True
        )
        seen = [i for i, g in enumerate(gradients) if g.requires_grad]
        linear = [gradients[i] for i in seen]
        if not linear:  # J is zero, or cannot be followed so: the comparison with the backward pass tells
            return self._zero()

        def push(u: Sequence[Tensor]) -> Tensor:
            directions = [u[i] for i in seen]
            (tangent,) = torch.autograd.grad(linear, w, directions, retain_graph=True, materialize_grads=True)
            return tangent

        return push

    def _zero(self) -> Push:
        outputs = self._outputs.detach()
        return lambda _: torch.zeros_like(outputs)

    def _forward_mode(self) -> Push:
        network, inputs, parameters, seed = self._network, self._inputs, self._parameters, self._seed
        names, outputs = list(network.parameters), self._outputs.detach()

        # Without a graph, which the dual numbers do not need: convolutions take two thirds of the time.
        @torch.no_grad()
        def push(u: Sequence[Tensor]) -> Tensor:
            seeded(seed)
            with forward_ad.dual_level():
                pairs = zip(names, parameters, u, strict=True)
                duals = {name: forward_ad.make_dual(p.detach(), tangent) for name, p, tangent in pairs}
                tangent = forward_ad.unpack_dual(network.function(duals, inputs)).tangent
                return torch.zeros_like(outputs) if tangent is None else tangent.clone()

        return push

    def _disagreement(self, push: Push) -> str:
        """Compare ⟨v, J u⟩ with ⟨Jᵀ v, u⟩ for random v and a random u in the range of Jᵀ; "" when they agree.

        Forward mode sees through `torch.no_grad`, where backward passes see a constant, and a hand-written backward
        may be no function of its argument that autograd can follow.
        """
        generator = torch.Generator().manual_seed(self._seed)
        v, w = (torch.randn(self._outputs.shape, generator=generator).to(self._outputs) for _ in range(2))
        u, pulled = self.pull(w), self.pull(v)
        self.passes += 1
        got, wanted = _dot([v], [push(u)]), _dot(pulled, u)
        scale = (_dot(u, u) * _dot(pulled, pulled)) ** 0.5
        error = abs(got - wanted) / (scale or 1.0)
        # Weights that are not finite are the problem themselves, not the route.
        if (
            error <= _TOLERANCE[8 if self._network.dtype.itemsize == 8 else 4]
            or scale != scale
            or scale == float("inf")
        ):
            return ""
        return f"its product differs from that of the backward pass by {error:.1e}"


class Weights:
    """Are the live weights that an operator shares still those of the moment it was made?

    A version counter misses writes through `.data` and some fused optimizers, so norms in double precision are compared
    too, to rounding. Costs one reading of the weights.
    """

    def __init__(self, network: Network, model: nn.Module) -> None:
        shadow = network._shadow  # copies (half precision, another device) are not concerned
        live = unwrapped(model).named_parameters()
        self._shared = {name: p for name, p in live if shadow.of(p) is not None and _same_memory(shadow.of(p), p)}
        self._versions, self._norms = self._now()

    def check(self) -> None:
        """Raise NetworkError if they are not."""
        versions, norms = self._now()
        for name, p in self._shared.items():
            was, now = self._norms[name], norms[name]
            moved = abs(now - was) > 1e-13 * abs(was) or (now != now) != (was != was)
            if moved or versions[name] != self._versions[name]:
                raise NetworkError(
                    f"the weights have changed since this operator was made ({name}, shape {tuple(p.shape)}); "
                    "make a new NTKOperator, which may start from this one's eigenvectors, or pass a copy of the model"
                )

    def _now(self) -> tuple[dict[str, int], dict[str, float]]:
        norms = [_norm(p) for p in self._shared.values()]
        listed = torch.stack([n.to(norms[0].device) for n in norms]).tolist() if norms else []
        return {name: p._version for name, p in self._shared.items()}, dict(zip(self._shared, listed, strict=True))


def _same_memory(shadow: Tensor, live: Tensor) -> bool:
    return shadow.device == live.device and shadow.data_ptr() == live.data_ptr()


@torch.no_grad()
def _norm(p: Tensor) -> Tensor:
    values = torch.view_as_real(p) if p.is_complex() else p
    norm: Tensor = torch.linalg.vector_norm(values.cpu() if p.is_mps else values, dtype=torch.float64)
    return norm


def cheaper(module: nn.Module) -> Route:
    """Return the route whose products cost less for the layers of this network."""
    convolutions = any(isinstance(child, nn.modules.conv._ConvNd) for child in module.modules())
    return "vjp+jvp" if convolutions else "double-vjp"


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the real inner product in double precision: a complex number counts as its two parts."""
    return sum(float(torch.linalg.vecdot(real(a), real(b))) for a, b in zip(left, right, strict=True))


def real(value: Tensor) -> Float[Tensor, " p"]:
    """Return a real double vector of all entries, on the CPU where the device has no doubles."""
    flat = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).detach().flatten()
    return (flat.cpu() if flat.device.type == "mps" else flat).double()


def routes(module: nn.Module) -> list[Route]:
    """Return both routes to J u, the cheaper one for this module's layers first."""
    both: list[Route] = ["double-vjp", "vjp+jvp"]
    first = cheaper(module)
    return sorted(both, key=lambda route: route != first)
