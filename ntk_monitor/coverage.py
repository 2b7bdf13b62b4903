"""Coverage: which parameters a kernel holds, and why the others are not in it.

A kernel by plain autograd is exact for the parameters that gradients of the outputs reach. Whether these are all that
training moves is another question, answered here at the first probe: by the graph of the measured forward pass, one
backward pass of a random combination of the outputs, and, only where something is missing, a forward pass that is
watched and one in training mode.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_monitor.batch import Batch, take
from ntk_monitor.errors import NetworkError
from ntk_monitor.guard import undisturbed
from ntk_monitor.network import Network
from ntk_monitor.shadow import unwrapped

_NAMES = 6
"""Parameters that a sentence names before it counts the rest."""

_SAMPLES = 8
"""Of the forward passes that only ask which parameters take part; more than one, for BatchNorm in training mode."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The parameters of a network by what the kernel knows of them: name → number of scalars, shared ones once.

    Attributes:
        covered: gradients of the outputs reach them; they are in the kernel.
        frozen: without `requires_grad`.
        unselected: left out by `params`.
        unused: no operation of the measured forward pass takes them (an auxiliary head, an expert no sample went to).
        detached: computed with, but cut off from the gradients of these outputs, in training mode too: behind `no_grad`
            or `detach`, or part of another output. A kernel without them is exact, as autograd has it.
        unreachable: used without gradients in the measured forward pass, but with gradients in training mode. A kernel
            without them is partial.
    """

    covered: Mapping[str, int]
    frozen: Mapping[str, int]
    unselected: Mapping[str, int]
    unused: Mapping[str, int]
    detached: Mapping[str, int]
    unreachable: Mapping[str, int]

    def scalars(self, *kinds: str) -> int:
        """Return the number of scalars of these kinds (names of attributes), of all without an argument."""
        return sum(sum(getattr(self, kind).values()) for kind in kinds or (f.name for f in fields(self)))

    @property
    def total(self) -> int:
        """Scalars in all parameters of the network."""
        return self.scalars()

    @property
    def selected(self) -> int:
        """Scalars in the parameters that were asked for: trainable, and not left out by `params`."""
        return self.scalars("covered", "unused", "detached", "unreachable")

    @property
    def share(self) -> float:
        """Scalars in the kernel over trainable ones, a fraction; 1 without a trainable one."""
        trainable = self.total - self.scalars("frozen")
        return self.scalars("covered") / trainable if trainable else 1.0

    def facts(self) -> dict[str, float]:
        """Return what the record holds in numbers (keys of `ntk_monitor.snapshot.FACTS`)."""
        kinds = ("unselected", "unused", "detached")
        return {"coverage": self.share} | {kind: float(self.scalars(kind)) for kind in kinds}

    def texts(self) -> dict[str, str]:
        """Return what the record holds in words (keys of `ntk_monitor.snapshot.TEXTS`)."""
        return {
            kind: listed(list(names)) for kind in ("unselected", "unused", "detached") if (names := getattr(self, kind))
        }

    def check(self) -> None:
        """Refuse a network whose kernel would be partial, or zero.

        Raises:
            NetworkError: some parameter is unreachable, or none is covered.
        """
        if self.unreachable:
            raise NetworkError(
                f"gradients reach {_counted(self.unreachable)} in training mode but not in the measured forward pass, "
                "which runs them with gradients switched off; pass forward=callable(module, inputs) that keeps "
                "gradients on, or leave them out with params="
            )
        if not self.covered:
            how = "cuts them off (no_grad, detach, another output)" if self.detached else "does not use them"
            raise NetworkError(
                f"the kernel would be zero: no output depends on {_counted(self.unused | self.detached)}, "  # type: ignore[operator]
                f"as the forward pass {how}; widen params=, or pass forward=callable(module, inputs)"
            )


def listed(names: Sequence[str], most: int = _NAMES) -> str:
    """Return names as a list in words, the first few and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nonzero(kernel: Tensor, coverage: Coverage) -> Tensor:
    """Return the kernel, unless all of it is exactly zero: then nothing that was asked for moves anything.

    Raises:
        NetworkError: every entry is zero.
    """
    if bool(kernel.any()):  # NaN counts: that is another fault, with a sentence of its own
        return kernel
    raise NetworkError(
        f"the kernel is exactly zero: at these weights nothing measured depends on {_counted(coverage.covered)} "
        "(behind a factor that is zero, dead units, or losses without a gradient); widen params= or wait some steps"
    )


