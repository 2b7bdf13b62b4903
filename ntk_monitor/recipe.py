"""Recipe: every option of a monitor, once. The callback, the plain loop and the command line share it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeAlias

from ntk_monitor.errors import InputError

Outputs: TypeAlias = Literal["auto", "full", "trace", "sum", "loss"]

FULL_KERNEL_ROWS = 2048
"""outputs="auto" stores the full kernel up to this many rows N·C; its eigensolve then takes seconds at most."""

FULL_KERNEL_PRODUCTS = 2e11
"""... and up to this many multiply-adds (N·C)² P, some twenty seconds on two CPU cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to measure, how often, and where to write.

    Attributes:
        every_n_steps: cadence in optimizer steps; None: as often as `max_overhead` allows.
        max_overhead: share of wall time after start-up that the monitor may take when `every_n_steps` is None; light
            probes between the full ones included (see `ntk_monitor.schedule`).
        outputs: kernel layout (see `empirical_ntk`); "auto": the full kernel while N·C ≤ 2048, else the kernel of the
            per-sample losses; the latter also where (N·C)² P exceeds 2e11 multiply-adds.
        loss: name, torch loss or callable (outputs, targets) → scalar; None: found by matching the training loss.
        forward: callable (module, inputs) → tensor; None: `module(inputs)`, its `.logits`, or its only floating tensor.
        params: predicate (name, parameter), regular expression or names; None: all with requires_grad.
        reference: training samples that drive forecasts, those of the probe included; fewer where their kernel would
            be too large; 0: no forecasts.
        forecast_every: simulate the rest of the run at every this many probes, the costliest part of a probe; 0: never.
            Forecasts from one probe to the next are made and scored at all of them.
        batch_size: samples whose mean loss one optimizer step follows; None: the trainer's, or unknown.
        total_steps: planned length of the run in optimizer steps; None: the trainer's, or unknown.
        optimizer: which of the trainer's optimizers drives stability and forecasts, and whose steps are counted: its
            place (0 or "0") or the name of its class; None: all of them together.
        directions: named directions of the residual whose learning is followed (see `ntk_monitor.directions`): a
            mapping name → (N, C) array, or None for classes or outputs.
        engine: see `empirical_ntk`.
        memory_limit: bytes for Jacobian blocks; None: half of what is free at the peak of training, at most 1 GiB on a
            CPU.
        gram_every: store and draw the Gram matrix at every this many probes; 0: never.
        verify: prove on the first probe that parameters, buffers, gradients, flags and random states are untouched.
        log_prefix: prefix of every tag.
        log_dir: where to write events; None: into the TensorBoard logger's own file, else the Trainer's log directory.
        device: where to measure; None: where the parameters are.
        seed: of the probe's choice and of random numbers drawn inside the network.
        strict: raise instead of skipping a probe that fails.

    Raises:
        InputError: an option outside its range.
    """

    every_n_steps: int | None = None
    max_overhead: float = 0.02
    outputs: Outputs = "auto"
    loss: Any = None
    forward: Any = None
    params: Any = None
    reference: int = 512
    forecast_every: int = 4
    batch_size: int | None = None
    total_steps: int | None = None
    optimizer: int | str | None = None
    directions: Any = None
    engine: Literal["auto", "structured", "reference", "rows"] = "auto"
    memory_limit: int | None = None
    gram_every: int = 10
    verify: bool = True
    log_prefix: str = "ntk"
    log_dir: str | None = None
    device: str | None = None
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._check_numbers()
        if self.outputs not in ("auto", "full", "trace", "sum", "loss"):
            raise InputError(f"outputs must be auto, full, trace, sum or loss, got {self.outputs!r}")
        if self.engine not in ("auto", "structured", "reference", "rows"):
            raise InputError(f"engine must be auto, structured, reference or rows, got {self.engine!r}")
        if self.forward is not None and not callable(self.forward):
            raise InputError(f"forward must be callable(module, inputs), got {type(self.forward).__name__}")
        if self.directions is not None and not isinstance(self.directions, Mapping):
            raise InputError(f"directions must map names to arrays (N, C), got {type(self.directions).__name__}")
        if not self.log_prefix or self.log_prefix != self.log_prefix.strip("/ "):
            raise InputError(f"log_prefix must be a non-empty tag without outer slashes, got {self.log_prefix!r}")

    def _check_numbers(self) -> None:
        if not 0 < self.max_overhead <= 1:
            raise InputError(f"max_overhead must be a fraction in (0, 1], got {self.max_overhead!r}")
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise InputError(f"memory_limit must be positive bytes or None, got {self.memory_limit!r}")
        for name, zero in (("reference", "no forecasts"), ("forecast_every", "never"), ("gram_every", "never")):
            if (count := getattr(self, name)) < 0:
                raise InputError(f"{name} must be 0 ({zero}) or positive, got {count!r}")
        for name in ("every_n_steps", "batch_size", "total_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise InputError(f"{name} must be at least 1 or None, got {value!r}")

    def _check_types(self) -> None:
        wanted: dict[str, tuple[Any, ...]] = {
            "every_n_steps": (int, type(None)),
            "max_overhead": (int, float),
            "memory_limit": (int, type(None)),
            "gram_every": (int,),
            "reference": (int,),
            "forecast_every": (int,),
            "batch_size": (int, type(None)),
            "total_steps": (int, type(None)),
            "optimizer": (int, str, type(None)),
            "seed": (int,),
            "log_prefix": (str,),
            "log_dir": (str, PathLike, type(None)),
        }
        for name, kinds in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise InputError(f"{name} must be {names}, got {value!r}")
        if isinstance(self.params, str):
            try:
                re.compile(self.params)
            except re.error as error:
                raise InputError(f"params must be a valid regular expression, got {self.params!r}: {error}") from None
        elif not (self.params is None or callable(self.params) or isinstance(self.params, (list, tuple, set))):
            raise InputError(f"params must be a predicate, a regular expression or names, got {self.params!r}")

    def layout(self, samples: int, outputs: int, parameters: int) -> Literal["full", "trace", "sum", "loss"]:
        """Return the kernel layout for N samples of C outputs and P parameters."""
        if self.outputs != "auto":
            return self.outputs
        rows = samples * outputs
        return "full" if rows <= FULL_KERNEL_ROWS and rows**2 * parameters <= FULL_KERNEL_PRODUCTS else "loss"
