"""Input gradients and kernel expansions against plain autograd; correlations against scipy; a yes, a no and neither."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor import empirical_ntk
from ntk_monitor.applications import saliency as app
from ntk_monitor.errors import InputError


def _net(act: nn.Module | None = None, inputs: int = 4, width: int = 8, outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), act or nn.Tanh(), nn.Linear(width, outputs)).double()


def _theta(model: nn.Module, x: Tensor, z: Tensor, c: int, d: int) -> Tensor:
    """Θ_cd(x, z) of two single samples, differentiable in x."""
    p = list(model.parameters())
    one = torch.autograd.grad(model(x[None])[0, c], p, create_graph=True, materialize_grads=True, allow_unused=True)
    other = torch.autograd.grad(model(z[None])[0, d], p, materialize_grads=True, allow_unused=True)
    terms = [(a * b).sum() for a, b in zip(one, other, strict=True)]
    return torch.stack(terms).sum()


def test_input_gradients_are_those_of_each_sample() -> None:
    model, x = _net(), torch.randn(5, 4).double()
    found = app.input_gradient_norms(model, x)
    for n in range(5):
        jacobian = torch.autograd.functional.jacobian(model, x[n])
        assert found[n] == pytest.approx(float(torch.as_tensor(jacobian).norm()), rel=1e-12)


def test_gradient_of_the_kernel_expansion_is_exact() -> None:
    model, x, train = _net(), torch.randn(3, 4).double(), torch.randn(5, 4).double()
    alpha = torch.randn(5, 2).double()
    found = app.expansion_gradient(model, x, train, alpha)
    for n in range(3):
        for c in range(2):
            at = x[n].clone().requires_grad_(True)
            value = model(at[None])[0, c]
            for m in range(5):
                for d in range(2):
                    value = value + alpha[m, d] * _theta(model, at, train[m], c, d)
            wanted = torch.autograd.grad(value, at)[0]
            torch.testing.assert_close(found[n, c], wanted, rtol=1e-11, atol=1e-12)


def test_without_coefficients_the_gradient_of_the_network_itself_remains() -> None:
    """The term that a bare kernel expansion leaves out."""
    model, x = _net(outputs=1), torch.randn(3, 4).double()
    found = app.expansion_gradient(model, x, x, torch.zeros(3, 1))
    np.testing.assert_allclose(found.flatten(1).norm(dim=1), app.input_gradient_norms(model, x), rtol=1e-12)
    assert float(found.norm()) > 0.1


def test_relu_without_bias_is_homogeneous_and_its_kernel_is_not_scale_free() -> None:
    model = nn.Sequential(nn.Linear(4, 32, bias=False), nn.ReLU(), nn.Linear(32, 1, bias=False)).double()
    x = torch.randn(6, 4).double()
    gradients = app.expansion_gradient(model, x, x, torch.zeros(6, 1))[:, 0]
    torch.testing.assert_close((gradients * x).sum(1, keepdim=True), model(x).detach())
    np.testing.assert_allclose(app.input_gradient_norms(model, 3 * x), app.input_gradient_norms(model, x), rtol=1e-12)
    theta, larger = (np.diag(empirical_ntk(model, s * x, outputs="trace").numpy()) for s in (1.0, 3.0))
    np.testing.assert_allclose(larger, 9 * theta, rtol=1e-12)


def test_correlations_are_those_of_scipy() -> None:
    from scipy.stats import linregress, pearsonr, spearmanr

    draw = np.random.default_rng(0)
    a, b, c = draw.normal(size=(3, 30)) + draw.normal(size=30)
    found = app.correlations(a, b, c, resamples=50)
    assert found.pearson.value == pytest.approx(pearsonr(a, b).statistic, rel=1e-12)
    assert found.spearman.value == pytest.approx(spearmanr(a, b).statistic, rel=1e-12)
    rest = [v - (linregress(c, v).intercept + linregress(c, v).slope * c) for v in (a, b)]
    assert found.partial.value == pytest.approx(pearsonr(*rest).statistic, rel=1e-10)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        z = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=80)
        r = app.correlations(z[:, 0], z[:, 1], resamples=300, seed=seed).pearson
        covered += r.low <= 0.5 <= r.high
    # 95 expected, a few less for the percentile interval at 80 samples; below 84 has probability 1e-4 at 0.93.
    assert covered >= 84


@given(st.integers(0, 100), st.floats(0.01, 100), st.floats(-5, 5))
def test_units_do_not_matter(seed: int, scale: float, shift: float) -> None:
    a, b, c = np.random.default_rng(seed).normal(size=(3, 12))
    one, other = app.correlations(a, b, c, resamples=20), app.correlations(scale * a + shift, b, c, resamples=20)
    for name in ("pearson", "spearman", "partial"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, abs=1e-9)


@pytest.mark.parametrize(
    ("act", "low", "high"),
    [(nn.ReLU(), -0.25, 0.25), (nn.Tanh(), -0.72, -0.22), (nn.Sigmoid(), -0.72, -0.1)],
    ids=["relu", "tanh", "sigmoid"],
)
def test_at_random_weights_there_is_no_strong_positive_correlation(act: nn.Module, low: float, high: float) -> None:
    """Theory, 20 seeds, Gaussian inputs: ReLU .021, tanh -.492, sigmoid -.388; here 20 of width 128."""
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = _net(act, inputs=5, width=128, outputs=1), torch.randn(60, 5).double()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                assert isinstance(layer, nn.Linear)
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layer.bias.zero_()
        found.append(app.saliency_report(model, x, resamples=1).pearson.value)
    assert low < np.mean(found) < high


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.Sigmoid()], ids=["relu", "gelu", "tanh", "sigmoid"]
)
@pytest.mark.parametrize("sphere", [False, True], ids=["gaussian", "sphere"])
def test_the_claim_is_denied_for_random_networks(act: nn.Module, sphere: bool) -> None:
    """The claim "saliency correlates with Θ(x, x)": no network of either kind of inputs gets a yes."""
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = _net(act, inputs=5, width=128, outputs=1), torch.randn(60, 5).double()
        x = x / x.norm(dim=1, keepdim=True) if sphere else x
        assert app.study(model, x, resamples=50).verdicts[0].holds is False


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh()], ids=["relu", "tanh"])
def test_the_claim_is_denied_after_training_too(act: nn.Module) -> None:
    """Of these two; a sigmoid network trained on this target gets a Pearson of 0.55 and a yes: no law either way."""
    model, x = _net(act, inputs=5, width=64, outputs=1), torch.randn(60, 5).double()
    weights, y = list(model.parameters()), torch.sin(2 * x[:, :1])
    loss = nn.functional.mse_loss(model(x), y)
    first = loss.item()
    for _ in range(300):
        loss = nn.functional.mse_loss(model(x), y)
        with torch.no_grad():
            for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                p.sub_(g, alpha=0.1)
    assert loss.item() < 0.9 * first
    assert app.study(model, x, resamples=50).verdicts[0].holds is False


class _Square(nn.Module):
    """f = w·x²: Θ = |x|⁴ summed and ∂f/∂x = 2 w x grow together."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2).double())

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x**2).sum(1, keepdim=True)


