"""Dropout: what it does to the kernel that training sees. q = 1 - p is kept, K the kernel without dropout.

| masks on the two samples | without rescaling | torch (kept ones divided by q) |
|---|---|---|
| independent | q² K | K |
| the same for both, a sample with itself included | q K | K / q |
| none (evaluation) and one: what a training step moves | q² K (evaluation scales by q) | K |

Exact in the mean for one hidden layer with dropout behind it. Then one step's kernel is K + ((1 - q)/q) diag K: a ridge
on the diagonal and noise, not a smaller learning rate. Two dropout layers, or nonlinearities behind one, break it.

Source: derived from E[m] = 1, E[m²] = 1/q of torch's masks; Srivastava et al. 2014 (dropout).
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.applications.masks import Masked, kept_together, tiled
from ntk_monitor.applications.report import Number, Report, Table, Verdict
from ntk_monitor.batch import Batch, size
from ntk_monitor.errors import InputError
from ntk_monitor.figures.style import BLUE, GREY, ORANGE, Figure, layout_of, line, numbers
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Forward

EXAMPLE = "a network with two dropout layers on 12 scanned digits"

Array: TypeAlias = NDArray[np.float64]
Mode: TypeAlias = Literal["eval", "same", "shared", "independent", "eval_vs_train"]

_MODES: tuple[Mode, ...] = ("independent", "same", "shared", "eval_vs_train")
_WORDS = {
    "independent": "independent masks",
    "same": "one step: a mask per sample",
    "shared": "one mask for all samples",
    "eval_vs_train": "evaluation against one mask",
}
# Rows of one kernel: large enough that a draw is cheap, small enough that its Gram is.
_ROWS = 128
_CLOSE = 0.02


@dataclass(frozen=True, slots=True)
class Ratio:
    """The scale of a masked kernel against K: ⟨M, K⟩ / ⟨K, K⟩ over some entries, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Kernels:
    """Mean kernels under masks, (N, N), outputs summed.

    Attributes:
        plain: K, without dropout.
        batches: mode → (B, N, N), means over each of B independent batches of draws.
        keeps: q of every dropout module.
    """

    plain: Array
    batches: dict[Mode, Array]
    keeps: list[float]

    def mean(self, mode: Mode) -> Array:
        """Return the mean over all draws."""
        return np.asarray(self.batches[mode].mean(axis=0))

    def ratio(self, mode: Mode, *, diagonal: bool) -> Ratio:
        """Return the scale against K of the diagonal entries or of the others."""
        chosen = np.eye(len(self.plain), dtype=bool)
        chosen = chosen if diagonal else ~chosen
        k = self.plain[chosen]
        each = self.batches[mode][:, chosen] @ k / (k @ k)
        wide = 1.96 * float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.inf
        return Ratio(float(each.mean()), float(each.mean()) - wide, float(each.mean()) + wide)


