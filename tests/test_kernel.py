"""The kernel against double loops over one gradient at a time, in every layout, and the laws every kernel obeys."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor import kernel as door
from ntk_monitor.engines.structured.operations import Elementwise, Matrix
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.kernel import empirical_ntk, measured
from tests import reference
from tests.cases import CASES, Case, N, answer, cnn_batchnorm, samples

BY_NAME = {case.name: case for case in CASES}


def twin(case: Case, dtype: torch.dtype = torch.float64, mode: bool = False) -> Tensor:
    """The kernel of the case by double loops: an untouched network for every sample, or for the batch if coupled."""
    inputs = case.inputs(dtype)
    batches = [inputs] if case.coupled else list(samples(inputs))
    parts = []
    for batch in batches:
        model = case.model(dtype).train(mode)
        parts.append(reference.rows(model, answer(case, model, batch)))
    return reference.ntk({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("engine", ["auto", "rows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_double_precision_matches_the_double_loop(case: Case, engine: Any) -> None:
    got = empirical_ntk(case.model(), case.inputs(), forward=case.forward, engine=engine)
    assert_close(got, twin(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_single_precision_matches_the_double_loop_in_double(case: Case) -> None:
    # A sum of a few dozen products rounded to 2⁻²⁴ each; measured: at most 2e-6.
    got = measured(case.model(torch.float32), case.inputs(torch.float32), forward=case.forward)
    assert got.jacobian_dtype == torch.float32
    assert got.values.dtype == torch.float64
    assert_close(got.values, twin(case), 1e-5)


# What the structured engine refuses: the case, and the reason that is given.
BATCHED = {
    "samples coupled": r"samples of the batch depend on each other in linear \(body\.0\.weight, body\.0\.bias\)",
    "checkpointing": "activation checkpointing computes operations again",
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_engine_that_ran_is_named_with_a_reason(case: Case) -> None:
    found = measured(case.model(), case.inputs(), forward=case.forward)
    if case.name in BATCHED:
        assert found.engine == "batched"
        assert re.search(BATCHED[case.name], found.reason)
        assert found.lines == ()
    else:
        assert found.engine == "structured"
        assert "agrees" in found.reason
        names = [name for name, p in case.model().named_parameters() if p.requires_grad]
        assert [line.parameter for line in found.lines] == names


@pytest.mark.parametrize("name", BATCHED)
def test_the_structured_engine_refuses_what_it_cannot_do_exactly(name: str) -> None:
    case = BY_NAME[name]
    with pytest.raises(
        NetworkError, match=rf'engine="structured" is not exact here: {BATCHED[name]}.*use engine="auto"'
    ):
        empirical_ntk(case.model(), case.inputs(), engine="structured")


@pytest.mark.parametrize("name", ["lstm", "samples coupled"])
def test_the_reference_engine_refuses_what_it_cannot_do_exactly(name: str) -> None:
    case = BY_NAME[name]
    with pytest.raises(NetworkError, match=r'engine="reference".*use engine="auto"'):
        empirical_ntk(case.model(), case.inputs(), engine="reference")


def test_the_reference_engine_notices_a_rule_of_torch_that_mixes_samples_up() -> None:
    # The gradient of PReLU's slope under vmap, as many outputs as samples.
    model, x = nn.PReLU().double(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(NetworkError, match='engine="reference"'):
        empirical_ntk(model, x, forward=lambda m, inputs: m(inputs)[:, :3].cumsum(1).sin(), engine="reference")


def test_rows_come_one_by_one_where_backward_passes_cannot_be_vectorised() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * float(g.isfinite().all())

    double: Any = Doubled.apply
    model, x = nn.Linear(4, 2).double(), torch.randn(3, 4, dtype=torch.float64)

    def centred(m: nn.Module, inputs: Tensor) -> Tensor:
        y: Tensor = double(m(inputs - inputs.mean(0)) * m(inputs).mean(0))
        return y

    found = measured(model, x, forward=centred)
    assert found.engine == "rows"
    assert re.search("samples of the batch depend on each other.*; vectorised: RuntimeError", found.reason)
    assert_close(found.values, reference.ntk(reference.rows(model, centred(model, x))))


def test_half_precision_parameters_are_measured_in_single() -> None:
    case = BY_NAME["transformer encoder"]
    model = case.model(torch.bfloat16)
    found = measured(model, case.inputs(torch.bfloat16))
    assert found.jacobian_dtype == torch.float32
    exact = model.double().eval()
    rows = [reference.rows(exact, exact(x)) for x in samples(case.inputs(torch.bfloat16).double())]
    assert_close(found.values, reference.ntk({k: torch.cat([r[k] for r in rows]) for k in rows[0]}), 1e-5)


def test_complex_parameters_count_as_two_real_ones() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
            self.bias = nn.Parameter(torch.randn(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(self.weight) @ self.weight.conj()).abs() + self.bias

    model, x = Spectral(), torch.randn(4, 3, dtype=torch.float64)
    y = model(x).reshape(-1)
    rows = []
    for value in y:
        w, b = torch.autograd.grad(value, [model.weight, model.bias], retain_graph=True)
        rows.append(torch.cat([w.real.flatten(), w.imag.flatten(), b]))
    wanted = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    assert_close(empirical_ntk(model, x).reshape(8, 8), wanted)


# Layouts.

LAYOUT_CASES = [
    "mlp",
    "one number per sample",
    "outputs of two axes",
    "lstm",
    "embedding tied to the output",
    "cnn with batch norm, in-place relu, dropout",
]


@pytest.mark.parametrize("engine", ["auto", "rows"])
@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_layouts_follow_from_the_full_kernel(name: str, engine: Any) -> None:
    case = BY_NAME[name]
    full = twin(case)
    classes = full.shape[1]

    def ntk(layout: Any) -> Tensor:
        kernel: Tensor = empirical_ntk(case.model(), case.inputs(), outputs=layout, engine=engine)
        return kernel

    assert_close(ntk("trace"), sum((full[:, c, :, c] for c in range(classes)), torch.zeros(N, N, dtype=torch.float64)))
    assert_close(ntk("sum"), full.sum(dim=(1, 3)) / classes)
    assert_close(ntk("per_output"), torch.stack([full[:, c, :, c] for c in range(classes)]))


@pytest.mark.parametrize("engine", ["auto", "rows"])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1), F.multi_margin_loss])
def test_the_kernel_of_the_losses_is_made_of_gradients_of_single_losses(loss: Any, engine: Any) -> None:
    model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    got = empirical_ntk(model, x, outputs="loss", targets=y, loss=loss, engine=engine)
    function = F.cross_entropy if loss == "cross_entropy" else loss
    rows = []
    for n in range(5):
        gradients = torch.autograd.grad(function(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    assert_close(got, torch.stack([torch.stack([a @ b for b in rows]) for a in rows]))


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_an_ignored_sample_has_no_loss(engine: Any) -> None:
    model, x = nn.Linear(4, 3).double(), torch.randn(3, 4, dtype=torch.float64)
    kernel = empirical_ntk(
        model, x, outputs="loss", targets=torch.tensor([0, -100, 1]), loss="cross_entropy", engine=engine
    )
    assert torch.equal(kernel[1], torch.zeros(3, dtype=torch.float64))
    assert float(kernel[0, 0]) > 0


@pytest.mark.parametrize("layout", ["full", "trace", "sum", "per_output"])
@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_the_cross_kernel_is_a_block_of_the_kernel_of_both_sets(name: str, layout: Any) -> None:
    case = BY_NAME[name]
    x = case.inputs()
    more = torch.cat([x, x.flip(-1) + 0.3])
    whole = empirical_ntk(case.model(), more, outputs=layout)
    cross = empirical_ntk(case.model(), x, more[N - 1 :], outputs=layout)
    places = {
        "full": (slice(N), slice(None), slice(N - 1, None)),
        "per_output": (slice(None), slice(N), slice(N - 1, None)),
    }
    assert_close(cross, whole[places.get(layout, (slice(N), slice(N - 1, None)))])


def test_the_cross_kernel_of_losses_takes_a_pair_of_targets() -> None:
    model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    whole = empirical_ntk(model, x, outputs="loss", targets=y, loss="cross_entropy")
    cross = empirical_ntk(model, x[:2], x[2:], outputs="loss", targets=(y[:2], y[2:]), loss="cross_entropy")
    assert_close(cross, whole[:2, 2:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_sum_to_the_whole(case: Case) -> None:
    layers = empirical_ntk(case.model(), case.inputs(), forward=case.forward, by_layer=True)
    whole = empirical_ntk(case.model(), case.inputs(), forward=case.forward)
    trainable = {name for name, p in case.model().named_parameters() if p.requires_grad}
    assert set(layers) == {name.rpartition(".")[0] or name for name in trainable}
    assert_close(torch.stack(list(layers.values())).sum(0), whole)


@pytest.mark.parametrize("layout", ["trace", "sum", "per_output"])
def test_layers_sum_to_the_whole_in_every_layout(layout: Any) -> None:
    case = BY_NAME["loose parameters"]
    layers = empirical_ntk(case.model(), case.inputs(), by_layer=True, outputs=layout)
    assert set(layers) == {"body.0", "matrix", "scale"}
    whole = empirical_ntk(case.model(), case.inputs(), outputs=layout)
    assert_close(torch.stack(list(layers.values())).sum(0), whole)


def test_one_layer_is_the_kernel_of_its_parameters_alone() -> None:
    case = BY_NAME["mlp"]
    layers = empirical_ntk(case.model(), case.inputs(), by_layer=True)
    for name, kernel in layers.items():
        assert_close(kernel, empirical_ntk(case.model(), case.inputs(), params=rf"^{name}\."))


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_a_preconditioner_weighs_the_parameters(engine: Any) -> None:
    case = BY_NAME["mlp"]
    model, inputs = case.model(), case.inputs()
    generator = torch.Generator().manual_seed(0)
    d = {name: torch.rand(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}
    rows = reference.rows(model, model(inputs))
    scaled = {name: row * d[name].flatten() for name, row in rows.items()}
    assert_close(empirical_ntk(model, inputs, preconditioner=d, engine=engine), reference.ntk(scaled, rows))


def test_a_preconditioner_must_fit() -> None:
    model, x = nn.Linear(2, 1), torch.ones(1, 2)
    with pytest.raises(InputError, match=r"every selected parameter, got none for \['bias'\]"):
        empirical_ntk(model, x, preconditioner={"weight": torch.ones(1, 2)})
    with pytest.raises(InputError, match=r"of weight must be non-negative, of shape \(1, 2\)"):
        empirical_ntk(model, x, preconditioner={"weight": -torch.ones(1, 2), "bias": torch.ones(1)})
    with pytest.raises(InputError, match=r"of bias must be non-negative, of shape \(1,\)"):
        empirical_ntk(model, x, preconditioner={"weight": torch.ones(1, 2), "bias": torch.ones(2)})


@pytest.mark.parametrize(
    "selection", [r"^2\.", ["2.weight", "2.bias"], lambda name, p: name.startswith("2") and p.requires_grad]
)
def test_selections_name_the_same_parameters(selection: Any) -> None:
    case = BY_NAME["mlp"]
    model, inputs = case.model(), case.inputs()
    rows = reference.rows(model, model(inputs))
    wanted = reference.ntk({name: row for name, row in rows.items() if name.startswith("2")})
    assert_close(empirical_ntk(model, inputs, params=selection), wanted)


@pytest.mark.parametrize("layout", ["full", "trace", "per_output"])
@pytest.mark.parametrize("engine", ["auto", "rows"])
@pytest.mark.parametrize("x2", [False, True])
def test_little_memory_changes_nothing(layout: Any, engine: Any, x2: bool) -> None:
    model, x = CASES[0].model(), torch.randn(7, 4, dtype=torch.float64)
    other = torch.randn(5, 4, dtype=torch.float64) if x2 else None
    whole = empirical_ntk(model, x, other, outputs=layout, engine=engine)
    per_sample = 2 * 8 * sum(p.numel() for p in model.parameters())
    for limit in (1, 6 * per_sample, 9 * per_sample):  # blocks of 1, 2 and 3 samples
        got = empirical_ntk(model, x, other, outputs=layout, engine=engine, memory_limit=limit)
        assert_close(got, whole, 1e-14)


def test_training_mode_is_the_batch_coupled_function() -> None:
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    model = cnn_batchnorm().double().eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    got = measured(model, x, mode="train")
    exact: Any = cnn_batchnorm().double().train()
    exact.load_state_dict(model.state_dict())
    exact[3].eval()
    assert_close(got.values, reference.ntk(reference.rows(exact, exact(x))))
    assert got.engine == "batched"
    assert "training mode may couple" in got.reason
    assert not any(m.training for m in model.modules())
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]), name


def test_training_mode_keeps_layers_that_the_user_froze_in_evaluation() -> None:
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    model: Any = cnn_batchnorm().double().train()
    model[1].eval()
    got = empirical_ntk(model, x, mode="train")
    model[3].eval()
    assert_close(got, reference.ntk(reference.rows(model, model(x))))


class _DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 0.5)).to(x) if self.training else x


class _Functional(nn.Module):
    """Dropout by function, inside attention, between recurrent layers, and of whole paths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.path = _DropPath()

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(F.dropout(x, 0.5, self.training))
        h = h + self.attention(h, h, h)[0]
        h = h + F.scaled_dot_product_attention(h, h, h, dropout_p=0.5 if self.training else 0.0)
        y: Tensor = self.path(F.dropout(h, p=0.5, training=self.training).flatten(1))
        return y


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_has_no_dropout_of_any_kind(training: bool) -> None:
    model, x = _Functional().double().train(training), torch.randn(2, 3, 4, dtype=torch.float64)
    got = empirical_ntk(model, x, mode="train")
    assert_close(got, empirical_ntk(model, x, mode="eval"), 1e-12)


