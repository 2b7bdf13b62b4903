"""plan: what a kernel will cost, before it is paid. Seconds and bytes for every engine, and layer by layer.

N samples, C outputs, P parameters. One forward pass is watched, operation by operation, and the sample map tells how
many positions of each operation belong to a sample. Everything else is arithmetic on shapes: contractions at the rates
of `engines.structured.costs`, everything else at the `Speeds` below.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ntk_monitor.batch import Batch, size, take
from ntk_monitor.engines.contract import Layout
from ntk_monitor.engines.structured import engine as structured
from ntk_monitor.engines.structured.contraction import _HALVED
from ntk_monitor.engines.structured.costs import (
    BLOCK_BYTES,
    Rates,
    Sizes,
    gradients_seconds,
    pairs_seconds,
    rates,
    route,
)
from ntk_monitor.engines.structured.operations import Contraction, Local, Matrix, Table, Value
from ntk_monitor.engines.structured.recording import SharedValueError, Side, located, needed, recorded
from ntk_monitor.engines.structured.samples import Axis
from ntk_monitor.engines.structured.tap import Operation, UnfollowedError
from ntk_monitor.errors import InputError, NTKMonitorError
from ntk_monitor.guard import undisturbed
from ntk_monitor.kernel import MEMORY_LIMIT, Outputs, _check, _first_line, _headed
from ntk_monitor.network import Forward, Mode, Network, Selection

ENGINES = ("structured", "batched", "rows", "reference", "operator")
"""In the order of the table; the first three are the ladder of `engine="auto"`."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What passes over the network cost beside matrix products. Defaults: two CPU cores, AVX-512, torch 2.13."""

    matmul: float = 40e9
    """Multiply-adds per second of matrix products, float32."""
    convolution: float = 32e9
    """Multiply-adds per second of convolutions, forward and backward, float32."""
    double: float = 0.4
    """Speed of products in float64 relative to float32."""
    memory: float = 5e9
    """Bytes of results per second of elementwise operations, which read their arguments and write once."""
    call: float = 8e-6
    """Seconds of one operation, however small."""
    tapped: float = 60e-6
    """Seconds of recording one operation, and of asking for its gradient."""
    module: float = 1.2e-3
    """Seconds of making one module ready: shadows of the network, states kept and given back."""
    vectorised: float = 0.75
    """Speed of vectorised backward passes relative to as many ordinary ones, calls aside."""
    single: float = 0.5
    """The same of per-sample passes by `vmap(jacrev)`."""


CPU = Speeds()
CUDA = Speeds(1e13, 1e13, 0.5, 1e12, 8e-6, 60e-6, 1.2e-3, 0.75, 0.5)

_MAP_READS = 10
"""Times that the sample map goes over the gradients of all operations."""

_KERNEL_READS = 10
"""Times that the full kernel is gone over beside the products: memory mapped anew, its upper half copied."""

_VECTORISED = 16
"""Rows at a time of the batched engine."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one engine would cost."""

    engine: str
    seconds: float
    """Infinite where the engine refuses."""
    bytes: int
    """The most that is held at a time, the kernel included, beside the model and its inputs."""
    chosen: bool
    why: str
    limited: int = 0
    """The part of `bytes` that `memory_limit` bounds: gradients of activations, or blocks of a Jacobian."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one parameter costs by the chosen engine, beside the passes over the network that all share."""

    parameter: str
    operations: tuple[str, ...]
    route: str
    """"hadamard", "gradients", "pairs", "per-sample gradients", "rows of the table", "rows", "not reached"."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a kernel costs by each engine. `print(plan)` shows it as a table.

    Attributes:
        rows: one for each of `ENGINES`.
        lines: one for each parameter, by the chosen engine.
        passes: seconds that are in no line: passes over the network by the chosen engine, and preparations.
        kernel: bytes of the kernel in float64.
        blocks: of samples, in which the chosen engine has to work to stay within `memory_limit`.
        samples, outputs, parameters: N, C and P.
        layout: `outputs` as asked for.
    """

    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    passes: float
    kernel: int
    blocks: int
    samples: int
    outputs: int
    parameters: int
    layout: str

    @property
    def chosen(self) -> str:
        """The engine that `engine="auto"` would take."""
        return next(row.engine for row in self.rows if row.chosen)

    def seconds(self, engine: str | None = None) -> float:
        """Return the seconds of an engine, of the chosen one for None; infinite where it refuses."""
        return self._row(engine).seconds

    def bytes(self, engine: str | None = None) -> int:
        """Return the bytes that an engine holds at a time, the chosen one for None."""
        return self._row(engine).bytes

    def _row(self, engine: str | None) -> Row:
        for row in self.rows:
            if row.engine == (engine or self.chosen):
                return row
        raise InputError(f"engine must be one of {ENGINES}, got {engine!r}")

    def __str__(self) -> str:
        return "\n".join(_report(self))


