"""Normalisation: derivatives and kernels against autograd, effective rates against real optimizers, verdicts of no."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor.applications.norm_layers import groups_of, norms_of
from ntk_monitor.applications.norm_projection import derivative, norm_projection_report
from ntk_monitor.applications.norm_scale import effective_lr, equilibrium_step, scale_test
from ntk_monitor.applications.normalization import example, study
from ntk_monitor.cli import main
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.render import png

C, S = 4, 3


def images(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, S, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


class LastAxis(nn.Module):
    """A norm over the last axis, where torch's others take the channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return total


class ToyRMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.linspace(0.5, 2, width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


KINDS: dict[str, Callable[[float], nn.Module]] = {
    "batch": lambda eps: nn.BatchNorm2d(C, eps=eps),
    "instance": lambda eps: nn.InstanceNorm2d(C, eps=eps, affine=True),
    "group": lambda eps: nn.GroupNorm(2, C, eps=eps),
    "layer": lambda eps: LastAxis(nn.LayerNorm(C, eps=eps)),
    "rms": lambda eps: LastAxis(nn.RMSNorm(C, eps=eps)),
    "whole": lambda eps: nn.LayerNorm((C, S, S), eps=eps),
    "toy": lambda _: LastAxis(ToyRMSNorm(C)),
}


def network(kind: str, *, eps: float = 1e-14, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(2, C, 3, padding=1, bias=bias)
    model = nn.Sequential(first, KINDS[kind](eps), nn.Tanh(), nn.Flatten(), nn.Linear(C * S * S, 2)).double()
    with torch.no_grad():
        for name, p in model[1].named_parameters():
            p.copy_(torch.linspace(0.5, 2, p.numel()).reshape(p.shape) if "weight" in name else torch.full_like(p, 0.1))
        if kind == "batch":
            model[1].running_mean.fill_(0.2)  # type: ignore[operator]
            model[1].running_var.fill_(0.7)  # type: ignore[operator]
    return model.eval()


def norm_name(kind: str) -> str:
    return "1.norm" if kind in ("layer", "rms", "toy") else "1"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_autograd(kind: str, training: bool) -> None:
    model = network(kind, eps=1e-3)
    layer = model.get_submodule(norm_name(kind)).train(training)
    shape = (S, S, C) if norm_name(kind) == "1.norm" else (C, S, S)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(layer, z).reshape(z.numel(), z.numel())
    found = derivative(z.flatten(1).numpy(), groups_of(layer, shape, training=training))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "batch", "removed"),
    [
        *(("batch", False, 0), ("batch", True, 2 * C), ("instance", False, 4 * 2 * C), ("group", False, 4 * 2 * 2)),
        *(("layer", False, 4 * 2 * 9), ("rms", False, 4 * 9), ("whole", False, 4 * 2), ("toy", False, 4 * 9)),
    ],
)
def test_behind_a_layer_the_kernel_is_the_projected_one(kind: str, batch: bool, removed: int) -> None:
    """Two directions of each group, four samples (or one batch); K behind from autograd, A K Aᵀ from the formula."""
    found = norm_projection_report(network(kind, eps=1e-5), images(), norm_name(kind), batch=batch)
    assert found.error < 1e-10
    assert found.removed == removed
    assert (found.kept < 1 - 1e-6) is (removed > 0)
    assert found.top[1] <= found.top[0] * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.booleans(), st.integers(0, 10**6))
def test_projections_are_idempotent_and_eigenvalues_interlace(
    n: int, count: int, size: int, centred: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    layer: nn.Module = nn.LayerNorm(size) if centred else nn.RMSNorm(size, eps=1e-6)
    z = draw.normal(size=(n, count * size)) + 2
    p = derivative(z, groups_of(layer, (count, size)), alone=True)
    np.testing.assert_allclose(p @ p, p, atol=1e-10)
    np.testing.assert_allclose(p, p.T)
    half = draw.normal(size=(len(p), len(p)))
    before = np.linalg.eigvalsh(half @ half.T)[::-1]
    after = np.linalg.eigvalsh(p @ half @ half.T @ p)[::-1]
    lost = n * count * (min(2, size) if centred else 1)
    slack = 1e-9 * before[0]
    assert (after <= before + slack).all()
    assert (after[: len(p) - lost] >= before[lost:] - slack).all()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "toy"])