# Laws.


def _network(outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**20)


@settings(max_examples=25)
@given(n=SIZES, c=st.integers(1, 4), seed=SEEDS)
def test_kernels_are_symmetric_and_positive_semidefinite(n: int, c: int, seed: int) -> None:
    model = _network(c, seed)
    k = empirical_ntk(model, torch.randn(n, 3, dtype=torch.float64))
    assert k.shape == (n, c, n, c)
    flat = k.reshape(n * c, n * c)
    assert torch.equal(flat, flat.T)
    values = torch.linalg.eigvalsh(flat)
    # The Gram and the solver each err by at most n ε λ₁.
    assert float(values[0]) >= -2 * n * c * 2.0**-52 * float(values[-1])


@settings(max_examples=15)
@given(n=SIZES, c=st.integers(1, 3), seed=SEEDS, data=st.data())
def test_permuting_samples_permutes_the_kernel(n: int, c: int, seed: int, data: st.DataObject) -> None:
    model, order = _network(c, seed), data.draw(st.permutations(range(n)))
    x = torch.randn(n, 3, dtype=torch.float64)
    assert_close(empirical_ntk(model, x[order]), empirical_ntk(model, x)[order][:, :, order], 1e-13)


@settings(max_examples=15)
@given(n=SIZES, scale=st.floats(-50, 50), seed=SEEDS)
def test_scaling_outputs_scales_the_kernel_by_the_square(n: int, scale: float, seed: int) -> None:
    model, x = _network(2, seed), torch.randn(n, 3, dtype=torch.float64)
    got = empirical_ntk(model, x, forward=lambda m, inputs: scale * m(inputs))
    torch.testing.assert_close(got, scale**2 * empirical_ntk(model, x), rtol=1e-11, atol=1e-300)