def kernels(
    model: nn.Module,
    x: Batch,
    *,
    draws: int = 200,
    rescale: bool = True,
    seed: int = 0,
    forward: Forward | None = None,
) -> Kernels:
    """Return the mean kernels of a network under dropout masks, every combination of masks from the same draws.

    Args:
        model: any network with dropout modules (elementwise or by channel); a copy in evaluation mode is used.
        x: N samples, at least two.
        draws: of the masks.
        rescale: kept values are divided by q, as torch does; False: the textbook's masks.
        seed: of the masks.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: fewer than two samples or draws.
        NetworkError: no dropout module whose masks multiply.

    Cost: about 2 · draws · N / 128 kernels of 128 rows.
    """
    if size(x) < 2 or draws < 2:
        raise InputError(f"wanted at least two samples and two draws, got {size(x)} and {draws}")
    twin = Masked(model, forward)
    x = twin.prepare(x)
    n = size(x)
    count = max(2, min(_ROWS // n, draws))
    generator = torch.Generator().manual_seed(seed)
    found: dict[Mode, list[Array]] = {mode: [] for mode in _MODES}
    plain = np.empty(0)
    for _ in range(math.ceil(draws / count)):
        blocks = _blocks(twin, x, count, generator, shared=False, rescale=rescale)
        plain = blocks[0, 0]
        masked = blocks[2:, 2:]
        own = masked[np.arange(count), np.arange(count)]
        found["same"].append(own.mean(axis=0))
        found["independent"].append((masked.sum(axis=(0, 1)) - own.sum(axis=0)) / (count * (count - 1)))
        found["eval_vs_train"].append(blocks[1, 2:].mean(axis=0))
        together = _blocks(twin, x, count, generator, shared=True, rescale=rescale)[2:, 2:]
        found["shared"].append(together[np.arange(count), np.arange(count)].mean(axis=0))
    return Kernels(plain, {mode: np.array(found[mode]) for mode in _MODES}, twin.keeps)


def _blocks(twin: Masked, x: Batch, count: int, generator: torch.Generator, *, shared: bool, rescale: bool) -> Array:
    """Return kernels (2 + count, 2 + count, N, N) between the samples under masks: none, evaluation's, draws."""
    n = size(x)
    device = next(twin.parameters()).device
    parts = zip(
        twin.constant(n, kept=False),
        twin.constant(n, kept=not rescale),
        twin.draw(count, n, generator, shared=shared, rescale=rescale),
        strict=True,
    )
    masks = [torch.cat(part).to(device) for part in parts]
    kernel = empirical_ntk(twin, (tiled(x, count + 2), masks), outputs="trace")
    return np.asarray(kernel.cpu().numpy().reshape(count + 2, n, count + 2, n).transpose(0, 2, 1, 3))


def dropout_kernel(
    model: nn.Module,
    x: Batch,
    mode: Mode = "eval",
    *,
    draws: int = 200,
    seed: int = 0,
    forward: Forward | None = None,
) -> Tensor:
    """Return the mean kernel (N, N) under torch's dropout, outputs summed.

    Args:
        model: a network with dropout modules.
        x: N samples.
        mode: "eval": no masks. "same": a mask for each sample, one draw on both sides: the kernel of one training step.
            "shared": one mask for all samples. "independent": two draws. "eval_vs_train": how evaluation moves in one
            training step.
        draws: of the masks.
        seed: of the masks.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: an unknown mode, or fewer than two samples or draws.
        NetworkError: no dropout module whose masks multiply.
    """
    if mode != "eval" and mode not in _MODES:
        raise InputError(f"mode must be one of {('eval', *_MODES)}, got {mode!r}")
    found = kernels(model, x, draws=2 if mode == "eval" else draws, seed=seed, forward=forward)
    return torch.from_numpy(found.plain.copy() if mode == "eval" else found.mean(mode))


def diagonal_law(plain: Array, keep: float) -> Array:
    """Return K + ((1 - q)/q) diag K, the mean kernel of one training step: one hidden layer, torch's dropout."""
    return plain + (1 - keep) / keep * np.diag(np.diag(plain))


def study(
    model: nn.Module,
    x: Batch,
    y: Tensor | None = None,
    *,
    draws: int = 400,
    seed: int = 0,
    forward: Forward | None = None,
) -> Report:
    """Return what dropout does to the kernel of a network: slower learning, a ridge, or neither.

    Args:
        model: a network with dropout modules; a copy in evaluation mode is used, with masks as inputs.
        x: N samples, at least two; about 16 are enough.
        y: not used.
        draws: of the masks.
        seed: of the masks.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: fewer than two samples or draws.
        NetworkError: no dropout module whose masks multiply.

    Cost: about 2 · draws · N / 128 kernels of 128 rows.
    """
    found = kernels(model, x, draws=draws, seed=seed, forward=forward)
    q = kept_together(found.keeps)
    ratios = {(mode, diagonal): found.ratio(mode, diagonal=diagonal) for mode in _MODES for diagonal in (False, True)}
    law = diagonal_law(found.plain, q)
    error = float(np.linalg.norm(found.mean("same") - law) / np.linalg.norm(law))
    drift = ratios["eval_vs_train", False]
    own = ratios["same", True]
    verdicts = (
        _equal("the mean step of evaluation is that of K: dropout does not slow learning", drift, 1.0),
        _equal(f"dropout multiplies the kernel by q² = {q * q:.3g}, like a smaller learning rate", drift, q * q),
        _equal(f"one step's diagonal is K/q, {1 / q:.3g} times K", own, 1 / q),
        _equal("one step's kernel between different samples is K", ratios["same", False], 1.0),
    )
    return Report(
        name="dropout",
        title=f"Dropout: {len(found.keeps)} module(s), q = {', '.join(f'{k:g}' for k in found.keeps)}, {draws} draws",
        summary=(
            f"What a training step moves in evaluation mode is {drift.value:.3f} times what it is without dropout "
            f"(q² would be {q * q:.3g}). A sample moves itself {own.value:.3f} times as much: on the training "
            "network dropout acts like a ridge on the diagonal, plus noise."
        ),
        numbers=(
            *(
                Number(f"{mode}, {'diagonal' if on else 'off-diagonal'}", r.value, "times K", r.low, r.high)
                for (mode, on), r in ratios.items()
            ),
            Number("law_error", error, "", note="one step's mean kernel against K + ((1 - q)/q) diag K, relative"),
        ),
        verdicts=verdicts,
        tables={"Masked kernels over K [95 % interval]": _table(ratios)},
        figures={"dropout": figure(ratios, q)},
        caveats=(
            "The mean kernel is not the mean step: masks go with the residual they leave. The difference is the "
            "gradient of the known dropout penalty and falls as 1/width.",
            "With several dropout modules q is the product of theirs; the laws are exact for one hidden layer only.",
            "Dropout inside attention, recurrent layers and torch.nn.functional is off here.",
        ),
    )


def _equal(claim: str, ratio: Ratio, wanted: float) -> Verdict:
    """Return whether a ratio is what is wanted, within 2 %; None where its interval cannot tell."""
    low, high = wanted * (1 - _CLOSE), wanted * (1 + _CLOSE)
    inside, outside = low <= ratio.low and ratio.high <= high, ratio.high < low or ratio.low > high
    holds = True if inside else False if outside else None
    evidence = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] times K, wanted {wanted:.3g} within 2 %"
    return Verdict(claim, holds, evidence)


def _table(ratios: dict[tuple[Mode, bool], Ratio]) -> Table:
    def cell(mode: Mode, on: bool) -> str:
        one = ratios[mode, on]
        return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"

    rows = tuple((_WORDS[mode], cell(mode, False), cell(mode, True)) for mode in _MODES)
    return Table(("masks", "between samples", "a sample with itself"), rows)


def figure(ratios: dict[tuple[Mode, bool], Ratio], q: float) -> Figure:
    """Return the ratios with their intervals, and lines at K, q² K and K/q."""
    data: list[Figure] = []
    for level, name, dash in ((1.0, "K", "solid"), (1 / q, f"K/q = {1 / q:.3g} K", "dash"), (q * q, "q² K", "dot")):
        look = {"line": {"color": GREY, "dash": dash, "width": 1.5}}
        data.append(line([-0.5, len(_MODES) - 0.5], numbers([level] * 2), name, GREY, **look))
    for on, name, colour in ((False, "between samples", BLUE), (True, "a sample with itself", ORANGE)):
        at = [k + (0.1 if on else -0.1) for k in range(len(_MODES))]
        values = [ratios[mode, on] for mode in _MODES]
        bars = [(x, r) for x, r in zip(at, values, strict=True) if math.isfinite(r.high)]
        x = [value for place, _ in bars for value in (place, place, None)]
        y = [value for _, r in bars for value in (r.low, r.high, None)]
        data.append(line(x, y, "95 % interval", colour, line={"color": colour, "width": 3}, showlegend=False))
        dots = {"mode": "markers", "marker": {"size": 9, "color": colour}}
        data.append(line(at, numbers([r.value for r in values]), name, colour, **dots))
    layout = layout_of(
        "Kernels under dropout, relative to K without it",
        "Right column: what a training step moves in evaluation mode; near 1, dropout does not slow learning. A "
        "sample's own entry near 1/q is what makes dropout a ridge.",
        xaxis={
            "tickvals": list(range(len(_MODES))),
            "ticktext": ["independent", "one step", "shared mask", "evaluation<br>vs mask"],
            "range": [-0.5, len(_MODES) - 0.5],
            "showgrid": False,
        },
        yaxis={"title": {"text": "times K"}, "rangemode": "tozero"},
        showlegend=True,
    )
    return {"data": data, "layout": layout}


def example(quick: bool = False) -> Report:
    """Return the study of a network with two dropout layers on scanned digits; `quick`: fewer draws."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data[:12] / 16.0)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*hidden, nn.Linear(200, 10)).double()
    torch.set_rng_state(state)
    return study(model, x, draws=40 if quick else 2000)
