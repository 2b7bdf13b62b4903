"""Interference of classes against gradients and steps written out; a yes, a no and neither for each claim."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor import empirical_ntk
from ntk_monitor.applications import class_interference as app
from ntk_monitor.applications.class_steps import within_and_between
from ntk_monitor.applications.report import Report
from ntk_monitor.cli import main
from ntk_monitor.errors import InputError
from ntk_monitor.losses import recognised


def _net(outputs: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def _data(samples: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4).double(), torch.arange(samples) % classes


def _flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def _quartic(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y) ** 4).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "quartic": _quartic,
}


def _measured(loss: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[app.Classes, Tensor]:
    """Return what is measured, and the targets of this loss."""
    targets = y if loss == "cross_entropy" else F.one_hot(y).double()
    lossy = recognised(_quartic if loss == "quartic" else loss)
    return app.Classes.measured(model, x, targets, y.numpy(), lossy), targets


@pytest.mark.parametrize("loss", LOSSES)
def test_first_order_is_the_inner_product_of_the_gradients_of_the_class_losses(loss: str) -> None:
    model, (x, y) = _net(), _data()
    seen, targets = _measured(loss, model, x, y)
    gradients = [_flat_gradient(model, LOSSES[loss](model(x[y == c]), targets[y == c])) for c in range(3)]
    wanted = torch.stack(gradients) @ torch.stack(gradients).T
    np.testing.assert_allclose(seen.inner, wanted, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(app.interference(seen.gram, None, y.numpy(), 0.1), -0.1 * wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_step_that_a_copy_takes(loss: str) -> None:
    model, (x, y) = _net(), _data()
    seen, targets = _measured(loss, model, x, y)
    found = seen.steps([0.03, 0.3])[1]
    for a in range(3):
        stepped = copy.deepcopy(model)
        optimizer = torch.optim.SGD(stepped.parameters(), lr=0.3)
        LOSSES[loss](stepped(x[y == a]), targets[y == a]).backward()
        optimizer.step()
        for b in range(3):
            rows = y == b
            with torch.no_grad():
                change = LOSSES[loss](stepped(x[rows]), targets[rows]) - LOSSES[loss](model(x[rows]), targets[rows])
            assert found.actual[a, b] == pytest.approx(float(change), rel=1e-9, abs=1e-13)


def test_a_kernel_that_is_known_already_gives_the_same() -> None:
    model, (x, y) = _net(), _data()
    seen, _ = _measured("cross_entropy", model, x, y)
    f = model(x).detach()
    g = f.softmax(1) - F.one_hot(y)
    found = app.interference(empirical_ntk(model, x), g, y.numpy(), lr=0.5)
    np.testing.assert_allclose(found, -0.5 * seen.inner, rtol=1e-9, atol=1e-14)


def test_the_first_order_is_the_limit_of_small_steps() -> None:
    model, (x, y) = _net(), _data()
    small, half = _measured("cross_entropy", model, x, y)[0].steps([1e-4, 5e-5])
    assert small.error < 1e-2
    assert small.error / half.error == pytest.approx(2, rel=0.02)


def test_errors_are_told_apart_network_or_loss() -> None:
    """A linear network bends no output; a loss that is linear in the outputs bends itself nowhere."""
    x, y = _data()
    linear = _measured("mse", nn.Linear(4, 3).double(), x, y)[0].steps([0.1])[0]
    assert linear.error_of_network < 1e-10 < 0.01 < linear.error_of_loss
    assert linear.error == pytest.approx(linear.error_of_loss, rel=1e-8)
    weights = torch.randn(3).double()
    slope = app.Classes.measured(_net(), x, y, y.numpy(), recognised(lambda f, _: (f @ weights).mean())).steps([0.1])[0]
    assert slope.error_of_loss < 1e-10 < 1e-3 < slope.error_of_network


@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 6), st.integers(0, 50))
def test_samples_have_no_order_and_classes_no_rank(k: int, n: int, p: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    j, of = draw.normal(size=(k * n, p)), np.repeat(np.arange(k), n)
    found = app.class_gram(j @ j.T, of)
    assert np.linalg.eigvalsh(found)[0] > -1e-9 * np.trace(found) - 1e-12
    order, names = draw.permutation(k * n), draw.permutation(k)
    shuffled = app.class_gram(j[order] @ j[order].T, names[of[order]])
    np.testing.assert_allclose(shuffled[np.ix_(names, names)], found, rtol=1e-9, atol=1e-12)


def test_standard_errors_are_those_of_other_samples() -> None:
    """400 draws of both classes from a linear model with the same distribution; within a fifth on average."""
    draw, of, j = np.random.default_rng(0), np.repeat([0, 1], [40, 60]), np.empty((100, 3))
    found, claimed = [], []
    for _ in range(400):
        j = draw.normal(size=(100, 3)) + np.where(of == 0, 1.0, -0.5)[:, None]
        found.append(app.class_gram(j @ j.T, of)[0, 1])
        claimed.append(app.doubt(j @ j.T, of)[0, 1])
    assert np.mean(claimed) == pytest.approx(np.std(found), rel=0.2)
    assert np.isnan(app.doubt(j @ j.T, of)[0, 0])


def test_cosines_within_and_between_by_loops() -> None:
    j, of = np.random.default_rng(0).normal(size=(9, 2)), np.repeat([0, 1, 2], [2, 3, 4])
    j[8] = 0.0  # a sample without a gradient has no direction
    found = within_and_between(j @ j.T, of)
    for a in range(3):
        means = []
        for b in range(3):
            pairs = [(n, m) for n in range(8) for m in range(8) if n != m and of[n] == a and of[m] == b]
            means.append(np.mean([j[n] @ j[m] / np.linalg.norm(j[n]) / np.linalg.norm(j[m]) for n, m in pairs]))
        assert found[0][a] == pytest.approx(means[a])
        assert found[1][a] == pytest.approx(max(m for b, m in enumerate(means) if b != a))


class _Start(nn.Module):
    """A linear network without bias that starts at zero."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, inputs).double())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