def test_weights_before_a_layer_are_scale_free_but_for_batchnorm_in_evaluation(kind: str, mode: str) -> None:
    model, x = network(kind), images()
    (norm,) = norms_of(model, x)
    assert norm.weights == ("0.weight",)
    assert norm.biases == ("0.bias",)
    assert norm.direct
    found = scale_test(model, x, norm, mode=mode)  # type: ignore[arg-type]
    if kind == "batch" and mode == "eval":
        assert not found.scale_free
        assert found.alignment > 0.01
        assert found.dead > 1e-3
        return
    assert found.scale_free
    assert found.error < 1e-10
    assert found.ratio == pytest.approx(1 / 9, rel=1e-10)
    assert found.alignment < 1e-9
    # Constant over a group in InstanceNorm and BatchNorm alone.
    assert (found.dead < 1e-25) is (kind in ("instance", "batch"))
    model.train(mode == "train")
    outputs = model(x)
    grads = torch.autograd.grad(outputs[0, 0], [model.get_parameter(name) for name in ("0.weight", "0.bias")])
    weights = [model.get_parameter(name).detach() for name in ("0.weight", "0.bias")]
    assert abs(sum(float((g * w).sum()) for g, w in zip(grads, weights, strict=True))) < 1e-12


def test_epsilon_that_is_not_small_binds_the_scale() -> None:
    model, x = network("group", eps=1.0), images()
    assert not scale_test(model, x, norms_of(model, x)[0]).scale_free


def scaled(model: nn.Sequential, c: float) -> nn.Sequential:
    copied = network("group")
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in copied[0].parameters():
            p.mul_(c)
    return copied


@pytest.mark.parametrize(("optimizer", "power"), [("sgd", 2), ("adam", 1)])
def test_the_effective_rate_is_what_real_optimizers_feel(optimizer: str, power: int) -> None:
    """Weights three times as long at 3² (Adam: 3) times the rate: the same function after every step."""
    one = network("group")
    other = scaled(one, 3.0)
    x, kinds = images(), {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    runs = []
    for model, lr in ((one, 0.1), (other, 0.1 * 3**power)):
        options = {} if optimizer == "sgd" else {"eps": 0.0}
        stepper = kinds[optimizer](model[0].parameters(), lr=lr, **options)
        for _ in range(3):
            stepper.zero_grad()
            model(x).square().mean().backward()
            stepper.step()
        runs.append(model(x).detach())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-8, atol=1e-8)
    rates = [effective_lr(length, 0.1, optimizer) for length in (2.0, 6.0)]  # type: ignore[arg-type]
    assert rates[0] / rates[1] == pytest.approx(3**power)
    weights = torch.cat([p.detach().flatten() for p in other[0].parameters()])
    by_layer, by_weights, by_length = (
        effective_lr(given, 0.1, optimizer)  # type: ignore[arg-type]
        for given in (other[0], weights, float(weights.norm()))
    )
    assert by_layer == pytest.approx(0.1 / float(weights.norm()) ** power)
    assert by_layer == pytest.approx(by_weights) == pytest.approx(by_length)


def test_decay_and_growth_meet_in_the_step_of_equilibrium() -> None:
    """Scale-free weights under gradients at random: orthogonal to w, of length 1/|w|."""
    lr, decay = 0.1, 0.01
    draw = np.random.default_rng(0)
    w, turned = draw.normal(size=50), []
    for step in range(6000):
        g = draw.normal(size=50)
        g -= w * (g @ w) / (w @ w)
        update = lr * g / np.linalg.norm(g) / np.linalg.norm(w)
        grown = w - update
        assert grown @ grown == pytest.approx(w @ w + update @ update)
        if step > 5000:
            turned.append(np.linalg.norm(update) / np.linalg.norm(w))
        w = grown - lr * decay * w
    assert np.mean(turned) == pytest.approx(equilibrium_step(lr, decay), rel=0.02)


