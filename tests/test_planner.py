"""A plan names the engine that will run, what each layer costs, and never more than a few passes are spent on it."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import ntk_monitor as ntk
from ntk_monitor.engines.structured import blocks as blockwise
from ntk_monitor.engines.structured.engine import structured_gram
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.kernel import measured
from ntk_monitor.planner import ENGINES, Plan, plan
from tests.cases import CASES, Case, Lambda

BY_NAME = {case.name: case for case in CASES}


def mlp(width: int = 16, outputs: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(2), Lambda(_mean)
    )


def _mean(_: nn.Module, x: Tensor) -> Tensor:
    return x.mean(-1)


def work(p: Plan) -> float:
    """Seconds that grow with the problem: those of the lines."""
    return sum(line.seconds for line in p.lines)


def test_the_table_has_a_row_for_each_engine_and_one_is_chosen() -> None:
    p = plan(mlp(), torch.randn(5, 4))
    assert tuple(row.engine for row in p.rows) == ENGINES
    assert [row.engine for row in p.rows if row.chosen] == ["structured"] == [p.chosen]
    assert all(row.seconds > 0 and row.bytes > 0 and row.why for row in p.rows)
    assert (p.samples, p.outputs, p.parameters, p.blocks, p.layout) == (5, 3, 4 * 16 + 16 + 16 * 3 + 3, 1, "full")


def test_seconds_and_bytes_are_those_of_the_row() -> None:
    p = plan(mlp(), torch.randn(5, 4))
    assert p.seconds() == p.seconds("structured") == p.rows[0].seconds
    assert p.bytes("rows") == next(row.bytes for row in p.rows if row.engine == "rows")
    assert p.seconds() == pytest.approx(p.passes + work(p))
    with pytest.raises(InputError, match="engine must be one of"):
        p.seconds("fast")


def test_lines_say_how_each_parameter_is_contracted() -> None:
    lines = {line.parameter: line for line in plan(cnn(), torch.randn(3, 3, 6, 6), outputs="trace").lines}
    assert set(lines) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert lines["2.weight"].operations == ("conv2d",)
    assert lines["2.weight"].route in ("gradients", "pairs")
    assert lines["0.bias"].route == "per-sample gradients"
    assert plan(mlp(), torch.randn(3, 4)).lines[0].route == "hadamard"


PLANNED = [
    ("mlp", "full"),
    ("mlp", "sum"),
    ("cnn with batch norm, in-place relu, dropout", "trace"),
    ("cnn with batch norm, in-place relu, dropout", "per_output"),
    ("transformer encoder", "full"),
    ("lstm", "trace"),
    ("embedding tied to the output", "full"),
    ("module applied twice", "per_output"),
    ("weight norm", "trace"),
    ("transposed convolution", "full"),
    ("complex numbers inside", "trace"),
    ("checkpointing", "full"),
    ("samples coupled", "full"),
    ("dict inputs", "sum"),
]


@pytest.mark.parametrize(("name", "outputs"), PLANNED)
def test_the_plan_is_what_happens(name: str, outputs: Any) -> None:
    case = BY_NAME[name]
    p = plan(case.model(), case.inputs(), forward=case.forward, outputs=outputs)
    found = measured(case.model(), case.inputs(), forward=case.forward, outputs=outputs)
    assert p.chosen == found.engine
    assert p.parameters == found.parameters
    assert p.kernel == found.values.numel() * 8
    if found.lines:
        planned = [(line.parameter, line.operations, line.route) for line in p.lines]
        assert planned == [(line.parameter, line.operations, line.route) for line in found.lines]


def test_the_kernel_of_losses_is_planned() -> None:
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    p = plan(mlp(), x, outputs="loss", targets=y, loss="cross_entropy")
    assert (p.outputs, p.kernel, p.layout) == (1, 5 * 5 * 8, "loss")
    assert p.chosen == measured(mlp(), x, outputs="loss", targets=y, loss="cross_entropy").engine


@pytest.mark.parametrize("name", ["samples coupled", "checkpointing"])
def test_a_refusal_says_why_and_the_next_engine_is_chosen(name: str) -> None:
    case = BY_NAME[name]
    p = plan(case.model(), case.inputs(), forward=case.forward)
    row = p.rows[0]
    assert math.isinf(row.seconds)
    assert row.why == measured(case.model(), case.inputs(), forward=case.forward).reason
    assert p.chosen == "batched"
    assert row.why in str(p)


def test_training_mode_is_left_to_autograd() -> None:
    p = plan(cnn(), torch.randn(3, 3, 6, 6), mode="train")
    assert p.chosen == "batched"
    assert "training mode" in p.rows[0].why


class _Doubled(torch.autograd.Function):
    """Without a batching rule, and with a backward pass that cannot be vectorised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g if float(g.sum()) != float("inf") else g


