"""Initialisation: how fast, and how evenly, a network can learn on the first day, for one start against another.

Monte Carlo over draws: trace, log10 condition number, effective rank and λ₁ of K = J Jᵀ (N·C rows). The trace is the
summed squared gradient norm, the scale of learning speed; the scale of the outputs is another kernel (NNGP).
For ReLU networks, with or without biases, E[tr K] has a closed form, exact at every finite width.
The condition number does not see a common gain of the kernel: for two layers it depends on v1 / v2 alone, so "He is
better conditioned than Xavier" is a question for each network, not a law.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ntk_monitor.applications.initializers import INITS, VARIANCES, Init, fans
from ntk_monitor.applications.montecarlo import (
    STATISTICS,
    Draws,
    Model,
    Progress,
    as_built,
    draws,
    median_interval,
)
from ntk_monitor.applications.report import Number, Report, Table, Verdict, short
from ntk_monitor.batch import Batch, size
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import GREY, MODE_COLOURS, Figure, layout_of, line, numbers
from ntk_monitor.kernel import Outputs
from ntk_monitor.network import Forward

EXAMPLE = "a three-layer ReLU network on 32 scanned digits under five initialisations"


def expected_trace_relu_mlp(
    sizes: Sequence[int], variances: Sequence[float], x: Tensor, bias_variances: Sequence[float] | None = None
) -> float:
    """Return E[tr K] over all samples and outputs of a ReLU MLP, exact at finite width.

    With s_0 = |x|² and s_l = n_l (v_l s_{l-1} + b_l) / 2, each output has
    E K(x, x) = Σ_l (s_{l-1} + [bias]) Π_{k=l}^{L-1} n_k v_{k+1} / 2. Every row of weights (and its bias) must be
    independent of the others and symmetric about 0; the distribution is otherwise free.

    Args:
        sizes: n_0 … n_L, inputs to outputs.
        variances: v_1 … v_L of the weights.
        x: (N, n_0) samples.
        bias_variances: b_1 … b_L (0: biases that start at zero); None: the network has no biases.

    Raises:
        InputError: lengths that do not fit together.

    Source: Hanin and Nica 2019 (products of random ReLU matrices); derived by flipping the signs of rows.
    """
    layers = len(sizes) - 1
    if layers < 1 or len(variances) != layers or (bias_variances is not None and len(bias_variances) != layers):
        raise InputError(
            f"L + 1 sizes need L variances (and L bias variances or None), got {len(sizes)} sizes, {len(variances)} "
            f"variances; pass one per layer"
        )
    if x.dim() != 2 or x.shape[1] != sizes[0]:
        raise InputError(f"x must be (N, {sizes[0]}), got {tuple(x.shape)}; flatten the samples")
    biases = [0.0] * layers if bias_variances is None else list(bias_variances)
    signal = x.double().square().sum(1)
    # Backwards from the output: squared gradient with respect to the pre-activations of layer l.
    back = [math.prod(sizes[k] * variances[k] / 2 for k in range(j, layers)) for j in range(1, layers + 1)]
    total = torch.zeros_like(signal)
    for index in range(layers):
        total += (signal + (bias_variances is not None)) * back[index]
        signal = sizes[index + 1] * (variances[index] * signal + biases[index]) / 2
    return sizes[-1] * float(total.sum())


def closed_form(model: nn.Module, x: Batch, init: str) -> float | None:
    """Return E[tr K] of a named initialisation, or None where no closed form is known.

    Known for `nn.Sequential` of Linear layers with ReLU between them (Flatten, Identity and Dropout may stand
    anywhere), all of them with or all without bias, everything trainable, under xavier, he, lecun and pytorch.
    """
    linears = _relu_mlp(model)
    if not linears or not isinstance(x, Tensor) or (init not in VARIANCES and init != "pytorch"):
        return None
    rows = x.reshape(len(x), -1)
    if rows.shape[1] != linears[0].in_features:
        return None
    sizes = [linears[0].in_features, *(layer.out_features for layer in linears)]
    # torch's Linear draws weights and biases uniformly within ±1/√fan_in: variance 1/(3 fan_in).
    rule = VARIANCES.get(init, _torch_variance)
    variances = [rule(*fans(layer.weight)) for layer in linears]
    biased = linears[0].bias is not None
    biases = [1 / (3 * n) if init == "pytorch" else 0.0 for n in sizes[:-1]] if biased else None
    return expected_trace_relu_mlp(sizes, variances, rows, biases)


def _torch_variance(fan_in: int, _: int) -> float:
    return 1 / (3 * fan_in)


def _relu_mlp(model: nn.Module) -> list[nn.Linear]:
    if not isinstance(model, nn.Sequential):
        return []
    parts = [part for part in model.children() if not isinstance(part, (nn.Flatten, nn.Identity, nn.Dropout))]
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    fits = (
        len(parts) % 2 == 1
        and all(type(part) is (nn.ReLU if k % 2 else nn.Linear) for k, part in enumerate(parts))
        and len({layer.bias is None for layer in linears}) == 1
        and all(parameter.requires_grad for parameter in model.parameters())
        and all(a.out_features == b.in_features for a, b in pairwise(linears))
    )
    return linears if fits else []


def study(  # noqa: PLR0913 - one experiment
    model: Model,
    x: Batch,
    y: Tensor | None = None,
    *,
    inits: Mapping[str, Init] | None = None,
    count: int = 200,
    outputs: Outputs = "full",
    forward: Forward | None = None,
    seed: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Return how the kernel at initialisation depends on the rule that draws the weights.

    Args:
        model: a module (copied, never changed) or a callable that builds one.
        x: N samples; the kernel has N·C rows, so some tens of samples are enough.
        y: not used; initialisation does not see targets.
        inits: name → function that draws a module's parameters in place; None: xavier, he, lecun, orthogonal, pytorch,
            and for a callable also what it builds ("as built").
        count: draws per initialisation.
        outputs: as in `empirical_ntk`; "trace" for many outputs.
        forward: as in `empirical_ntk`.
        seed: of the first draw.
        processes: worker processes; see `montecarlo.draws`.
        progress: called with (draws done, draws in all).

    Raises:
        InputError: no draws, or something that workers cannot be given.

    Cost: count · inits kernels and eigendecompositions.
    """
    factory = not isinstance(model, nn.Module)
    chosen = dict(INITS if inits is None else inits)
    if factory and inits is None:
        chosen["as built"] = as_built
    found = draws(
        model,
        x,
        chosen,
        count=count,
        outputs=outputs,
        forward=forward,
        seed=seed,
        processes=processes,
        progress=progress,
    )
    one = model if isinstance(model, nn.Module) else model()
    # A sum over outputs keeps the trace; the other layouts change it.
    known = {
        name: closed_form(one, x, name) if outputs in ("full", "trace") and name in INITS else None for name in found
    }
    verdicts = [*_conditioned(found), *_exact(found, known)]
    medians = {name: float(np.nanmedian(one.values["trace"])) for name, one in found.items()}
    fastest, slowest = max(medians, key=lambda name: medians[name]), min(medians, key=lambda name: medians[name])
    even = min(found, key=lambda name: found[name].quartiles("condition_log10")[1])
    spread = medians[fastest] / medians[slowest] if medians[slowest] > 0 else math.inf
    return Report(
        name="initialization",
        title=f"Initialisation: kernels of {count} draws each on {size(x)} samples",
        summary=(
            f"At the same learning rate, outputs move fastest under {fastest}: its median trace is {spread:.3g} times "
            f"that of {slowest}. The kernel is most evenly conditioned under {even}. A ratio of traces can be undone "
            "by the learning rate; a condition number cannot."
        ),
        numbers=(
            Number("trace_ratio", spread, "", note=f"median trace, {fastest} over {slowest}"),
            *(_median(name, one) for name, one in found.items()),
        ),
        verdicts=tuple(verdicts),
        tables={"Median [quartiles] over draws": _table(found, known)},
        figures={"initialization": figure(found, known)},
        caveats=_caveats(found, count),
    )