def test_what_feeds_a_layer_is_found() -> None:
    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.a, self.b, self.c = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(self.one(x).reshape(len(x), 2, 2).flatten(1))
            h = self.b(torch.relu(self.two(h)))
            total: Tensor = self.c(h + self.three(h))
            return total

    a, b, c = norms_of(Fed(), torch.randn(4, 4))
    assert (a.weights, a.biases, a.direct) == (("one.weight",), ("one.bias",), True)
    assert (b.weights, b.biases, b.direct) == (("two.weight",), (), False)
    assert (c.weights, c.biases) == ((), ())


def holds(model: nn.Module) -> dict[str, bool | None]:
    x = images(8)
    # Company that is unlike oneself.
    x[4:] *= 3
    return {verdict.claim: verdict.holds for verdict in study(model, x).verdicts}


def test_the_report_says_yes_and_no() -> None:
    free = "weights in front of a normalisation are scale-free in evaluation: K(3w) = K(w)/9"
    dead = "biases in front of a normalisation are dead in evaluation"
    formula = "behind each layer the kernel is A K Aᵀ, A = (γ/σ)(I - 11ᵀ/P - u uᵀ/P)"
    found = holds(network("instance"))
    assert (found[free], found[dead], found[formula]) == (True, True, True)
    found = holds(network("group"))
    assert (found[free], found[dead]) == (True, False)
    found = holds(network("batch"))
    assert (found[free], found[dead]) == (False, False)
    batch = [claim for claim in found if "statistics of the batch" in claim]
    assert [found[claim] for claim in batch] == [True, True]
    assert found["the kernel of evaluation is the one that a training step feels"] is False
    assert found["a sample's kernel in training does not depend on the others in its batch"] is False


def test_rates_and_equilibrium_are_reported() -> None:
    report = study(network("group"), images(), lr=0.1, weight_decay=0.01, optimizer="adamw")
    length = math.sqrt(sum(float(p.detach().square().sum()) for p in network("group")[0].parameters()))
    assert report.number("largest effective rate") == pytest.approx(0.1 / length)
    assert report.number("step of equilibrium") == pytest.approx(math.sqrt(2 * 0.1 * 0.01))


def test_a_mean_over_what_was_centred_is_nothing() -> None:
    """A linear mean behind InstanceNorm leaves its bias alone: no weight before it moves the outputs."""
    model = nn.Sequential(
        nn.Conv2d(2, C, 3, padding=1), nn.InstanceNorm2d(C, affine=True), nn.AvgPool2d(S), nn.Flatten()
    )
    report = study(model, images())
    assert any("do not reach the outputs" in note for note in report.caveats)


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: study(nn.Sequential(nn.Flatten(), nn.Linear(18, 1)), images()), NetworkError, "no normalisation layer"),
    (lambda: study(network("group"), images(3)), InputError, "four samples"),
    (lambda: study(network("group"), images(), modules=["2"]), InputError, "there are 1"),
    (lambda: effective_lr(0.0), InputError, "positive length"),
    (lambda: equilibrium_step(-1.0, 0.1), InputError, "negative"),
    (
        lambda: norm_projection_report(
            nn.Sequential(nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(18, 1)), images(), "0"
        ),
        InputError,
        "before 0",
    ),
    (lambda: groups_of(nn.LocalResponseNorm(2), (4, 3)), InputError, "not known"),
]


@pytest.mark.parametrize(("ask", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(ask: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask()


class Plain(nn.Sequential):
    """A network without normalisation, for the command line."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def test_a_network_without_layers_is_one_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((8, 3), dtype=np.float32), y=np.ones((8, 1), dtype=np.float32))
    words = ["--model", f"{__name__}.Plain", "--data", str(tmp_path / "d.npz")]
    for name, sentence in (("normalization", "no normalisation layer"), ("residual", "no residual connection")):
        assert main(["app", name, *words]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1


def test_the_network_is_left_alone() -> None:
    model = network("batch").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    study(model, images())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_the_example_draws_its_figures() -> None:
    report = example(quick=True)
    assert set(report.figures) == {"projection", "scale", "batch"}
    for figure in report.figures.values():
        assert png(figure).startswith(b"\x89PNG")
    assert "DOES NOT HOLD" in report.text()