def test_where_backward_passes_cannot_be_vectorised_rows_remain() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        doubled: Tensor = _Doubled.apply(m.body(x))  # type: ignore[no-untyped-call, operator]
        return doubled - doubled.mean(0)

    case = Case("vectorised", lambda: Lambda(function, body=nn.Linear(4, 2)), lambda dtype: torch.randn(3, 4).to(dtype))
    p = plan(case.model(), case.inputs())
    assert p.chosen == "rows" == measured(case.model(), case.inputs()).engine
    assert math.isinf(p.seconds("batched"))
    assert {line.route for line in p.lines} == {"rows"}


def test_parameters_that_fall_back_are_listed_with_their_cost() -> None:
    case = BY_NAME["complex numbers inside"]
    p = plan(case.model(), case.inputs(), forward=case.forward)
    missed = [line for line in p.lines if line.route == "rows"]
    assert missed
    text = str(p)
    assert "not recognised, hence" in text
    for line in missed:
        assert line.seconds > 0
        assert line.parameter in text.split("not recognised, hence")[1]


def test_the_report_shows_every_engine() -> None:
    text = str(plan(mlp(), torch.randn(5, 4)))
    for engine in ENGINES:
        assert f"\n{engine}" in text
    assert "seconds" in text
    assert "memory" in text
    assert "0.weight  (linear, hadamard)" in text
    assert "5 samples, 3 outputs, 131 parameters" in text


Sized = Callable[[int], Plan]


def _samples(n: int) -> Plan:
    return plan(mlp(256), torch.randn(n, 4))


def _outputs(c: int) -> Plan:
    return plan(mlp(256, c), torch.randn(16, 4), params="^0")


def _positions(t: int) -> Plan:
    model = Lambda(lambda m, x: m.head(torch.tanh(m.body(x)).mean(1)), body=nn.Linear(8, 64), head=nn.Linear(64, 2))
    return plan(model, torch.randn(8, 4 * t, 8))


@pytest.mark.parametrize("sized", [_samples, _outputs, _positions])
def test_more_of_anything_costs_more(sized: Sized) -> None:
    plans = [sized(size) for size in (8, 16, 32, 64)]
    for smaller, larger in pairwise(plans):
        for engine in ENGINES:
            assert smaller.seconds(engine) < larger.seconds(engine)
            assert smaller.bytes(engine) <= larger.bytes(engine)


@pytest.mark.parametrize(
    ("sized", "least", "most"), [(_samples, 1.0, 2.05), (_outputs, 1.0, 2.05), (_positions, 0.3, 2.05)]
)
def test_lines_grow_with_sensible_exponents(sized: Sized, least: float, most: float) -> None:
    # Kernels of all pairs of outputs are quadratic in N and C; contractions lie between T and T².
    exponent = math.log(work(sized(1024)) / work(sized(256))) / math.log(4)
    assert least <= exponent <= most


def test_rows_cost_a_backward_pass_for_each_output_of_each_sample() -> None:
    few, many = plan(cnn(), torch.randn(8, 3, 16, 16)), plan(cnn(), torch.randn(32, 3, 16, 16))
    exponent = math.log(many.seconds("rows") / few.seconds("rows")) / math.log(4)
    assert 1.0 <= exponent <= 2.0


