"""Learning speed: before training, how many steps each part of the target takes; then, whether it did.

K = J Jᵀ (n × n, n = N·C) of the training samples, K vᵢ = λᵢ vᵢ, cᵢ = vᵢᵀ (f - y). For squared error the gradient in
the outputs is s·(f - y), with s = 2/(N·C) for torch's `MSELoss()`, and full-batch gradient descent gives
cᵢ(t + 1) = (1 - s·lr·λᵢ) cᵢ(t) as long as K stays: exactly for a linear model, to about 1/width for smooth wide ones
and 1/√width for ReLU. Minibatches, Adam and other losses have no such modes.

Source: Jacot, Gabriel and Hongler 2018; Lee et al. 2019.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ntk_monitor.applications.learning_figure import figure
from ntk_monitor.applications.learning_run import from_history  # noqa: F401 - --history asks for it
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.batch import Batch, moved, size, tensors
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.metrics.speed import steps_to_learn
from ntk_monitor.network import Forward, call, only_tensor
from ntk_monitor.spectrum import Spectrum

EXAMPLE = "a tanh network of 512 units learns 60 scanned digits, forecast from its first kernel"

Array: TypeAlias = NDArray[np.float64]
Reduction: TypeAlias = Literal["mean", "sum", "half"]

_SHOWN = 12
# Of the initial residual: below it a forecast is called right.
_CLOSE = 0.05
# Modes with less of the residual than this have no decay that could be seen above the others' errors.
_VISIBLE = 1e-4


def squared_error_scale(samples: int, outputs: int, reduction: Reduction = "mean") -> float:
    """Return s, with which the gradient of the loss in the outputs is s·(f - y).

    Args:
        samples: N, those that the loss averages over.
        outputs: C.
        reduction: "mean" and "sum" as in `torch.nn.MSELoss`; "half" for ½ Σ (f - y)².
    """
    return {"mean": 2 / (samples * outputs), "sum": 2.0, "half": 1.0}[reduction]


def time_to_learn(
    eigenvalues: ArrayLike,
    lr: float,
    left: float = 0.1,
    *,
    scale: float,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Array:
    """Return the steps until each mode is down to a fraction `left`: ln(1/left) / -ln|1 - s·lr·λ|; inf where never.

    Args:
        eigenvalues: of K.
        lr: learning rate.
        left: fraction that is left of a coordinate.
        scale: s; see `squared_error_scale`.
        momentum: of SGD; the slower root of its recursion then takes the place of 1 - s·lr·λ.
        nesterov: as in torch.

    Raises:
        InputError: `left` outside 0 to 1.
    """
    rates = scale * np.asarray(eigenvalues, dtype=np.float64)
    return steps_to_learn(rates, lr, left, momentum=momentum, nesterov=nesterov)


def predict_modes(
    coordinates: ArrayLike,
    eigenvalues: ArrayLike,
    lrs: Sequence[float],
    *,
    scale: float,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Array:
    """Return the coordinates before and after each step of SGD with these learning rates, (T + 1, n).

    Exact for a fixed kernel, squared error and full batches. Buffer b ← β b + u, u = s λ c; c ← c - lr b (Nesterov:
    c - lr (u + β b)), as torch steps.

    Raises:
        InputError: coordinates and eigenvalues of different lengths.

    Cost: T n.
    """
    c, rates = np.asarray(coordinates, dtype=np.float64), scale * np.asarray(eigenvalues, dtype=np.float64)
    if c.shape != rates.shape or c.ndim != 1:
        raise InputError(f"wanted one eigenvalue for each coordinate, got {rates.shape} and {c.shape}")
    path, buffer = [c], np.zeros_like(c)
    for lr in lrs:
        u = rates * path[-1]
        buffer = momentum * buffer + u
        path.append(path[-1] - lr * (u + momentum * buffer if nesterov else buffer))
    return np.array(path)


def component_steps(vectors: Array, times: Array, component: ArrayLike, left: float = 0.1) -> float:
    """Return the steps until a residual that starts as `component` has a fraction `left` of its norm; inf if never.

    Args:
        vectors: (n, n) eigenvectors of K as columns.
        times: (n,) steps until each mode is down to the same `left`; see `time_to_learn`.
        component: (n,) any function on the samples, sample-major: a class, a task, a Fourier mode.
        left: the fraction.

    Raises:
        InputError: a component of another length, or one that is zero.
    """
    d = np.asarray(component, dtype=np.float64).reshape(-1)
    if d.size != len(vectors) or not np.linalg.norm(d) > 0:
        raise InputError(f"a component needs {len(vectors)} numbers, not all zero; got {d.size}")
    weights = (vectors.T @ d) ** 2 / (d @ d)
    never = ~np.isfinite(times)
    if weights[never].sum() >= left**2:
        return math.inf

    # A mode that one step takes away whole has a time of 0 and is gone from the start.
    kept, slow = weights[~never & (times > 0)], times[~never & (times > 0)]

    def remains(t: float) -> float:
        return float(weights[never].sum() + (kept * left ** (2 * t / slow)).sum())

    low, high = 0.0, float(slow.max(initial=0.0))
    while remains(high) > left**2:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if remains(middle) > left**2 else (low, middle)
    return high


def target_matrix(y: Tensor, samples: int, outputs: int) -> Tensor:
    """Return targets of squared error, (N, C) in float64: classes become one-hot rows minus 1/C.

    Raises:
        InputError: targets of another shape, or classes outside 0 … C-1.
    """
    if outputs > 1 and y.dim() == 1 and len(y) == samples and not y.is_floating_point():
        labels = y.detach().cpu().long()
        if int(labels.min()) < 0 or int(labels.max()) >= outputs:
            raise InputError(f"classes must lie in 0 … {outputs - 1}, got {labels.min()} … {labels.max()}")
        return torch.eye(outputs, dtype=torch.float64)[labels] - 1 / outputs
    if y.numel() != samples * outputs:
        raise InputError(f"targets must be ({samples}, {outputs}) or {samples} classes, got {tuple(y.shape)}")
    return y.detach().cpu().double().reshape(samples, outputs)


def trained(  # noqa: PLR0913 - one run
    model: nn.Module,
    x: Batch,
    y: Tensor,
    lrs: Sequence[float],
    *,
    reduction: Reduction = "mean",
    momentum: float = 0.0,
    nesterov: bool = False,
    forward: Forward | None = None,
) -> Array:
    """Return f - y before and after each full-batch SGD step of a float64 copy in evaluation mode, (T + 1, N·C).

    Cost: T forward and backward passes.
    """
    twin, x = _double(model, x)
    y = y.to(tensors(x)[0].device)
    chosen = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=1.0, momentum=momentum, nesterov=nesterov)
    path = []
    with torch.enable_grad():
        for lr in [*lrs, 0.0]:
            residual = _outputs(twin, x, forward) - y
            path.append(residual.detach().cpu().numpy().reshape(-1).copy())
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            (squared_error_scale(len(y), y.shape[1], reduction) / 2 * residual.square().sum()).backward()
            optimizer.step()
    return np.array(path)


def _double(model: nn.Module, x: Batch) -> tuple[nn.Module, Batch]:
    twin = copy.deepcopy(model).double().eval()
    return twin, moved(x, next(twin.parameters()).device, torch.float64)


def _outputs(model: nn.Module, x: Batch, forward: Forward | None) -> Tensor:
    raw = only_tensor(call(model, x)) if forward is None else forward(model, x)
    return raw.reshape(size(x), -1)


def study(  # noqa: PLR0913 - one experiment
    model: nn.Module,
    x: Batch,
    y: Tensor | None = None,
    *,
    lr: float | Sequence[float] | None = None,
    steps: int = 200,
    momentum: float = 0.0,
    nesterov: bool = False,
    components: Mapping[str, ArrayLike] | None = None,
    kernel: ArrayLike | None = None,
    forward: Forward | None = None,
) -> Report:
    """Return how long each part of the target takes by the kernel of now, and by training a copy of the network.

    Args:
        model: the network; a copy in float64 and evaluation mode is trained, the model itself never changes.
        x: N training samples, all of one batch.
        y: targets (N, C), or N classes, which become one-hot rows minus 1/C.
        lr: of SGD on the mean squared error, one number or one for each step; None: half of what decays without
            oscillation, 0.5 / (s λ₁).
        steps: of training (the length of `lr`, if that is a schedule).
        momentum: as in `torch.optim.SGD`.
        nesterov: as in `torch.optim.SGD`.
        components: name → function on the samples, N·C numbers; None: every output's targets.
        kernel: the kernel of x, (N, C, N, C) or (N·C, N·C), if it is known already.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: no targets, or targets, kernel or learning rates that do not fit.

    Cost: one kernel, one eigendecomposition of N·C rows, and `steps` passes.
    """
    if y is None:
        raise InputError("how long a target takes needs the target; pass y=")
    twin, inputs = _double(model, x)
    with torch.no_grad():
        samples, outputs = _outputs(twin, inputs, forward).shape
    targets = target_matrix(y, samples, outputs)
    spectrum = Spectrum.of(empirical_ntk(twin, inputs, forward=forward) if kernel is None else kernel)
    assert spectrum.eigenvectors is not None
    if len(spectrum.eigenvalues) != samples * outputs:
        raise InputError(f"the kernel must have {samples * outputs} rows, got {len(spectrum.eigenvalues)}")
    values, vectors = spectrum.eigenvalues.clip(min=0), spectrum.eigenvectors
    scale = squared_error_scale(samples, outputs)
    lrs = _schedule(lr, steps, scale * spectrum.lambda_max)
    rule: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
    residuals = trained(model, x, targets, lrs, forward=forward, **rule)
    # A run that diverges overflows, which is an answer and no fault.
    with np.errstate(over="ignore", invalid="ignore"):
        coordinates = residuals @ vectors
        predicted = predict_modes(coordinates[0], values, lrs, scale=scale, **rule)
    usual = float(np.mean(lrs))
    times = time_to_learn(values, usual, scale=scale, **rule)
    named = components if components is not None else _of_outputs(targets)
    found = {name: component_steps(vectors, times, one) for name, one in named.items()}
    return _report(values, times, predicted, coordinates, found, usual)


def _schedule(lr: float | Sequence[float] | None, steps: int, top: float) -> list[float]:
    if not top > 0:
        raise InputError("the kernel must not be zero: no output of this network can move")
    if lr is None or isinstance(lr, (int, float)):
        lrs = [0.5 / top if lr is None else float(lr)] * steps
    else:
        lrs = [float(one) for one in lr]
    if not lrs or not all(one > 0 for one in lrs):
        raise InputError(f"wanted at least one step and positive learning rates, got {lrs[:5]}")
    return lrs


def _of_outputs(targets: Tensor) -> dict[str, Array]:
    columns: dict[str, Array] = {}
    for c in range(targets.shape[1]):
        one = torch.zeros_like(targets)
        one[:, c] = targets[:, c]
        if bool(one.any()):
            columns[f"target of output {c}"] = one.reshape(-1).numpy()
    return columns


def _report(
    values: Array, times: Array, predicted: Array, measured: Array, found: Mapping[str, float], lr: float
) -> Report:
    energy = measured[0] ** 2 / max(float((measured[0] ** 2).sum()), np.finfo(np.float64).tiny)
    with np.errstate(over="ignore", invalid="ignore"):
        gap = float(np.linalg.norm(predicted - measured, axis=1).max() / np.linalg.norm(measured[0]))
    reached = learned(measured)
    steps = len(measured) - 1
    fast = float(energy[times <= steps].sum())
    numbers = (
        Number("learning_rate", lr, "", note="mean over the run"),
        Number("fastest", float(times[0]), "steps", note="until the fastest mode is down to a tenth"),
        Number("in_reach", fast, "fraction", note=f"of the residual's energy, in modes learned within {steps} steps"),
        Number("forecast_error", gap, "", note="largest |forecast - training|, relative to the first residual"),
        *(Number(f"steps, {name}", value, "steps") for name, value in found.items()),
    )
    first = min(found, key=lambda name: found[name]) if found else "nothing"
    return Report(
        name="learning_speed",
        title=f"Learning speed: {len(values)} modes, {steps} steps of gradient descent at {short(lr)}",
        summary=(
            f"The first kernel says that {fast:.0%} of the residual lies in modes learned within {steps} steps. "
            f"Training a copy left {_left(measured):.0%} of its energy, the forecast {_left(predicted):.0%}. First "
            f"comes {first}."
        ),
        numbers=numbers,
        verdicts=(_stable(times, measured), _forecast(gap), _order(times, reached, energy)),
        tables={"Modes with most of the residual": _modes(values, times, reached, energy)},
        figures={"learning_speed": figure(predicted, measured, times, energy)},
        caveats=(
            "Squared error, full batches and plain or momentum SGD; minibatches, Adam and cross-entropy have no such "
            "modes: use the simulated forecast of a run for those.",
        ),
    )


def _left(path: Array) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float((path[-1] ** 2).sum() / (path[0] ** 2).sum())


def learned(path: Array, left: float = 0.1) -> Array:
    """Return the first step at which each coordinate of a path (T + 1, n) is down to `left` of its start, or inf."""
    below = np.abs(path) <= left * np.abs(path[0])
    return np.where(below.any(axis=0), below.argmax(axis=0).astype(np.float64), np.inf)


def _stable(times: Array, measured: Array) -> Verdict:
    grew = float((measured[-1] ** 2).sum()) if np.isfinite(measured[-1]).all() else math.inf
    start = float((measured[0] ** 2).sum())
    evidence = (
        f"fastest mode to a tenth in {short(float(times[0]))} steps; in training the residual's energy went from "
        f"{short(start)} to {short(grew)}"
    )
    return Verdict("this learning rate is stable at the first kernel", bool(np.isfinite(times[0])), evidence)


def _forecast(gap: float) -> Verdict:
    evidence = f"largest error {short(gap)} of the first residual; {_CLOSE:g} allowed"
    return Verdict("the first kernel predicts the whole run", bool(gap <= _CLOSE), evidence)


def _order(times: Array, reached: Array, energy: Array) -> Verdict:
    claim = "modes are learned in the order of their eigenvalues"
    seen = np.isfinite(reached) & np.isfinite(times) & (energy > _VISIBLE) & (reached > 0)
    if seen.sum() < 5 or np.ptp(reached[seen]) == 0:
        found = int(seen.sum())
        return Verdict(claim, None, f"{found} modes with a visible share of the residual were learned, too few to rank")
    # Imported here: scipy.stats takes about a second to load.
    from scipy.stats import spearmanr

    rank = float(spearmanr(times[seen], reached[seen]).statistic)
    evidence = f"rank correlation {rank:.3f} of forecast and measured times over {int(seen.sum())} modes; 0.9 wanted"
    return Verdict(claim, rank >= 0.9, evidence)


def _modes(values: Array, times: Array, reached: Array, energy: Array) -> Table:
    chosen = np.sort(np.argsort(-energy, kind="stable")[:_SHOWN])
    rows = tuple(
        (int(i) + 1, float(values[i]), float(energy[i]), float(times[i]), float(reached[i])) for i in chosen.tolist()
    )
    return Table(("mode", "eigenvalue", "share of residual", "steps to a tenth, forecast", "measured"), rows)


def example(quick: bool = False) -> Report:
    """Return the study of a wide tanh network on scanned digits; `quick`: fewer samples and steps."""
    from sklearn.datasets import load_digits

    digits, n = load_digits(), 20 if quick else 60
    x, y = torch.from_numpy(digits.data[:n] / 16.0), torch.from_numpy(digits.target[:n])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 10)).double()
    torch.set_rng_state(state)
    return study(model, x, y, steps=40 if quick else 1000)