def plan(  # noqa: PLR0913 - the public door
    model: nn.Module,
    x: Batch,
    *,
    outputs: Outputs = "full",
    params: Selection | None = None,
    forward: Forward | None = None,
    mode: Mode = "eval",
    dtype: torch.dtype = torch.float64,
    memory_limit: int | None = None,
    device: torch.device | str | None = None,
    targets: Any = None,
    loss: Any = None,
) -> Plan:
    """Return what `empirical_ntk` with the same arguments would cost: seconds, bytes, the engine, and each layer.

    Seconds are those of the documented machine (two CPU cores, AVX-512, torch 2.13; one data-centre GPU for CUDA) and
    never measured here, so that the same model has the same plan everywhere. Bytes are peaks beside model and inputs.

    Cost: one forward pass over the batch and two backward passes. One more forward pass where the structured engine
    stops in the middle of the first, or where gradients of all operations exceed `memory_limit`.

    Accuracy: meant to be within 30 % on five workloads of the benchmark, with two cores; elsewhere an order of
    magnitude. Not included: the comparison with autograd when an engine first meets a model, which takes a few passes
    more and may overrule the choice. "reference" and "operator" are only taken when asked for; whether they refuse is
    not tried.

    Raises:
        InputError: as `empirical_ntk`: empty or inconsistent batches, no single floating output, unknown options.
        NetworkError: nothing trainable, or a module that cannot be followed exactly.
    """
    _check(outputs, "auto", targets, loss)
    size(x)
    batch: Batch = (x, targets) if outputs == "loss" else x
    head = _headed(forward, outputs, loss)
    with undisturbed(seed=0):
        network = Network.careful(model, batch, params=params, forward=head, mode=mode, device=device)
        layout: Layout = outputs if outputs in ("trace", "per_output") else "full"
        work = torch.float32 if dtype == torch.float32 and network.dtype != torch.float64 else torch.float64
        planner = _Planner(network, network.prepared(batch), layout, work, memory_limit or MEMORY_LIMIT)
        return replace(planner.plan(mode), layout=outputs)


@dataclass(frozen=True, slots=True)
class _Work:
    """Multiply-adds by kind, bytes of results, and calls."""

    matmul: float = 0.0
    convolution: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "_Work") -> "_Work":
        return _Work(
            self.matmul + other.matmul,
            self.convolution + other.convolution,
            self.bytes + other.bytes,
            self.calls + other.calls,
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation of the forward pass, below autograd.

    Attributes:
        work: of the operation itself.
        data, weights: how many of its factors are activations, or parameters, that gradients go to.
        follows: it depends on activations that gradients go to.
        storages: of its arguments.
    """

    work: _Work
    data: int
    weights: int
    follows: bool
    storages: frozenset[int]


class _Meter(TorchDispatchMode):
    """Counts the operations of a forward pass."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {_storage(p) for p in parameters.values()}
        self.steps: list[_Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = frozenset(map(_storage, given))
        view = not func._schema.is_mutable and any(_storage(t) in storages for t in made)
        written = 0 if view else sum(t.numel() * t.element_size() for t in made)
        products = _multiply_adds(packet, args, kwargs, result)
        convolution = "conv" in str(packet)
        work = _Work(0 if convolution else products, products if convolution else 0, written, 0 if view else 1)
        data = [t for t in given if t.requires_grad and _storage(t) not in self._parameters]
        weights = [t for t in given if _storage(t) in self._parameters]
        self.steps.append(
            _Step(work, sum(t.dim() >= 2 for t in data), sum(t.dim() >= 2 for t in weights), bool(data), storages)
        )
        return result

    def forward(self) -> _Work:
        """Return the work of the forward pass."""
        return sum((s.work for s in self.steps), _Work())

    def backward(self, *, weights: bool, steps: Sequence[_Step] | None = None) -> _Work:
        """Return the work of one backward pass to the activations, and to the weights."""
        total = _Work()
        for s in self.steps if steps is None else steps:
            count = s.data + (s.weights if weights else 0)
            follows = s.follows or (weights and s.weights > 0)
            total += _Work(
                count * s.work.matmul,
                count * s.work.convolution,
                s.work.bytes * follows,
                s.work.calls * follows * (1 + (weights and s.weights > 0)),
            )
        return total

    def between(self, tensors: Sequence[Tensor]) -> list[_Step]:
        """Return the operations from the first to the last that these tensors enter."""
        storages = {_storage(t) for t in tensors}
        where = [i for i, s in enumerate(self.steps) if s.storages & storages]
        return self.steps[where[0] : where[-1] + 1] if where else []


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or inside a transform
        return id(t)


def _multiply_adds(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result)) / 2
    # Two operations of the CPU that torch does not count.
    if "scaled_dot_product" in str(packet):
        query, key, value = args[:3]
        return float(query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * value.shape[-2:].numel())
    if "mkldnn_rnn_layer" in str(packet):
        return float(math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel()))
    return 0.0


