"""Gradients, curvature and residuals of losses against autograd of torch's own, for every option."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.errors import InputError
from ntk_monitor.losses import (
    Loss,
    Terms,
    bce_with_logits,
    candidates,
    cross_entropy,
    from_name,
    huber,
    mse,
    recognised,
    token_cross_entropy,
)

N, C = 5, 3


def root_of(terms: Terms) -> Tensor:
    """S as an explicit (N·C, N·C) matrix."""
    n, c = terms.gradient.shape
    root = torch.zeros(n * c, n * c, dtype=torch.float64)
    for i in range(n):
        block = np.diag(terms.root[i]) if terms.root.ndim == 2 else terms.root[i]
        root[i * c : (i + 1) * c, i * c : (i + 1) * c] = torch.as_tensor(block)
    return root


def assert_terms(loss: Any, module: Any, f: Tensor, y: Tensor) -> None:
    """Compare with autograd: value, gradient, S Sᵀ = Hessian, u = S⁺ g with g in the range of S."""
    leaf = f.detach().double().requires_grad_(True)
    value = module(leaf, y)
    (gradient,) = torch.autograd.grad(value, leaf)
    shape = (len(f), f[0].numel())
    hessian = torch.autograd.functional.hessian(lambda x: module(x, y), f.detach().double())
    hessian = hessian.reshape(f.numel(), f.numel())
    terms = recognised(loss).terms(f.detach().reshape(shape), y)
    scale = float(gradient.abs().max()) or 1.0
    wanted_value = pytest.approx(float(value.detach()), rel=1e-12)
    assert terms.value == wanted_value
    assert recognised(loss).value(f.detach(), y) == wanted_value
    np.testing.assert_allclose(terms.gradient, gradient.reshape(shape), atol=1e-13 * scale)
    root = root_of(terms)
    np.testing.assert_allclose(root @ root.T, hessian, atol=1e-13 * max(float(hessian.abs().max()), 1e-300))
    wanted = np.linalg.pinv(root.numpy(), rcond=1e-10) @ terms.gradient.reshape(-1)
    np.testing.assert_allclose(terms.residual(), wanted, atol=1e-9 * max(np.abs(wanted).max(), 1e-300))
    np.testing.assert_allclose(root.numpy() @ terms.residual(), terms.gradient.reshape(-1), atol=1e-12 * scale)


LABELS = torch.tensor([0, 2, 1, 2, 0])
IGNORING = torch.tensor([0, 7, 1, 2, 7])
SOFT = torch.softmax(torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1)
WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("reduction", "weight", "smoothing", "targets"),
    list(itertools.product(["mean", "sum"], [None, WEIGHT], [0.0, 0.2], ["labels", "ignoring", "soft", "column"])),
)
def test_cross_entropy(reduction: str, weight: Tensor | None, smoothing: float, targets: str) -> None:
    y = {"labels": LABELS, "ignoring": IGNORING, "soft": SOFT, "column": LABELS}[targets]
    index = 7 if targets == "ignoring" else -100
    module = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing, ignore_index=index)
    f = 2 * torch.randn(N, C, dtype=torch.float64)
    if targets == "column":
        # (N, 1) labels are accepted where torch itself refuses them.
        got = recognised(module).terms(f, y[:, None])
        np.testing.assert_array_equal(got.gradient, recognised(module).terms(f, y).gradient)
    assert_terms(module, module, f, y)


def test_soft_targets_that_do_not_sum_to_one() -> None:
    y = SOFT * torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    for smoothing in (0.0, 0.1):
        module = nn.CrossEntropyLoss(WEIGHT, label_smoothing=smoothing)
        assert_terms(module, module, torch.randn(N, C, dtype=torch.float64), y)


def test_negative_log_likelihood_is_cross_entropy_of_log_probabilities() -> None:
    f = torch.randn(N, C, dtype=torch.float64).log_softmax(1)
    for reduction in ("mean", "sum"):
        module = nn.NLLLoss(WEIGHT, reduction=reduction)
        assert recognised(module).value(f, LABELS) == pytest.approx(float(module(f, LABELS)), rel=1e-12)
        assert recognised(module).terms(f, LABELS).value == pytest.approx(float(module(f, LABELS)), rel=1e-12)
    assert recognised(F.nll_loss).kind == "cross_entropy"


@pytest.mark.parametrize(
    ("reduction", "weight", "soft"),
    list(itertools.product(["mean", "sum"], [None, torch.tensor(2.5), WEIGHT], [False, True])),
)
def test_binary_cross_entropy(reduction: str, weight: Tensor | None, soft: bool) -> None:
    module = nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction)
    y = torch.rand(N, C, dtype=torch.float64) if soft else torch.randint(2, (N, C)).double()
    assert_terms(module, module, 2 * torch.randn(N, C, dtype=torch.float64), y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("outputs", [(N,), (N, 1), (N, C)])
def test_mean_squares(reduction: str, outputs: tuple[int, ...]) -> None:
    f, y = torch.randn(outputs, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)
    assert_terms(nn.MSELoss(reduction=reduction), nn.MSELoss(reduction=reduction), f, y)


@pytest.mark.parametrize("make", [mse, bce_with_logits])
def test_targets_of_one_axis_fit_outputs_of_two(make: Any) -> None:
    f, y = torch.randn(N, 1, dtype=torch.float64), torch.randint(2, (N,))
    loss = make()
    wanted = loss.terms(f, y[:, None])
    np.testing.assert_array_equal(loss.terms(f, y).gradient, wanted.gradient)
    np.testing.assert_array_equal(loss.terms(f, y).residual(), wanted.residual())
    assert loss.value(f, y) == pytest.approx(wanted.value, rel=1e-12)
    assert loss.value(f[:, 0], y) == pytest.approx(wanted.value, rel=1e-12)


@pytest.mark.parametrize("reach", [30.0, 1e3, 1e30])
@pytest.mark.parametrize("loss", [cross_entropy(), cross_entropy(weight=WEIGHT), bce_with_logits(), mse()])
def test_extreme_outputs_stay_finite(loss: Loss, reach: float) -> None:
    f = reach * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([1, 1]) if loss.kind == "cross_entropy" else torch.tensor([[0.0, 1, 0], [0, 1, 1]])
    terms = loss.terms(f, y)
    for values in (terms.gradient, terms.root, terms.inverse, terms.residual(), terms.value):
        assert np.isfinite(values).all()
    leaf = f.clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(loss.function(leaf, y), leaf)
    np.testing.assert_allclose(terms.gradient, wanted, atol=1e-11 * max(float(wanted.abs().max()), 1.0))


def test_a_later_gradient_in_the_coordinates_of_this_point() -> None:
    terms = cross_entropy().terms(torch.randn(N, C), LABELS)
    np.testing.assert_allclose(terms.residual(2 * terms.gradient), 2 * terms.residual(), rtol=1e-14)


def test_a_batch_that_is_ignored_altogether_has_no_gradient() -> None:
    terms = cross_entropy(ignore_index=0).terms(torch.randn(2, C), torch.tensor([0, 0]))
    assert terms.value == 0
    assert not terms.gradient.any()
    assert not terms.residual().any()


def test_targets_that_do_not_fit_are_refused() -> None:
    f = torch.randn(N, C)
    with pytest.raises(InputError, match=r"one integer per sample \(5\), got shape \(5, 3\)"):
        cross_entropy().terms(f, torch.zeros(N, C, dtype=torch.int64))
    with pytest.raises(InputError, match=r"must lie in 0..2, got up to 3"):
        cross_entropy().terms(f, torch.full((N,), 3))
    with pytest.raises(InputError, match=r"must lie in 0..2"):
        cross_entropy().terms(f, torch.full((N,), -1))
    with pytest.raises(InputError, match=r"soft targets must have the shape of the outputs \(5, 3\), got \(5,\)"):
        cross_entropy().terms(f, torch.zeros(N))
    with pytest.raises(InputError, match=r"targets of shape \(5,\) do not fit outputs \(5, 3\) of mse\(mean\)"):
        mse().terms(f, torch.zeros(N))
    with pytest.raises(InputError, match=r"huber\(mean, delta=1\) has no known curvature; .* need MSE, cross-entropy"):
        huber().terms(f, f)


def test_broadcasting_is_not_a_loss_value() -> None:
    # torch would warn and average an N × N table; that value must match no loss.
    assert math.isnan(mse().value(torch.randn(4, 1), torch.randn(4, 4)))
    assert math.isnan(mse().value(torch.randn(4, 2), torch.randn(4)))
    assert math.isnan(cross_entropy().value(torch.randn(4, 2), torch.tensor([[0], [1], [0], [1]])))


@dataclass
class _Focal:
    """A loss that cannot be hashed."""

    gamma: float = 2.0

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        p = f.softmax(1).gather(1, y[:, None])
        return (-((1 - p) ** self.gamma) * p.log()).mean()


def test_losses_are_recognised() -> None:
    same = cross_entropy()
    assert recognised(same) is same
    names = {"mse": "mse(mean)", "cross_entropy": "cross_entropy(mean)", "huber": "huber(mean, delta=1)"}
    names |= {"bce_with_logits": "bce_with_logits(mean)"}
    for name, shown in names.items():
        assert recognised(name).name == shown
    assert recognised(F.cross_entropy).kind == "cross_entropy"
    assert recognised(F.mse_loss).kind == "mse"
    assert recognised(F.binary_cross_entropy_with_logits).kind == "bce_with_logits"
    assert recognised(nn.HuberLoss(delta=0.5)).name == "huber(mean, delta=0.5)"
    smooth = nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, reduction="sum")
    assert recognised(smooth).name == "cross_entropy(sum, class weights, label_smoothing=0.1)"
    assert recognised(nn.BCEWithLogitsLoss(pos_weight=WEIGHT)).name == "bce_with_logits(mean, pos_weight)"
    for unknown in (_Focal(), nn.L1Loss(), nn.BCEWithLogitsLoss(weight=WEIGHT), nn.MSELoss(reduction="none")):
        assert recognised(unknown).kind == "other"
    assert recognised(_Focal()).value(torch.zeros(1, 2), torch.tensor([0])) == pytest.approx(math.log(2) / 4)
    with pytest.raises(InputError, match=r"unknown loss 'mae'; known names are \['mse', "):
        recognised("mae")
    with pytest.raises(InputError, match=r"a name, a torch loss or a callable\(outputs, targets\), got int"):
        recognised(3)


def test_subclasses_with_other_behaviour_are_not_taken_for_their_base() -> None:
    class Doubled(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - torch's own name
            return 2 * super().forward(input, target)

    assert recognised(Doubled()).kind == "other"


def test_candidates_begin_with_what_the_module_holds() -> None:
    module = nn.Module()
    module.one, module.other = nn.CrossEntropyLoss(WEIGHT), nn.MSELoss()
    names = [loss.name for loss in candidates(module)]
    assert names[:2] == ["cross_entropy(mean, class weights)", "mse(mean)"]
    assert names.count("mse(mean)") == 1
    assert {"cross_entropy(mean)", "bce_with_logits(mean)", "mse(sum)", "huber(mean, delta=1)"} < set(names)


NAMED = [mse(), mse("sum"), cross_entropy(label_smoothing=0.1), bce_with_logits(), token_cross_entropy(shift=True)]


@pytest.mark.parametrize("loss", NAMED, ids=lambda loss: str(loss.name))
def test_a_name_gives_its_loss_back(loss: Loss) -> None:
    found = from_name(loss.name)
    assert found is not None
    assert (found.name, found.kind, found.options) == (loss.name, loss.kind, loss.options)


@pytest.mark.parametrize("name", ["", "mse", "mse(mean, shifted)", "cross_entropy(mean, weight)", "MyLoss(mean)"])
def test_a_name_that_does_not_say_all_gives_none(name: str) -> None:
    assert from_name(name) is None
