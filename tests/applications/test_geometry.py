"""Geometry: distances and pictures against explicit gradients, the permutation test against null data, and a no."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_monitor import empirical_ntk
from ntk_monitor.applications import geometry as app
from ntk_monitor.applications.geometry_words import FOLLOWS
from ntk_monitor.errors import InputError

Array = NDArray[np.float64]


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def _gradients(model: nn.Module, x: Tensor) -> Array:
    """Gradients of both outputs, one row per sample, one backward pass each."""
    rows = []
    for sample in x:
        outputs = model(sample[None])[0]
        parts = [torch.autograd.grad(f, list(model.parameters()), retain_graph=True) for f in outputs]
        rows.append(torch.cat([g.reshape(-1) for part in parts for g in part]))
    return torch.stack(rows).numpy()


def _pairwise(points: Array) -> Array:
    return np.array([[np.linalg.norm(a - b) for b in points] for a in points])


def _relu_kernel(x: Array) -> Array:
    """Infinitely wide two-layer ReLU network without bias, NTK parametrisation (Cho and Saul 2009)."""
    length = np.linalg.norm(x, axis=1)
    cosine = np.clip(x @ x.T / np.outer(length, length), -1, 1)
    np.fill_diagonal(cosine, 1.0)
    angle = np.arccos(cosine)
    kappa = (cosine * (np.pi - angle) + np.sqrt(1 - cosine**2)) / np.pi
    return np.asarray(np.outer(length, length) * kappa + x @ x.T * (np.pi - angle) / np.pi)


def test_distances_are_those_between_gradients() -> None:
    model, x = _net(), torch.randn(6, 4).double()
    kernel = empirical_ntk(model, x, outputs="trace")
    np.testing.assert_allclose(app.kernel_distances(kernel), _pairwise(_gradients(model, x)), atol=1e-7)


def test_the_whole_embedding_has_the_distances_of_the_kernel_and_is_that_of_sklearn() -> None:
    from sklearn.decomposition import KernelPCA

    kernel = _relu_kernel(np.random.default_rng(0).normal(size=(12, 4)))
    points = app.kernel_pca(kernel).points
    np.testing.assert_allclose(_pairwise(points), app.kernel_distances(kernel), atol=1e-12)
    other = KernelPCA(n_components=5, kernel="precomputed").fit_transform(kernel)
    np.testing.assert_allclose(np.abs(points[:, :5]), np.abs(other), atol=1e-10)


@given(st.integers(2, 9), st.integers(1, 9), st.integers(1, 12))
def test_few_components_make_distances_too_short(n: int, k: int, p: int) -> None:
    j = np.random.default_rng(n + 10 * k + 100 * p).normal(size=(n, p))
    embedding = app.kernel_pca(j @ j.T, k)
    assert np.all(_pairwise(embedding.points) <= app.kernel_distances(j @ j.T) + 1e-9)
    assert embedding.explained.sum() == pytest.approx(1.0)
    assert np.all(np.diff(embedding.explained) <= 1e-12)


def test_distances_of_a_linear_network_are_those_of_its_inputs() -> None:
    x = torch.randn(15, 6).double()
    kernel = empirical_ntk(nn.Linear(6, 3).double(), x, outputs="trace")
    for method in ("pearson", "spearman"):
        found = app.distance_correlation(kernel, x, method, mantel=99)
        assert found.value == pytest.approx(1.0, abs=1e-12)
        assert found.p_value == pytest.approx(0.01)


def test_the_kernel_of_relu_follows_distances_but_not_exactly() -> None:
    """Theory: Pearson .979 and Spearman .996 on a sphere, .966 for Gaussian inputs, n = 40, d = 4; mean of 10."""
    sphere, gaussian, ranks = [], [], []
    for seed in range(10):
        x = np.random.default_rng(seed).normal(size=(40, 4))
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        sphere.append(app.distance_correlation(_relu_kernel(unit), unit, mantel=0).value)
        ranks.append(app.distance_correlation(_relu_kernel(unit), unit, "spearman", mantel=0).value)
        gaussian.append(app.distance_correlation(_relu_kernel(x), x, mantel=0).value)
    assert np.mean(sphere) == pytest.approx(0.979, abs=0.005)
    assert np.mean(ranks) == pytest.approx(0.996, abs=0.005)
    assert np.mean(gaussian) == pytest.approx(0.966, abs=0.01)


def test_correlations_are_those_of_scipy() -> None:
    from scipy.spatial.distance import pdist
    from scipy.stats import pearsonr, spearmanr

    x = np.random.default_rng(0).normal(size=(11, 3))
    kernel = _relu_kernel(x)
    mine = app.kernel_distances(kernel)[np.triu_indices(11, 1)]
    wanted = (pearsonr(mine, pdist(x)).statistic, spearmanr(mine, pdist(x)).statistic)
    found = tuple(app.distance_correlation(kernel, x, m, mantel=0).value for m in ("pearson", "spearman"))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_unrelated_distances_are_significant_by_the_ordinary_p_value_and_not_by_permutation() -> None:
    """Theory: false positives at 0.05 in 60 % of null sets, which are not specified; here, in one dimension, 40 %."""
    from scipy.spatial.distance import pdist
    from scipy.stats import pearsonr

    ordinary = permuted = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        a, b = draw.normal(size=(40, 1)), draw.normal(size=(40, 1))
        ordinary += pearsonr(pdist(a), pdist(b)).pvalue < 0.05
        permuted += app.distance_correlation(a @ a.T, b, mantel=99, seed=seed).p_value < 0.05
    assert ordinary >= 15  # 3 expected of a valid test; 24 found
    assert permuted <= 8  # 3 expected; more than 8 of 60 at a level of 0.05 has probability 0.004


def test_turned_pictures_are_turned_back() -> None:
    draw = np.random.default_rng(0)
    points = draw.normal(size=(9, 3))
    points -= points.mean(axis=0)
    turn = np.linalg.qr(draw.normal(size=(3, 3)))[0] * np.array([1.0, 1.0, -1.0])
    back, left = app.aligned(points @ turn, points)
    np.testing.assert_allclose(back, points, atol=1e-12)
    assert left < 1e-24


def test_a_trajectory_of_one_kernel_stands_still_however_it_grows() -> None:
    kernel = _relu_kernel(np.random.default_rng(0).normal(size=(8, 3)))
    order = np.random.default_rng(1).permutation(8)
    path = app.trajectory([kernel, 5 * kernel, kernel])
    np.testing.assert_allclose(path[1], path[0], atol=1e-10)
    np.testing.assert_allclose(path[2], path[0], atol=1e-10)
    moved = app.trajectory([kernel, kernel[np.ix_(order, order)]])
    assert np.linalg.norm(moved[1] - moved[0]) > 0.1


def test_constant_distances_have_no_correlation() -> None:
    found = app.distance_correlation(np.eye(5), np.random.default_rng(0).normal(size=(5, 2)))
    assert np.isnan(found.value)
    assert np.isnan(found.p_value)
    report = app.study(_net(), torch.randn(5, 4).double(), kernel=np.eye(5))
    assert report.verdicts[0].holds is None
    nothing = app.study(_net(), torch.randn(5, 4).double(), kernel=np.ones((5, 5)))
    assert nothing.verdicts[0].holds is None
    assert nothing.number("explained variance") == 0


class _Angle(nn.Module):
    """A network that sees nothing of its inputs but the fifth digit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.net(torch.sin(1e5 * x[:, :1])))