@settings(max_examples=15)
@given(n=SIZES, seed=SEEDS, limit=st.integers(1, 5000))
def test_chunks_change_nothing(n: int, seed: int, limit: int) -> None:
    model, x = _network(2, seed), torch.randn(n, 3, dtype=torch.float64)
    assert_close(empirical_ntk(model, x, memory_limit=limit), empirical_ntk(model, x), 1e-13)


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_linear_layer_in_closed_form(engine: Any) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    got = empirical_ntk(nn.Linear(5, 3).double(), x, engine=engine).reshape(18, 18)
    wanted = torch.kron(x @ x.T + 1, torch.eye(3, dtype=torch.float64))
    assert_close(got, wanted, 1e-14)


def test_the_result_comes_in_the_dtype_asked_for() -> None:
    model, x = nn.Linear(2, 1), torch.ones(2, 2)
    assert empirical_ntk(model, x).dtype == torch.float64
    assert empirical_ntk(model, x, dtype=torch.float32).dtype == torch.float32
    layers = empirical_ntk(model, x, by_layer=True, dtype=torch.float32)
    assert {k.dtype for k in layers.values()} == {torch.float32}


@pytest.mark.parametrize(
    "fault", [lambda g: g * 0, lambda g: g * (1 + 1e-6), lambda g: g.flip(0), lambda g: g * math.nan]
)
@pytest.mark.parametrize("name", ["mlp", "cnn with batch norm, in-place relu, dropout", "transformer encoder"])
def test_a_wrong_gradient_is_noticed(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Plant the fault that the self-check is there for, in all weights that enter as matrices.
    honest = Matrix.gradient
    monkeypatch.setattr(Matrix, "gradient", lambda self, g: fault(honest(self, g)))
    case = BY_NAME[name]
    found = measured(case.model(), case.inputs())
    assert found.engine == "batched"
    assert re.search(r"the kernel of \S+weight \(.*(linear|conv2d).*\) differs from autograd's by", found.reason)
    monkeypatch.undo()
    assert_close(found.values, twin(case))


def test_a_lost_parameter_is_noticed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Elementwise.jacobian
    monkeypatch.setattr(Elementwise, "jacobian", lambda self, index, gradients: honest(self, index, gradients) * index)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    found = measured(model, torch.randn(3, 4, dtype=torch.float64))
    assert found.engine == "batched"
    assert "the kernel of 1.weight (layer_norm) differs from autograd's" in found.reason
    with pytest.raises(NetworkError, match=r"1\.weight \(layer_norm\) differs from autograd's"):
        empirical_ntk(model, torch.randn(3, 4, dtype=torch.float64), engine="structured")


def test_a_model_that_agreed_once_is_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(*_: Any) -> str:
        compared.append(1)
        return ""

    monkeypatch.setattr(door, "structured_disagreement", compare)
    model, x = _network(2, 0), torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2):
        empirical_ntk(model, x)
    assert len(compared) == 1
    empirical_ntk(model, x[:3])
    assert len(compared) == 2
    empirical_ntk(_network(2, 0), x)
    assert len(compared) == 3


