"""What stands behind a click: the probe samples that load on a mode, and one sample by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ntk_monitor.dashboard.pictures import data_url
from ntk_monitor.dashboard.store import nearest
from ntk_monitor.errors import InputError
from ntk_monitor.history import History
from ntk_monitor.snapshot import Snapshot

SHOWN = 8
"""Samples on either side of a mode."""


def mode(history: History, step: int | None, rank: int) -> dict[str, Any]:
    """Return the samples that load most on a mode, the strongest first, where it was stored nearest to a step.

    Positive loadings are samples whose residual goes along with the residual's part in this mode; negative ones go
    against it. Loadings are relative to a pattern of length one over all samples.

    Raises:
        InputError: no patterns of modes were stored, or not of this one.
    """
    stored = [s for s in history.measured if s.mode_samples.size]
    if not stored:
        raise InputError("which samples load on a mode was not stored in this run; record it again to see them")
    snapshot = stored[nearest([s.step for s in stored], step)]
    patterns = snapshot.mode_samples
    if rank > len(patterns):
        raise InputError(f"samples of the first {len(patterns)} modes are stored, got mode {rank}; choose one of them")
    loadings = patterns[rank - 1]
    order = np.argsort(-loadings, kind="stable")
    outputs = snapshot.mode_outputs
    described = _described(history, snapshot)

    def loaded(i: int) -> dict[str, Any]:
        return described(i) | {"loading": float(loadings[i])}

    return {
        "mode": rank,
        "step": snapshot.step,
        "outputs": outputs[rank - 1].tolist() if rank <= len(outputs) else [],
        "positive": [loaded(int(i)) for i in order[:SHOWN] if loadings[i] > 0],
        "negative": [loaded(int(i)) for i in order[::-1][:SHOWN] if loadings[i] < 0],
    }


def sample(history: History, index: int) -> dict[str, Any]:
    """Return one sample of the last probe: its class, its text and its picture, each null where there is none.

    Raises:
        InputError: the probe has no such sample.
    """
    measured = history.measured
    count = measured[-1].samples if measured else 0
    if index >= count:
        raise InputError(f"the probe has samples 0 to {count - 1}, got {index}; choose one of them")
    return _described(history, measured[-1])(index)


def _described(history: History, snapshot: Snapshot) -> Callable[[int], dict[str, Any]]:
    """Return what tells the words and the picture of a sample of a probe."""
    same = [one for one in history.measured if one.probe == snapshot.probe]
    labels, texts = snapshot.labels, _of_batch(same, snapshot.step, "sample_texts")
    pictures = _of_batch(same, snapshot.step, "thumbnails")
    return lambda i: {
        "sample": i,
        "label": int(labels[i]) if i < len(labels) else None,
        "text": str(texts[i]) if i < len(texts) else None,
        "thumbnail": data_url(pictures[i]) if i < len(pictures) else None,
    }


def _of_batch(same: Sequence[Snapshot], step: int, name: str) -> Any:
    """Return what was stored once for a probe batch: by its last probe up to a step that has it, else by any."""
    stored = [one for one in same if len(getattr(one, name))]
    before = [one for one in stored if one.step <= step]
    return getattr((before[-1:] or stored)[0], name) if stored else ()
