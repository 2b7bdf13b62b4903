"""Kernels of infinitely wide networks as functions of an angle: closed for ReLU, by quadrature for any activation.

NTK parametrisation: f = √(c/h) a·φ(W x + β b), all entries N(0, 1), c = 2, first-layer inputs not normalised. u is the
cosine of the angle between two inputs (with β: between (x, β) and (x', β)).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ntk_monitor.errors import InputError

Array: TypeAlias = NDArray[np.float64]
Activation: TypeAlias = Callable[[Tensor], Tensor]

# The radius of a standard normal pair exceeds this with probability 1e-18.
_FAR = 9.1


def kappa0(cosine: ArrayLike) -> Array:
    """Return (π - arccos u)/π, the normalised kernel of a step's features. Source: Cho and Saul 2009 (order 0)."""
    return np.asarray((np.pi - np.arccos(np.clip(cosine, -1, 1))) / np.pi)


def kappa1(cosine: ArrayLike) -> Array:
    """Return (u (π - arccos u) + √(1 - u²))/π, the normalised kernel of ReLU features. Source: Cho and Saul 2009."""
    u = np.clip(cosine, -1, 1)
    return np.asarray((u * (np.pi - np.arccos(u)) + np.sqrt((1 - u) * (1 + u))) / np.pi)