def _median(name: str, one: Draws) -> Number:
    middle, low, high = median_interval(one.values["condition_log10"])
    return Number(f"log10 condition, {name}", middle, "decades", low, high, "median, 95 % interval")


def _table(found: Mapping[str, Draws], known: Mapping[str, float | None]) -> Table:
    rows = []
    for name, one in found.items():
        cells = [_cell(middle, low, high) for low, middle, high in map(one.quartiles, STATISTICS)]
        middle, low, high = one.mean("trace")
        exact = known[name]
        rows.append((name, *cells, _cell(middle, low, high), "" if exact is None else short(exact)))
    names = ("trace", "log10 condition", "effective rank", "lambda max")
    return Table(("init", *names, "mean trace [95 % CI]", "closed form"), tuple(rows))


def _cell(middle: float, low: float, high: float) -> str:
    return f"{short(middle)} [{short(low)}, {short(high)}]"


def _conditioned(found: Mapping[str, Draws]) -> list[Verdict]:
    if "he" not in found or "xavier" not in found:
        return []
    # Draw i of both rules comes from the same normal numbers, so their difference is less noisy than either.
    gain = found["xavier"].values["condition_log10"] - found["he"].values["condition_log10"]
    middle, low, high = median_interval(gain)
    holds = True if low > 0 else False if high < 0 else None
    interval = f"95 % interval {low:+.3g} to {high:+.3g}" if math.isfinite(low) else "too few draws for an interval"
    evidence = f"log10 condition of Xavier minus that of He, draw by draw: median {middle:+.3g} decades, {interval}"
    return [Verdict("He is better conditioned than Xavier", holds, evidence)]


