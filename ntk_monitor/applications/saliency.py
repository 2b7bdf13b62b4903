"""Does the kernel know where the output is sensitive to its input? ‖∂f/∂x‖ against Θ(x, x).

Θ(x, x) = ‖∂f/∂θ‖² says how far a step in the weights moves the output, ‖∂f/∂x‖ how far a step in the input does. No
theorem ties them: at random weights the correlation is about zero for ReLU and negative for tanh and sigmoid, where
what saturates has a small ∂f/∂x and large activations. So it is measured, with an interval, and may come out negative.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.report import Number, Report, Verdict
from ntk_monitor.batch import Batch
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import BLUE, VIRIDIS, Figure, layout_of, line, numbers
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import call, only_tensor

Array = NDArray[np.float64]

EXAMPLE = "a small network that tells benign from malignant tumours by thirty measurements"

STRONG = 0.5
"""Correlation from which the kernel is said to tell how sensitive the output is."""
_CONSTANT = 1e-9
"""Relative spread below which a quantity is constant, and a correlation with it rounding noise."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A correlation with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Saliency:
    """Correlations over samples between ‖∂f/∂x‖ and Θ(x, x).

    Attributes:
        pearson: of the values.
        spearman: of the ranks.
        partial: Pearson with ‖x‖ held fixed, linearly; the plain one where all ‖x‖ are equal.
        reason: why there is no correlation (then all are NaN), or None.
    """

    pearson: Estimate
    spearman: Estimate
    partial: Estimate
    reason: str | None = None


def input_gradient_norms(model: nn.Module, x: Any) -> Array:
    """Return ‖∂f/∂x‖ of each sample, (N,): root of the sum of squares over outputs and inputs, in evaluation mode.

    Raises:
        InputError: x is no floating tensor, or the outputs do not depend on it.

    Cost: one backward pass per output.
    """
    gradients = _input_gradients(_outputs(_copy(model), at := _leaf(model, x)), at)
    return np.asarray(gradients.flatten(1).norm(dim=1).cpu().numpy(), dtype=np.float64)


def expansion_gradient(model: nn.Module, x: Tensor, x_train: Tensor, alpha: Any) -> Tensor:
    """Return ∂f_lin/∂x of the kernel expansion f_lin(x) = f(x) + Σ_m Θ(x, x_m) α_m, exactly, (N, C, ...).

    Σ_m Θ(x, x_m) α_m is the derivative of f(x) along the direction Jᵀα in parameter space, so no kernel is formed. The
    gradient of f itself, at the weights of `model`, belongs to it.

    Args:
        model: any module of one tensor; only read.
        x: (N, ...) where.
        x_train: (M, ...) samples of the expansion.
        alpha: (M, C) coefficients, as from kernel regression.

    Raises:
        InputError: inputs that are no floating tensors, or coefficients of another shape than the outputs.

    Cost: two passes, and three backward passes per output.

    Source: Jacot, Gabriel and Hongler 2018 (the expansion); Pearlmutter 1994 (products with derivatives).
    """
    module, at, train = _copy(model), _leaf(model, x), _leaf(model, x_train).detach()
    outputs = _outputs(module, train)
    a = torch.as_tensor(alpha, dtype=torch.float64, device=outputs.device)
    if a.numel() != outputs.numel():
        raise InputError(f"wanted alpha of the outputs' shape {tuple(outputs.shape)}, got {tuple(a.shape)}")
    trainable = [p for p in module.parameters() if p.requires_grad]
    # A parameter that the outputs do not reach has a gradient of zero.
    options: dict[str, Any] = {"materialize_grads": True, "allow_unused": True}
    weighted = (outputs * a.reshape(outputs.shape)).sum()
    along = torch.autograd.grad(weighted, trainable, **options)
    columns = []
    for f in _outputs(module, at).unbind(1):
        # The sum over samples is harmless: each depends on its own input only.
        slopes = torch.autograd.grad(f.sum(), trainable, create_graph=True, **options)
        products = [(slope * v).sum() for slope, v in zip(slopes, along, strict=True)]
        columns.append(f.sum() + torch.stack(products).sum())
    return _input_gradients(torch.stack(columns)[None], at)


