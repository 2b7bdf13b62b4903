"""The structured engine on networks drawn at random, and the laws that its shortcuts must not break."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.engines.structured import contraction, engine, held, samples, waiting
from ntk_monitor.engines.structured.recording import recorded
from ntk_monitor.engines.structured.units import Unit, units_of
from ntk_monitor.errors import NetworkError
from ntk_monitor.kernel import empirical_ntk, measured
from ntk_monitor.network import Network
from tests.cases import Case, Lambda, cnn_batchnorm
from tests.zoo import ZOO, lively
from tests.zoo_transformers import ATTENTION

Shape = tuple[int, ...]
Step = Callable[[Tensor], Tensor]
Draw = Callable[..., Any]


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10, floor: float = 0.0) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max()) + floor


class Program(nn.Module):
    """Steps drawn one after the other, each on the shape (without the sample axis) that the last one left."""

    def __init__(self, draw: Draw, shape: Shape, tokens: int, crowded: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.numbers = nn.ParameterDict()
        self.steps: list[Step] = []
        self.words: list[str] = []
        self.shape, self._draw = shape, draw
        # A token expanded over a batch of one sample is followed in another way than over more, in both batches alike.
        self.crowded = crowded
        if tokens:
            table = nn.Embedding(6, tokens, padding_idx=draw(st.sampled_from([None, 1])))
            self.add("embedding", (*shape, tokens), self.part("table", table))

    def draw(self, *choices: Any) -> Any:
        """Draw one of these."""
        return self._draw(st.sampled_from(choices))

    def part(self, key: str, module: nn.Module) -> nn.Module:
        """Return this module, or one that was made for the same key before: shared weights."""
        if key in self.parts and self.draw(True, False):
            return self.parts[key]
        name = key if key not in self.parts else f"{key} {len(self.parts)}"
        self.parts[name] = module
        return module

    def number(self, *shape: int) -> nn.Parameter:
        """Return a new loose parameter."""
        parameter = nn.Parameter(torch.randn(shape))
        self.numbers[str(len(self.numbers))] = parameter
        return parameter

    def add(self, word: str, shape: Shape, step: Any) -> None:
        """Append a step that leads to this shape."""
        self.words.append(word)
        self.steps.append(step)
        self.shape = shape

    def grow(self) -> None:
        """Append one step that fits the shape."""
        kinds = {1: VECTORS, 2: SEQUENCES, 3: IMAGES}[len(self.shape)]
        self.draw(*kinds, *ANYWHERE)(self)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for step in self.steps:
            h = step(h)
        return h

    def __repr__(self) -> str:
        return f"Program({', '.join(self.words)})"


# Steps of any shape.


def _elementwise(p: Program) -> None:
    lead = p.draw(*range(len(p.shape) + 1))
    shape = tuple(p.draw(length, 1) for length in p.shape[lead:])
    shape = p.draw(shape, (1,) * (lead + 1) + shape)
    w = p.number(*shape)
    step: Step = p.draw(
        lambda h: h * w,
        lambda h: w + h,
        lambda h: w - h,
        lambda h: h / (2 + w.square()),
        lambda h: torch.maximum(h, w),
        lambda h: torch.lerp(h, torch.tanh(h), w),
        lambda h: torch.where(h > 0, h, w),
        lambda h: torch.addcmul(h, h, w),
        lambda h: (h + 0).mul_(w),
        lambda h: (2 * h).add_(w, alpha=0.5),
    )
    p.add(f"elementwise {shape}", p.shape, step)


def _residual(p: Program) -> None:
    if p.steps:
        inner = p.steps.pop()
        if p.words[-1].startswith(("square", "elementwise", "norm", "relu", "attention")):
            p.steps.append(lambda h: h.tanh() + inner(h.tanh()))
            p.words.append("residual")
        else:
            p.steps.append(inner)


def _again(p: Program) -> None:
    if p.words and p.words[-1].startswith(("square", "norm")):
        p.add(p.words[-1] + " again", p.shape, p.steps[-1])


def _relu(p: Program) -> None:
    p.add("relu", p.shape, lambda h: F.relu(h * 1.1 + 0.1, inplace=True))


def _tanh(p: Program) -> None:
    p.add("tanh", p.shape, torch.tanh)


def _batch_reversed(p: Program) -> None:
    inner = nn.Linear(p.shape[-1], p.shape[-1])
    inner_ = p.part(f"linear {p.shape[-1]} {p.shape[-1]}", inner)
    p.add("square, reversed", p.shape, lambda h: inner_(h.flip(0)).flip(0))


def _twice_as_many(p: Program) -> None:
    width = p.shape[-1]
    inner = p.part(f"linear {width} {width}", nn.Linear(width, width))
    p.add("square, twice as many", p.shape, lambda h: torch.sub(*inner(torch.cat([h, h.cos()])).tanh().chunk(2)))


# Vectors.


def _linear(p: Program) -> None:
    width, bias = p.draw(1, 2, p.shape[-1]), p.draw(True, False)
    word = "square" if width == p.shape[-1] else "linear"
    inner = p.part(f"linear {p.shape[-1]} {width}", nn.Linear(p.shape[-1], width, bias=bias))
    p.add(word, (*p.shape[:-1], width), inner)


def _tied(p: Program) -> None:
    width = p.shape[-1]
    w = p.number(2, width)
    p.add("square, tied", p.shape, lambda h: F.linear(F.linear(h, w).tanh(), w.T) + h @ w.T @ w)


def _layer_norm(p: Program) -> None:
    axes = p.draw(*range(1, len(p.shape) + 1))
    if math.prod(p.shape[-axes:]) == 1:  # nothing is left but rounding
        return
    if p.draw(True, False):
        norm: nn.Module = nn.LayerNorm(p.shape[-axes:], bias=p.draw(True, False))
    else:
        norm = nn.RMSNorm(p.shape[-axes:], eps=1e-3)
    p.add("norm", p.shape, p.part(f"{type(norm).__name__} {p.shape[-axes:]}", norm))


def _prepended(p: Program) -> None:
    token = p.number(1, *p.shape)
    if len(p.shape) == 2 and p.crowded:
        p.add("prepended", (2 * p.shape[0], p.shape[1]), lambda h: torch.cat([token.expand_as(h), h], 1))


def _into_sequence(p: Program) -> None:
    if len(p.shape) == 1:
        p.add("sequence", (2, *p.shape), lambda h: torch.stack([h, h.sin()], 1))


# Sequences (T, D).


def _transposed(p: Program) -> None:
    p.add("transposed", p.shape[::-1], lambda h: h.transpose(1, 2))


def _sequence_first(p: Program) -> None:
    width = p.shape[-1]
    inner = p.part(f"linear {width} {width}", nn.Linear(width, width))
    p.add("square, sequence first", p.shape, lambda h: inner(h.transpose(0, 1).contiguous()).transpose(0, 1))


def _attention(p: Program) -> None:
    width = p.shape[-1]
    first = p.draw(True, False)
    inner = p.part(f"attention {width} {first}", nn.MultiheadAttention(width, 1, batch_first=first))

    def step(h: Tensor) -> Tensor:
        h = h if first else h.transpose(0, 1)
        y: Tensor = inner(h, h, h, need_weights=False)[0]
        return y if first else y.transpose(0, 1)

    p.add("attention", p.shape, step)


def _mixed(p: Program) -> None:
    w = p.number(p.shape[0], p.shape[0])
    step: Step = p.draw(
        lambda h: w @ h, lambda h: torch.einsum("st,ntd->nsd", w, h), lambda h: torch.einsum("ntd,ts->nsd", h, w)
    )
    p.add("square of positions", p.shape, step)


def _series(p: Program) -> None:
    t, d = p.shape
    size = p.draw(*range(1, min(t, 3) + 1))
    conv = nn.Conv1d(d, 2, size, padding=size // 2, bias=p.draw(True, False))
    inner = p.part(f"series {d} {size}", conv)
    p.add("series", (t + 2 * (size // 2) - size + 1, 2), lambda h: inner(h.transpose(1, 2)).transpose(1, 2))


def _joined(p: Program) -> None:
    p.add("joined", (p.shape[0] * p.shape[1],), lambda h: h.flatten(1))


def _shortened(p: Program) -> None:
    """Nothing flows back to the positions left out, as behind a class token or the last token of a text."""
    start = p.draw(*range(p.shape[0]))
    stop = p.draw(*range(start + 1, p.shape[0] + 1))
    p.add(f"{start}:{stop}", (stop - start, *p.shape[1:]), lambda h: h[:, start:stop])


def _averaged(p: Program) -> None:
    p.add("averaged", p.shape[1:], lambda h: h.mean(1))


# Images (C, H, W).


def _convolution(p: Program) -> None:
    c, h, w = p.shape
    groups = p.draw(*(g for g in range(1, c + 1) if c % g == 0))
    out, dilation, stride, padding = groups * p.draw(1, 2), p.draw(1, 2), p.draw(1, 2), p.draw(0, 1, 2)
    size = (p.draw(1, 2, 3), p.draw(1, 2))
    spans = [length + 2 * padding - dilation * (k - 1) - 1 for length, k in zip((h, w), size, strict=True)]
    if min(spans) < 0:
        return
    mode: Any = p.draw("zeros", "circular") if padding <= min(h, w) else "zeros"
    conv = nn.Conv2d(c, out, size, stride, padding, dilation, groups, p.draw(True, False), mode)
    key = f"convolution {c} {out} {size} {stride} {padding} {dilation} {groups} {mode}"
    p.add("convolution", (out, *(s // stride + 1 for s in spans)), p.part(key, conv))


def _upward(p: Program) -> None:
    c, h, w = p.shape
    if h * w > 30 or not p.crowded:  # of one sample: see the test of it below
        return
    stride, size, extra = p.draw(1, 2), p.draw(1, 2), p.draw(0, 1)
    conv = nn.ConvTranspose2d(c, 2, size, stride, output_padding=extra if stride > 1 else 0)
    shape = tuple((k - 1) * stride + size + (extra if stride > 1 else 0) for k in (h, w))
    p.add("upward", (2, *shape), p.part(f"upward {c} {size} {stride} {extra}", conv))


def _norm_of_images(p: Program) -> None:
    c = p.shape[0]
    kinds: list[nn.Module] = [nn.BatchNorm2d(c), nn.GroupNorm(p.draw(1, c), c)]
    if p.shape[1] * p.shape[2] > 1:
        kinds.append(nn.InstanceNorm2d(c, affine=True))
    norm = p.draw(*kinds)
    p.add("norm", p.shape, p.part(f"{type(norm).__name__} {c} {getattr(norm, 'num_groups', 0)}", norm))


def _slopes(p: Program) -> None:
    p.add("slopes", p.shape, p.part(f"slopes {p.shape[0]}", nn.PReLU(p.draw(1, p.shape[0]))))


def _patches(p: Program) -> None:
    p.add("patches", (p.shape[1] * p.shape[2], p.shape[0]), lambda h: h.flatten(2).transpose(1, 2))


ANYWHERE = (_elementwise, _elementwise, _residual, _again, _relu, _tanh, _batch_reversed, _twice_as_many)
VECTORS = (_linear, _tied, _layer_norm, _into_sequence)
SEQUENCES = (_linear, _tied, _layer_norm, _transposed, _sequence_first, _attention, _mixed, _series, _joined,
             _averaged, _shortened, _prepended)  # fmt: skip
IMAGES = (_convolution, _convolution, _convolution, _upward, _norm_of_images, _slopes, _patches)


class Drawn:
    """A program and how to measure it."""

    def __init__(self, draw: Draw, blocks: bool = False) -> None:
        torch.manual_seed(draw(st.integers(0, 2**16)))
        words = draw(st.booleans())
        shape = (
            (draw(st.integers(1, 4)),) if words else draw(st.sampled_from([(4,), (3, 2), (3, 3), (2, 5, 4), (1, 3, 3)]))
        )
        self.samples, self.columns = draw(st.integers(1, 4)), draw(st.sampled_from([0, 1, 3]))
        self.program = Program(
            draw,
            shape,
            draw(st.sampled_from([1, 3])) if words else 0,
            crowded=self.samples > 1 and self.columns != 1 and not blocks,
        )
        for _ in range(draw(st.integers(1, 5))):
            self.program.grow()
        if not list(self.program.parameters()):
            _linear(self.program)
        lively(self.program.double())
        self.words, self.inputs = words, shape
        self.outputs = draw(st.integers(1, 3))
        self.layout = draw(st.sampled_from(["full", "trace", "per_output", "sum"]))
        self.by_layer, self.weighted = draw(st.booleans()), draw(st.booleans())

    def __repr__(self) -> str:
        sizes = f"{self.samples} and {self.columns} samples of {self.inputs}, {self.outputs} outputs"
        return f"{self.program!r} on {sizes}, {self.layout}, {self.by_layer=}, {self.weighted=}"

    def batch(self, n: int) -> Tensor:
        return torch.randint(6, (n, *self.inputs)) if self.words else torch.randn(n, *self.inputs, dtype=torch.float64)

    def head(self, m: nn.Module, x: Tensor) -> Tensor:
        h = m(x).flatten(1)
        i = torch.arange(h.shape[1], dtype=h.dtype)
        return torch.stack([(torch.tanh(h) * torch.cos((c + 1) * i + c)).sum(1) for c in range(self.outputs)], 1)


drawn = st.composite(Drawn)


@pytest.fixture(autouse=True, scope="module")
def _unchecked() -> Iterator[None]:
    """Type checks at run time would take most of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def agree(case: Drawn) -> None:
    x, x2 = case.batch(case.samples), case.batch(case.columns) if case.columns else None
    d = {name: torch.rand_like(p) for name, p in case.program.named_parameters()} if case.weighted else None

    def ntk(engine: Any) -> dict[str, Tensor]:
        found = empirical_ntk(
            case.program,
            x,
            x2,
            forward=case.head,
            engine=engine,
            outputs=case.layout,
            by_layer=case.by_layer,
            preconditioner=d,
        )
        return found if case.by_layer else {"": found}

    got = ntk("structured")
    for wanted in (ntk("rows"), *_by_transforms(case, ntk)):
        assert got.keys() == wanted.keys()
        # A parameter without influence (a bias before a norm) has a kernel of rounding alone.
        floor = 1e-12 * max(float(k.abs().max()) for k in wanted.values())
        for name, kernel in wanted.items():
            assert_close(got[name], kernel, 1e-10, floor)


