"""Dropout: ratios of the table by hand and through a network, the law of the diagonal, networks in which laws fail."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor import empirical_ntk
from ntk_monitor.applications.dropout import Ratio, diagonal_law, dropout_kernel, example, kernels, study
from ntk_monitor.applications.masks import Masked
from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.render import png

D, H = 10, 200


def samples(n: int = 6) -> Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit: Tensor = x / x.norm(dim=1, keepdim=True)
    return unit


def network(*keeps: float, width: int = 24, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    wide = D
    for keep in keeps:
        parts += [nn.Linear(wide, width, bias=False), nn.ReLU(), nn.Dropout(1 - keep)]
        wide = width
    return nn.Sequential(*parts, nn.Linear(wide, outputs, bias=False)).double()


def scale(kernel: Tensor, plain: Tensor) -> float:
    return float((kernel * plain).sum() / plain.square().sum())


def off(kernel: Tensor) -> Tensor:
    return kernel[~torch.eye(len(kernel), dtype=torch.bool)]


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_the_table_of_the_textbook_by_hand(keep: float) -> None:
    """4,000 draws of f = a·(m ∘ relu(W x)) at width 200, kernels from their definition, without rescaling."""
    g, x = torch.Generator().manual_seed(0), samples()
    w = torch.randn(H, D, generator=g, dtype=torch.float64)
    a = torch.randn(H, generator=g, dtype=torch.float64)
    before = x @ w.T
    features, gates = before.relu(), (before > 0) * a

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        linear = (left * features) @ (right * features).mT
        values: Tensor = linear + (left * gates) @ (right * gates).mT * (x @ x.T)
        return values.mean(0) if values.dim() == 3 else values

    def masks(rows: int) -> Tensor:
        return (torch.rand(4000, rows, H, generator=g) < keep).double().expand(4000, 6, H)

    one, two, shared = masks(6), masks(6), masks(1)
    plain = kernel(torch.ones(6, H).double(), torch.ones(6, H).double())
    independent, same, together = kernel(one, two), kernel(one, one), kernel(shared, shared)
    assert scale(independent, plain) == pytest.approx(keep**2, abs=0.01)
    assert scale(off(same), off(plain)) == pytest.approx(keep**2, abs=0.01)
    assert scale(same.diagonal(), plain.diagonal()) == pytest.approx(keep, abs=0.01)
    assert scale(together, plain) == pytest.approx(keep, abs=0.01)
    torchs = same / keep**2
    law = torch.from_numpy(diagonal_law(plain.numpy(), keep))
    assert float((torchs - law).norm() / law.norm()) < 0.01


@pytest.mark.parametrize("keep", [0.5, pytest.param(0.8, marks=pytest.mark.slow)])
def test_a_network_has_the_ratios_of_the_table(keep: float) -> None:
    x = samples()
    found = kernels(network(keep), x, draws=600)
    expected = {("independent", False): 1, ("independent", True): 1, ("same", False): 1, ("same", True): 1 / keep}
    expected |= {("shared", False): 1 / keep, ("shared", True): 1 / keep}
    expected |= {("eval_vs_train", False): 1, ("eval_vs_train", True): 1}
    for (mode, diagonal), value in expected.items():
        ratio = found.ratio(mode, diagonal=diagonal)  # type: ignore[arg-type]
        # Five standard errors: the interval is 1.96 of them on each side.
        assert abs(ratio.value - value) < 5 / 1.96 * (ratio.high - ratio.value)
        assert ratio.high - ratio.value < 0.05


def test_without_rescaling_evaluation_moves_by_q_squared() -> None:
    found = kernels(network(0.5), samples(), draws=300, rescale=False)
    expected = {"eval_vs_train": 0.25, "independent": 0.25, "shared": 0.5}
    for mode, value in expected.items():
        assert found.ratio(mode, diagonal=False).value == pytest.approx(value, abs=0.02)  # type: ignore[arg-type]


def test_without_masks_it_is_the_kernel_of_the_network() -> None:
    model, x = network(0.7, 0.6, outputs=3), samples()
    expected = empirical_ntk(model, x, outputs="trace")
    torch.testing.assert_close(dropout_kernel(model, x), expected)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d])
def test_a_kernel_under_masks_is_that_of_autograd_under_the_same_masks(kind: type[nn.Module]) -> None:
    """A convolutional network with dropout behind both layers: gradients sample by sample under drawn masks."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), kind(0.5), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 2))
    twin, x = Masked(conv), torch.randn(3, 2, 5, dtype=torch.float64)
    twin.prepare(x)
    masks = twin.draw(1, 3, torch.Generator().manual_seed(0), shared=False, rescale=True)
    assert masks[0].shape == ((3, 1, 4, 3) if kind is nn.Dropout else (3, 1, 4, 1))
    found = empirical_ntk(twin, (x, masks), outputs="trace")
    rows = []
    for n in range(3):
        outputs = twin(x[n : n + 1], [mask[n : n + 1] for mask in masks])[0]
        grads = [torch.autograd.grad(one, list(twin.parameters()), retain_graph=True) for one in outputs]
        rows.append(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]))
    jacobian = torch.stack(rows)
    torch.testing.assert_close(found, torch.einsum("ncp,mcp->nm", jacobian, jacobian))