def _opposites() -> Report:
    """The same inputs are to become 1 in class 0 and -1 in class 1."""
    x = (1 + 0.1 * torch.randn(20, 4)).double()
    sign = 1.0 - 2.0 * (torch.arange(20) % 2)
    return app.study(_Start(4), x, sign[:, None].double(), labels=torch.arange(20) % 2, loss="mse", lr=1e-4)


def test_classes_that_want_the_opposite_hurt_each_other() -> None:
    report = _opposites()
    assert [verdict.holds for verdict in report.verdicts] == [True, True, True]
    assert report.number("most opposed") == pytest.approx(-1, abs=0.02)


def test_classes_that_share_nothing_do_not_interfere() -> None:
    """Disjoint inputs of a linear network: the kernel between the classes is zero, and so is every change."""
    x = torch.zeros(20, 6).double()
    x[::2, :3], x[1::2, 3:] = torch.randn(10, 3).double(), torch.randn(10, 3).double()
    report = app.study(_Start(6), x, torch.randn(20, 1).double(), labels=np.arange(20) % 2)
    assert [verdict.holds for verdict in report.verdicts[:2]] == [False, None]
    assert "no interference" in report.verdicts[0].evidence
    assert "nothing to foresee" in report.verdicts[1].evidence


def test_a_step_too_large_for_the_first_order_gets_a_no() -> None:
    model, (x, y) = _net(), _data(30)
    small, large = (app.study(model, x, y, lr=lr) for lr in (1e-3, 30.0))
    assert small.verdicts[1].holds is True
    assert large.verdicts[1].holds is False
    assert large.number("error of first order") > 0.25
    assert small.number("first order holds up to") < 30


def test_labels_without_meaning_get_a_no_and_no_certainty() -> None:
    model, x = _net(outputs=1), torch.randn(40, 4).double()
    report = app.study(model, x, x[:, :1] ** 2, labels=torch.randint(4, (40,)))
    assert report.verdicts[0].holds is not True
    assert report.verdicts[2].holds is False


