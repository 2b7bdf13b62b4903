"""Checkpoints: found on disk and put in order of step.

Kinds: "lightning" (.ckpt), "weights" (.pt, .pth, .bin: a state dict, plain or inside a dict), "safetensors",
"huggingface" (a Trainer's checkpoint directory), "sharded" (torch.distributed.checkpoint, FSDP, ModelParallelStrategy).
`ntk_monitor.reading` reads them.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk_monitor.errors import CheckpointError

State = Mapping[str, Tensor]

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
# Files of a Hugging Face or a sharded directory that are no checkpoints of their own, and our own probe.
_PARTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state.*|training_args|meta)\.(pt|pth|bin)$|.*_probe.*\.safetensors$"
)
LIVE = "live"
"""Name of the weights that training itself moves, beside averages of them."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read.

    Attributes:
        path: file or directory.
        kind: see the module.
        step: optimizer steps taken; None: not recorded anywhere.
        epoch: None: not recorded.
        states: state dicts by name, "live" first; averages beside it ("average").
        optimizers: state dicts of the optimizers; empty: none were saved.
        schedulers: state dicts of the learning-rate schedulers.
        hyper_parameters: of the constructor, as Lightning saves them.
        total_steps: planned length of the run in optimizer steps; None: not recorded.
        notes: what is missing or was found in an unusual place, one sentence each.
        known: the digest, where the tensors themselves are gone.
    """

    path: Path
    kind: str
    step: int | None
    epoch: int | None
    states: Mapping[str, State]
    optimizers: tuple[Mapping[str, Any], ...] = ()
    schedulers: tuple[Mapping[str, Any], ...] = ()
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    notes: tuple[str, ...] = ()
    known: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the live weights: names, dtypes, shapes and bits, whatever file they came in."""
        return self.known or digest(self.states[LIVE])

    def light(self, state: State) -> "Checkpoint":
        """Return this checkpoint with one of its states only, as tensors without data, and empty optimizers."""
        blank = {name: value.to("meta") for name, value in state.items()}
        bare: tuple[Mapping[str, Any], ...] = ({},) * len(self.optimizers)
        return Checkpoint(self.path, self.kind, self.step, self.epoch, {LIVE: blank}, bare, known=digest(state))


def find(paths: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    """Return every checkpoint at or below these paths, each once, in the order of the paths, then of their names.

    A safetensors file stands for a pickle of the same name beside it. Cost: a walk through the directories; no
    checkpoint is opened.

    Raises:
        CheckpointError: a path that does not exist, or nothing in it that looks like a checkpoint.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise CheckpointError(f"wanted a checkpoint or a directory of them, got {path}, which does not exist")
        here = list(_below(path))
        if not here:
            raise CheckpointError(
                f"no checkpoint found in {path}: wanted {', '.join(_PICKLED)}, .safetensors, a directory with "
                "config.json and weights, or one with .metadata"
            )
        found += here
    unique = {path.resolve(): path for path in found}
    return tuple(unique.values())


def _below(path: Path) -> Iterator[Path]:
    if path.is_file() or directory_kind(path):
        yield path
        return
    entries = sorted(path.iterdir(), key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    for entry in entries:
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _below(entry)
        elif _is_checkpoint(entry) and not (entry.suffix in _PICKLED and f"{entry.stem}.safetensors" in names):
            yield entry


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in (*_PICKLED, ".safetensors") and not is_part(path)


def directory_kind(path: Path) -> str:
    """Return "sharded" or "huggingface" for a directory that is one checkpoint, else ""."""
    if not path.is_dir():
        return ""
    if (path / ".metadata").is_file():
        return "sharded"
    weights = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    return "huggingface" if (path / "config.json").is_file() and weights else ""


def is_part(path: Path) -> bool:
    """True for files that belong to a checkpoint, or to us, and hold no weights of their own."""
    return bool(_PARTS.fullmatch(path.name))


def ordered(checkpoints: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """Return checkpoints by step, each state of the network once, and sentences about what was left out.

    Copies (`last.ckpt`) have the same step and the same weights; the first of them stays, or one with optimizers. Two
    different networks at one step are kept apart by a sentence only: the later file wins, as a resumed run replaces
    what it repeats. Without any recorded step they go by the time they were written.

    Raises:
        CheckpointError: some have a step and some have none.
    """
    without = [c for c in checkpoints if c.step is None]
    if without and len(without) < len(checkpoints):
        raise CheckpointError(
            f"{without[0].path} does not say at which step it was saved, others do; leave it out, or put the number "
            "into its name (step=100.pt)"
        )
    if without:
        by_age = sorted(checkpoints, key=lambda c: (_written(c.path), str(c.path)))
        note = ("no checkpoint says at which step it was saved: they are numbered in the order they were written",)
        return tuple(_numbered(c, k) for k, c in enumerate(by_age)), note if len(by_age) > 1 else ()
    kept: dict[int, Checkpoint] = {}
    notes = []
    for one in sorted(checkpoints, key=lambda c: (c.step or 0, _written(c.path), str(c.path))):
        step = one.step or 0
        other = kept.get(step)
        if other is None:
            kept[step] = one
        elif other.digest == one.digest:
            notes.append(f"{one.path.name} holds the same weights as {other.path.name}")
            if len(one.optimizers) > len(other.optimizers):
                kept[step] = one
        else:
            notes.append(f"{one.path} and {other.path} are different networks at step {step}: the newer one is used")
            kept[step] = one
    return tuple(kept[step] for step in sorted(kept)), tuple(notes)


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _numbered(checkpoint: Checkpoint, step: int) -> Checkpoint:
    return replace(checkpoint, step=step)


def digest(state: State) -> str:
    """Return the SHA-256 of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()
