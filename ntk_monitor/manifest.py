"""Manifest: how a monitor measures its probe, in the words that are stored beside the run."""

from typing import Any

from ntk_monitor.monitor import Monitor
from ntk_monitor.network import Network
from ntk_monitor.probe_files import Manifest
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


def _name(thing: Any) -> str:
    """Return module and name of a class or function; of a partial or an object, those of its class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
