"""Manifest: how a monitor measures its probe, in the words that are stored beside the run."""

import os
from pathlib import Path
from typing import Any

from ntk_monitor.monitor import Monitor
from ntk_monitor.network import Network
from ntk_monitor.probe_files import Manifest, save
from ntk_monitor.shadow import unwrapped
from ntk_monitor.snapshot import Snapshot


def manifest(monitor: Monitor, snapshot: Snapshot) -> Manifest:
    """Return how this snapshot was measured: what a later analysis has to repeat. Costs no forward pass.

    Args:
        monitor: that measured.
        snapshot: its first one, which tells the layout, the engine and the loss.

    Raises:
        NetworkError: a module whose parameters cannot be followed.
    """
    recipe = monitor.recipe
    return Manifest(
        parameters=tuple(Network(monitor.model, params=recipe.params).parameters),
        model=_name(type(unwrapped(monitor.model))),
        forward="" if recipe.forward is None else _name(recipe.forward),
        mode=snapshot.mode,
        precision=snapshot.precision,
        layout=snapshot.kernel,
        outputs=snapshot.outputs,
        engine=snapshot.engine,
        loss=snapshot.loss or (monitor.loss.name if monitor.loss is not None else ""),
        seed=recipe.seed,
        prefix=recipe.log_prefix,
    )


def keep_probe(monitor: Monitor, snapshot: Snapshot, directory: str | os.PathLike[str]) -> Path:
    """Store a monitor's samples and how it measures them in the directory of a run, and return the JSON file's path.

    The callbacks do this by themselves; a plain loop calls it after its first snapshot. `ntk_monitor.probe_files.load`
    reads the samples.

    Raises:
        OSError: the disk is full, or the directory cannot be written.
    """
    return save(monitor.probe, directory, monitor.recipe.log_prefix, manifest=manifest(monitor, snapshot))


def _name(thing: Any) -> str:
    """Return module and name of a class or function; of a partial or an object, those of its class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
