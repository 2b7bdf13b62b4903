"""Promises of cross-validation: refits without a sample, held-out errors, and kernels that were fitted to targets."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor import empirical_ntk
from ntk_monitor.applications import generalization as app
from ntk_monitor.applications.arccosine import relu_ntk
from ntk_monitor.applications.estimates import shares_agree, wrong
from ntk_monitor.applications.generalization_words import rank_correlation
from ntk_monitor.applications.problem import problem
from ntk_monitor.errors import InputError
from ntk_monitor.metrics.regression import sample_loo
from ntk_monitor.render import png

Array = NDArray[np.float64]


def kernel_of(n: int, c: int, seed: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((n * c, n * c + 3))
    return a @ a.T, draw.standard_normal((n, c))


@given(n=st.integers(3, 8), c=st.integers(1, 3), seed=st.integers(0, 99), ridge=st.floats(0.05, 50))
def test_leave_one_out_is_a_refit_without_the_sample(n: int, c: int, seed: int, ridge: float) -> None:
    kernel, r = kernel_of(n, c, seed)
    found = app.leave_one_out_path(kernel, r, [ridge, 2 * ridge])
    blocks = kernel.reshape(n, c, n, c)
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        within = blocks[rest][:, :, rest].reshape((n - 1) * c, -1) + ridge * np.eye((n - 1) * c)
        predicted = blocks[i][:, rest].reshape(c, -1) @ np.linalg.solve(within, r[rest].ravel())
        np.testing.assert_allclose(found[0, i], r[i] - predicted, atol=1e-8)
    np.testing.assert_allclose(found[1], sample_loo(kernel, r, 2 * ridge, intercept=False), atol=1e-8)


@given(seed=st.integers(0, 50), scale=st.floats(0.1, 10))
def test_scales_of_kernel_and_outputs_change_nothing_but_units(seed: int, scale: float) -> None:
    kernel, r = kernel_of(6, 2, seed)
    cross, left = kernel[:4], r[:2]
    one, other = app.estimate(kernel, cross, r, left), app.estimate(scale * kernel, scale * cross, 3 * r, 3 * left)
    assert other.ridge == pytest.approx(scale * one.ridge)
    assert other.dof == pytest.approx(one.dof)
    np.testing.assert_allclose(other.promised, 9 * one.promised, rtol=1e-6)
    np.testing.assert_allclose(other.left_test, 3 * one.left_test, rtol=1e-5, atol=1e-9)


def test_estimates_are_those_of_twenty_draws_of_a_wide_relu_network() -> None:
    """Acceptance (20 seeds): GCV/test means .1746/.1748 at ridge 1, and 5 to 9 % in single draws."""
    promised, gcvs, kept = [], [], []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(1300, 6, generator=g, dtype=torch.float64)
        x = x / x.norm(dim=1, keepdim=True)
        y = torch.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]
        y = (y + 0.3 * torch.randn(1300, generator=g, dtype=torch.float64))[:, None].numpy()
        k = np.asarray(relu_ntk(x, x[:300], depth=2))
        found = app.estimate(k[:300], k[300:], y[:300], y[300:], ridge=1.0)
        promised.append(found.loo)
        gcvs.append(found.gcv)
        kept.append(found.error)
    assert np.mean(kept) == pytest.approx(0.1748, rel=0.1)
    assert np.mean(gcvs) == pytest.approx(np.mean(kept), rel=0.06)
    assert np.mean(promised) == pytest.approx(np.mean(kept), rel=0.06)
    single = np.abs(np.array(gcvs) / np.array(kept) - 1).mean()
    assert 0.02 < single < 0.12


def test_the_ridge_is_the_best_of_leave_one_out() -> None:
    kernel, r = kernel_of(9, 1, 3)
    found = app.estimate(kernel, kernel[:2], r, r[:2])
    for factor in (0.3, 3.0):
        assert found.loo <= app.estimate(kernel, kernel[:2], r, r[:2], factor * found.ridge).loo


def network(width: int = 32, inputs: int = 10, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def noisy(count: int, noise: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(count, 10).double()
    return x, (x @ torch.linspace(-0.5, 0.5, 10).double())[:, None] + noise * torch.randn(count, 1).double()


def test_moments_of_training_are_estimates_with_their_own_kernels() -> None:
    x, y = noisy(40, 0.5)
    task = problem(network(8), x, y)
    points = app.over_training(task, ridge=0.7, steps=12, looks=4)
    assert [one.step for one in points] == [0, 1, 2, 5, 12]
    largest = float(np.linalg.eigvalsh(task.kernels()[0])[-1])
    start, start_test = task.outputs(task.x), task.outputs(task.x_test)
    for point in (points[0], points[3]):
        twin = copy.deepcopy(task.model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.9 / 5.6 / largest, momentum=0.9, nesterov=True)
        for _ in range(point.step):
            optimizer.zero_grad()
            (0.5 * (twin(task.x) - torch.from_numpy(task.y)).square().sum()).backward()
            optimizer.step()
        k = empirical_ntk(twin, task.x).reshape(30, 30).numpy()
        cross = empirical_ntk(twin, task.x_test, task.x).reshape(10, 30).numpy()
        predicted = start_test + cross @ np.linalg.solve(k + 0.7 * np.eye(30), task.y - start)
        np.testing.assert_allclose(point.estimate.left_test, task.y_test - predicted, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(point.test, task.y_test - twin(task.x_test).detach().numpy(), rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def fitted() -> Any:
    """Noise is learned: the kernel of the end was fitted to it."""
    x, y = noisy(400, 1.0)
    return app.study(network(48), x, y, held_out=0.5, steps=1500)


def test_a_kernel_that_was_fitted_to_noise_promises_too_much(fitted: Any) -> None:
    start, later, best, end, _ = (one.holds for one in fitted.verdicts)
    assert start is True
    assert later is False
    assert best is True
    assert end is False
    assert fitted.number("promised at the end") < 0.8 * fitted.number("kept at the end")
    assert "fitted to the same targets" in fitted.text()
    rows = fitted.tables["Over training"].rows
    assert rows[-1][-2] < 0.05 < rows[0][-2]


def test_linear_models_keep_every_promise() -> None:
    """Their kernel has never seen a target."""
    x, y = noisy(400, 0.6)
    found = app.study(nn.Linear(10, 1), x, y, held_out=0.5, steps=300)
    assert [one.holds for one in found.verdicts[:4]] == [True] * 4
    promised = [row[1] for row in found.tables["Over training"].rows]
    assert np.ptp(promised) < 1e-9


def test_copies_of_samples_break_leave_one_out() -> None:
    """Every training sample twice: each predicts its copy, and the promise is far too good."""
    x, y = noisy(150, 1.0)
    task = problem(network(256), x, y, held_out=0.5)
    twice = type(task)(
        task.model, torch.cat([task.x] * 2), np.tile(task.y, (2, 1)), task.x_test, task.y_test, None, False
    )
    honest, doubled = (app.over_training(one, ridge=1e-2, steps=1)[0].estimate for one in (task, twice))
    assert app.agrees(doubled.promised, doubled.kept)[0] is False
    assert doubled.loo < 0.2 * honest.loo


def test_few_samples_decide_nothing() -> None:
    x, y = noisy(24, 1.0)
    found = app.study(network(), x, y, held_out=0.5, steps=20)
    assert found.verdicts[0].holds is None
    assert "told from noise" in found.summary


def classes(count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(count, 10)
    return x, (x[:, :3] + 0.7 * torch.randn(count, 3)).argmax(1)


def test_classes_are_judged_by_their_wrong_samples() -> None:
    x, y = classes(160)
    found = app.study(network(16, outputs=3).float(), x, y, held_out=0.5, steps=60)
    assert "share of held-out samples" in found.verdicts[2].claim
    assert 0 <= found.number("held-out error of the network") <= 1
    assert any("one-hot" in words for words in found.caveats)
    assert "GCV" not in found.tables["Over training"].columns
    task = problem(network(16, outputs=3).float(), x, y, held_out=0.5)
    point = app.over_training(task, steps=1)[0]
    labels = task.y_test.argmax(1)
    assert wrong(point.test, task.y_test).tolist() == (task.outputs(task.x_test).argmax(1) != labels).tolist()


def test_checkpoints_are_not_trained_and_start_from_the_first() -> None:
    x, y = noisy(200, 1.0)
    first = network(24)
    last = problem(first, x, y, held_out=0.01).descend(300, 3e-4, momentum=0.9, nesterov=True)
    states = {"run/a.ckpt": first.state_dict(), "run/b.ckpt": last.state_dict()}
    model = network(24)
    model.load_state_dict(last.state_dict())
    before = copy.deepcopy(model.state_dict())
    found = app.study(model, x, y, states=states, held_out=0.5)
    assert [row[0] for row in found.tables["Over checkpoints"].rows] == ["a.ckpt", "b.ckpt"]
    assert any("validation data" in words for words in found.caveats)
    task = problem(model, x, y, held_out=0.5)
    squares = ((task.outputs(task.x_test) - task.y_test) ** 2).mean()
    assert found.number("held-out error of the network") == pytest.approx(squares)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    start = problem(first, x, y, held_out=0.5)
    kernel, cross = start.kernels()
    left = [t - start.outputs(i) for i, t in ((task.x, task.y), (task.x_test, task.y_test))]
    again = app.estimate(kernel, cross, left[0], left[1])
    assert found.number("promised at the start") == pytest.approx(again.loo)
    assert png(found.figures["errors"]).startswith(b"\x89PNG")


def test_equal_means_agree_as_often_as_they_say() -> None:
    """Squared normal errors with equal means: 95 % of 400 pairs agree (34 not: one in a thousand), at twice none."""
    draw = np.random.default_rng(0)
    pairs = [(draw.standard_normal(300) ** 2, draw.standard_normal(300) ** 2) for _ in range(400)]
    assert sum(app.agrees(a, b)[0] is False for a, b in pairs) <= 34
    assert all(app.agrees(2 * a, b)[0] is False for a, b in pairs)
    assert app.agrees(np.ones(1), np.ones(5))[0] is None


def test_shares_agree_within_their_noise() -> None:
    right, half = np.zeros(400), np.tile([0.0, 1.0], 200)
    assert shares_agree(half, half)[0] is True
    assert shares_agree(right, half)[0] is False
    assert shares_agree(np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0]))[0] is None


def test_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    a, b = np.random.default_rng(0).standard_normal((2, 30))
    assert rank_correlation(a, b) == pytest.approx(float(spearmanr(a, b).statistic))
    assert math.isnan(rank_correlation(a[:1], b[:1]))


def test_a_rate_that_the_kernel_outgrows_is_lowered() -> None:
    """Targets a hundred times larger than the outputs: the first rate makes the loss rise."""
    x, _ = noisy(30, 0.0)
    task = problem(network(16), x, 300 * torch.sign(x[:, :1] * x[:, 1:2]))
    points = app.over_training(task, steps=40)
    assert (points[-1].train ** 2).mean() < (points[0].train ** 2).mean()
    assert [one.step for one in points] == sorted({one.step for one in points})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: app.study(network(), noisy(20, 1)[0]), "needs targets"),
        (lambda: app.study(network(), *noisy(20, 1), ridge=0.0), "above 0"),
        (lambda: app.study(network(), *noisy(20, 1), steps=0), "at least one step"),
        (lambda: app.study(nn.Linear(10, 1, bias=False), torch.zeros(20, 10), torch.ones(20)), "nothing to learn"),
        (lambda: app.leave_one_out_path(np.eye(4), np.ones((3, 1)), [1.0]), "3 or more"),
        (lambda: app.leave_one_out_path(np.eye(3), np.ones((3, 1)), [0.0]), "above 0"),
        (lambda: app.leave_one_out_path(np.full((3, 3), np.nan), np.ones((3, 1)), [1.0]), "finite"),
        (lambda: app.estimate(np.zeros((3, 3)), np.ones((1, 3)), np.ones((3, 1)), np.ones((1, 1))), "positive trace"),
        (lambda: app.estimate(np.eye(3), np.ones((1, 2)), np.ones((3, 1)), np.ones((1, 1))), "cross kernel"),
    ],
)
def test_bad_input_is_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_example() -> None:
    found = app.example(quick=True)
    assert found.verdicts[3].holds is False
    assert "GCV at the start" in found.text()
    assert all(png(figure).startswith(b"\x89PNG") for figure in found.figures.values())