def _by_transforms(case: Drawn, ntk: Callable[[Any], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    # torch.func's own rule for the slopes' gradient is wrong where N = C, and refuses where it is not.
    if "slopes" in case.program.words:
        return []
    try:
        return [ntk("reference")]
    except NetworkError as refusal:
        # Samples one at a time have other shapes, on which some broadcasts of tiny parameters fail.
        return [] if "torch.func refused" in str(refusal) else [{"refused": torch.empty(0)}]


@settings(max_examples=30)
@given(case=drawn())
def test_networks_drawn_at_random_agree_with_autograd(case: Drawn) -> None:
    agree(case)


@pytest.mark.slow
@settings(max_examples=500)
@given(case=drawn())
def test_many_networks_drawn_at_random_agree_with_autograd(case: Drawn) -> None:
    agree(case)


@settings(max_examples=30)
@given(case=drawn(), data=st.data())
def test_permuting_samples_permutes_the_kernel(case: Drawn, data: st.DataObject) -> None:
    order, x = data.draw(st.permutations(range(case.samples))), case.batch(case.samples)
    kernels = [empirical_ntk(case.program, x, forward=case.head, engine="structured") for x in (x, x[order])]
    assert_close(kernels[1], kernels[0][order][:, :, order], 1e-11, 1e-300)


@settings(max_examples=30)
@given(case=drawn(blocks=True), limit=st.sampled_from([1, 2000, 20000]))
def test_blocks_of_samples_change_nothing(case: Drawn, limit: int) -> None:
    x, x2 = case.batch(case.samples), case.batch(case.columns) if case.columns else None
    options: dict[str, Any] = {"forward": case.head, "outputs": case.layout, "engine": "structured"}
    whole = empirical_ntk(case.program, x, x2, **options)
    assert_close(empirical_ntk(case.program, x, x2, memory_limit=limit, **options), whole, 1e-11, 1e-300)


@settings(max_examples=30)
@given(case=drawn(), way=st.sampled_from(["gradients", "pairs"]), size=st.sampled_from([1, 200, 2**20]))
def test_the_route_changes_nothing(case: Drawn, way: str, size: int) -> None:
    x, x2 = case.batch(case.samples), case.batch(case.columns) if case.columns else None
    options: dict[str, Any] = {"forward": case.head, "outputs": case.layout, "engine": "structured"}
    usual = empirical_ntk(case.program, x, x2, **options)
    with pytest.MonkeyPatch.context() as patch:
        # One position is always a product of products: a bias may share it.
        patch.setattr(contraction, "route", lambda x, *_: "hadamard" if x.t == x.s == 1 else way)
        patch.setattr(contraction, "BLOCK_BYTES", size)
        found = measured(case.program, x, x2, **options)
    assert {line.route for line in found.lines} <= {
        way,
        "hadamard",
        "per-sample gradients",
        "rows of the table",
        "not reached",
    }
    assert_close(found.values, usual, 1e-11, 1e-300)


@settings(max_examples=30)
@given(case=drawn(), formed=st.sampled_from(["smaller", "all", "none"]))
def test_what_is_held_for_a_full_kernel_changes_nothing(case: Drawn, formed: str) -> None:
    held_matters(case, formed)


@pytest.mark.slow
@settings(max_examples=300)
@given(case=drawn(), formed=st.sampled_from(["smaller", "all", "none"]))
def test_what_is_held_for_many_full_kernels_changes_nothing(case: Drawn, formed: str) -> None:
    held_matters(case, formed)


def _possible(unit: Unit, *_: Any) -> bool:
    return unit.kind != "table" and unit.bias is None and bool(unit.uses)


def held_matters(case: Drawn, formed: str) -> None:
    x, x2 = case.batch(case.samples), case.batch(case.columns) if case.columns else None
    d = {name: torch.rand_like(p) for name, p in case.program.named_parameters()} if case.weighted else None
    options: dict[str, Any] = {"forward": case.head, "outputs": "full", "engine": "structured", "preconditioner": d}
    usual = empirical_ntk(case.program, x, x2, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "STACKED_BYTES", 0)
        if formed != "smaller":
            patch.setattr(held, "_lean", _possible if formed == "all" else lambda *_: False)
        found = empirical_ntk(case.program, x, x2, **options)
    assert_close(found, usual, 1e-11, 1e-300)


def test_a_full_kernel_holds_the_jacobian_of_early_convolutions_and_the_gradients_of_late_ones() -> None:
    early, late = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 64, 3, padding=1)
    model = nn.Sequential(early, nn.Tanh(), nn.AvgPool2d(8), late, nn.Flatten(), nn.Linear(64 * 16, 5)).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    network = Network(model)
    side = recorded(network, x)
    units = units_of(network, [side], str, weighted=False)
    formed = {unit.parameter for unit in held.parted(units, side, network, torch.float64)[0]}
    assert formed == {"0.weight", "0.bias"}
    rows, results = sum(p.numel() for p in early.parameters()), 64 * 16 + 5
    one = 4 * 32 * 32 + results
    assert held.needed(side, "full", units, network, torch.float64) == 8 * 3 * (one + 5 * (rows + results))
    same_as_rows(model, x)
    same_as_rows(model, x, x[:2] + 1)


@settings(max_examples=20)
@given(case=drawn(), scale=st.floats(-50, 50))
def test_scaling_an_output_scales_its_kernel_by_the_square(case: Drawn, scale: float) -> None:
    x = case.batch(case.samples)
    got = empirical_ntk(case.program, x, forward=lambda m, x: scale * case.head(m, x), engine="structured")
    assert_close(got, scale**2 * empirical_ntk(case.program, x, forward=case.head), 1e-11, 1e-300)


@settings(max_examples=20)
@given(case=drawn())
def test_the_same_call_gives_the_same_bits(case: Drawn) -> None:
    x = case.batch(case.samples)
    options: dict[str, Any] = {"forward": case.head, "outputs": case.layout, "engine": "structured"}
    first, second = (empirical_ntk(case.program, x, **options) for _ in range(2))
    assert torch.equal(first, second)


@settings(max_examples=30)
@given(case=drawn())
def test_single_precision_errs_by_a_millionth_at_most(case: Drawn) -> None:
    x = case.batch(case.samples)
    model = case.program.float()
    x = x if case.words else x.float()
    options: dict[str, Any] = {"forward": case.head, "outputs": case.layout, "engine": "structured"}
    double = empirical_ntk(model, x, **options)
    single = empirical_ntk(model, x, dtype=torch.float32, **options)
    assert single.dtype == torch.float32
    # Both use the Jacobian of the float32 model; one multiplies it in float32 and sums in float64.
    assert_close(single.double(), double, 1e-6, 1e-30)


# Where the samples are.

PLACES = [
    case
    for case in (*ZOO, *ATTENTION)
    if case.name
    in {
        "linear of as many features as samples",
        "linear of axes swapped",
        "samples on the second axis",
        "linear of rows joined the other way",
        "attention of as many positions as samples",
        "encoder, sequence first",
        "windows before samples",
    }
]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("case", PLACES, ids=str)
def test_samples_are_found_wherever_they_lie(case: Case, n: int) -> None:
    shape = case.inputs().shape[1:]
    # As many positions as samples where the network takes any number of them.
    shape = (n, *shape[1:]) if "attention" in case.name or "encoder" in case.name else shape
    model, x = case.model(), torch.randn(n, *shape, dtype=torch.float64)
    wanted = empirical_ntk(model, x, forward=case.forward, engine="rows")
    for layout in ("full", "trace"):
        got = empirical_ntk(model, x, forward=case.forward, engine="structured", outputs=layout)
        assert_close(got, wanted if layout == "full" else torch.einsum("ncmc->nm", wanted))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("name", ["one expert", "two experts", "experts by mask", "experts gathered"])
def test_tokens_are_found_wherever_they_are_sent(name: str, n: int) -> None:
    case = next(case for case in ATTENTION if case.name == name)
    torch.manual_seed(0)
    model, x = case.model(), torch.randn(n, 3, 4, dtype=torch.float64)
    wanted = empirical_ntk(model, x, forward=case.forward, engine="rows")
    assert_close(empirical_ntk(model, x, forward=case.forward), wanted)


def _batch_norm() -> tuple[nn.Module, Tensor]:
    return cnn_batchnorm().double().eval(), torch.randn(4, 2, 6, 6, dtype=torch.float64)


def test_statistics_of_the_batch_are_refused_by_name_and_left_to_autograd() -> None:
    model, x = _batch_norm()
    with pytest.raises(
        NetworkError, match=r"samples of the batch depend on each other in conv2d \(0\.weight, 0\.bias\)"
    ):
        empirical_ntk(model, x, mode="train", engine="structured")
    found = measured(model, x, mode="train")
    assert (found.engine, found.reason) == ("batched", "training mode may couple the samples of a batch")
    assert_close(found.values, empirical_ntk(model, x, mode="train", engine="rows"))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["full", "trace", "per_output", "sum"])