def test_masks_are_drawn_as_torch_draws_them() -> None:
    twin = Masked(network(0.8, width=400))
    twin.prepare(samples())
    g = torch.Generator().manual_seed(0)
    (mask,) = twin.draw(20, 6, g, shared=False, rescale=True)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.8}
    # 48,000 numbers of variance ¼: five standard errors.
    assert float(mask.mean()) == pytest.approx(1.0, abs=5 * 0.5 / math.sqrt(48_000))
    (mask,) = twin.draw(2, 6, g, shared=True, rescale=False)
    by_draw = mask.reshape(2, 6, -1)
    assert torch.equal(by_draw[0, 0], by_draw[0, 5])
    assert not torch.equal(by_draw[0], by_draw[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.floats(0.1, 1.0))
def test_the_law_changes_the_diagonal_alone_and_not_at_q_1(n: int, keep: float) -> None:
    kernel = np.random.default_rng(n).normal(size=(n, 2 * n))
    kernel = kernel @ kernel.T
    law = diagonal_law(kernel, keep)
    np.testing.assert_allclose(np.diag(law) * keep, np.diag(kernel))
    np.testing.assert_allclose(law - np.diag(np.diag(law)), kernel - np.diag(np.diag(kernel)))


def test_dropout_does_not_slow_learning_by_q_squared() -> None:
    """One hidden layer, where the laws are exact: the claim is refused whatever the noise of a hundred draws is."""
    report = study(network(0.5), samples(), draws=100)
    claims = {verdict.claim: verdict.holds for verdict in report.verdicts}
    assert claims["dropout multiplies the kernel by q² = 0.25, like a smaller learning rate"] is False
    assert report.number("eval_vs_train, off-diagonal") == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_one_layer_keeps_the_mean_drift_and_is_no_smaller_learning_rate() -> None:
    report = study(network(0.5, width=64), samples(12), draws=800)
    holds = [verdict.holds for verdict in report.verdicts]
    assert holds[0] is not False
    assert holds[1] is False
    assert abs(report.number("eval_vs_train, off-diagonal") - 1) < 0.03
    assert report.number("law_error") < 0.05


def test_two_layers_break_the_laws() -> None:
    report = study(network(0.5, 0.5, width=64), samples(12), draws=300)
    holds = [verdict.holds for verdict in report.verdicts]
    assert holds[1] is False
    assert False in (holds[0], holds[2], holds[3])


def test_networks_without_masks_that_multiply_are_refused() -> None:
    x = samples()
    plain = nn.Linear(D, 1)
    with pytest.raises(NetworkError, match="no dropout module"):
        study(plain, x)
    with pytest.raises(NetworkError, match="no dropout module"):
        study(nn.Sequential(plain, nn.Dropout(0.0)), x)
    with pytest.raises(NetworkError, match="AlphaDropout"):
        study(nn.Sequential(plain, nn.AlphaDropout(0.1)), x)
    with pytest.raises(NetworkError, match="keeps nothing"):
        study(nn.Sequential(plain, nn.Dropout(1.0)), x)
    with pytest.raises(NetworkError, match="leading axis"):
        study(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (D, 6)), nn.Dropout(0.5), nn.Linear(6, 1)), samples(7)[:6])


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="two samples"):
        kernels(network(0.5), samples(1))
    # The run-time types of the tests refuse an unknown mode before our own check does.
    with pytest.raises((InputError, TypeError), match="mode"):
        dropout_kernel(network(0.5), samples(), "train")  # type: ignore[arg-type]


def test_the_network_is_left_alone() -> None:
    model = network(0.5).train()
    state, before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    dropout_kernel(model, samples(), "same", draws=4)
    assert model.training
    assert isinstance(model[2], nn.Dropout)  # type: ignore[index]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_single_batch_has_no_interval() -> None:
    ratio = kernels(network(0.5), samples(), draws=2).ratio("same", diagonal=True)
    assert ratio == Ratio(ratio.value, -math.inf, math.inf)


def test_the_example_draws_its_figure() -> None:
    report = example(quick=True)
    assert png(report.figures["dropout"]).startswith(b"\x89PNG")
    assert "Dropout: 2 module(s)" in report.text()
