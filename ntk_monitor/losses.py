"""Losses as functions of the outputs: gradient and curvature, which turn a kernel into speeds of learning.

f (N, C) outputs, g = dL/df (N, C), H = d²L/df² block-diagonal over samples, H = S Sᵀ with S (N, C, C). For the
losses here g lies in the range of S, so that the residual u = S⁺ g exists and a gradient step with learning rate lr
moves it by -lr Sᵀ K S u. N is the number of samples the loss averages over.

| loss | g | S | u = S⁺ g |
|---|---|---|---|
| MSE (mean: s = 2/(N C), sum: s = 2) | s (f - y) | √s I | √s (f - y) |
| cross-entropy (mean; W target weights, w = Σ_c W) | (w p - W)/Σw | √(w/Σw) (diag √p - p √pᵀ) | Pearson residual |
| BCE with logits (mean; a = 1 + (w₊ - 1) y) | (a p - w₊ y)/(N C) | √(a p (1-p)/(N C)) | Pearson residual |
"""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.errors import InputError

Array = NDArray[np.float64]
Kind: TypeAlias = Literal["mse", "cross_entropy", "bce_with_logits", "other"]

# A class of probability below this is treated as having it: 1/√p must stay finite.
_SMALLEST_PROBABILITY = 1e-12

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a loss says about the outputs at one point: gradient and root of the curvature, in float64."""

    value: float
    gradient: Array
    """dL/df, (N, C)."""
    root: Array
    """S, as (N, C, C), or (N, C) where it is diagonal."""
    inverse: Array
    """Elementwise factor of the pseudo-inverse, (N, C): u = g · inverse. Zero where the loss does not look."""

    def residual(self, gradient: Array | None = None) -> Array:
        """Return u = S⁺ g, (N·C,), of this point's gradient or of a later one in this point's coordinates."""
        g = self.gradient if gradient is None else gradient
        return np.asarray((g * self.inverse).reshape(-1))


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with its options, as torch defines it.

    Attributes:
        name: how it is shown to people, e.g. "cross_entropy(mean, label_smoothing=0.1)".
        kind: which row of the module's table gives gradient and curvature; "other" has a value only.
        function: (outputs, targets) → scalar tensor.
    """

    name: str
    kind: Kind
    function: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def value(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the loss of a batch; NaN where the shapes do not fit it."""
        try:
            with torch.no_grad():
                return float(self.function(outputs, targets))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return float("nan")

    @property
    def per_sample(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of one sample, (1, ...) outputs and targets → scalar, whose weighted mean is the loss of a batch.

        Cross-entropy keeps its class weight, which the mean over a single sample would cancel.
        """
        if self.kind != "cross_entropy":
            return self.function
        total = cross_entropy(**{**self.options, "reduction": "sum"}).function
        return lambda f, y: total(f, y) if f.dim() == 2 else self.function(f, y)

    def singly(self, targets: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `per_sample` for the samples of a batch with these targets.

        Token losses are means over all tokens of a batch, not over sequences: the loss of one sequence is the sum over
        its tokens divided by the mean number of tokens per sequence, so that long sequences weigh as they do in
        training and the mean over sequences is the loss of the batch.
        """
        if "shift" not in self.options:
            return self.per_sample
        labels = torch.as_tensor(targets)
        labels = labels[:, 1:] if self.options["shift"] else labels
        share = len(labels) / max(1, int((labels != IGNORED).sum()))
        total = token_cross_entropy(**{**self.options, "reduction": "sum"}).function
        return lambda f, y: total(f, y) * share

    def terms(self, outputs: Tensor, targets: Tensor) -> Terms:
        """Return gradient and curvature at these outputs.

        Raises:
            InputError: no closed form for this loss, or outputs and targets whose shapes do not fit it.
        """
        f = outputs.detach().cpu().double()
        y = targets.detach().cpu()
        if self.kind == "other":
            raise InputError(f"{self.name} has no known curvature; residual modes need MSE, cross-entropy or BCE")
        if self.kind == "cross_entropy":
            if f.dim() != 2:
                raise InputError(f"modes of {self.name} need one class per sample, got outputs {tuple(f.shape)}")
            return self._cross_entropy(f, y)
        if y.numel() != f.numel():
            raise InputError(f"targets of shape {tuple(y.shape)} do not fit outputs {tuple(f.shape)} of {self.name}")
        return self._elementwise(f, y.double())

    def _elementwise(self, f: Tensor, y: Tensor) -> Terms:
        n, shape = f.numel(), f.shape[1:]
        f, y = f.reshape(len(f), -1), y.reshape(len(f), -1)
        if self.kind == "mse":
            s = 2.0 if self.options.get("reduction") == "sum" else 2.0 / n
            g, curvature = s * (f - y), torch.full_like(f, s)
            value = s / 2 * float((f - y).square().sum())
        else:
            scale = 1.0 if self.options.get("reduction") == "sum" else 1.0 / n
            weight = self.options.get("pos_weight")
            pw = torch.ones(shape) if weight is None else weight.detach().cpu().double().expand(shape)
            pw = pw.reshape(-1)
            a, p = 1 + (pw - 1) * y, f.sigmoid()
            g, curvature = scale * (a * p - pw * y), scale * a * p * (1 - p)
            value = scale * float(F.binary_cross_entropy_with_logits(f, y, pos_weight=pw.double(), reduction="sum"))
        root = curvature.sqrt()
        return Terms(value, g.numpy(), root.numpy(), _reciprocal(root).numpy())

    def _cross_entropy(self, f: Tensor, y: Tensor) -> Terms:
        weights = _target_weights(f, y, self.options)
        kept = weights.sum(1)
        # Torch divides by the sum of class weights of the labels, not of the smoothed targets.
        total = _normaliser(y, f.shape[1], self.options)
        p = f.softmax(1).clamp_min(_SMALLEST_PROBABILITY)
        p = p / p.sum(1, keepdim=True)
        g = (kept[:, None] * p - weights) / total
        q = p.sqrt()
        a = (kept / total).sqrt()[:, None]
        root = a[:, :, None] * (torch.diag_embed(q) - p[:, :, None] * q[:, None, :])
        # Σ_c g = 0, and on such vectors (diag √p - p √pᵀ)⁺ is the division by √p.
        value = -float((weights * f.log_softmax(1)).sum()) / total
        return Terms(value, g.numpy(), root.numpy(), (_reciprocal(a) / q).numpy())


def _target_weights(f: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    """Return W (N, C): class weight times smoothed or soft target; rows of ignored samples are zero."""
    n, c = f.shape
    if y.is_floating_point():
        if y.shape != f.shape:
            raise InputError(f"soft targets must have the shape of the outputs {tuple(f.shape)}, got {tuple(y.shape)}")
        target, kept = y.double(), torch.ones(n, 1, dtype=torch.float64)
    else:
        if y.numel() != n:
            raise InputError(f"class targets must be one integer per sample ({n}), got shape {tuple(y.shape)}")
        labels = y.reshape(n)
        ignored = labels == options.get("ignore_index", -100)
        if bool(((labels < 0) | (labels >= c))[~ignored].any()):
            raise InputError(f"class targets must lie in 0..{c - 1}, got up to {int(labels.max())}")
        kept = (~ignored[:, None]).double()
        target = F.one_hot(labels.masked_fill(ignored, 0).long(), c).double() * kept
    eps = float(options.get("label_smoothing", 0.0))
    smoothed = (1 - eps) * target + eps / c * kept
    weight = options.get("weight")
    return smoothed if weight is None else smoothed * weight.detach().cpu().double()


def _normaliser(y: Tensor, classes: int, options: dict[str, Any]) -> float:
    if options.get("reduction") == "sum":
        return 1.0
    if y.is_floating_point():
        return float(len(y))
    labels = y.reshape(-1)
    labels = labels[labels != options.get("ignore_index", -100)]
    weight = options.get("weight")
    return float(len(labels) if weight is None else weight.detach().cpu().double()[labels].sum()) or 1.0


def _reciprocal(x: Tensor) -> Tensor:
    """Return 1/x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(x))


def mse(reduction: str = "mean") -> Loss:
    """Return `torch.nn.MSELoss` with this reduction."""
    return Loss(
        f"mse({reduction})",
        "mse",
        lambda f, y: F.mse_loss(f, _same(y, f), reduction=reduction),
        {"reduction": reduction},
    )


def cross_entropy(
    reduction: str = "mean", *, weight: Tensor | None = None, label_smoothing: float = 0.0, ignore_index: int = -100
) -> Loss:
    """Return `torch.nn.CrossEntropyLoss` with these options; on log-probabilities it equals the NLL loss."""
    shown = [reduction, *(["class weights"] if weight is not None else [])]
    shown += [f"label_smoothing={label_smoothing:g}"] if label_smoothing else []
    options: dict[str, Any] = {"reduction": reduction, "weight": weight}
    options |= {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    return Loss(f"cross_entropy({', '.join(shown)})", "cross_entropy", lambda f, y: _ce(f, y, options), options)


def bce_with_logits(reduction: str = "mean", *, pos_weight: Tensor | None = None) -> Loss:
    """Return `torch.nn.BCEWithLogitsLoss` with these options."""
    shown = [reduction, *(["pos_weight"] if pos_weight is not None else [])]
    options = {"reduction": reduction, "pos_weight": pos_weight}
    return Loss(
        f"bce_with_logits({', '.join(shown)})",
        "bce_with_logits",
        lambda f, y: F.binary_cross_entropy_with_logits(
            f, _same(y, f), pos_weight=None if pos_weight is None else pos_weight.to(f), reduction=reduction
        ),
        options,
    )


def _ce(f: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    weight = options["weight"]
    targets = y.to(f.dtype) if y.is_floating_point() else y.long()
    value = F.cross_entropy(
        f,
        targets,
        weight=None if weight is None else weight.to(f),
        reduction=options["reduction"],
        label_smoothing=options["label_smoothing"],
        ignore_index=options["ignore_index"],
    )
    # A sample that is ignored has no loss; on its own, torch's mean over no samples would be 0/0.
    return value if y.is_floating_point() else torch.where((targets != options["ignore_index"]).any(), value, 0.0)


def _same(y: Tensor, f: Tensor) -> Tensor:
    if y.numel() != f.numel():
        # Broadcasting (N,) against (N, 1) gives an N × N loss; nobody means it, and it must not match by accident.
        raise ValueError("targets and outputs differ in size")
    return y.reshape(f.shape).to(f.dtype)


def huber(delta: float = 1.0) -> Loss:
    """Return `torch.nn.HuberLoss` (mean); it has no residual coordinate where the error is clipped."""
    return Loss(
        f"huber(mean, delta={delta:g})",
        "other",
        lambda f, y: F.huber_loss(f, _same(y, f), delta=delta),
        {"delta": delta},
    )


def recognised(loss: Any) -> Loss:
    """Return the Loss behind a name, a torch loss module or function, or any callable (outputs, targets) → scalar.

    Raises:
        InputError: an unknown name or something that cannot be called.
    """
    if isinstance(loss, Loss):
        return loss
    names: dict[Any, Callable[[], Loss]] = {
        "mse": mse,
        "cross_entropy": cross_entropy,
        "bce_with_logits": bce_with_logits,
        "huber": huber,
        "token_cross_entropy": token_cross_entropy,
        F.mse_loss: mse,
        F.cross_entropy: cross_entropy,
        F.nll_loss: cross_entropy,
        F.binary_cross_entropy_with_logits: bce_with_logits,
        F.huber_loss: huber,
    }
    if isinstance(loss, str) or (isinstance(loss, Hashable) and loss in names):
        if loss not in names:
            raise InputError(f"unknown loss {loss!r}; known names are {[n for n in names if isinstance(n, str)]}")
        return names[loss]()
    if isinstance(loss, type):
        raise InputError(f"loss must be an instance, got the class {loss.__name__}; pass {loss.__name__}()")
    if isinstance(loss, nn.Module) and (known := _module_loss(loss)):
        return known
    if callable(loss):
        return Loss(getattr(loss, "__name__", type(loss).__name__), "other", loss)
    raise InputError(f"loss must be a name, a torch loss or a callable(outputs, targets), got {type(loss).__name__}")


def token_cross_entropy(reduction: str = "mean", *, shift: bool = False, label_smoothing: float = 0.0) -> Loss:
    """Return cross-entropy over the tokens of sequences: outputs (N, T, V), targets (N, T), -100 ignored.

    Args:
        reduction: "mean" over all tokens that are not ignored, "sum".
        shift: token t predicts target t + 1, as causal language models do inside.
        label_smoothing: as torch defines it.
    """

    def function(f: Tensor, y: Tensor) -> Tensor:
        if f.dim() != 3 or y.is_floating_point() or y.shape != f.shape[:2]:
            raise ValueError("tokens need outputs (N, T, V) and integer targets (N, T)")
        logits, labels = (f[:, :-1], y[:, 1:]) if shift else (f, y)
        labels = labels.flatten().long()
        total = F.cross_entropy(
            logits.flatten(0, 1), labels, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing
        )
        # Sequences without a token to predict have no loss; torch's mean over none would be 0/0.
        return total if reduction == "sum" else total / (labels != IGNORED).sum().clamp_min(1)

    shown = [reduction, *(["shifted"] if shift else [])]
    shown += [f"label_smoothing={label_smoothing:g}"] if label_smoothing else []
    options = {"reduction": reduction, "shift": shift, "label_smoothing": label_smoothing}
    return Loss(f"token_cross_entropy({', '.join(shown)})", "other", function, options)


def _module_loss(loss: nn.Module) -> Loss | None:
    reduction = getattr(loss, "reduction", "mean")
    if reduction == "none":
        return None
    if type(loss) is nn.MSELoss:
        return mse(reduction)
    if type(loss) is nn.CrossEntropyLoss:
        return cross_entropy(
            reduction, weight=loss.weight, label_smoothing=loss.label_smoothing, ignore_index=loss.ignore_index
        )
    if type(loss) is nn.NLLLoss:
        return cross_entropy(reduction, weight=loss.weight, ignore_index=loss.ignore_index)
    if type(loss) is nn.BCEWithLogitsLoss and loss.weight is None:
        return bce_with_logits(reduction, pos_weight=loss.pos_weight)
    if type(loss) is nn.HuberLoss and reduction == "mean":
        return huber(loss.delta)
    return None


def _same_loss(a: Loss, b: Loss) -> bool:
    """True for losses that differ in no option, class weights included."""
    pairs = [(value, b.options.get(name)) for name, value in a.options.items()]
    return a.name == b.name and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y for x, y in pairs
    )


def candidates(module: nn.Module) -> list[Loss]:
    """Return the losses a training step may have used: those attached to the module first, then the usual ones."""
    attached: list[Loss] = []
    for child in module.modules():
        if (known := _module_loss(child)) and not any(_same_loss(known, other) for other in attached):
            attached.append(known)
    usual = [
        cross_entropy(),
        *(cross_entropy(label_smoothing=eps) for eps in (0.05, 0.1, 0.2)),
        cross_entropy("sum"),
        bce_with_logits(),
        bce_with_logits("sum"),
        mse(),
        mse("sum"),
        huber(),
        token_cross_entropy(),
        token_cross_entropy(shift=True),
    ]
    names = {loss.name for loss in attached}
    return attached + [loss for loss in usual if loss.name not in names]


def from_name(name: str) -> Loss | None:
    """Return the Loss of which this is the name, such as "cross_entropy(mean, label_smoothing=0.1)".

    None where a name does not say all: class weights, or a callable.
    """
    found = re.fullmatch(
        r"(mse|cross_entropy|bce_with_logits|huber|token_cross_entropy)\((mean|sum)((?:, (?:\w+=[^,]+|shifted))*)\)",
        name,
    )
    if found is None:
        return None
    kind, reduction, rest = found.groups()
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(", ")):
        key, _, value = ("shift", "=", "True") if part == "shifted" else part.partition("=")
        options[key] = value == "True" if value in ("True", "False") else float(value)
    makers: dict[str, Callable[..., Loss]] = {
        "mse": mse,
        "cross_entropy": cross_entropy,
        "bce_with_logits": bce_with_logits,
        "token_cross_entropy": token_cross_entropy,
    }
    try:
        made = huber(**options) if kind == "huber" else makers[kind](reduction, **options)
    except TypeError:  # an option of another loss
        return None
    return made if made.name == name else None