def relu_ntk(x: ArrayLike, y: ArrayLike | None = None, *, depth: int = 2, bias: float = 0.0) -> Array:
    """Return the NTK (N, M) of an infinitely wide ReLU network between the rows of x (N, d) and y (M, d).

    Σ₁ = Θ₁ = x·y + β², then Σ ← √(q q') κ₁(u) + β², Θ ← Θ κ₀(u) + Σ, with q, q' the Σ of each input with itself.
    Without bias Θ(x, x) = depth · |x|², and Θ is homogeneous of degree 1 in each argument.

    Args:
        x: (N, d) inputs.
        y: (M, d) inputs; None: x.
        depth: layers of weights, at least 1 (1: the linear kernel).
        bias: β, standard deviation of all biases.

    Raises:
        InputError: inputs that are not (N, d) and (M, d), or no layer.

    Source: Cho and Saul 2009; Jacot, Gabriel and Hongler 2018; Bietti and Mairal 2019.
    """
    a = np.asarray(x, dtype=np.float64)
    b = a if y is None else np.asarray(y, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or depth < 1:
        raise InputError(f"wanted (N, d), (M, d) and depth >= 1, got {a.shape}, {b.shape} and {depth}; flatten samples")
    sigma = a @ b.T + bias**2
    theta = sigma.copy()
    left, right = (a**2).sum(1) + bias**2, (b**2).sum(1) + bias**2
    for _ in range(depth - 1):
        norms = np.sqrt(np.outer(left, right))
        u = np.divide(sigma, norms, out=np.zeros_like(sigma), where=norms > 0)
        sigma = norms * kappa1(u) + bias**2
        theta = theta * kappa0(u) + sigma
        left, right = left + bias**2, right + bias**2
    return theta


def relu_profile(theta: ArrayLike, *, depth: int = 2) -> Array:
    """Return the bias-free ReLU NTK between unit inputs at angles θ, accurate at small angles where cos θ is not."""
    angle = np.abs(np.asarray(theta, dtype=np.float64))
    sigma, kernel = np.cos(angle), np.cos(angle)
    for _ in range(depth - 1):
        step = (np.pi - angle) / np.pi
        sigma = np.sin(angle) / np.pi + step * np.cos(angle)
        kernel = kernel * step + sigma
        angle = np.arccos(np.clip(sigma, -1, 1))
    return np.asarray(kernel)


def ntk_numeric(
    activation: Activation,
    theta: ArrayLike,
    *,
    norm: float = 1.0,
    bias: float = 0.0,
    nodes: int = 64,
) -> Array:
    """Return the two-layer NTK of any activation between inputs of one norm at angles θ, by quadrature.

    2 (E[φ(s) φ(t)] + (x·x' + β²) E[φ'(s) φ'(t)]), (s, t) normal with the covariance of the inputs; in polar
    coordinates, split where s or t changes sign. Exact to about 1e-9 for activations that are smooth away from 0 (kinks
    elsewhere, as in ReLU6, leave 1e-3 to 1e-4).

    Args:
        activation: element-wise function of a float64 tensor, differentiable by autograd.
        theta: angles in radians, 0 to π.
        norm: |x| = |x'|.
        bias: β, standard deviation of first-layer biases.
        nodes: per quarter of the circle and along the radius.

    Raises:
        InputError: an activation that is not element-wise, or norm and bias both 0 or negative.

    Cost: 4 nodes² evaluations per angle.

    Source: Jacot, Gabriel and Hongler 2018 (recursion); polar form as in Cho and Saul 2009.
    """
    size = math.hypot(norm, bias)
    if size <= 0 or norm < 0:
        raise InputError(f"norm must be >= 0 and not 0 together with bias, got norm {norm} and bias {bias}")
    angles = np.abs(np.asarray(theta, dtype=np.float64))
    inner = norm**2 * np.cos(angles.ravel()) + bias**2
    # From the half angle: the cosine has lost small angles.
    between = 2 * np.arcsin(np.clip(norm * np.sin(angles.ravel() / 2) / size, 0, 1))
    values = [_pair(activation, size, float(turn), float(dot), nodes) for turn, dot in zip(between, inner, strict=True)]
    return np.array(values).reshape(angles.shape)


def _pair(activation: Activation, size: float, turn: float, dot: float, nodes: int) -> float:
    unit, weight = _ends(nodes)
    radius, by_radius = _FAR * unit, _FAR * weight * (_FAR * unit) * np.exp(-((_FAR * unit) ** 2) / 2)
    # s = r cos ψ changes sign at ±π/2, t = r cos(ψ - turn) a turn later.
    cuts = sorted({-np.pi / 2, turn - np.pi / 2, np.pi / 2, turn + np.pi / 2, 3 * np.pi / 2})
    arcs = [(low, high) for low, high in pairwise(cuts) if high - low > 1e-15]
    psi = np.concatenate([low + (high - low) * unit for low, high in arcs])
    by_psi = np.concatenate([(high - low) * weight for low, high in arcs]) / (2 * np.pi)
    first = torch.from_numpy(size * np.outer(radius, np.cos(psi)))
    second = torch.from_numpy(size * np.outer(radius, np.cos(psi - turn)))
    (f, df), (g, dg) = (_with_slope(activation, values) for values in (first, second))
    weights = torch.from_numpy(np.outer(by_radius, by_psi))
    return float(2 * (weights * (f * g + dot * df * dg)).sum())


def _ends(nodes: int) -> tuple[Array, Array]:
    """Return nodes and weights on (0, 1), crowded at both ends, where large inputs make activations sharp.

    Source: Takahasi and Mori 1974 (double exponential formula).
    """
    t = np.linspace(-3.1, 3.1, nodes)
    power = np.pi / 2 * np.sinh(t)
    unit = 1 / (1 + np.exp(-2 * power))
    weight = (t[1] - t[0]) * np.pi / 2 * np.cosh(t) / (2 * np.cosh(power) ** 2)
    return unit, weight


def _with_slope(activation: Activation, values: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        at = values.clone().requires_grad_(True)
        out = activation(at)
        if out.shape != at.shape:
            raise InputError(
                f"an activation must keep the shape of its input, got {tuple(at.shape)} to {tuple(out.shape)}"
            )
        (slope,) = torch.autograd.grad(out.sum(), at)
    return out.detach(), slope


def circle_spectrum(profile: ArrayLike, orders: int = 12) -> Array:
    """Return Fourier coefficients c_0 … c_{orders-1} of a kernel on the circle: k(θ) = c_0 + 2 Σ c_k cos kθ.

    They are the kernel's eigenvalues under the uniform distribution on the circle; a zero one is never learned.

    Args:
        profile: k at n equally spaced angles 2π j / n, j = 0 … n-1.
        orders: number of coefficients, at most n / 2.

    Raises:
        InputError: too few angles.

    Kernels with a kink alias: relative errors of about (order / n)².
    """
    values = np.asarray(profile, dtype=np.float64)
    if values.ndim != 1 or orders < 1 or 2 * orders > values.size:
        raise InputError(f"{orders} coefficients need a vector of at least {2 * orders} angles, got {values.shape}")
    return np.asarray(np.fft.rfft(values).real[:orders] / values.size)