def test_weights_that_are_not_finite_give_a_kernel_that_is_not() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    deep = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), model)
    assert not torch.isfinite(empirical_ntk(deep, torch.ones(2, 2))).all()


# What is refused: wanted, got, do this.


@pytest.fixture
def _untyped() -> Iterator[None]:
    """The run-time type checks of the tests come before the package's own; users do not have them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("_untyped")
def test_options_are_refused_with_what_is_known() -> None:
    model, x = nn.Linear(2, 1), torch.ones(2, 2)
    with pytest.raises(InputError, match=r"outputs must be one of .*'trace'.*, got 'all'"):
        empirical_ntk(model, x, outputs="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"engine must be one of \('auto', 'structured', .*\), got 'fast'"):
        empirical_ntk(model, x, engine="fast")  # type: ignore[arg-type]
    for lacking in ({"targets": torch.ones(2)}, {"loss": "mse"}):
        with pytest.raises(InputError, match=r'outputs="loss" needs targets= and loss='):
            empirical_ntk(model, x, outputs="loss", **lacking)


@pytest.mark.parametrize("engine", ["auto", "structured", "reference", "rows", "operator"])
def test_batches_are_refused(engine: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match=r"at least one sample, got 0; pass a non-empty probe"):
        empirical_ntk(model, torch.ones(0, 2), engine=engine)
    with pytest.raises(InputError, match=r"share their leading \(sample\) axis, got lengths \[2, 3\]"):
        empirical_ntk(model, (torch.ones(2, 2), torch.ones(3, 2)), engine=engine)
    with pytest.raises(InputError, match=r"must hold data, got a tensor on the meta device; pass a materialised"):
        empirical_ntk(model, torch.ones(2, 2, device="meta"), engine=engine)
    with pytest.raises(InputError, match=r"at least one sample, got 0"):
        empirical_ntk(model, torch.ones(2, 2), torch.ones(0, 2), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "structured", "reference", "rows", "operator"])
def test_outputs_are_refused(engine: Any) -> None:
    model, x = nn.Linear(2, 2), torch.ones(3, 2)

    def ntk(output: Any) -> None:
        empirical_ntk(model, x, forward=lambda m, inputs: output(m(inputs)), engine=engine)

    with pytest.raises(InputError, match=r"one row per sample \(N = \d\), got shape \(\); pass forward="):
        ntk(torch.sum)
    with pytest.raises(InputError, match=r"one row per sample \(N = \d\), got shape \(2, \d+\); pass forward="):
        ntk(lambda y: torch.cat([y, y, y, y]).T)
    with pytest.raises(InputError, match=r"real and floating, got torch.int64; pass forward="):
        ntk(lambda y: y.argmax(1))
    with pytest.raises(InputError, match=r"one floating tensor, got several floating tensors \['a', 'b.0'\]; pass for"):
        ntk(lambda y: {"a": y, "b": [y, y.argmax(1)]})
    with pytest.raises(InputError, match=r"got no floating tensor in dict; pass forward="):
        ntk(lambda y: {"a": y.argmax(1)})
    with pytest.raises(InputError, match=r"got torch.complex64"):
        ntk(lambda y: y.to(torch.complex64))


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_parameters_are_refused(engine: Any) -> None:
    frozen = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(NetworkError, match=r"Linear has no trainable parameter .*2 in all, 0 with requires_grad.*unfr"):
        empirical_ntk(frozen, torch.ones(1, 2), engine=engine)
    with pytest.raises(NetworkError, match=r"2 with requires_grad.*widen params"):
        empirical_ntk(nn.Linear(2, 1), torch.ones(1, 2), params="nothing like it", engine=engine)
    with pytest.raises(InputError, match=r"unknown parameters \['wieght'\]; known are \['bias', 'weight'\]"):
        empirical_ntk(nn.Linear(2, 1), torch.ones(1, 2), params=["wieght", "bias"], engine=engine)


@pytest.mark.usefixtures("_untyped")
def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"wanted a torch.nn.Module, got function"):
        empirical_ntk(lambda x: x, torch.ones(1, 2))  # type: ignore[arg-type]