def correlations(sensitivity: Any, theta: Any, norms: Any = None, *, resamples: int = 1000, seed: int = 0) -> Saliency:
    """Return how two quantities of N samples go together, with bootstrap intervals over samples.

    Args:
        sensitivity: (N,) ‖∂f/∂x‖.
        theta: (N,) Θ(x, x).
        norms: (N,) ‖x‖, to be held fixed in the partial correlation; None: nothing is.
        resamples: of the samples, with replacement.
        seed: of the resamples.

    Raises:
        InputError: different lengths, fewer than four samples, or values that are not finite.

    Cost: O(resamples · N log N).

    Source: Efron 1979 (bootstrap; percentile interval).
    """
    a, b = _array(sensitivity), _array(theta)
    c = np.ones_like(a) if norms is None else _array(norms)
    if not (a.shape == b.shape == c.shape and a.ndim == 1 and len(a) >= 4 and np.isfinite([a, b, c]).all()):
        raise InputError(
            f"wanted finite values of the same 4 or more samples, got shapes {a.shape}, {b.shape} and {c.shape}"
        )
    named = (("the input gradient", a), ("Θ(x, x)", b))
    flat = [name for name, values in named if values.std() <= _CONSTANT * max(abs(float(values.mean())), 1e-300)]
    if flat:
        none = Estimate(float("nan"), float("nan"), float("nan"))
        return Saliency(none, none, none, f"{' and '.join(flat)}, the same for all samples to rounding")
    steady = bool(c.std() <= _CONSTANT * max(abs(float(c.mean())), 1e-300))
    draws = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    rows = np.vstack([np.arange(len(a)), draws])
    plain = _pearson(a[rows], b[rows])
    held = plain if steady else _partial(plain, _pearson(a[rows], c[rows]), _pearson(b[rows], c[rows]))
    ranks = _pearson(_ranks(a[rows]), _ranks(b[rows]))
    return Saliency(_estimate(plain), _estimate(ranks), _estimate(held))


def saliency_report(model: nn.Module, x: Any, *, kernel: Any = None, resamples: int = 1000) -> Saliency:
    """Return the correlations between ‖∂f/∂x‖ and Θ(x, x) of a network; see `correlations`.

    Raises:
        InputError: x is no floating tensor, or a kernel of other samples.
        NetworkError: a module that cannot be followed exactly.
    """
    return _measured(model, x, kernel, resamples)[0]


def study(model: nn.Module, x: Batch, y: Any = None, *, kernel: Any = None, resamples: int = 1000) -> Report:
    """Return whether Θ(x, x) tells where a network's output is sensitive to its input.

    Args:
        model: any eager module; only read.
        x: (N, ...) one floating tensor, N of 4 or more.
        y: not used; targets have no part in it.
        kernel: (N, N), (N, C, N, C) or its diagonal (N,), summed over outputs, if it is known already.
        resamples: of the bootstrap.

    Raises:
        InputError: inputs without a gradient (token ids, dicts), or a kernel of other samples.
        NetworkError: a module that cannot be followed exactly.

    Cost: one trace kernel, and one backward pass per output.
    """
    del y
    found, sensitivity, theta, norms = _measured(model, x, kernel, resamples)
    return _told(found, sensitivity, theta, norms)


def example(quick: bool = False) -> Report:
    """Return the study of a small trained network on the breast cancer data of Wisconsin."""
    from sklearn.datasets import load_breast_cancer

    from ntk_monitor.guard import undisturbed

    inputs, labels = load_breast_cancer(return_X_y=True)
    x = torch.as_tensor((inputs - inputs.mean(axis=0)) / inputs.std(axis=0))
    y = torch.as_tensor(labels).double()[:, None]
    with undisturbed(seed=0):
        model = nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
    return study(model, x[: 60 if quick else 300], resamples=200 if quick else 2000)


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def _leaf(model: nn.Module, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"Tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"the gradient in the input needs one floating tensor, got {got}; pass embedded inputs")
    device = next((p.device for p in model.parameters()), x.device)
    return x.detach().to(device, torch.float64).requires_grad_(True)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    f = only_tensor(call(model, x))
    return f.reshape(len(x), -1)


def _input_gradients(f: Tensor, x: Tensor) -> Tensor:
    """Return ∂f/∂x as (N, C, ...) of samples that do not see each other."""
    found = [
        torch.autograd.grad(f[:, c].sum(), x, retain_graph=True, allow_unused=True)[0] if f.requires_grad else None
        for c in range(f.shape[1])
    ]
    if all(g is None for g in found):
        raise InputError("the outputs do not depend on the input through anything that has a gradient")
    return torch.stack([torch.zeros_like(x) if g is None else g for g in found], dim=1).detach()


def _measured(model: nn.Module, x: Any, kernel: Any, resamples: int) -> tuple[Saliency, Array, Array, Array]:
    sensitivity = input_gradient_norms(model, x)
    theta = _diagonal(empirical_ntk(model, x, outputs="trace") if kernel is None else kernel, len(x))
    norms = _array(x.flatten(1).double().norm(dim=1))
    return correlations(sensitivity, theta, norms, resamples=resamples), sensitivity, theta, norms


def _diagonal(kernel: Any, samples: int) -> Array:
    k = _array(kernel)
    theta = np.einsum("ncnc->n", k) if k.ndim == 4 else np.diag(k).copy() if k.ndim == 2 else k
    if theta.shape != (samples,):
        raise InputError(f"wanted the kernel of these {samples} samples, got shape {k.shape}")
    return np.asarray(theta)


def _array(values: Any) -> Array:
    held = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(held, dtype=np.float64)


def _pearson(a: Array, b: Array) -> Array:
    """Return the correlation of each row; NaN where a resample has drawn equal values only."""
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)))


