"""Named directions add up to the residual, and move at the rates that are said."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ntk_monitor import directions
from ntk_monitor.directions import Direction
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.losses import Loss, bce_with_logits, cross_entropy, mse
from ntk_monitor.modes import Modes
from tests import twins_modes

N, C = 9, 3
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])


def problem(loss: Loss) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    y = torch.from_numpy(LABELS)
    targets = y if loss.kind == "cross_entropy" else nn.functional.one_hot(y).double()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    return model, torch.randn(N, 4, dtype=torch.float64), targets


LOSSES = pytest.mark.parametrize("loss", [mse(), cross_entropy(), bce_with_logits()], ids=lambda loss: loss.name)


@LOSSES
@pytest.mark.parametrize("labels", [LABELS, None], ids=["classes", "outputs"])
def test_parts_add_up_and_interference_is_their_rate(loss: Loss, labels: np.ndarray | None) -> None:
    model, x, y = problem(loss)
    kernel, terms = empirical_ntk(model, x).numpy(), loss.terms(model(x).detach(), y)
    modes = Modes.of(kernel, terms)
    groups = directions.default_groups(N, C, labels)
    assert list(groups) == [f"{'output' if labels is None else 'class'} {i}" for i in range(3)]
    parts = directions.parts(groups, modes.residual)
    along = directions.residuals(parts, modes.residual)
    assert np.square(along).sum() == pytest.approx(np.square(modes.coordinates).sum(), rel=1e-12)
    between = directions.interference(kernel, terms.gradient, groups)
    np.testing.assert_allclose(between, twins_modes.interference(kernel, terms.gradient, list(groups.values())))
    gradients = torch.autograd.grad(loss.function(model(x), y), list(model.parameters()))
    assert between.sum() == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-10)
    if loss.kind != "cross_entropy" or labels is not None:
        # Cross-entropy couples outputs: part of a sample's residual alone is no residual of outputs.
        rates = directions.rates(parts, modes.rates, modes.vectors)
        np.testing.assert_allclose(np.diag(between), along**2 * rates, rtol=1e-9)


@LOSSES
def test_a_small_step_on_one_class_moves_the_loss_of_another_as_said(loss: Loss) -> None:
    model, x, y = problem(loss)
    groups = directions.class_groups(LABELS, C)
    terms = loss.terms(model(x).detach(), y)
    between = directions.interference(empirical_ntk(model, x).numpy(), terms.gradient, groups)
    parts = [torch.from_numpy(label == LABELS) for label in range(3)]

    def part(i: int) -> torch.Tensor:
        # Equal classes: the mean over the batch is the mean of the classes' means.
        return loss.function(model(x[parts[i]]), y[parts[i]]) / 3

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for b in range(3):
        gradients = torch.autograd.grad(part(b), list(model.parameters()))
        changes = []
        for lr in (1e-5, -1e-5):
            with torch.no_grad():
                for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                    p.copy_(before[name] - lr * g)
                changes.append([float(part(a)) for a in range(3)])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        slope = (np.array(changes[0]) - np.array(changes[1])) / 2e-5
        np.testing.assert_allclose(slope, -between[:, b], rtol=1e-5, atol=1e-9)


def test_tasks_that_want_opposite_things_have_negative_interference() -> None:
    # Two outputs read the same feature through one shared weight, one with the sign turned.
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x * self.w, -x * self.w], dim=1)

    model, x = Shared(), torch.randn(5, 1, dtype=torch.float64)
    terms = mse().terms(model(x).detach(), torch.cat([x, x], dim=1))
    groups = directions.output_groups(5, 2, names=("a", "b"))
    between = directions.interference(empirical_ntk(model, x).numpy(), terms.gradient, groups)
    np.testing.assert_allclose(directions.cosines(between), [[1, -1], [-1, 1]], atol=1e-12)
    assert np.isnan(directions.cosines(np.zeros((2, 2)))).all()


@LOSSES
def test_a_pattern_is_the_residual_it_would_leave(loss: Loss) -> None:
    # At f = f* + ε w with f* the minimum, u is Sᵀ w ε to first order.
    model, x, _ = problem(loss)
    f = model(x).detach()
    y = {"mse": f, "cross_entropy": f.softmax(1), "bce_with_logits": f.sigmoid()}[loss.kind]
    w = torch.randn(N, C, dtype=torch.float64)
    terms = loss.terms(f + 1e-6 * w, y)
    found = directions.pattern("mine", w.numpy(), terms.root)
    np.testing.assert_allclose(terms.residual(), 1e-6 * found.vector, atol=1e-11)
    assert np.abs(found.vector).max() > 0.01


def test_rates_of_eigenvectors_are_eigenvalues_and_length_does_not_matter() -> None:
    model, x, y = problem(mse())
    terms = mse().terms(model(x).detach(), y)
    modes = Modes.of(empirical_ntk(model, x).numpy(), terms)
    own = [Direction(f"mode {i}", -3.0 * modes.vectors[:, i]) for i in range(4)]
    np.testing.assert_allclose(directions.rates(own, modes.rates, modes.vectors), modes.rates[:4], rtol=1e-12)
    np.testing.assert_allclose(directions.residuals(own, modes.residual), -modes.coordinates[:4], rtol=1e-9)
    both = Direction("two", modes.vectors[:, 0] + modes.vectors[:, 1])
    rate = directions.rates([both], modes.rates, modes.vectors)[0]
    assert rate == pytest.approx(modes.rates[:2].mean())
    np.testing.assert_allclose(np.linalg.norm(directions.matrix(own), axis=1), 1)


def test_a_group_without_residual_has_no_rate() -> None:
    part = directions.parts({"none": np.zeros((2, 1), dtype=bool)}, np.ones(2))
    assert directions.residuals(part, np.ones(2))[0] == 0
    assert np.isnan(directions.rates(part, np.ones(2), np.eye(2))[0])


def test_confusing_two_classes_shows_in_their_pair_alone() -> None:
    # Samples of class 0 and 1 taken for each other, class 2 right.
    f = torch.tensor([[0.0, 2.0, -5.0], [2.0, 0.0, -5.0], [-5.0, -5.0, 5.0]], dtype=torch.float64)
    labels = np.array([0, 1, 2])
    terms = cross_entropy().terms(f, torch.from_numpy(labels))
    pairs = [directions.class_pair(a, b, labels, terms.root) for a, b in ((0, 1), (1, 0), (0, 2), (1, 2))]
    there, back, *others = directions.residuals(pairs, terms.residual())
    assert there == pytest.approx(back)
    assert there > 0.99 * float(np.linalg.norm(terms.residual()))
    assert np.abs(others).max() < 0.8 * there
    with pytest.raises(InputError, match=r"two different classes of 0\.\.2"):
        directions.class_pair(0, 3, labels, terms.root)


@settings(max_examples=20)
@given(st.integers(0, 4), st.floats(0, 6), st.floats(0.1, 10))
def test_a_wave_of_any_phase_lies_in_its_direction(k: int, phase: float, extent: float) -> None:
    # One period over the extent of the data; a grid whose last point would repeat the first is left open by 1/n.
    n = 32
    x = extent * np.linspace(0, 1, n)[:, None]
    wrong = np.cos(2 * np.pi * k * x / extent + phase)
    terms = mse().terms(torch.from_numpy(wrong), torch.zeros(n, 1))
    found = directions.waves(x, terms.root, terms.residual(), most=4)
    assert [d.name for d in found] == [f"wave {i}" for i in range(5)]
    along = directions.residuals(found, terms.residual())
    assert along[k] == pytest.approx(float(np.linalg.norm(terms.residual())), rel=1e-9, abs=1e-12)


def test_waves_in_the_plane_count_each_once() -> None:
    axis = np.arange(8.0)
    x = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    f = np.cos(2 * np.pi * (2 * x[:, :1] - x[:, 1:]) / 7)
    terms = mse().terms(torch.from_numpy(f), torch.zeros(64, 1))
    found = directions.waves(x, terms.root, terms.residual(), most=2)
    assert len(found) == 13
    assert len({d.name for d in found}) == 13
    best = max(found, key=lambda d: directions.residuals([d], terms.residual())[0])
    assert best.name == "wave (2, -1)"
    with pytest.raises(InputError, match=r"waves need inputs \(64, 1 to 3\), got \(64, 4\)"):
        directions.waves(np.zeros((64, 4)), terms.root, terms.residual())


def test_defaults_stay_short() -> None:
    assert list(directions.default_groups(3, 1, np.array([2, 0, 2]))) == ["class 0", "class 2"]
    assert list(directions.default_groups(3, 2, np.array([1, 0, 1]), ["cat", "dog"])) == ["cat", "dog"]
    assert directions.default_groups(20, 20, np.arange(20)) == {}
    assert directions.default_groups(20, 1) == {}
    assert directions.default_groups(20, 13) == {}
    assert directions.default_groups(3, 2, np.zeros(3, dtype=int)) == {}


def test_loss_terms_are_blocks_of_outputs() -> None:
    groups = directions.block_groups(2, {"equation": 2, "boundary": 1})
    np.testing.assert_array_equal(groups["equation"], [[True, True, False]] * 2)
    np.testing.assert_array_equal(groups["boundary"], [[False, False, True]] * 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"'mine' must be a finite vector .* got shape \(2, 2\)"):
        Direction("mine", np.zeros((2, 2)))
    with pytest.raises(InputError, match="finite"):
        Direction("mine", np.array([np.nan]))
    with pytest.raises(InputError, match=r"must mark each of 6 rows .* got shape \(2, 2\)"):
        directions.parts({"a": np.ones((2, 2), dtype=bool)}, np.zeros(6))
    with pytest.raises(InputError, match="got 1 names for 2 outputs"):
        directions.output_groups(3, 2, ["one"])
    with pytest.raises(InputError, match=r"one number per output, \(2, 1\), got \(2, 2\)"):
        directions.pattern("mine", np.zeros((2, 2)), np.ones((2, 1)))


def test_one_wrong_sample_can_hold_the_residual() -> None:
    p = np.array([0.9, 0.9, 0.001])
    f = torch.from_numpy(np.log(np.stack([p, 1 - p], axis=1)))
    terms = cross_entropy().terms(f, torch.zeros(3, dtype=torch.long))
    shares = directions.sample_shares(terms.residual(), 3)
    np.testing.assert_allclose(shares, (1 / p - 1) / (1 / p - 1).sum(), rtol=1e-9)
    assert shares[2] > 0.99
    assert directions.sample_shares(np.zeros(6), 3).tolist() == [0, 0, 0]
