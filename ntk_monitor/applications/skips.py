"""Residual connections of a network, found where it adds: z = s + b, skip s and branch b with parameters of its own.

A sum is a residual connection when both summands depend on the same earlier values and one of them (b) goes through
parameters that the other (s) does not. `gated` runs the network with α s + β b in its place.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntk_monitor.batch import Batch, mapped, size, take, tensored
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.network import Forward, call, only_tensor

_ADDS = frozenset({torch.add, Tensor.add, Tensor.add_})
"""What `+`, `+=` and `torch.add` arrive as."""

# Parameters in another shape, without data: they are shared by summands that have nothing else in common.
_SHAPES = re.compile(
    r"AccumulateGrad|^(T|Transpose|Permute|View|UnsafeView|Expand|Slice|Select|ToCopy|Unsqueeze)Backward"
)


@dataclass(frozen=True, slots=True)
class Skip:
    """One residual connection of a network.

    Attributes:
        name: module that adds, with a number where it adds more than once.
        module: the module alone; "" for the network itself.
        index: which of the additions of a forward pass.
        skip_first: the skip is the first summand.
        identity: the branch is computed from the skip itself; False: from what the skip is computed from too.
        parameters: trainable ones of the branch that the skip does not use.
    """

    name: str
    module: str
    index: int
    skip_first: bool
    identity: bool
    parameters: frozenset[str]


@dataclass(frozen=True, slots=True)
class Skips:
    """The residual connections of a network in the order in which they run.

    Attributes:
        found: them.
        additions: of one forward pass in all.
    """

    found: tuple[Skip, ...]
    additions: int

    def gated(self, forward: Forward | None, gates: Mapping[Skip, tuple[float, float]]) -> Forward:
        """Return a forward with α s + β b in place of s + b, gates being connection → (α, β); others stay as they are.

        The forward raises NetworkError when a pass does not add as often as the one in which they were found.
        """
        weights = {skip.index: (pair if skip.skip_first else pair[::-1]) for skip, pair in gates.items()}

        def run(module: nn.Module, inputs: Batch) -> Any:
            with _Gates(weights) as mode:
                output = (forward or call)(module, inputs)
            if mode.seen != self.additions:
                raise NetworkError(
                    f"a forward pass must always add equally often, got {mode.seen} additions after {self.additions}; "
                    "its residual connections cannot be told apart"
                )
            return output

        return run


class _Watched(TorchFunctionMode):
    """Counts the additions of two floating tensors, and lets `at` replace what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _ADDS:
            pair = (*args[:2], *(options[key] for key in ("input", "other") if key in options))
            if len(pair) == 2 and all(isinstance(t, Tensor) and t.is_floating_point() for t in pair):
                self.seen += 1
                scaled = pair[1] if options.get("alpha", 1) == 1 else pair[1] * options["alpha"]
                return self.at(self.seen - 1, pair[0], scaled, func)
        return func(*args, **options)

    def at(self, index: int, first: Tensor, second: Tensor, func: Any) -> Tensor:
        total: Tensor = func(first, second)
        return total


class _Gates(_Watched):
    def __init__(self, weights: Mapping[int, tuple[float, float]]) -> None:
        super().__init__()
        self._weights = weights

    def at(self, index: int, first: Tensor, second: Tensor, func: Any) -> Tensor:
        if index not in self._weights or self._weights[index] == (1.0, 1.0):
            return super().at(index, first, second, func)
        # A weight of 0 removes a summand even where it is infinite.
        terms = [w * t for w, t in zip(self._weights[index], torch.broadcast_tensors(first, second), strict=True) if w]
        total = terms[0] + terms[1] if len(terms) == 2 else terms[0] if terms else torch.zeros_like(first)
        return first.copy_(total) if func is Tensor.add_ else total