@pytest.mark.parametrize(("outputs", "limit"), [("full", 2**15), ("trace", 2**13)])
def test_blocks_stay_within_the_limit_and_are_those_of_the_engine(
    limit: int, outputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = cnn(), torch.randn(5, 3, 6, 6)
    p = plan(model, x, outputs=outputs, memory_limit=limit)
    whole = plan(model, x, outputs=outputs)
    assert whole.blocks == 1
    assert p.blocks > 1
    assert p.seconds() > whole.seconds()
    assert p.seconds("rows") >= whole.seconds("rows")
    width = -(-5 // p.blocks)
    assert p.rows[0].limited <= limit or width == 1
    blocks: list[int] = []

    def counted(network: Any, inputs: Any, other: Any, *rest: Any, **options: Any) -> Any:
        found = structured_gram(network, inputs, other, *rest, **options)
        blocks.append(len(inputs))
        return found

    monkeypatch.setattr(blockwise, "structured_gram", counted)
    assert measured(model, x, outputs=outputs, memory_limit=limit).engine == "structured"
    sizes = [min(width, 5 - start) for start in range(0, 5, width)]
    assert sorted(blocks) == sorted(size for i, size in enumerate(sizes) for _ in sizes[: i + 1])


def test_jacobian_blocks_stay_within_the_limit() -> None:
    p = plan(mlp(), torch.randn(16, 4), memory_limit=20_000)
    one = 3 * p.parameters * 4
    for row in p.rows[1:4]:
        assert one < row.limited <= 20_000
    assert p.rows[4].limited == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_the_precision_is_not_slower(dtype: torch.dtype) -> None:
    model, x = mlp(256, dtype=dtype), torch.randn(64, 4, dtype=dtype)
    double, single = plan(model, x), plan(model, x, dtype=torch.float32)
    assert double.kernel == single.kernel == (64 * 3) ** 2 * 8
    if dtype == torch.float32:
        assert single.seconds() < double.seconds()
    else:
        assert single.seconds() == double.seconds()


@pytest.mark.parametrize("outputs", ["full", "trace"])
@pytest.mark.parametrize("limit", [None, 2**10])
def test_a_plan_costs_a_few_passes(outputs: Any, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []
    backwards: list[int] = []
    model = mlp()

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        forwards.append(len(x))
        found: Tensor = module(x)
        return found

    original = torch.autograd.grad

    def counted(*args: Any, **options: Any) -> Any:
        backwards.append(1)
        return original(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    plan(model, torch.randn(12, 4), outputs=outputs, memory_limit=limit, forward=forward)
    whole = [n for n in forwards if n > 2]
    assert whole.count(12) == 1
    assert len(whole) <= (1 if limit is None else 2)
    assert len(backwards) == 2


def test_a_plan_leaves_no_trace() -> None:
    model, x = mlp().train(), torch.randn(5, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first, second = plan(model, x), plan(model, x)
    assert str(first) == str(second)
    assert first == second
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_selected_parameters_only() -> None:
    p = plan(mlp(), torch.randn(5, 4), params=["2.bias"])
    assert [line.parameter for line in p.lines] == ["2.bias"]
    assert p.parameters == 3


def test_one_sample_is_planned() -> None:
    assert plan(mlp(), torch.randn(1, 4)).chosen == "structured"


@pytest.fixture
def _untyped() -> Iterator[None]:
    """Wrong options reach the door itself; elsewhere the tests check types before it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("_untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": "everything"}, "outputs must be one of"),
        ({"outputs": "loss"}, "needs targets= and loss="),
        ({"mode": "sleep"}, "mode must be"),
        ({"x": torch.ones(0, 4)}, "sample"),
        ({"forward": lambda m, x: (m(x), m(x))}, "must be one floating tensor"),
        ({"params": ["wieght"]}, "unknown parameters"),
    ],
)
def test_bad_arguments_are_refused_as_by_the_kernel(change: dict[str, Any], message: str) -> None:
    arguments = {"model": mlp(), "x": torch.randn(3, 4), **change}
    with pytest.raises(InputError, match=message):
        plan(**arguments)


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(NetworkError, match="no trainable parameter"):
        plan(mlp().requires_grad_(False), torch.randn(3, 4))


def test_the_front_door_has_it() -> None:
    assert ntk.plan is plan
    assert ntk.Plan is Plan