def _partial(ab: Array, ac: Array, bc: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((ab - ac * bc) / np.sqrt(np.clip((1 - ac**2) * (1 - bc**2), 0, None)))


def _ranks(values: Array) -> Array:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=1), dtype=np.float64)


def _estimate(rows: Array) -> Estimate:
    kept = rows[1:][np.isfinite(rows[1:])]
    low, high = np.quantile(kept, [0.025, 0.975]) if kept.size else (np.nan, np.nan)
    return Estimate(float(rows[0]), float(low), float(high))


def _told(found: Saliency, sensitivity: Array, theta: Array, norms: Array) -> Report:
    r = found.pearson
    interval = f"Pearson {r.value:.3f}, 95 % interval {r.low:.3f} to {r.high:.3f}"
    known = found.reason is None
    rows = (("Pearson", found.pearson), ("Spearman", found.spearman), ("Pearson, |x| held fixed", found.partial))
    return Report(
        name="saliency",
        title="Does the kernel know where the output is sensitive to its input?",
        summary=(
            f"Over {len(theta)} samples, the size of the gradient in the input and the kernel Θ(x, x) "
            f"{f'correlate: {interval}' if known else f'have no correlation: {found.reason}'}."
        ),
        numbers=tuple(Number(name, e.value, low=e.low, high=e.high, note="95 % bootstrap") for name, e in rows),
        verdicts=(
            Verdict(
                "Θ(x, x) tells at which samples the output is sensitive to its input",
                bool(r.value >= STRONG and r.low > 0) if known else None,
                f"{interval}; wanted {STRONG} and more" if known else str(found.reason),
            ),
            Verdict(
                "they go together at fixed |x|",
                bool(found.partial.low > 0) if known and np.isfinite(found.partial.low) else None,
                f"partial correlation {found.partial.value:.3f}, 95 % interval {found.partial.low:.3f} to "
                f"{found.partial.high:.3f}; wanted above 0"
                if known
                else str(found.reason),
            ),
        ),
        figures={"saliency": _scatter(sensitivity, theta, norms, interval if known else str(found.reason))},
        caveats=(
            "No theorem ties the two; the sign follows saturation and |x|, and may change during training.",
            "Both are sums over outputs; of a single output they may behave differently.",
        ),
    )


def _scatter(sensitivity: Array, theta: Array, norms: Array, found: str) -> Figure:
    edges = np.quantile(norms, [1 / 3, 2 / 3])
    group = np.searchsorted(edges, norms)
    steady = norms.std() <= _CONSTANT * max(norms.mean(), 1e-300)
    names = ("small |x|", "middle |x|", "large |x|")
    colours = (VIRIDIS[1][1], VIRIDIS[3][1], "#e07b00")
    parts = [(np.ones(len(norms), bool), "all |x| equal", BLUE)] if steady else []
    parts = parts or [(group == k, names[k], str(colours[k])) for k in range(3)]
    data = [
        line(numbers(theta[m]), numbers(sensitivity[m]), n, c, mode="markers", marker={"color": c, "size": 6})
        for m, n, c in parts
    ]
    layout = layout_of(
        "Sensitivity to the input against the kernel",
        f"One dot per sample; {found}. A rising line would mean that Θ(x, x) tells where the output is sensitive; "
        "colours: whether the size of the input is behind it.",
        xaxis={"tickformat": "~g", "title": {"text": "Θ(x, x), sum over outputs (units of K)"}},
        yaxis={"title": {"text": "size of ∂f/∂x (output / input units)"}},
        showlegend=True,
    )
    return {"data": data, "layout": layout}