def test_the_operator_has_the_same_kernel(layout: Any, weighted: bool, mode: Any) -> None:
    model, x = _batch_norm()
    d = {name: torch.rand_like(p) for name, p in model.named_parameters()} if weighted else None
    options: dict[str, Any] = {"outputs": layout, "preconditioner": d, "mode": mode}
    found = measured(model, x, engine="operator", **options)
    assert found.engine == "operator"
    assert_close(found.values, empirical_ntk(model, x, **options))


# What must not be wrong without a word.


def same_as_rows(model: nn.Module, x: Tensor, x2: Tensor | None = None, **options: Any) -> None:
    for layout in ("full", "trace", "per_output"):
        wanted = empirical_ntk(model, x, x2, engine="rows", outputs=layout, **options)
        assert_close(empirical_ntk(model, x, x2, outputs=layout, **options), wanted)


def vectors(n: int) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def test_batches_that_reach_other_parameters_have_another_cross_kernel() -> None:
    experts = Lambda(lambda m, x: m.e[int(x.mean() > 0)](x), e=nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]))
    x = vectors(5).abs()
    same_as_rows(experts.double(), x, -x)


def test_coupling_of_later_outputs_alone_is_noticed_with_another_forward() -> None:
    def apart(m: nn.Module, x: Tensor) -> Tensor:
        h = m(x)
        return torch.stack([h.sum(1), h.tanh().sum(1)], 1)

    def coupled(m: nn.Module, x: Tensor) -> Tensor:
        h = m(x)
        return torch.stack([h.sum(1), (h - h.mean(0)).tanh().sum(1)], 1)

    model, x = nn.Linear(4, 3).double(), vectors(5)
    for forward in (apart, coupled):
        same_as_rows(model, x, forward=forward)