@dataclass(frozen=True, slots=True)
class _Part:
    """One unit of the contraction for N row and M column samples and the outputs of one step."""

    route: str
    seconds: float
    bytes: int
    """Temporaries of this unit alone."""
    kept: int
    """Inputs kept from one step to the next."""


class _Planner:
    """One call of `plan`."""

    def __init__(self, network: Network, inputs: Batch, layout: Layout, work: torch.dtype, limit: int) -> None:
        self._network, self._inputs, self._layout, self._work, self._limit = network, inputs, layout, work, limit
        self._rates: Rates = rates(network.device)
        self._speeds = CUDA if network.device.type == "cuda" else CPU
        self._speed = self._speeds.double if network.dtype == torch.float64 else 1.0
        self._item = network.dtype.itemsize
        self._meter = _Meter(network.parameters)
        self._ready = self._speeds.module * sum(1 for _ in network._module.modules())
        self._n = self._seen = size(inputs)  # seen: by the meter

    def plan(self, mode: Mode) -> Plan:
        side, reason = (
            self._followed() if mode != "train" else (None, "training mode may couple the samples of a batch")
        )
        problem = ""
        if side is None:
            self._meter.steps.clear()
            self._seen = self._n
            with self._meter, torch.enable_grad():
                self._y = self._network.outputs(self._inputs)
            problem = self._vectorised()
        self._c = self._y.shape[1]
        self._y = self._y.detach()  # its graph has told what it knows
        self._kernel = 8 * self._n**2 * {"full": self._c**2, "trace": 1, "per_output": self._c}[self._layout]
        chosen = "structured" if side is not None else "rows" if problem else "batched"
        found = [
            self._refused(reason) if side is None else self._structured(side),
            *(self._autograd(engine) for engine in ("batched", "rows", "reference")),
            self._operator(),
        ]
        whys = self._whys(reason, problem, chosen)
        rows = [
            replace(row, chosen=row.engine == chosen, why=whys[row.engine], **_infinite(row.engine, problem))
            for row, *_ in found
        ]
        _, lines, passes, blocks = found[[row.engine for row in rows].index(chosen)]
        count = self._network.parameter_count
        return Plan(tuple(rows), lines, passes, self._kernel, blocks, self._n, self._c, count, self._layout)

    def _whys(self, reason: str, problem: str, chosen: str) -> dict[str, str]:
        followed = chosen == "structured"
        return {
            "structured": "exact by layers, the first of the ladder" if followed else reason,
            "batched": "where the structured engine refuses" if followed else problem or "vectorised backward passes",
            "rows": "plain autograd, the last resort",
            "reference": "only when asked for: torch.func, not tried here",
            "operator": "only when asked for: two passes for each column, not tried here",
        }

    def _followed(self) -> tuple[Side | None, str]:
        """Return what the structured engine sees, with the samples located, or None and why it refuses."""
        try:
            with self._meter:
                side = recorded(self._network, self._inputs)
            self._y = side.y
            self._needed = needed(side, "trace") // 2
            step = self._n
            while 2 * self._needed * step > self._limit * self._n and step > 1:
                step = -(-step // 2)
            if step < self._n:
                # As the engine does, in blocks of samples; one of them tells of all.
                self._meter.steps.clear()
                self._seen = step
                return self._located(take(self._inputs, slice(0, step)), None), ""
            return self._located(self._inputs, side), ""
        except NTKMonitorError as error:
            if not isinstance(error, UnfollowedError):
                raise
            return None, str(error)
        except Exception as error:  # noqa: BLE001 - whatever a user's forward does to a mode that it does not expect
            return None, f"{type(error).__name__}: {_first_line(error)}"

    def _located(self, inputs: Batch, side: Side | None) -> Side:
        if side is None:
            with self._meter:
                side = recorded(self._network, inputs)
        try:
            located(side)
        except SharedValueError:
            side = recorded(self._network, inputs, values=False)
            located(side)
        side.gradients = []
        return side

    def _vectorised(self) -> str:
        """Return why autograd's backward pass cannot be vectorised here, or ""; tried with two rows."""
        if any(p.is_complex() for p in self._network.parameters.values()):
            return "RuntimeError: complex parameters"
        if not self._y.requires_grad:
            return ""
        cotangents = self._y.detach().new_zeros(2, *self._y.shape)
        cotangents[0, 0, 0], cotangents[1, -1, -1] = 1, 1
        parameters = list(self._network.parameters.values())
        try:
            torch.autograd.grad(
                self._y, parameters, cotangents, allow_unused=True, is_grads_batched=True, retain_graph=True
            )
        except Exception as error:  # noqa: BLE001 - vectorised backward passes refuse with any kind of error
            return f"vectorised: {type(error).__name__}: {_first_line(error)}"
        return ""

    def _seconds(self, work: _Work, share: float = 1.0) -> float:
        products = (work.matmul / self._speeds.matmul + work.convolution / self._speeds.convolution) / self._speed
        return share * (products + work.bytes / self._speeds.memory) + work.calls * self._speeds.call

    def _product(self, products: float, factors: float, results: float, work: torch.dtype) -> float:
        """Return the seconds of a product of two matrices that is added to the kernel."""
        wide = work == torch.float64
        converted = 8 * factors if wide and self._network.dtype != torch.float64 else 0
        seconds = products / self._speeds.matmul / (self._speeds.double if wide else 1.0)
        return seconds + (converted + 3 * 8 * results) / self._speeds.memory + 4 * self._speeds.call

    def _assembled(self) -> float:
        """Return the seconds of what any engine does once."""
        return self._ready + _KERNEL_READS * self._kernel / self._speeds.memory

    def _refused(self, reason: str) -> "_Found":
        return Row("structured", math.inf, 0, False, reason), (), math.inf, 1

    def _structured(self, side: Side) -> "_Found":
        job = _Layers(self, side)
        count, n = 1, self._n
        held = self._needed * (self._c + 1 if self._layout == "full" else 2)
        while count < n and held * -(-n // count) > self._limit * n:
            count *= 2
        step = -(-n // count)
        widths = [min(step, n - start) for start in range(0, n, step)]
        times = Counter((a, b, i == j) for i, a in enumerate(widths) for j, b in enumerate(widths[: i + 1]))
        passes = sum(k * (job.passes(a) + (0 if same else job.passes(b))) for (a, b, same), k in times.items())
        passes += self._assembled()
        spent: dict[str, tuple[str, float]] = {}
        temporary = 0
        for (a, b, same), k in times.items():
            for unit in job.units:
                part = job.part(unit, a, b, same)
                temporary = max(temporary, part.bytes)
                way, before = spent.get(unit.parameter, ("", 0.0))
                way = part.route if part.seconds or not way else way
                spent[unit.parameter] = (way, before + k * job.steps * part.seconds)
                if unit.bias is not None:
                    spent.setdefault(unit.bias, (part.route, 0.0))
        lines = tuple(
            Line(name, job.operations(name), *spent.get(name, ("not reached", 0.0)))
            for name in self._network.parameters
        )
        sides = 1 if len(widths) == 1 else 2
        limited = int(held * widths[0] / n)
        activations = int(sides * widths[0] / self._seen * self._meter.forward().bytes)
        kept = sum(job.part(unit, widths[0], widths[0], True).kept for unit in job.units)
        total = activations + sides * (limited + min(kept, structured._KEPT_BYTES)) + temporary + 2 * self._kernel
        seconds = passes + sum(line.seconds for line in lines)
        return Row("structured", seconds, total, False, "", limited), lines, passes, count

    def _autograd(self, engine: str) -> "_Found":
        """Rows of the Jacobian in blocks, and their products."""
        n, c, p = self._n, self._c, self._network.parameter_count
        one = max(1, c * p * self._item)
        width = max(1, min(n, self._limit // (3 * one)))
        blocks = -(-n // width)
        again = (blocks + 1) / 2  # a block is made again for each pair of blocks
        backward, forward = self._meter.backward(weights=True), self._meter.forward()
        share = n / self._seen
        pass_seconds = self._seconds(backward, share)
        calls = backward.calls * self._speeds.call
        rows = n * c * again
        written = n * c * again * p * self._item / self._speeds.memory
        if engine == "batched":
            passes = rows * ((pass_seconds - calls) / self._speeds.vectorised + calls / _VECTORISED) + 2 * written
        elif engine == "rows":
            passes = rows * pass_seconds + written
        else:
            # Every sample on its own, as many as fit side by side.
            chunks = -(-n // max(1, min(n, self._limit // (4 * one))))
            passes = c * again * ((pass_seconds - calls) / self._speeds.single + calls * chunks) + 4 * written
        passes += self._seconds(forward, share) + self._assembled()
        products = n**2 * (c**2 if self._layout == "full" else c) * (blocks + 1) / (2 * blocks if blocks > 1 else 2)
        kernel = self._kernel / 8
        lines = tuple(
            Line(
                name, (), "rows", self._product(products * q.numel(), n * c * again * q.numel(), kernel, torch.float64)
            )
            for name, q in self._network.parameters.items()
        )
        limited = one * (n if blocks == 1 else 3 * width)
        extra = {"batched": _VECTORISED * (backward.bytes * share + p * self._item), "rows": p * self._item}
        extra["reference"] = 3.0 * min(n * one, max(one, self._limit // 4))
        total = limited + extra[engine] + forward.bytes * share + 3 * self._kernel
        seconds = passes + sum(line.seconds for line in lines)
        return Row(engine, seconds, int(total), False, "", limited), lines, passes, blocks

    def _operator(self) -> "_Found":
        share = self._n / self._seen
        columns = self._n * self._c
        one = self._seconds(self._meter.backward(weights=True), share)
        # The derivative of a backward pass is about two of them.
        seconds = self._seconds(self._meter.forward(), share) + 3 * columns * one + self._assembled()
        total = 4 * self._meter.forward().bytes * share + 3 * 8 * columns**2
        return Row("operator", seconds, int(total), False, ""), (), seconds, 1


_Found: TypeAlias = tuple[Row, tuple[Line, ...], float, int]
"""A row without its reason, its lines, the seconds of its passes and its blocks."""


def _infinite(engine: str, problem: str) -> dict[str, Any]:
    return {"seconds": math.inf} if engine == "batched" and problem else {}


class _Layers:
    """What the structured engine would do with each parameter, from what it recorded."""

    def __init__(self, planner: _Planner, side: Side) -> None:
        self._p, self._side = planner, side
        network, n = planner._network, len(side.y)
        self._job = structured._Job(network, [side], planner._layout, lambda _: "", {}, planner._work, (n, n))
        self.units = self._job._units()
        stacked = not side.attached and needed(side, "full") <= structured._STACKED_BYTES
        self.steps = 1 if planner._layout == "full" or stacked else planner._c
        """Times that all parameters are contracted."""
        self._width = planner._c // self.steps
        self._results = sum(math.prod(out.shape) for o in side.operations for out in o.outs) * planner._item

    def operations(self, name: str) -> tuple[str, ...]:
        """Return the names of the operations that a parameter enters."""
        return self._job._line(name).operations

    def passes(self, samples: int) -> float:
        """Return the seconds of recording, of the sample map, and of a backward pass for each output."""
        p, share = self._p, samples / self._p._seen
        count = len(self._side.operations)
        backward = p._seconds(p._meter.backward(weights=False), share)
        looked = _MAP_READS * share * self._results / p._speeds.memory
        tapped = count * p._speeds.tapped
        return p._seconds(p._meter.forward(), share) + looked + tapped + (p._c + 1) * (backward + tapped / 2)

    def part(self, unit: structured._Unit, n: int, m: int, symmetric: bool) -> _Part:
        """Return what a unit costs in one of the `steps`, for n row and m column samples."""
        uses = [(k, i) for k, i in unit.uses if any(o.layout is not None for o in self._side.operations[k].outs)]
        if not uses and unit.parameter not in self._side.attached:
            return _Part("not reached", 0.0, 0, 0)
        if unit.kind == "factors":
            return self._factors(uses, n, m, symmetric)
        root = self._p._network.parameters[unit.parameter]
        width = root.numel()
        if unit.kind == "table":
            operation = self._side.operations[uses[0][0]]
            assert isinstance(operation, Table)
            width = operation.ids.unique().numel() * root.shape[-1]
            formed = self._p._item * n * self._width * (width + self._positions(operation) * root.shape[-1])
            seconds, way = formed / self._p._speeds.memory, "rows of the table"
        else:
            seconds = sum(self._formed(k, i, root, n) for k, i in uses)
            attached = unit.parameter in self._side.attached
            way = "rows" if attached else "per-sample gradients"
            if attached:
                one = self._p._seconds(self._p._meter.backward(weights=False), n / self._p._seen)
                seconds += n * self._width * (one + 2 * self._p._speeds.call)
        sides = 1 if symmetric else 2
        held = sides * n * self._width * width * self._p._item
        return _Part(way, sides * seconds + self._products(n, m, width, symmetric), 2 * held, 0)

    def _products(self, n: int, m: int, width: int, symmetric: bool) -> float:
        """Return the seconds of multiplying rows (n, C', width)."""
        p, c, full = self._p, self._width, self._p._layout == "full"
        half = 1.0 if not symmetric else _tiled(n) if full else _halved(n)
        pairs = n * m * (c**2 if full else c)
        results = pairs if p._layout != "trace" else n * m
        return p._product(half * pairs * width, n * c * width, results, p._work)

    def _factors(self, places: list[tuple[int, int]], n: int, m: int, symmetric: bool) -> _Part:
        p, c = self._p, self._width
        uses = [(self._side.operations[k], i) for k, i in places]
        operation = uses[0][0]
        assert isinstance(operation, Matrix)
        _, _, q, r = operation.sizes()
        t = sum(self._positions(o) for o, _ in uses)
        sizes = Sizes(n, m, c, t, t, q, r, p._c)
        way = route(sizes, p._layout, p._work, symmetric)
        patches = sum(n * self._positions(o) * q * p._item for o, _ in uses if _unfolds(o))
        if way == "gradients" and operation.shifts and (p._layout == "full" or patches > structured._KEPT_BYTES):
            patches = 0  # taken as shifted views
        turned = n * c * t * r * p._item
        seconds = (turned + patches / (1 if p._layout == "full" else self.steps)) / p._speeds.memory
        wide = 8 if p._work == torch.float64 else 4
        if way == "hadamard":
            half = _halved(n) if symmetric else 1.0
            inputs = p._product(half * n * m * q, n * q, n * m, p._work)
            seconds += inputs / self.steps + self._products(n, m, r, symmetric)
            held = 8 * n * m * 2
        elif way == "gradients":
            seconds += gradients_seconds(sizes, p._layout, p._work, symmetric, p._rates)
            seconds += 8 * -(-r * n * c * q * p._item // BLOCK_BYTES) * p._speeds.call
            held = min(max(BLOCK_BYTES, n * c * q * p._item), n * c * q * r * p._item)
        else:
            seconds += pairs_seconds(sizes, p._layout, p._work, symmetric, p._rates)
            block = min(n * t, max(t, 1024))
            seconds += 4 * (2 * n if p._layout == "full" else -(-n * t // block) * c) * p._speeds.call
            held = m * t * (q + c * r) * wide if p._layout == "full" else wide * m * t * (n * t + 2 * block)
        sides = 1 if symmetric else 2
        return _Part(way, seconds + (sides - 1) * turned / p._speeds.memory, held + sides * turned, patches)

    def _positions(self, operation: Operation) -> int:
        """Return T of one use."""
        out = operation.outs[0]
        if isinstance(operation, Matrix):
            return operation.sizes()[1]
        if out.layout is None or isinstance(out.layout, Axis):
            positions = math.prod(s for d, s in enumerate(out.shape) if d not in out.channels)
            return max(1, positions // len(self._side.y))
        return out.layout.index.shape[1]

    def _formed(self, k: int, index: int, root: Tensor, n: int) -> float:
        """Return the seconds of forming the gradients (n, C', p) of one source for each sample."""
        p, c, operation = self._p, self._width, self._side.operations[k]
        share, source = n / len(self._side.y), operation.sources[index].value
        results = share * sum(math.prod(out.shape) for out in operation.outs)
        gradients = n * c * source.numel()
        derived = 4 * gradients if source is not root else 0  # carried back to the parameter
        if isinstance(operation, Matrix) and operation.is_weight(index):
            made = self._positions(operation) * gradients / p._rates.gradients / p._speed
            read = c * results
        elif isinstance(operation, Local):
            made, read = n * c * self._again(operation, share) / len(operation.sources), 0.0
        elif isinstance(operation, Contraction):
            made, read = c * self._again(operation, share), c * results
        elif isinstance(operation, Value):
            made, read = 0.0, n * c * results
        else:
            # A bias is summed, which reads once; else values are computed again and multiplied.
            made, read = 0.0, (0.5 if isinstance(operation, Matrix) else 3) * c * results
        return made + p._item * (read + gradients + derived) / p._speeds.memory + (4 + c) * p._speeds.call

    def _again(self, operation: Operation, share: float) -> float:
        """Return the seconds of one backward pass through an operation that is computed again on its own."""
        p = self._p
        steps = p._meter.between([s.value for s in operation.sources])
        work = sum((s.work for s in steps), _Work())
        return p._seconds(work, share) + len(operation.outs) * 3 * p._speeds.call


def _halved(rows: int) -> float:
    """Return the part of a symmetric product that is computed when its halves are halved again."""
    return 1.0 if rows < _HALVED else 0.25 + 0.5 * _halved(rows // 2)


def _tiled(rows: int) -> float:
    """Return the part of a symmetric product that is computed in eight bands up to the diagonal."""
    bands = -(-rows // max(1, -(-rows // 8)))
    return (bands + 1) / (2 * bands)


def _unfolds(operation: Operation) -> bool:
    """True when the matrix's inputs are copies, patches of a convolution."""
    kernel = operation.sources[0].value.shape[2:]
    return operation.name.startswith("conv") and math.prod(kernel) > 1


def _report(p: Plan) -> Iterator[str]:
    size_ = f"{p.samples} samples, {p.outputs} outputs, {p.parameters:,} parameters"
    blocks = "" if p.blocks == 1 else f"; in blocks of {-(-p.samples // p.blocks)} samples"
    yield f"{p.layout} kernel of {size_}: {_memory(p.kernel)}{blocks}"
    yield ""
    yield f"{'engine':<12}{'seconds':>10}{'memory':>12}  {'chosen':<8}why"
    for row in p.rows:
        memory = _memory(row.bytes) if math.isfinite(row.seconds) else "-"
        chosen = "yes" if row.chosen else ""
        yield f"{row.engine:<12}{_time(row.seconds):>10}{memory:>12}  {chosen:<8}{row.why}"
    yield ""
    yield f"{_time(p.passes)} for passes over the network and preparations; the most expensive parameters:"
    missed = [line for line in p.lines if line.route == "rows"] if p.chosen == "structured" else []
    for line in sorted(p.lines, key=lambda line: -line.seconds)[:_SHOWN]:
        yield _described(line)
    if missed:
        yield "not recognised, hence a backward pass for each output of each sample:"
        yield from map(_described, missed)


_SHOWN = 8
"""Lines of the report; unrecognised parameters are always shown."""


def _described(line: Line) -> str:
    return f"  {_time(line.seconds):>10}  {line.parameter}  ({', '.join([*line.operations, line.route])})"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def _memory(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("kiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"