def test_a_network_with_a_geometry_of_its_own_gets_a_no() -> None:
    report = app.study(_Angle().double(), torch.rand(40, 3).double(), mantel=99)
    assert report.verdicts[0].holds is False
    assert abs(report.number("Pearson")) < FOLLOWS


def test_a_known_kernel_and_checkpoints() -> None:
    model, x, y = _net().train(), torch.randn(12, 4).double(), torch.arange(12) % 3
    other = copy.deepcopy(_net().state_dict())
    before = copy.deepcopy(model.state_dict())
    report = app.study(model, x, y, states={"first": other}, mantel=19)
    given_kernel = app.study(model, x, y, kernel=empirical_ntk(model, x), mantel=19)
    assert report.number("Pearson") == pytest.approx(given_kernel.number("Pearson"))
    assert [row[0] for row in report.tables["checkpoints"].rows] == ["first", "now"]
    assert set(report.figures) == {"embedding", "shepard", "trajectory"}
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_example_says_yes_and_no() -> None:
    report = app.example(quick=True)
    assert [verdict.holds for verdict in report.verdicts] == [True, False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: app.study(_net(), torch.zeros(4, 4).long()), "need one floating tensor, got Tensor of torch.int64"),
        (lambda: app.study(_net(), {"x": torch.randn(4, 4)}), "need one floating tensor, got dict"),
        (lambda: app.study(_net(), torch.randn(2, 4)), "at least 3 samples"),
        (lambda: app.kernel_pca(np.full((2, 2), np.nan)), "wanted a finite kernel"),
        (lambda: app.kernel_pca(np.eye(2), 0), "components must be at least 1"),
        (lambda: app.distance_correlation(np.eye(3), np.ones((4, 2))), "wanted inputs of the 3 samples"),
        (lambda: app.aligned(np.ones((3, 2)), np.ones((3, 1))), "one shape"),
        (lambda: app.trajectory([]), "at least one kernel"),
    ],
)
def test_what_cannot_be_used_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="method must be"):
        app.distance_correlation(np.eye(3), np.ones((3, 2)), "kendall")  # type: ignore[arg-type]