def test_an_axis_that_the_first_output_leaves_open_is_found_by_the_others() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h, n = m(x.transpose(0, 1)), torch.arange(len(x))
        return torch.stack([h[n, n].sum(1), h.tanh().sum((0, 2))], 1)

    same_as_rows(nn.Linear(4, 3).double(), torch.randn(5, 5, 4, dtype=torch.float64), forward=forward)


def _of_equal_scale(n: int) -> tuple[int, int]:
    # Neither the first, the middle nor the last sample, which the self-check looks at.
    scale = samples.scales(n, torch.float64, torch.device("cpu"))
    inner = [i for i in range(n) if i not in (0, n // 2, n - 1)]
    return next((i, j) for i in inner for j in inner if i < j and scale[i] == scale[j])


@pytest.mark.parametrize("kind", ["swapped", "coupled"])
def test_samples_of_equal_scale_are_told_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samples._POWERS, torch.float64, 16)  # as few as half precision nearly has
    i, j = _of_equal_scale(40)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if len(x) < 40:
            y: Tensor = m(x)
            return y
        order = torch.arange(40)
        order[i], order[j] = j, i
        y = m(x[order])[order] if kind == "swapped" else m(x)
        return y if kind == "swapped" else y.index_add(0, torch.tensor([i]), y[j : j + 1])

    same_as_rows(nn.Linear(4, 3).double(), vectors(40), forward=forward)


@pytest.mark.parametrize("kind", ["channels last", "columns"])
def test_a_preconditioner_fits_parameters_in_any_layout_of_memory(kind: str) -> None:
    if kind == "columns":
        model: nn.Module = nn.Linear(4, 3).double()
        model.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64).T)
        x = vectors(5)
    else:
        model = nn.Conv2d(2, 4, 3).double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    d = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    same_as_rows(model, x, preconditioner=d)


