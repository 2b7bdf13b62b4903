"""Recorded runs as long as wanted, written without training: what the tab's latency is measured on."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ntk_monitor.events import event
from ntk_monitor.recorder import beginning, encoded
from ntk_monitor.snapshot import Snapshot
from tests.histories import HEALTHY

SAMPLES, OUTPUTS = 64, 10
STARTED = 1.7e9
EVERY, GRAM_EVERY = 25, 10
"""Optimizer steps between probes, and probes between stored Gram matrices (the monitor's default)."""
TICKS = 32
"""Steps of a forecast that are written down."""


def probe(k: int, count: int, modes: int = SAMPLES * OUTPUTS, seed: int = 0) -> Snapshot:
    """Return probe k of a run of `count` probes: a power-law spectrum that sharpens while fast modes are learned."""
    generator = np.random.default_rng([seed, k])
    base = HEALTHY[min(k, len(HEALTHY) - 1)]
    progress, step = k / max(count - 1, 1), k * EVERY
    rates = (1 + progress + 0.1 * seed) * np.arange(1, modes + 1) ** -1.5
    coordinates = np.exp(-rates * k) * generator.normal(1, 0.05, modes) * 0.3
    labels = np.arange(SAMPLES) % OUTPUTS
    same = np.sort(labels)[:, None] == np.sort(labels)[None, :]
    features = generator.normal(size=(SAMPLES, 12))
    ticks = np.unique(np.geomspace(1, max(count * EVERY - step, 2), TICKS).round().astype(np.int64))
    leading = min(16, modes)
    since = np.arange(max(step - EVERY + 1, 0), step + 1)
    return replace(
        base,
        step=step,
        wall_time=STARTED + k,
        epoch=k // 10,
        samples=SAMPLES,
        outputs=OUTPUTS,
        rank=modes,
        previous_step=step - EVERY if k else None,
        loss_value=0.05 + 2.2 * np.exp(-5 * progress),
        facts=base.facts | {"total_steps": count * EVERY},
        eigenvalues=1000 * rates,
        rates=rates,
        coordinates=coordinates,
        carried=coordinates * generator.normal(1, 0.05, modes) if k else np.empty(0),
        time_to_learn=2.3 / rates,
        forecast_steps=step + ticks,
        forecast_loss=0.05 + 2.2 * np.exp(-5 * (step + ticks) / (count * EVERY)),
        forecast_bands=np.exp(-ticks[:, None] / np.array([50.0, 500.0, 5e4, 1e9])) * (1 - 0.9 * progress),
        forecast_directions=np.exp(-ticks[:, None] / 5000) * np.array([1.0, 0.9, 0.8]),
        sample_residual=generator.random(SAMPLES),
        predictions=generator.normal(size=(SAMPLES, OUTPUTS)),
        labels=labels,
        lr_steps=since,
        lr_values=0.05 * (1 + np.cos(np.pi * since / (count * EVERY)))[:, None],
        gram=(50 * progress * same + 10 * features @ features.T) if k % GRAM_EVERY == 0 else np.empty(0),
        mode_samples=generator.normal(size=(leading, SAMPLES)) / SAMPLES**0.5,
        mode_outputs=generator.normal(size=(leading, OUTPUTS)) / OUTPUTS**0.5,
    )


def write(folder: Path, count: int, modes: int = SAMPLES * OUTPUTS, seed: int = 0) -> Path:
    """Write the event file of a run and return its path. Costs 5 s for a thousand probes of 640 modes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{int(STARTED)}.bench.0"
    with path.open("wb") as file:
        file.write(beginning(STARTED))
        for k in range(count):
            file.write(encoded([event(probe(k, count, modes, seed))]))
    return path


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