def test_the_rate_that_is_chosen_is_useful_and_its_double_is_not() -> None:
    seen, _ = _measured("cross_entropy", _net(), *_data(30))
    rate = seen.useful_rate()
    good, bad = seen.steps([rate, 2 * rate])
    assert (np.diag(good.actual) <= np.diag(good.predicted) / 2).all()
    polyak = (seen.losses() / np.diag(seen.inner)).min()
    assert rate == pytest.approx(polyak) or (np.diag(bad.actual) > np.diag(bad.predicted) / 2).any()


def test_only_chosen_parameters_take_the_step() -> None:
    model, (x, y) = _net(), _data()
    alone = nn.Sequential(nn.Tanh(), copy.deepcopy(model[2]))
    hidden = model[0](x).detach()
    found = app.study(model, x, y, params="2\\.", lr=0.1)
    wanted = app.study(alone, hidden, y, lr=0.1)
    assert found.number("most opposed") == pytest.approx(wanted.number("most opposed"), rel=1e-9)
    assert found.number("error of first order") == pytest.approx(wanted.number("error of first order"), rel=1e-6)


def test_classes_are_chosen_and_single_samples_left_out() -> None:
    x, y = torch.randn(13, 4), torch.tensor([7] * 5 + [9] * 5 + [3] + [-100] * 2)
    report = app.study(_net(10), x, y)
    assert [row[:2] for row in report.tables["classes"].rows] == [("7", 5), ("9", 5)]
    picked = app.study(_net(10), torch.randn(12, 4), torch.arange(12) % 4, classes=[3, 1], per_class=2)
    assert [row[:2] for row in picked.tables["classes"].rows] == [("1", 2), ("3", 2)]


def test_a_class_that_is_learned_is_left_out_of_the_pairs() -> None:
    x, target = torch.eye(4).double().repeat(3, 1), torch.tensor([0.0, 1.0, -1.0, 0.0]).double().repeat(3)[:, None]
    report = app.study(_Start(4), x, target, labels=torch.arange(12) % 4)
    assert report.caveats[-1].endswith(": 0, 3")
    assert report.number("most opposed") == 0.0


def test_a_network_is_only_read_and_the_example_speaks() -> None:
    model, (x, y) = _net().float().train(), _data()
    before = copy.deepcopy(model.state_dict())
    app.study(model, x.float(), y)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = app.example(quick=True)
    assert report.number("most opposed") < 0
    assert set(report.figures) == {"foreseen", "actual", "steps"}


def test_targets_without_classes_end_the_command_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "samples.npz", x=np.random.randn(20, 3).astype(np.float32), y=np.random.randn(20, 1))
    words = ["--model", "tests.test_cli_app.Small", "--data", str(tmp_path / "samples.npz")]
    assert main(["app", "class_interference", *words]) == 2
    said = capsys.readouterr().err
    assert "which are no classes; pass labels=" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: app.study(_net(), torch.randn(4, 4)), "needs targets"),
        (lambda: app.study(_net(), torch.randn(4, 4), torch.randn(4, 3)), "no classes; pass labels="),
        (lambda: app.study(_net(), torch.randn(4, 4), torch.arange(4) % 3), "got 1 such among 4 samples"),
        (lambda: app.study(_net(), *_data(), labels=[0, 1]), "one label for each of the 12"),
        (lambda: app.study(_net(), *_data(), classes=[0, 8]), "no sample of class 8"),
        (lambda: app.study(_net(), *_data(), lr=-1.0), "positive learning rate"),
        (lambda: app.study(_net(), *_data(), per_class=1), "at least two samples"),
        (lambda: app.study(_net(), _data()[0] * np.nan, _data()[1]), "wanted finite losses"),
        (lambda: app.study(_Start(4), torch.randn(4, 4), torch.zeros(4, 1), labels=[0, 0, 1, 1]), "nothing is learned"),
        (lambda: app.class_gram(np.eye(3), [0, 1]), "wanted G"),
        (lambda: app.class_gram(np.eye(2), [0, 2]), "needs a sample, got none of 1"),
        (lambda: app.interference(np.ones((2, 1, 2, 1)), np.ones((2, 2)), [0, 1]), "wanted a kernel"),
    ],
)
def test_what_cannot_be_used_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
