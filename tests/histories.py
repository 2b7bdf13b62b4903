"""Histories of runs as rules read them: a healthy one, and edits that make one thing wrong.

The healthy run has 12 probes, 25 steps apart, of a network with four layers and three outputs: the loss falls from 1.1
to 0.05, the learning rate has room of 3 to 40, everything a rule needs is recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ntk_monitor.bands import REACH, reach
from ntk_monitor.snapshot import Snapshot

PROBES, EVERY, SAMPLES, OUTPUTS = 12, 25, 64, 3
LAYERS = ("body.0", "body.2", "body.4", "head")
TASKS = ("rain", "wind")

Values = float | Sequence[float]
"""One number for every probe, or one each; NaN leaves it out."""


def _at(values: Values, probe: int) -> float:
    return float(values[probe]) if isinstance(values, Sequence) else float(values)


CLASSES = np.arange(SAMPLES) % OUTPUTS
MODES = 10


def _loss(k: int) -> float:
    return 0.05 + 1.05 * 0.7**k


def _coordinates(k: int) -> Any:
    """Residual of probe k: its energy is the loss."""
    shape = 0.7 ** np.arange(MODES)
    return np.sqrt(_loss(k)) * shape / np.linalg.norm(shape)


def _patterns(k: int) -> Any:
    """Orthonormal patterns over samples that turn slowly, (modes, samples); the first two tell classes apart."""
    generator = np.random.default_rng(1)
    classes = np.eye(OUTPUTS)[CLASSES] - 1 / OUTPUTS
    start = np.concatenate([classes[:, :2], generator.normal(size=(SAMPLES, MODES - 2))], axis=1)
    turned = start + 0.05 * k * np.random.default_rng(2).normal(size=start.shape)
    return np.linalg.qr(turned)[0].T


def _gram(k: int) -> Any:
    """Kernel of the samples sorted by class; classes part more and more."""
    generator = np.random.default_rng(3)
    features = generator.normal(size=(SAMPLES, 12))
    features[:, :OUTPUTS] += (0.5 + 0.3 * k) * np.eye(OUTPUTS)[np.sort(CLASSES)]
    return (1 + 0.1 * k) * features @ features.T


def _thumbnails() -> Any:
    """Pictures of 8 x 8 whose bright row says the class."""
    pictures = np.random.default_rng(4).integers(0, 90, size=(SAMPLES, 8, 8, 1))
    for picture, label in zip(pictures, CLASSES, strict=True):
        picture[2 * label + 1] = 255
    return pictures.astype(np.uint8)


def _ahead(k: int) -> dict[str, Any]:
    """Forecast from probe k to the end of the run: arrays and the steps they are for."""
    ticks = np.unique(np.geomspace(1, EVERY * (PROBES - k), 20).round().astype(np.int64))
    times = 8.0 * 1.4 ** np.arange(MODES)
    energy = _coordinates(k) ** 2 * 0.1 ** (ticks[:, None] / times)
    masks = reach(0.5 ** np.arange(MODES), 0.0, times, float(EVERY * (PROBES - k)))
    left = 0.95 ** ticks[:, None]
    return {
        "time_to_learn": times,
        "forecast_steps": k * EVERY + ticks,
        "forecast_loss": 0.04 + (_loss(k) - 0.04) * 0.985**ticks,
        "forecast_bands": np.stack([energy[:, masks[name]].sum(axis=1) for name in REACH], axis=1),
        "launched_bands": np.stack([1.1 * (_coordinates(k) ** 2)[masks[name]].sum() for name in REACH])
        if k
        else np.empty(0),
        "forecast_directions": np.sqrt(_loss(k)) * left * np.array([1.0, 0.9, 0.8]),
        "direction_eta": np.array([40.0, 60.0, np.inf]),
    }


def _probe(k: int) -> Snapshot:
    """Return probe k of the healthy run."""
    generator = np.random.default_rng(k)
    step, loss = k * EVERY, _loss(k)
    modes = MODES
    coordinates, patterns = _coordinates(k), _patterns(k)
    weights = generator.normal(size=(OUTPUTS, OUTPUTS))
    share = generator.random(SAMPLES)
    return Snapshot(
        step=step,
        wall_time=1.7e9 + step,
        kernel="full",
        samples=SAMPLES,
        outputs=OUTPUTS,
        parameters=5000,
        probe="c0ffee",
        noise_floor=1e-12,
        rank=modes,
        loss="cross_entropy(mean)",
        loss_status="matched",
        loss_value=loss,
        layers=LAYERS,
        directions=("class 0", "class 1", "class 2"),
        metrics={
            "lr_headroom_low": 3.0 + k / 4,
            "lr_headroom_high": 8.0 + 3 * k,
            "trace": 900.0 + 40 * k,
            "effective_rank": 20.0 - k,
            "alignment": 0.15 + 0.05 * k,
            "kernel_change": 0.2 * 0.85**k,
            "linearisation_error": 0.2,
            "residual_out_of_reach": 0.05 * k,
        },
        facts={
            "launch_step": float(step - EVERY) if k else np.nan,
            "lr": 0.05 * (1 + np.cos(np.pi * k / PROBES)),
            "batch_size": 32,
            "total_steps": EVERY * PROBES,
            "sharpness_bias": 0.1,
            "train_loss": 1.1 * loss if k else np.nan,
            "forecast_error": 0.2,
            "explained_error": 0.1,
            "label_energy": 0.5,
            "label_energy_chance": 0.1,
            "k90": 20,
            "sample_loo": 0.6,
            "target_rms": 1.0,
            "target_offset": 0.1,
            "output_rms": 0.3 + 0.2 * k,
            "output_spread": 0.8,
            "input_rms": 0.6,
            "input_offset": 1.2,
            "input_range": 40.0,
            "duplicates": 0,
            "outlier": 4.0,
            "uncovered": 0,
            "frozen": 0,
            "accuracy": min(0.99, 0.3 + 0.1 * k),
        },
        texts={"optimizer": "SGD", "scale_free": "body.0, body.2"},
        eigenvalues=100.0 * 0.5 ** np.arange(modes),
        rates=0.5 ** np.arange(modes),
        rates_floor=1e-12,
        coordinates=coordinates,
        carried=1.05 * coordinates if k else np.empty(0),
        previous_step=step - EVERY if k else None,
        layer_trace=np.array([0.1, 0.3, 0.4, 0.2]) * (900 + 40 * k),
        layer_share=np.array([0.2, 0.3, 0.3, 0.2]),
        layer_update=np.array([0.1, 0.3, 0.3, 0.3]),
        layer_useful=np.array([0.3, 0.5, 0.6, 0.8]),
        layer_moved=np.array([0.1, 0.2, 0.2, 0.5]) * k / PROBES,
        layer_norm=np.array([4.0, 5.0, 5.0, 2.0]) * (1 + 0.02 * k),
        direction_residual=np.full(3, np.sqrt(loss)),
        direction_rate=np.array([0.4, 0.3, 0.1]),
        interference=np.eye(3) - 0.45 * (1 - np.eye(3)),
        predictions=generator.normal(size=(SAMPLES, OUTPUTS)),
        labels=CLASSES.astype(np.int64),
        lr_steps=np.arange(max(0, step - EVERY + 1), step + 1),
        lr_values=0.05
        * (1 + np.cos(np.pi * np.arange(max(0, step - EVERY + 1), step + 1) / (EVERY * PROBES)))[:, None],
        gram=_gram(k) if k % 3 == 0 else np.empty(0),
        mode_samples=patterns,
        mode_outputs=np.linalg.qr(weights)[0][np.arange(MODES) % OUTPUTS],
        sample_residual=np.sqrt(loss * share / share.sum()),
        thumbnails=_thumbnails() if k == 0 else np.empty(0),
        sample_texts=tuple(f"sample {i} of class {CLASSES[i]}" for i in range(SAMPLES)) if k == 0 else (),
        **_ahead(k),
    )


HEALTHY: tuple[Snapshot, ...] = tuple(_probe(k) for k in range(PROBES))

Edit = Callable[[Sequence[Snapshot]], Sequence[Snapshot]]


def edit(
    *,
    facts: Mapping[str, Values] | None = None,
    metrics: Mapping[str, Values] | None = None,
    loss: Values | str | None = None,
    **fields: Any,
) -> Edit:
    """Return a function that replaces numbers of every probe; a field may be a function of the probe's index.

    `loss` sets the loss on the probe and, a tenth higher, the trainer's; a text sets its name.
    """

    def apply(history: Sequence[Snapshot]) -> Sequence[Snapshot]:
        found = []
        for k, snapshot in enumerate(history):
            more = {name: _at(values, k) for name, values in (facts or {}).items()}
            changed = {name: value(k) if callable(value) else value for name, value in fields.items()}
            if isinstance(loss, str):
                changed["loss"] = loss
            elif loss is not None:
                changed["loss_value"] = _at(loss, k)
                more = {"train_loss": 1.1 * _at(loss, k) if k else np.nan, **more}
            found.append(
                replace(
                    snapshot,
                    facts={**snapshot.facts, **more},
                    metrics={**snapshot.metrics, **{name: _at(v, k) for name, v in (metrics or {}).items()}},
                    **changed,
                )
            )
        return found

    return apply


def facts(**values: Values) -> Edit:
    """Return an edit of `Snapshot.facts`."""
    return edit(facts=values)


def metrics(**values: Values) -> Edit:
    """Return an edit of `Snapshot.metrics`."""
    return edit(metrics=values)


def both(*edits: Edit) -> Edit:
    """Return one edit after the other."""

    def apply(history: Sequence[Snapshot]) -> Sequence[Snapshot]:
        for one in edits:
            history = one(history)
        return history

    return apply


def texts(**words: str) -> Edit:
    """Return an edit of `Snapshot.texts`."""
    return lambda history: [replace(snapshot, texts={**snapshot.texts, **words}) for snapshot in history]


def breaks(probe: int, reason: str) -> Edit:
    """Return an edit that makes every probe from this one on a skipped one."""
    return lambda history: [
        snapshot
        if k < probe
        else Snapshot(step=snapshot.step, wall_time=snapshot.wall_time, status="skipped", reason=reason, probe="c0ffee")
        for k, snapshot in enumerate(history)
    ]


def shortened(probes: int) -> Edit:
    """Return the run as it stands after so many probes."""
    return lambda history: history[:probes]


def plateau(level: float, start: float = 1.1) -> list[float]:
    """Losses that go from start to level at once and stay."""
    return [start] + [level] * (PROBES - 1)


def tasks(cosine: float, left: float = 0.9) -> Edit:
    """Return an edit to two tasks whose gradients have this cosine and whose residuals shrink to `left`."""
    return edit(
        directions=TASKS,
        interference=np.array([[1.0, 2 * cosine], [2 * cosine, 4.0]]),
        direction_residual=lambda k: np.array([1.0, 2.0]) * (1 - (1 - left) * k / (PROBES - 1)),
    )