class _Finder(_Watched):
    """Notes which additions join two ways from the same values."""

    def __init__(self, samples: int, names: Mapping[int, str]) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.found: list[Skip] = []
        self._samples, self._names = samples, names

    def at(self, index: int, first: Tensor, second: Tensor, func: Any) -> Tensor:
        if first.shape == second.shape and first.requires_grad and second.requires_grad:
            self._look(index, first, second)
        return super().at(index, first, second, func)

    def _constant(self, t: Tensor) -> bool:
        """True for what does not differ between samples: positions, masks, relative biases."""
        rows = t.detach()
        return not t.dim() or len(t) % self._samples > 0 or (self._samples > 1 and bool((rows == rows[:1]).all()))

    def _look(self, index: int, first: Tensor, second: Tensor) -> None:
        ways = [_ancestors(t) for t in (first, second)]
        if not any(not _SHAPES.search(node.name()) or self._data(node) for node in ways[0].keys() & ways[1].keys()):
            return
        own = [self._parameters(way) for way in ways]
        # The shorter way is the skip: all of it lies on the longer one, but for a projection.
        skip_first = len(ways[0]) <= len(ways[1])
        branch, skip = (own[1], own[0]) if skip_first else (own[0], own[1])
        summand = first if skip_first else second
        # Of the skip alone: a branch may be zero, or a bias, when training begins.
        if not branch - skip or self._constant(summand):
            return
        top = torch.autograd.graph.get_gradient_edge(summand).node
        identity = top in (ways[1] if skip_first else ways[0])
        module = self.stack[-1]
        self.found.append(Skip(module, module, index, skip_first, identity, frozenset(branch - skip)))

    def _data(self, node: Any) -> bool:
        leaf = getattr(node, "variable", None)
        return leaf is not None and id(leaf) not in self._names

    def _parameters(self, way: Iterable[Any]) -> set[str]:
        leaves = (getattr(node, "variable", None) for node in way)
        return {self._names[id(leaf)] for leaf in leaves if leaf is not None and id(leaf) in self._names}


def _ancestors(t: Tensor) -> dict[Any, None]:
    """Return the nodes of the graph behind a tensor, its own included."""
    stack: list[Any] = [torch.autograd.graph.get_gradient_edge(t).node]
    found: dict[Any, None] = {}
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack.extend(parent for parent, _ in node.next_functions)
    return found


def twin(model: nn.Module, x: Batch) -> tuple[nn.Module, Batch]:
    """Return a float64 copy of a network in evaluation mode, and the samples on its device.

    Raises:
        InputError: no module, or an empty batch.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"wanted a torch.nn.Module, got {type(model).__name__}")
    x = tensored(x)
    size(x)
    copied = copy.deepcopy(model).double()
    for child in copied.modules():
        child.training = False
    device = next((p.device for p in copied.parameters()), torch.device("cpu"))
    return copied, mapped(x, lambda t: t.to(device, torch.float64 if t.is_floating_point() else t.dtype))


def residual_connections(
    model: nn.Module, x: Batch, *, modules: Sequence[str] | str | None = None, forward: Forward | None = None
) -> Skips:
    """Return the residual connections of a network, from one forward pass of at most four samples of a copy.

    Args:
        model: any eager module.
        x: N samples; with a single one, positions that are added to it cannot be told from data.
        modules: names of the modules whose connections are wanted, inner ones included, or a regular expression that
            must match somewhere in the name; None: all.
        forward: as in `empirical_ntk`.

    Raises:
        InputError: a name that holds no residual connection.
        NetworkError: no residual connection at all. Concatenations (DenseNet, U-Net) are none.
    """
    model, x = twin(model, x)
    x = take(x, slice(0, 4))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    finder = _Finder(size(x), {id(p): name for name, p in model.named_parameters()})
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    x = mapped(x, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
    for name, part in model.named_modules():
        part.register_forward_pre_hook(_entered(finder.stack, name))
        part.register_forward_hook(_left(finder.stack), always_call=True)
    with torch.enable_grad(), finder:
        only_tensor((forward or call)(model, x))
    if not finder.found:
        raise NetworkError(
            f"{type(model).__name__} has no residual connection: none of its {finder.seen} additions joins two ways "
            "from the same values, one of them through parameters of its own"
        )
    chosen = _named(finder.found, modules)
    kept = tuple(
        Skip(name, s.module, s.index, s.skip_first, s.identity, s.parameters & trainable)
        for name, s in zip(_numbered(chosen), chosen, strict=True)
    )
    return Skips(kept, finder.seen)


def _entered(stack: list[str], name: str) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        stack.append(name)

    return enter


def _left(stack: list[str]) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        stack.pop()

    return leave


def _named(found: list[Skip], modules: Sequence[str] | str | None) -> list[Skip]:
    if modules is None:
        return found
    wanted = [modules] if isinstance(modules, str) else list(modules)

    def held(skip: Skip, name: str) -> bool:
        if isinstance(modules, str):
            return re.search(name, skip.module) is not None
        return skip.module == name or name == "" or skip.module.startswith(f"{name}.")

    if empty := [name for name in wanted if not any(held(skip, name) for skip in found)]:
        known = ", ".join(dict.fromkeys(skip.module or "the network itself" for skip in found))
        raise InputError(f"no residual connection in {', '.join(empty)}; there are some in {known}")
    return [skip for skip in found if any(held(skip, name) for name in wanted)]


def _numbered(chosen: list[Skip]) -> list[str]:
    """Return a name for each: its module, with a number where it adds more than once."""
    modules = [skip.module for skip in chosen]
    names = []
    for k, module in enumerate(modules):
        word = module or "network"
        names.append(f"{word} #{modules[: k + 1].count(module)}" if modules.count(module) > 1 else word)
    return names