def test_a_network_where_it_holds_gets_a_yes() -> None:
    report = app.study(_Square(), torch.randn(60, 2).double(), resamples=200)
    assert report.verdicts[0].holds is True
    assert report.number("Pearson") > app.STRONG


def test_a_network_where_it_fails_gets_a_no() -> None:
    report = app.example(quick=True)
    assert report.verdicts[0].holds is False
    assert report.number("Pearson") < 0


def test_a_gradient_that_is_the_same_everywhere_has_no_correlation_and_says_why() -> None:
    model, x = nn.Linear(4, 1).double(), torch.randn(20, 4).double()
    found = app.saliency_report(model, x)
    assert np.isnan([found.pearson.value, found.spearman.low, found.partial.high]).all()
    assert found.reason == "the input gradient, the same for all samples to rounding"
    report = app.study(model, x)
    assert [verdict.holds for verdict in report.verdicts] == [None, None]
    assert "have no correlation" in report.summary


def test_a_kernel_that_is_known_already() -> None:
    model, x = _net(), torch.randn(10, 4).double()
    k = empirical_ntk(model, x)
    wanted = app.saliency_report(model, x, resamples=10)
    for known in (k, np.einsum("ncmc->nm", k), np.einsum("ncnc->n", k)):
        assert app.saliency_report(model, x, kernel=known, resamples=10).pearson.value == pytest.approx(
            wanted.pearson.value
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: app.study(_net(), torch.zeros(5, 4).long()), "needs one floating tensor, got Tensor of torch.int64"),
        (lambda: app.study(_net(), {"x": torch.zeros(5, 4)}), "needs one floating tensor, got dict"),
        (lambda: app.study(_net(), torch.randn(3, 4)), "4 or more samples"),
        (lambda: app.study(_net(), torch.randn(5, 4), kernel=np.eye(4)), "kernel of these 5 samples"),
        (lambda: app.correlations([1.0, 2, 3, np.nan], [1.0, 2, 3, 4]), "wanted finite values"),
        (lambda: app.expansion_gradient(_net(), torch.randn(2, 4), torch.randn(3, 4), np.ones(3)), "wanted alpha"),
    ],
)
def test_what_cannot_be_used_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
