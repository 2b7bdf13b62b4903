"""Plain facts about a probe that explain what a kernel shows: scales of data and outputs, duplicates, what trains.

Keys and units are those of `ntk_monitor.snapshot.FACTS`. What does not apply to a probe is left out.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor.batch import digest, take, tensors
from ntk_monitor.probe import Probe
from ntk_monitor.shadow import unwrapped

Array = NDArray[np.float64]

# A feature whose spread is this small next to the largest one's is a constant up to rounding.
_CONSTANT = 1e-12

# Outputs of more numbers than this stay out of the record: 256 kB at each probe.
_KEPT = 2**16

# What is not finite is left out in the end.
_QUIET = np.errstate(invalid="ignore", over="ignore")


@_QUIET
def of_data(probe: Probe) -> dict[str, float]:
    """Return scales of floating inputs and targets, and how many samples occur twice. They do not change in a run."""
    found: dict[str, float] = {}
    columns = [_table(t) for t in tensors(probe.inputs) if t.dim() > 0 and t.is_floating_point()]
    if columns:
        found |= _of_inputs(np.concatenate(columns, axis=1))
    found |= _duplicates(probe)
    if isinstance(probe.targets, Tensor) and probe.targets.is_floating_point() and probe.labels is None:
        found |= _of_targets(_table(probe.targets))
    return {name: value for name, value in found.items() if np.isfinite(value)}


def kept_outputs(predictions: Array) -> Array:
    """Return the outputs (N, C) that a record keeps: all, or none where they are images or logits of whole texts."""
    return predictions if predictions.size <= _KEPT else np.empty(0)


@_QUIET
def of_outputs(predictions: Array, labels: NDArray[np.int64] | None) -> dict[str, float]:
    """Return scale and spread of outputs (N, C), and the accuracy where labels (N,) are classes of as many outputs."""
    rms = float(np.sqrt((predictions**2).mean()))
    found = {"output_rms": rms}
    if len(predictions) > 1 and rms > 0:
        found["output_spread"] = float(np.sqrt(predictions.var(axis=0).mean())) / rms
    if labels is not None and predictions.shape[1] > max(1, int(labels.max(initial=0))):
        found["accuracy"] = float((predictions.argmax(axis=1) == labels).mean())
    return {name: value for name, value in found.items() if np.isfinite(value)}


def of_parameters(module: nn.Module, uncovered: Iterable[str]) -> dict[str, float]:
    """Return how many parameters are frozen, and how many trainable ones no optimizer updates."""
    named = dict(unwrapped(module).named_parameters())
    frozen = sum(p.numel() for p in named.values() if not p.requires_grad)
    return {"frozen": float(frozen), "uncovered": float(sum(named[name].numel() for name in uncovered))}


def norms(module: nn.Module, group: Callable[[str], str]) -> dict[str, float]:
    """Return the norm of the trainable parameters of each layer, by its name."""
    squares: dict[str, float] = {}
    for name, p in unwrapped(module).named_parameters():
        if p.requires_grad:
            square = float(p.detach().abs().double().square().sum())
            squares[group(name)] = squares.get(group(name), 0.0) + square
    return {layer: square**0.5 for layer, square in squares.items()}


def _table(t: Tensor) -> Array:
    return np.asarray(t.detach().double().cpu().reshape(len(t), -1).numpy())


def _of_inputs(x: Array) -> dict[str, float]:
    centred = x - x.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=1).mean())
    deviations = centred.std(axis=0)
    alive = deviations[deviations > _CONSTANT * deviations.max(initial=0.0)]
    found = {"input_rms": float(np.sqrt((x**2).mean()))}
    if spread > 0:
        found["input_offset"] = float(np.linalg.norm(x.mean(axis=0)) / spread)
    if alive.size:
        # Percentiles: a pixel that is lit once in the probe says nothing about the scale of features.
        low, high = np.percentile(alive, [10, 90])
        found["input_range"] = float(high / low)
    return found


def _of_targets(y: Array) -> dict[str, float]:
    deviation = float(np.sqrt(y.var(axis=0).mean()))
    found = {"target_rms": float(np.sqrt((y**2).mean()))}
    if deviation > 0:
        found["target_offset"] = float(np.abs(y.mean(axis=0)).mean()) / deviation
    return found


def _duplicates(probe: Probe) -> dict[str, float]:
    inputs = [digest(take(probe.inputs, [n])) for n in range(probe.samples)]
    counts = Counter(inputs)
    found = {"duplicates": float(sum(count for count in counts.values() if count > 1))}
    targets: Any = probe.targets
    if found["duplicates"] and isinstance(targets, Tensor):
        pairs = {(i, digest(targets[n : n + 1])) for n, i in enumerate(inputs)}
        found["duplicate_labels"] = float(len(pairs) - len(counts))
    return found
