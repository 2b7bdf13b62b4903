"""Influence is what a step does: compared with steps that are taken. Leverage against the posterior in the weights."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.errors import InputError
from ntk_monitor.influence import influence, leverage


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """φ (N, P), one backward pass per sample."""
    rows = []
    for a, b in zip(x, y, strict=True):
        loss = F.cross_entropy(model(a[None]), b[None])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def _data(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4).double(), torch.randint(3, (samples,))


def test_scores_are_what_a_step_does() -> None:
    model, (x, y), (xv, yv), lr = _net(), _data(6), _data(4), 1e-6
    found = influence(model, (x, y), (xv, yv), "cross_entropy")
    for n in range(len(x)):
        stepped = copy.deepcopy(model)
        F.cross_entropy(stepped(x[n : n + 1]), y[n : n + 1]).backward()
        with torch.no_grad():
            for p in stepped.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=lr)
            before, after = (F.cross_entropy(m(xv), yv, reduction="none") for m in (model, stepped))
        np.testing.assert_allclose(found.scores[:, n], (before - after).numpy() / lr, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.total, found.scores.mean(0))


def test_scores_of_a_preconditioned_step() -> None:
    model, (x, y), (xv, yv) = _net(), _data(6), _data(4)
    scale = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    d = torch.cat([v.reshape(-1) for v in scale.values()])
    wanted = (_gradients(model, xv, yv) * d) @ _gradients(model, x, y).T
    found = influence(model, (x, y), (xv, yv), nn.CrossEntropyLoss(), preconditioner=scale)
    np.testing.assert_allclose(found.scores, wanted.numpy(), rtol=1e-9, atol=1e-12)


def test_damped_scores_are_those_of_the_inverse_fisher() -> None:
    model, (x, y), (xv, yv), ridge = _net(), _data(6), _data(4), 0.1
    phi, other = _gradients(model, x, y), _gradients(model, xv, yv)
    mu = ridge * float(phi.square().sum(1).mean())
    fisher = phi.T @ phi + mu * torch.eye(phi.shape[1]).double()
    wanted = other @ torch.linalg.solve(fisher, phi.T)
    found = influence(model, (x, y), (xv, yv), "cross_entropy", ridge=ridge)
    np.testing.assert_allclose(found.scores, wanted.numpy(), rtol=1e-8, atol=1e-12)


def test_the_sample_itself_helps_and_its_wrong_label_harms() -> None:
    model, (x, y), (xv, yv) = _net(), _data(30), _data(1)
    x[7], y[7] = xv[0], yv[0]
    found = influence(model, (x, y), (xv, yv), "cross_entropy", top=3)
    assert found.helpful[0][0] == 7
    assert len(found.helpful) == 3
    assert found.of(0)[0] == (found.helpful[0] if found.helpful[0][1] > -found.harmful[0][1] else found.harmful[0])
    wrong = y.clone()
    wrong[7] = int(model(xv).argmin())
    right = torch.tensor([int(model(xv).argmax())])
    # Not the most harmful of all: samples of large gradients outweigh it.
    assert influence(model, (x, wrong), (xv, right), "cross_entropy").scores[0, 7] < 0


def test_samples_that_teach_the_same_share_it() -> None:
    model, (x, y), (xv, yv) = _net(), _data(10), _data(3)
    x[1], y[1] = x[0], y[0]
    once = influence(model, (x[1:], y[1:]), (xv, yv), "cross_entropy", ridge=1e-3).scores[:, 0]
    twice = influence(model, (x, y), (xv, yv), "cross_entropy", ridge=1e-3).scores[:, :2]
    np.testing.assert_allclose(twice[:, 0], twice[:, 1], rtol=1e-6)
    np.testing.assert_allclose(twice.sum(1), once, rtol=0.05)


def test_lists_hold_their_own_sign_only() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    x, y = torch.eye(2).double(), model(torch.eye(2).double()).detach() + 1
    found = influence(model, (x, y), (x[:1], y[:1]), "mse")
    assert [n for n, _ in found.helpful] == [0]
    assert found.harmful == ()


def test_leverage_is_the_posterior_variance_in_the_weights() -> None:
    phi, other, ridge = np.random.default_rng(0).normal(size=(8, 5)), np.random.default_rng(1).normal(size=(3, 5)), 0.2
    mu = ridge * (phi**2).sum(1).mean()
    covariance = mu * np.linalg.inv(phi.T @ phi + mu * np.eye(5))
    k = phi @ phi.T
    np.testing.assert_allclose(leverage(k, ridge), np.diag(phi @ covariance @ phi.T), rtol=1e-9)
    found = leverage(torch.as_tensor(k), ridge, cross=other @ phi.T, own=(other**2).sum(1))
    np.testing.assert_allclose(found, np.diag(other @ covariance @ other.T), rtol=1e-9)


@given(st.integers(1, 8), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_laws_of_leverage(samples: int, ridge: float, scale: float, random: object) -> None:
    phi = np.random.default_rng(samples).normal(size=(samples, 4))
    k = phi @ phi.T
    found = leverage(k, ridge)
    assert (found >= 0).all()
    assert (found <= np.diag(k) * (1 + 1e-12)).all()
    np.testing.assert_allclose(leverage(scale * k, ridge), scale * found, rtol=1e-8, atol=1e-12 * scale)


def test_what_cannot_be_used_is_refused() -> None:
    model, pair = _net(), _data(3)
    with pytest.raises(InputError, match="ridge must be positive, got 0; pass None for the effect of one step"):
        influence(model, pair, pair, "cross_entropy", ridge=0.0)
    with pytest.raises(InputError, match=r"got shape \(2, 3\) and ridge 1"):
        leverage(np.ones((2, 3)), 1.0)
    with pytest.raises(InputError, match="cross= and own= belong together"):
        leverage(np.eye(2), 1.0, cross=np.ones((1, 2)))
    with pytest.raises(InputError, match=r"wanted cross \(m, 2\) and own \(m,\), got shapes \(2, 1\) and \(2,\)"):
        leverage(np.eye(2), 1.0, cross=np.ones((2, 1)), own=np.ones(2))