class Forwards:
    """The forward pass of each probe of a run, which keeps the coverage.

    Args:
        seed: of random numbers drawn inside the network.
        options: of `Network`: params, forward, mode, device.

    Attributes:
        coverage: of the last pass; None before the first.
    """

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        self._seed, self._options = seed, options
        self._seen: tuple[frozenset[str], frozenset[str], int] | None = None
        self.coverage: Coverage | None = None

    def outputs(self, module: nn.Module, inputs: Batch) -> tuple[Tensor, Coverage]:
        """Return the outputs (N, ...) in float64 on the CPU, and which parameters they depend on.

        Raises:
            NetworkError: the kernel would be partial or zero, or the module cannot be followed.
            InputError: as `Network`.

        Cost: one forward pass of the batch, and at the first call one backward pass. These again when other parameters
            are reached than before (a block that was unfrozen), and when some are missing two forward passes of eight
            samples. Memory of the backward pass: the gradients of all parameters once, as for one row.
        """
        with undisturbed(seed=self._seed):
            network = Network.careful(module, inputs, **self._options)
            # With gradients enabled: a forward may take gradients itself (physics-informed residuals).
            output = network.raw(network.prepared(inputs))
            trainable = sum(p.requires_grad for p in unwrapped(module).parameters())
            seen = (frozenset(network.parameters), network.reached(output), trainable)
            if self.coverage is None or seen != self._seen:
                self.coverage, self._seen = coverage(module, network, inputs, output, **self._options), seen
            self.coverage.check()
            return output.detach().double().cpu(), self.coverage


def coverage(module: nn.Module, network: Network, inputs: Batch, output: Tensor, **options: Any) -> Coverage:
    """Return which parameters of the module the outputs (N, ...) of its `network` on `inputs` depend on.

    `options` are those the network was made with. Consumes the graph of `output`. Cost: see `Forwards.outputs`.
    """
    reached = _with_gradient(network, output)
    missing = [name for name in network.parameters if name not in reached]
    used = _used(network, inputs) if missing else frozenset()
    trained = _reached_in_training(module, inputs, options) if used & frozenset(missing) else frozenset()
    kinds: dict[str, dict[str, int]] = {f.name: {} for f in fields(Coverage)}
    for name, p in unwrapped(module).named_parameters():
        if not p.requires_grad:
            kind = "frozen"
        elif name not in network.parameters:
            kind = "unselected"
        elif name in reached:
            kind = "covered"
        elif name not in used:
            kind = "unused"
        else:
            kind = "unreachable" if name in trained else "detached"
        kinds[kind][name] = p.numel()
    return Coverage(**kinds)


def _with_gradient(network: Network, output: Tensor) -> frozenset[str]:
    """Return the parameters that get a gradient, if only of zeros, from a random combination of all outputs."""
    if not output.requires_grad:
        return frozenset()
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(output.shape, generator=generator).to(output)
    parameters = list(network.parameters.values())
    gradients: Sequence[Tensor | None] = torch.autograd.grad(output, parameters, weights, allow_unused=True)
    return frozenset(name for name, g in zip(network.parameters, gradients, strict=True) if g is not None)


class _Storages(TorchDispatchMode):
    """Notes the storage of every tensor that enters an operation, below autograd, where composite functions end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else newer versions of torch import their compiler, a second of work, to keep it out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = kwargs or {}
        given: list[Any] = tree_leaves([args, options])
        self.seen |= {_storage(t) for t in given if isinstance(t, Tensor)}
        return func(*args, **options)


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or inside a transform
        return 0


def _used(network: Network, inputs: Batch) -> frozenset[str]:
    """Return the parameters that enter any operation of the forward pass."""
    with _Storages() as storages:
        network.raw(network.prepared(take(inputs, slice(0, _SAMPLES))))
    return frozenset(name for name, p in network.parameters.items() if _storage(p.detach()) in storages.seen - {0})


def _reached_in_training(module: nn.Module, inputs: Batch, options: Mapping[str, Any]) -> frozenset[str]:
    """Return the parameters that gradients of the same outputs reach in training mode; none where it cannot run."""
    few = take(inputs, slice(0, _SAMPLES))
    try:
        network = Network.careful(module, few, **{**options, "mode": "train"})
        return network.reached(network.raw(network.prepared(few)))
    except Exception:  # noqa: BLE001 - outputs of another kind in training mode (auxiliary heads), a batch too small
        return frozenset()


def _counted(names: Mapping[str, int]) -> str:
    scalars = sum(names.values())
    return f"{listed(list(names))} ({scalars:,} {'scalar' if scalars == 1 else 'scalars'})"