def test_as_many_rows_as_samples_may_all_belong_to_one_of_them() -> None:
    # What happens to experts, whose tokens are as many as the samples by chance.
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([x[0].sum(0)[:3], m(x[1]).tanh().sum(0)])

    same_as_rows(nn.Linear(4, 3).double(), torch.randn(2, 2, 4, dtype=torch.float64), forward=forward)


# What is left to autograd without need.


@pytest.mark.parametrize("kind", ["linear", "addmm", "positions"])
def test_a_bias_may_be_broadcast(kind: str) -> None:
    functions: dict[str, Any] = {
        "linear": lambda m, x: F.linear(x, m.w, m.b),
        "addmm": lambda m, x: torch.addmm(m.b, x, m.w.T),
        "positions": lambda m, x: F.linear(x[:, None].expand(-1, 2, -1), m.w, m.c),
    }
    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in {"w": (3, 4), "b": (1,), "c": (2, 3)}.items()}
    model = Lambda(functions[kind], **parts).double()
    _followed(model, vectors(5))


def _followed(model: nn.Module, x: Tensor, x2: Tensor | None = None) -> None:
    got = empirical_ntk(model, x, x2, engine="structured")
    assert_close(got, empirical_ntk(model, x, x2, engine="rows"))


def test_a_token_is_followed_in_batches_of_one_and_of_many() -> None:
    tokened = Lambda(
        lambda m, x: torch.cat([m.t.expand(len(x), 3), m.a(x)], 1), t=nn.Parameter(torch.randn(1, 3)), a=nn.Linear(4, 3)
    )
    _followed(tokened.double(), vectors(5), vectors(1))


