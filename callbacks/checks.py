"""What a monitor refuses at its door, before a run has begun."""

from typing import Any

import torch

from ntk_monitor.batch import tensors
from ntk_monitor.errors import InputError
from ntk_monitor.probe import Probe, dataset_of, default_samples


def checked_probe(probe: Any, seed: int) -> Any:
    """Refuse at once what can never be a probe; keep what needs the Trainer for later."""
    if isinstance(probe, bool) or (isinstance(probe, int) and probe < 1):
        raise InputError(f"probe must hold at least 1 sample, got {probe!r}")
    needs_trainer = probe is None or isinstance(probe, int) or dataset_of(probe) is not None
    return probe if needs_trainer else Probe.of(probe, default_samples(1), seed)


def check_device(device: str | None) -> None:
    """Refuse a device that torch does not know or does not see here.

    Raises:
        InputError: with the name of the device.
    """
    try:
        kind = torch.device(device).type if device is not None else "cpu"
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be a torch device such as cpu or cuda:0, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA here; leave device=None")


def probe_bytes(probe: Probe) -> int:
    """Return what a probe takes in memory, or in a checkpoint."""
    return sum(t.numel() * t.element_size() for t in [*tensors(probe.inputs), *tensors(probe.targets)])
