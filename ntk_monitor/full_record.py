"""The record of a full probe: what was measured, what was made of it, and what is known around it, in one Snapshot."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ntk_monitor.facts import kept_outputs
from ntk_monitor.look import Measurement, Outlook
from ntk_monitor.modes import Modes
from ntk_monitor.probe import Probe
from ntk_monitor.snapshot import Snapshot


def full_record(
    raw: Measurement, probe: Probe, modes: Modes | None, seen: Outlook, metrics: Mapping[str, float], **more: Any
) -> Snapshot:
    """Return the record.

    Args:
        raw: kernel, spectrum and outputs.
        probe: on which.
        modes: None: there are none.
        seen: whatever else was looked at. Of metrics and facts those that are finite are kept.
        metrics: further ones.
        more: the other fields of the Snapshot.
    """
    return Snapshot(
        step=raw.step,
        epoch=raw.epoch,
        wall_time=raw.wall_time,
        kernel=raw.layout,
        engine=raw.kernel.engine,
        engine_reason=raw.kernel.reason,
        precision=f"{str(raw.kernel.jacobian_dtype).removeprefix('torch.')} Jacobian, float64 Gram",
        samples=probe.samples,
        outputs=raw.predictions[0].numel(),
        parameters=raw.kernel.parameters,
        probe=probe.hash,
        probe_source=probe.source,
        noise_floor=raw.spectrum.noise_floor,
        rank=raw.spectrum.rank,
        condition_number=raw.spectrum.condition_number,
        condition_is_lower_bound=raw.spectrum.condition_is_lower_bound,
        negative=raw.spectrum.negative,
        rates_floor=modes.floor if modes else float("nan"),
        metrics=_finite({**metrics, **seen.metrics}),
        facts=_finite(raw.coverage.facts() | seen.facts),
        texts=raw.coverage.texts() | seen.texts,
        layers=seen.layers,
        directions=seen.directions,
        sample_texts=seen.sample_texts,
        eigenvalues=raw.spectrum.eigenvalues,
        rates=modes.rates if modes else np.empty(0),
        coordinates=modes.coordinates if modes else np.empty(0),
        predictions=kept_outputs(raw.predictions.reshape(probe.samples, -1).numpy()),
        **seen.arrays,
        **more,
    )


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if np.isfinite(value)}
