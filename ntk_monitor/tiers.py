"""The light tier: what a few passes over the probe keep fresh between two full probes.

A full probe measures the whole kernel and everything that follows from it. A light one costs about twenty passes:

| what | passes | how it compares |
|---|---|---|
| loss, and the residual in the modes of the last full probe | 1 | its energies with that probe's own |
| stability gauge, from the last top eigenvector | 10 | a lower bound of sharpness; noise and bias carried along |
| linearisation error since the last full probe | 7 | what the tangent there misses by now |

It holds no kernel, spectrum, layers or forecasts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ntk_monitor.batch import take
from ntk_monitor.dynamics.kept import change
from ntk_monitor.dynamics.refreshed import refreshed
from ntk_monitor.dynamics.stability import Stability
from ntk_monitor.dynamics.verdict import SMALL_MOTION, linearisation
from ntk_monitor.errors import said
from ntk_monitor.look import Outlook, Since
from ntk_monitor.losses import Loss
from ntk_monitor.memory import out_of_memory, release
from ntk_monitor.optimizers import OptimizerState, read
from ntk_monitor.probe import Probe
from ntk_monitor.recipe import Recipe
from ntk_monitor.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The run as the monitor knows it at a light probe."""

    loss: Loss | None
    optimizers: Sequence[Optimizer]
    others: Sequence[Optimizer] = ()
    batch_size: int | None = None
    population: int | None = None


def glance(
    model: nn.Module, recipe: Recipe, probe: Probe, since: Since, now: Moment
) -> tuple[Outlook, Stability | None]:
    """Return gauge and linearisation error, and the refreshed gauge for the next probe; None where there is none.

    A part that cannot be measured leaves a sentence in `texts`.
    """
    found, gauge = Outlook(), list[Stability]()
    if now.batch_size is not None:
        found.facts["batch_size"] = float(now.batch_size)
    _part(found, recipe, "stability", lambda: gauge.extend(_gauge(model, recipe, probe, since, now, found)))
    _part(found, recipe, "updates", lambda: _tangent(model, recipe, probe, since, found))
    return found, gauge[0] if gauge else None


def light_record(step: int, epoch: int | None, probe: Probe, loss: Loss | None, seen: Outlook) -> Snapshot:
    """Return the record of a light probe, with the numbers of `seen` that are finite."""
    return Snapshot(
        step=step,
        epoch=epoch,
        wall_time=time.time(),
        status="light",
        samples=probe.samples,
        probe=probe.hash,
        probe_source=probe.source,
        loss=loss.name if loss else "",
        metrics={name: value for name, value in seen.metrics.items() if math.isfinite(value)},
        facts={name: value for name, value in seen.facts.items() if math.isfinite(value)},
        texts=seen.texts,
        seconds=seen.seconds,
    )


def _part(found: Outlook, recipe: Recipe, part: str, measure: Callable[[], None]) -> None:
    start, full = time.perf_counter(), False
    try:
        measure()
    except Exception as error:
        if recipe.strict:
            raise
        found.texts[part] = f"not measured: {said(error)}"
        full = out_of_memory(error)
    if full:
        release()
    found.seconds["gauge" if part == "stability" else part] = time.perf_counter() - start


def _gauge(
    model: nn.Module, recipe: Recipe, probe: Probe, since: Since, now: Moment, found: Outlook
) -> Sequence[Stability]:
    if now.loss is None or probe.targets is None or not now.optimizers:
        found.texts["stability"] = "not measured: it takes a known loss, targets and an optimizer"
        return ()
    state: OptimizerState = read(model, now.optimizers, others=now.others)
    found.texts["optimizer"] = state.name
    found.facts["lr"] = max((group.lr for group in state.groups), default=0.0)
    if since.gauge is None or since.gauge.vector is None:
        found.texts["stability"] = "not measured: the last full probe has no gauge to go on from"
        return ()
    options: dict[str, Any] = {"params": recipe.params, "forward": recipe.forward, "seed": recipe.seed}
    judged = refreshed(
        model,
        state,
        take((probe.inputs, probe.targets), slice(0, since.gauge.samples)),
        now.loss,
        since.gauge,
        rates=since.rates,
        batch_size=now.batch_size,
        population=now.population,
        clipped=since.clipped,
        **options,
    )
    return (judged,) if found.judge(judged) else ()


def _tangent(model: nn.Module, recipe: Recipe, probe: Probe, since: Since, found: Outlook) -> None:
    if since.kept is None:
        found.texts["updates"] = "not measured: the last full probe kept no weights to compare with"
        return
    options: dict[str, Any] = {"forward": recipe.forward, "device": recipe.device, "seed": recipe.seed}
    moved = change(model, since.kept, probe.inputs, **options)
    judged = linearisation(moved)
    found.facts["buffers_change"] = judged.buffers
    # Where the outputs hardly moved, an error relative to that motion is noise.
    if judged.motion > SMALL_MOTION * since.residual:
        found.metrics["linearisation_error"] = judged.error


def skipped_record(step: int, epoch: int | None, probe: Probe, reason: str) -> Snapshot:
    """Return the record of a probe that failed."""
    return Snapshot(
        step=step,
        epoch=epoch,
        wall_time=time.time(),
        status="skipped",
        reason=reason,
        samples=probe.samples,
        probe=probe.hash,
        probe_source=probe.source,
    )