def test_as_many_rows_as_samples_are_followed() -> None:
    def rows(m: Any, x: Tensor) -> Tensor:
        return torch.stack([x[0].sum(0)[:3], m.a(x[1]).tanh().sum(0)])

    _followed(Lambda(rows, a=nn.Linear(4, 3)).double(), torch.randn(2, 2, 4, dtype=torch.float64))


def test_an_operation_without_rows_is_followed() -> None:
    model = Lambda(lambda m, x: m.a(x) + m.b(x[:, :0]).sum(1), a=nn.Linear(4, 3), b=nn.Linear(4, 3)).double()
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    got = empirical_ntk(model, x, engine="structured")
    assert_close(got, empirical_ntk(model, x, engine="rows"))


def test_a_transposed_convolution_of_one_sample_is_followed() -> None:
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    _followed(nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh()).double(), x)


@pytest.mark.parametrize("way", ["gradients", "pairs"])
@pytest.mark.parametrize("positions", [1, 3])
def test_outputs_may_reach_different_uses_of_a_weight(
    way: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        once = torch.tanh(m(x))
        return torch.stack([once.sum((1, 2)), m(once).sum((1, 2)), (once * m(once)).sum((1, 2))], 1)

    monkeypatch.setattr(contraction, "route", lambda *_: way)
    x = torch.randn(5, positions, 4, dtype=torch.float64)
    same_as_rows(nn.Linear(4, 4).double(), x, forward=forward)
    same_as_rows(nn.Linear(4, 4).double(), x, x[:3] + 1, forward=forward)


class Read(nn.Module):
    """A transformer block that is read at these positions."""

    def __init__(self, at: slice) -> None:
        super().__init__()
        self.at = at
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)[:, self.at].sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("at", "way"),
    [
        (slice(0, 1), "hadamard"),
        (slice(-1, None), "hadamard"),
        (slice(2, 4), "per position"),
        (slice(0, 7, 3), "per position"),
    ],
)
def test_positions_that_no_gradient_reaches_are_left_out(at: slice, way: str) -> None:
    model, x = Read(at).double(), torch.randn(5, 7, 4, dtype=torch.float64)
    same_as_rows(model, x)
    same_as_rows(model, x, x[:3] + 1)
    routes = {line.parameter: line.route for line in measured(model, x, outputs="trace", engine="structured").lines}
    assert (routes["block.linear1.weight"] == "hadamard") == (way == "hadamard")
    assert routes["block.self_attn.in_proj_weight"] != "hadamard"


