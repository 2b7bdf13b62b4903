"""Activations: what the kernel of a network does when inputs grow and when they meet, and which circle it can learn.

Degree of homogeneity: d log K(cx, cx) / d log c, 2 for bias-free ReLU networks of any depth and width, where
K(cx, cx') = c² K(x, x'). Only the kernel divided by its diagonal is then scale-invariant, the kernel is not.
Smoothness: 1 - K(θ)/K(0) ~ θ^e with e = 1 for a kink (ReLU), 2 for a smooth activation.
Circle spectrum: Fourier coefficients over the angle. A bias-free two-layer ReLU kernel has none at odd orders from 3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ntk_monitor.applications.arccosine import Activation, circle_spectrum, ntk_numeric
from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import GREY, MODE_COLOURS, Figure, layout_of, line, log_axis, numbers
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Forward

EXAMPLE = "ReLU, GELU, SiLU, tanh, sigmoid and softplus, and a ReLU network with biases on scanned digits"

Array: TypeAlias = NDArray[np.float64]

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
_SMALL = np.geomspace(0.01, 0.1, 5)
# Half the logarithmic step of the central difference: an error of 1e-4 where the degree turns within a factor of e.
_STEP = 0.02
# Rounding of float64 backward passes of a deep network, relative to the kernel.
_EXACT = 1e-8
_CIRCLE, _ORDERS = 64, 10

_KINDS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Hardswish, nn.Softsign),
)

_SHOWN: Mapping[str, Activation] = {
    "ReLU": torch.relu,
    "GELU": nn.functional.gelu,
    "SiLU": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
}


@dataclass(frozen=True, slots=True)
class Profile:
    """One activation in a wide bias-free two-layer network, unit inputs.

    Attributes:
        degrees: of homogeneity at each of `SCALES`.
        smoothness: exponent of 1 - K(θ)/K(0) between θ = 0.01 and 0.1.
        drops: 1 - K(θ)/K(0) at those angles.
        spectrum: circle coefficients c_0 … relative to Σ |c_k|.
    """

    degrees: Array
    smoothness: float
    drops: Array
    spectrum: Array


def profile(activation: Activation) -> Profile:
    """Return how the infinitely wide two-layer kernel of an element-wise activation behaves.

    Raises:
        InputError: an activation that is not element-wise, or has a zero kernel.

    Cost: about 60 quadratures, half a second.
    """
    here = float(ntk_numeric(activation, 0.0))
    if not here > 0:
        raise InputError(f"an activation must have a kernel above 0, got K(x, x) = {here}; is it constant?")
    drops = 1 - ntk_numeric(activation, _SMALL) / here
    half = ntk_numeric(activation, np.linspace(0, np.pi, _CIRCLE // 2 + 1), nodes=48)
    coefficients = circle_spectrum(np.concatenate([half, half[-2:0:-1]]), _ORDERS)
    degrees = np.array([_degree(lambda c: float(ntk_numeric(activation, 0.0, norm=c)), scale) for scale in SCALES])
    return Profile(degrees, slope(_SMALL, drops), drops, coefficients / np.abs(coefficients).sum())


def _degree(kernel: Callable[[float], float], scale: float) -> float:
    low, high = (kernel(scale * math.exp(step)) for step in (-_STEP, _STEP))
    return math.log(high / low) / (2 * _STEP) if low > 0 and high > 0 else math.nan


def slope(thetas: ArrayLike, drops: ArrayLike) -> float:
    """Return the exponent e of drops ~ θ^e by least squares in logarithms; NaN with fewer than two positive drops."""
    angle, drop = np.asarray(thetas, dtype=np.float64), np.asarray(drops, dtype=np.float64)
    kept = (drop > 0) & (angle > 0)
    if kept.sum() < 2:
        return math.nan
    return float(np.polyfit(np.log(angle[kept]), np.log(drop[kept]), 1)[0])


def smoothness_exponent(kernel: Callable[[Array], Array], thetas: ArrayLike) -> float:
    """Return e of 1 - k(θ)/k(0) ~ θ^e for a kernel of the angle: 1 at a kink, 2 where it is smooth.

    Args:
        kernel: angles → values.
        thetas: small positive angles; below 1e-6 rounding decides.
    """
    angles = np.asarray(thetas, dtype=np.float64)
    return slope(angles, 1 - kernel(angles) / kernel(np.zeros(1))[0])


def scale_exponent(
    model: nn.Module, x: Tensor, scales: Sequence[float] = SCALES, *, forward: Forward | None = None
) -> Array:
    """Return d log tr K(cx, cx) / d log c of a network at each scale c, by central differences.

    2 at all scales: the kernel is homogeneous of degree 1 in each argument. NaN where the kernel is zero.

    Raises:
        InputError: inputs that cannot be scaled, or scales that are not positive.

    Cost: two kernels per scale.
    """
    _scalable(x)
    if not all(scale > 0 for scale in scales):
        raise InputError(f"scales must be positive, got {list(scales)}")

    def trace(scale: float) -> float:
        kernel = empirical_ntk(model, x * scale, outputs="trace", forward=forward)
        return float(kernel.diagonal().sum())

    return np.array([_degree(trace, scale) for scale in scales])


def homogeneity_error(model: nn.Module, x: Tensor, scale: float = 3.0, *, forward: Forward | None = None) -> float:
    """Return max |K(cx, cx') - c² K(x, x')| relative to c² max |K|: rounding for bias-free ReLU networks, every draw.

    Raises:
        InputError: inputs that cannot be scaled, or a kernel that is zero.

    Cost: two kernels.
    """
    _scalable(x)
    one, other = (empirical_ntk(model, x * c, outputs="trace", forward=forward) for c in (1.0, scale))
    largest = float(one.abs().max())
    if not largest > 0:
        raise InputError("the kernel must not be zero, got a network whose outputs do not depend on its parameters")
    return float((other - scale**2 * one).abs().max()) / (scale**2 * largest)


def _scalable(x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        found = f"a {x.dtype} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"inputs must be one floating tensor (N, ...) that can be scaled, got {found}")


def circle(x: Tensor, points: int = _CIRCLE, seed: int = 0) -> Tensor:
    """Return `points` inputs on a circle around 0, in a random plane of input space, as long as samples are typically.

    Raises:
        InputError: inputs of a single feature, in which there is no circle.
    """
    _scalable(x)
    flat = x.reshape(len(x), -1)
    if flat.shape[1] < 2:
        raise InputError("a circle needs at least two input features, got 1")
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(flat.shape[1], 2, generator=generator, dtype=torch.float64))[0]
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    rows = torch.stack([angle.cos(), angle.sin()], 1) @ plane.T * float(flat.double().norm(dim=1).median())
    inputs: Tensor = rows.to(x).reshape(points, *x.shape[1:])
    return inputs


def circle_profile(model: nn.Module, x: Tensor, *, forward: Forward | None = None, seed: int = 0) -> Array:
    """Return a network's kernel against the angle, averaged over positions on the `circle`; value j is at 2π j / n.

    Cost: one kernel of 64 samples.
    """
    kernel = empirical_ntk(model, circle(x, seed=seed), outputs="trace", forward=forward).cpu().numpy()
    n = len(kernel)
    rows = np.arange(n)
    return np.array([kernel[rows, (rows + j) % n].mean() for j in range(n)])


def activations_of(model: nn.Module) -> dict[str, Activation]:
    """Return one activation module per kind, of those torch knows as element-wise, by class name."""
    found: dict[str, Activation] = {}
    for part in model.modules():
        if isinstance(part, _KINDS):
            found.setdefault(type(part).__name__, part)
    return found


def study(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    activations: Mapping[str, Activation] | None = None,
    forward: Forward | None = None,
) -> Report:
    """Return what a network's kernel, and that of its activations alone, does over scales and angles.

    Args:
        model: the network.
        x: (N, ...) floating inputs; some tens are enough.
        y: not used.
        activations: name → element-wise function; None: those of torch's modules in the network, else ReLU and GELU.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: inputs that cannot be scaled (token ids, dicts).

    Cost: 13 kernels of N samples, and half a second per activation.
    """
    _scalable(x)
    chosen = activations or activations_of(model) or {"ReLU": torch.relu, "GELU": nn.functional.gelu}
    profiles = {name: profile(activation) for name, activation in chosen.items()}
    error = homogeneity_error(model, x, forward=forward)
    degrees = scale_exponent(model, x, forward=forward)
    around = circle_profile(model, x, forward=forward)
    coefficients = circle_spectrum(around, _ORDERS)
    shares = coefficients / np.abs(coefficients).sum()
    verdicts = [_homogeneous(error), _invariant(degrees)]
    verdicts += [_smooth(name, one) for name, one in profiles.items()]
    verdicts += [_odd(f"a wide two-layer network of {name}", one.spectrum) for name, one in profiles.items()]
    verdicts.append(_odd("this network", shares))
    names = ", ".join(profiles)
    return Report(
        name="activations",
        title=f"Activations: kernels over scale and angle ({names})",
        summary=(
            f"When inputs are three times as long, this network's kernel {_growth(error)}. Its trace grows as |x| to "
            f"the power {degrees[2]:.3g} at the scale of the data, and {degrees[-1]:.3g} at a hundred times that. The "
            "other curves are exact kernels of infinitely wide two-layer networks without biases, one per activation."
        ),
        numbers=(
            Number("homogeneity_error", error, "", note="largest departure from K(3x, 3x') = 9 K(x, x'), relative"),
            *(Number(f"degree at scale {c:g}", float(d)) for c, d in zip(SCALES, degrees, strict=True)),
            *(Number(f"smoothness exponent, {name}", one.smoothness) for name, one in profiles.items()),
        ),
        verdicts=tuple(verdicts),
        tables={
            "Degree of homogeneity": _rows(
                "scale", SCALES, {"this network": degrees} | {name: one.degrees for name, one in profiles.items()}
            ),
            "Share of circle harmonics": _rows(
                "order", range(_ORDERS), {"this network": shares} | {name: p.spectrum for name, p in profiles.items()}
            ),
        },
        figures={"activations": figure(profiles, degrees, shares)},
        caveats=(
            "Curves of activations are for infinitely wide two-layer networks; depth, biases and norms change them.",
            "This network's circle lies in one random plane of input space, at the median length of the samples.",
        ),
    )


def _rows(word: str, index: Sequence[float], columns: Mapping[str, Array]) -> Table:
    # What rounding makes of nothing is shown as nothing.
    shown = [np.where(np.abs(values) < 1e-12, 0.0, values) for values in columns.values()]
    rows = tuple((float(at), *(float(values[k]) for values in shown)) for k, at in enumerate(index))
    return Table((word, *columns), rows)


def _growth(error: float) -> str:
    return "is exactly nine times as large" if error < _EXACT else f"is not nine times as large (off by {error:.2g})"


def _homogeneous(error: float) -> Verdict:
    evidence = f"largest departure {error:.2g} of the largest entry, at c = 3"
    return Verdict("K(cx, cx') = c² K(x, x') for this network", error < _EXACT, evidence)


def _invariant(degrees: Array) -> Verdict:
    known = degrees[np.isfinite(degrees)]
    holds = bool((np.abs(known) < 0.01).all()) if known.size else None
    evidence = (
        f"degrees {', '.join(f'{d:.3g}' for d in degrees)} at scales {', '.join(f'{c:g}' for c in SCALES)}; 0 wanted"
    )
    return Verdict("the kernel of this network does not change with the scale of inputs", holds, evidence)


def _smooth(name: str, one: Profile) -> Verdict:
    holds = True if one.smoothness > 1.9 else False if one.smoothness < 1.5 else None
    evidence = f"exponent {one.smoothness:.3f}; 2 is smooth, 1 a kink"
    return Verdict(f"the kernel of {name} is smooth where inputs meet", holds, evidence)


def _odd(who: str, shares: Array) -> Verdict:
    weakest = float(np.abs(shares[3::2]).max())
    evidence = f"largest odd harmonic from order 3 carries {weakest:.2g} of the spectrum"
    return Verdict(f"{who} can learn odd harmonics of order 3 and more", weakest > 1e-6, evidence)


def figure(profiles: Mapping[str, Profile], degrees: Array, shares: Array) -> Figure:
    """Return three panels: the fall of the kernel at small angles, its degree over scales, its circle spectrum."""
    data: list[Figure] = []
    for k, (name, one) in enumerate(profiles.items()):
        colour = MODE_COLOURS[k % len(MODE_COLOURS)]
        shared = {"mode": "lines+markers", "marker": {"size": 6}}
        data.append(line(numbers(_SMALL), numbers(one.drops, positive=True), name, colour, **shared))
        quiet = shared | {"showlegend": False}
        data.append(line(list(SCALES), numbers(one.degrees), name, colour, xaxis="x2", yaxis="y2", **quiet))
        # No line: every other order may be missing.
        dots = quiet | {"mode": "markers", "marker": {"size": 7, "color": colour}}
        data.append(line(list(range(_ORDERS)), _visible(one.spectrum), name, colour, xaxis="x3", yaxis="y3", **dots))
    own = {"mode": "lines+markers", "marker": {"size": 6}, "line": {"color": "#111111", "dash": "dot", "width": 2}}
    data.append(line(list(SCALES), numbers(degrees), "this network", GREY, xaxis="x2", yaxis="y2", **own))
    data.append(
        line(
            list(range(_ORDERS)),
            _visible(shares),
            "this network",
            GREY,
            xaxis="x3",
            yaxis="y3",
            showlegend=False,
            **own,
        )
    )
    layout = layout_of(
        "Kernels of activations, over angle, scale and frequency",
        "Left: slope 1 is a kink, slope 2 smooth. Middle: how the kernel grows with the inputs; 2 throughout is "
        "homogeneous, 0 would be scale-invariant. Right: harmonics with next to no share are not learned.",
        xaxis=log_axis("angle between inputs (rad)") | {"domain": [0, 0.27]},
        yaxis=log_axis("1 - K(θ) / K(0)"),
        xaxis2=log_axis("scale of inputs") | {"domain": [0.37, 0.63], "anchor": "y2"},
        yaxis2={"title": {"text": "degree d log K / d log c"}, "anchor": "x2"},
        xaxis3={"title": {"text": "harmonic order"}, "domain": [0.74, 1], "anchor": "y3"},
        yaxis3=log_axis("share of spectrum") | {"anchor": "x3"},
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def _visible(shares: Array) -> list[float | None]:
    """Return shares, None where rounding and quadrature hide them."""
    return numbers(np.where(np.abs(shares) > 1e-6, np.abs(shares), np.nan), positive=True)


def example(quick: bool = False) -> Report:
    """Return the study of six activations and of a ReLU network with biases on scanned digits; `quick`: two of them."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data[:24] / 16.0)
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).double()
    torch.set_rng_state(torch_state)
    shown = {name: _SHOWN[name] for name in ("ReLU", "GELU")} if quick else _SHOWN
    return study(model, x, activations=shown)