def _exact(found: Mapping[str, Draws], known: Mapping[str, float | None]) -> list[Verdict]:
    verdicts = []
    for name, exact in known.items():
        if exact is None:
            continue
        # 3.29 standard errors: a true closed form is called wrong once in a thousand.
        middle, low, high = found[name].mean("trace", 3.29)
        holds = low <= exact <= high if math.isfinite(high) else None
        evidence = f"closed form {exact:.4g}, mean {middle:.4g}, 99.9 % interval {low:.4g} to {high:.4g}"
        verdicts.append(Verdict(f"the expected trace under {name} is the closed form", holds, evidence))
    return verdicts


def _caveats(found: Mapping[str, Draws], count: int) -> tuple[str, ...]:
    notes = ["Kernels at initialisation say nothing about how far training moves them."]
    bounds = [f"{name} ({one.deficient} of {count})" for name, one in found.items() if one.deficient]
    if bounds:
        notes.append(
            f"Rank-deficient kernels, whose condition number is a lower bound: {', '.join(bounds)}. Compare condition "
            "numbers only between kernels of equal rank."
        )
    wide = [
        name for name, one in found.items() if np.nanstd(one.values["trace"]) > 0.3 * np.nanmean(one.values["trace"])
    ]
    if wide and count < 1000:
        notes.append(
            f"The trace varies by more than 30 % between draws under {', '.join(wide)}; its mean needs 1000 draws for "
            "1 to 3 %."
        )
    return tuple(notes)


def figure(found: Mapping[str, Draws], known: Mapping[str, float | None] | None = None) -> Figure:
    """Return draws of trace and condition number as points with median and quartiles, one column per initialisation.

    Dotted: the closed form of the expected trace, where one is known.
    """
    names = list(found)
    data: list[Figure] = []
    shifts = np.random.default_rng(0).uniform(-0.28, 0.28, max(len(one.values["trace"]) for one in found.values()))
    for k, (name, one) in enumerate(found.items()):
        colour = MODE_COLOURS[k % len(MODE_COLOURS)]
        for axis, statistic in (("", "trace"), ("2", "condition_log10")):
            values = one.values[statistic]
            with np.errstate(divide="ignore", invalid="ignore"):
                shown = values if statistic == "condition_log10" else np.log10(values)
            place = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "showlegend": False}
            marker = {"size": 4, "color": colour, "opacity": 0.35}
            hover = f"{name}: 10^%{{y:.3f}}<extra></extra>"
            data.append(
                line(numbers(k + shifts[: len(shown)]), numbers(shown), name, colour, mode="markers", marker=marker)
                | place
                | {"hovertemplate": hover}
            )
            finite = shown[np.isfinite(shown)]
            if finite.size:
                low, middle, high = np.quantile(finite, [0.25, 0.5, 0.75])
                data.append(
                    line([k, k], numbers([low, high]), "quartiles", GREY, line={"color": "#333333", "width": 5}) | place
                )
                data.append(
                    line(
                        [k - 0.3, k + 0.3], numbers([middle] * 2), "median", GREY, line={"color": "#333333", "width": 2}
                    )
                    | place
                )
        exact = (known or {}).get(name)
        if exact:
            level = numbers([math.log10(exact)] * 2)
            dash = {"color": "#000000", "dash": "dot", "width": 2}
            data.append(
                line([k - 0.42, k + 0.42], level, f"closed form, {name}", GREY, line=dash) | {"showlegend": False}
            )
    ticks = {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "range": [-0.6, len(names) - 0.4],
        "showgrid": False,
    }
    layout = layout_of(
        "Kernels at initialisation, one point per draw",
        "Left: how fast outputs can move, which the learning rate can make up for. Right: how unevenly, which it "
        "cannot. Bars: quartiles and median. Dotted: closed form of the expected trace (a mean, so above the median).",
        xaxis=ticks | {"domain": [0, 0.46]},
        yaxis={"title": {"text": "log10 tr K"}},
        xaxis2=ticks | {"domain": [0.56, 1], "anchor": "y2"},
        yaxis2={"title": {"text": "log10 condition number"}, "anchor": "x2"},
    )
    return {"data": data, "layout": layout}


def example(quick: bool = False, *, processes: int = 1, progress: Progress | None = None) -> Report:
    """Return the study of a three-layer ReLU network on scanned digits; `quick`: fewer draws."""
    from sklearn.datasets import load_digits

    digits = load_digits().data[:32] / 16.0
    x = torch.from_numpy(digits)
    x = x / x.norm(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).double()
    return study(model, x, count=4 if quick else 150, processes=processes, progress=progress)