@pytest.mark.parametrize(("terms", "products"), [(30, 5), (60, 3), (90, 2), (2048, 1)])
def test_gradients_wait_for_those_of_as_many_outputs_as_one_product_takes(
    terms: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[slice] = []

    def counted(gram: Any, left: Any, right: Any, classes: slice, **options: Any) -> Any:
        calls.append(classes)
        return contraction.contract(gram, left, right, classes, **options)

    monkeypatch.setattr(engine, "contract", counted)
    monkeypatch.setattr(held, "STACKED_BYTES", 0)
    monkeypatch.setattr(engine, "INNER", terms)
    monkeypatch.setattr(waiting, "INNER", terms)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    empirical_ntk(model, x, outputs="trace")  # checked against autograd at its first use
    calls.clear()
    found = empirical_ntk(model, x, outputs="trace")
    assert_close(found, empirical_ntk(model, x, outputs="trace", engine="rows"))
    # All five outputs of the last layer fit at any of these sizes.
    assert len(calls) == products + 1
    assert sorted(k for one in calls for k in range(5)[one]) == sorted([*range(5), *range(5)])
    cross = empirical_ntk(model, x, x[:3] + 1, outputs="trace")
    assert_close(cross, empirical_ntk(model, x, x[:3] + 1, outputs="trace", engine="rows"))


@pytest.mark.parametrize("layout", ["full", "trace"])
def test_long_sums_over_pairs_of_positions_end_in_double_precision(layout: Any) -> None:
    # All terms of one sign, so that rounding adds up instead of cancelling.
    a, g = torch.rand(2, 64, 3) + 0.5, torch.rand(2, 2, 64, 700) + 0.5
    factors = contraction.Factors((2, 64, 3), 700, 2, gradient=lambda: g, inputs=lambda: a)
    gram = contraction.Gram(layout, (2, 2, 2), symmetric=True, work=torch.float32, device=a.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "route", lambda *_: "pairs")
        contraction.contract(gram, factors, None, slice(0, 2))
    rows = torch.einsum("nctr,ntq->ncrq", g.double(), a.double()).flatten(2)
    wanted = torch.einsum("ncp,mdp->ncmd", rows, rows)
    assert_close(gram.finished(), wanted if layout == "full" else torch.einsum("ncmc->nm", wanted), 2e-7)
