"""Modes decay as they should: exactly for squares on a linear model, to first order for the rest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.errors import InputError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.losses import Loss, Terms, bce_with_logits, cross_entropy, mse
from ntk_monitor.modes import Modes, Tracks, weighted
from tests import twins_modes

N = 7


def problem(outputs: int, features: int = 4) -> tuple[nn.Module, Tensor]:
    return nn.Linear(features, outputs).double(), torch.randn(N, features, dtype=torch.float64)


def modes_of(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> tuple[Modes, Terms]:
    terms = loss.terms(model(x).detach(), y)
    return Modes.of(empirical_ntk(model, x).numpy(), terms), terms


def descend(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, lr: float, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss.function(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_descent_on_squares_multiplies_each_coordinate_by_its_rate(outputs: int, reduction: str) -> None:
    (model, x), y = problem(outputs), torch.randn(N, outputs, dtype=torch.float64)
    modes, _ = modes_of(model, x, y, mse(reduction))
    values = np.linalg.eigvalsh(empirical_ntk(model, x).reshape(N * outputs, -1).numpy())[::-1]
    scale = 2 / (N * outputs) if reduction == "mean" else 2
    np.testing.assert_allclose(modes.rates, scale * values, atol=1e-13 * modes.rates[0])
    lr, steps = 1.9 / modes.rates[0], 5
    resolved = modes.rates > modes.floor
    for step in range(1, steps + 1):
        descend(model, x, y, mse(reduction), lr)
        carried = modes.carried(mse(reduction).terms(model(x).detach(), y).gradient)
        wanted = (1 - lr * modes.rates) ** step
        np.testing.assert_allclose((carried / modes.coordinates)[resolved], wanted[resolved], rtol=1e-8, atol=1e-8)
        # What no parameter can move does not move.
        np.testing.assert_allclose(carried[~resolved], modes.coordinates[~resolved], atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        (mse(), 3),
        (cross_entropy(), 3),
        (cross_entropy(label_smoothing=0.2, weight=torch.tensor([0.5, 1.0, 3.0])), 3),
        (bce_with_logits(pos_weight=torch.tensor([2.0, 0.5])), 2),
    ],
    ids=lambda value: value.name if isinstance(value, Loss) else str(value),
)
def test_energies_sum_to_the_squared_residual_at_both_ends(loss: Loss, outputs: int) -> None:
    model, x = problem(outputs)
    y = torch.randint(outputs, (N,)) if loss.kind == "cross_entropy" else torch.randint(2, (N, outputs)).double()
    modes, terms = modes_of(model, x, y, loss)
    assert (modes.coordinates**2).sum() == pytest.approx((terms.residual() ** 2).sum(), rel=1e-12)
    descend(model, x, y, loss, 0.1)
    later = loss.terms(model(x).detach(), y)
    carried = modes.carried(later.gradient)
    assert (carried**2).sum() == pytest.approx((terms.residual(later.gradient) ** 2).sum(), rel=1e-12)
    own, _ = modes_of(model, x, y, loss)
    assert (own.coordinates**2).sum() == pytest.approx((later.residual() ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [(cross_entropy(), 3), (cross_entropy(label_smoothing=0.1), 3), (bce_with_logits(), 2), (mse(), 2)],
    ids=lambda value: value.name if isinstance(value, Loss) else str(value),
)
def test_a_small_step_moves_each_coordinate_at_its_rate(loss: Loss, outputs: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    x = torch.randn(N, 4, dtype=torch.float64)
    y = torch.randint(outputs, (N,)) if loss.kind == "cross_entropy" else torch.randint(2, (N, outputs)).double()
    modes, _ = modes_of(model, x, y, loss)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    errors = []
    for lr in (1e-3, 1e-4):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
        descend(model, x, y, loss, lr)
        carried = modes.carried(loss.terms(model(x).detach(), y).gradient)
        speed = (carried - modes.coordinates) / lr
        wanted = -modes.rates * modes.coordinates
        errors.append(np.abs(speed - wanted).max() / np.abs(wanted).max())
    assert errors[1] < 1e-3
    # The remainder is of second order: a tenth of the step, a tenth of the error.
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_cross_entropy_has_one_direction_per_sample_that_nobody_sees() -> None:
    model, x = problem(3, features=16)
    modes, _ = modes_of(model, x, torch.randint(3, (N,)), cross_entropy())
    null = modes.rates < modes.floor
    assert null.sum() == N
    assert np.abs(modes.coordinates[null]).max() < 1e-12


def blocks(root: np.ndarray, n: int, c: int) -> np.ndarray:
    s = np.zeros((n * c, n * c))
    for i in range(n):
        s[i * c : (i + 1) * c, i * c : (i + 1) * c] = root[i] if root.ndim == 3 else np.diag(root[i])
    return s


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_weighting_is_a_product_with_explicit_blocks(n: int, c: int, diagonal: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    j = generator.normal(size=(n * c, 6))
    # Roots that are not symmetric: an S in place of its transpose must not pass.
    root = generator.normal(size=(n, c) if diagonal else (n, c, c))
    s = blocks(root, n, c)
    np.testing.assert_allclose(weighted((j @ j.T).reshape(n, c, n, c), root), s.T @ j @ j.T @ s, atol=1e-12)


def test_rates_of_cross_entropy_are_those_of_the_gauss_newton_matrix() -> None:
    model, x = problem(3)
    y = torch.randint(3, (N,))
    modes, _ = modes_of(model, x, y, cross_entropy())
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)), y)

    # The model is linear in its parameters, so the whole Hessian is the Gauss-Newton matrix.
    parts = torch.autograd.functional.hessian(loss, tuple(p.detach() for p in model.parameters()))
    rows = [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(parts, model.parameters())]  # noqa: B905
    hessian = torch.linalg.eigvalsh(torch.cat(rows)).flip(0).numpy()
    rank = int((modes.rates > modes.floor).sum())
    assert rank == 10  # of 15: adding one number to all logits of a sample changes nothing, for each of 5 features
    np.testing.assert_allclose(modes.rates[:rank], hessian[:rank], atol=1e-12)


def test_kernels_of_another_size_are_refused() -> None:
    terms = mse().terms(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"full kernel of 3 samples × 2 outputs, got \(3, 3\)"):
        Modes.of(np.eye(3), terms)


def test_the_floor_follows_the_jacobian() -> None:
    terms = mse().terms(torch.zeros(2, 1), torch.zeros(2, 1))
    low, high = (Modes.of(np.eye(2), terms, jacobian_eps=eps) for eps in (0.0, 1e-3))
    assert low.floor < 1e-15
    assert high.floor == pytest.approx(2 * (8 * 1e-3) ** 2, rel=1e-6)


def test_one_basis_for_the_whole_run() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))
    first, _ = modes_of(model, x, y, cross_entropy())
    start = first.in_basis(empirical_ntk(model, x).numpy(), first.terms.gradient)
    np.testing.assert_allclose(start.rates, first.rates, atol=1e-12)
    np.testing.assert_allclose(start.coordinates, first.coordinates)
    assert start.off_diagonal < 1e-12
    descend(model, x, y, cross_entropy(), 0.5, 20)
    later, kernel = cross_entropy().terms(model(x).detach(), y), empirical_ntk(model, x)
    seen = first.in_basis(kernel.numpy(), later.gradient)
    assert (seen.coordinates**2).sum() == pytest.approx((first.terms.residual(later.gradient) ** 2).sum(), rel=1e-12)
    s = blocks(first.terms.root, N, 3)
    m = first.vectors.T @ s.T @ kernel.reshape(N * 3, -1).numpy() @ s @ first.vectors
    np.testing.assert_allclose(seen.rates, np.diag(m), atol=1e-12)
    whole = (m**2).sum()
    assert seen.off_diagonal == pytest.approx(np.sqrt((whole - (np.diag(m) ** 2).sum()) / whole), rel=1e-9)
    assert 0.01 < seen.off_diagonal < 1
    grown = first.in_basis(3 * empirical_ntk(model, x).numpy(), later.gradient)
    assert grown.off_diagonal == pytest.approx(seen.off_diagonal)
    with pytest.raises(InputError, match=r"7 samples × 3 outputs, the kernel shape \(2, 2\)"):
        first.in_basis(np.eye(2), later.gradient)


def test_a_later_gradient_step_is_predicted_in_the_fixed_basis() -> None:
    # Squares on a linear model: the kernel stands still, so each column keeps its speed.
    (model, x), y = problem(2), torch.randn(N, 2, dtype=torch.float64)
    first, _ = modes_of(model, x, y, mse())
    lr = 1 / first.rates[0]
    earlier = first
    for _ in range(3):
        descend(model, x, y, mse(), lr)
        terms = mse().terms(model(x).detach(), y)
        seen = first.in_basis(empirical_ntk(model, x).numpy(), terms.gradient)
        assert seen.off_diagonal < 1e-12
        wanted = (1 - lr * first.rates) * first.carried(earlier.terms.gradient)
        np.testing.assert_allclose(seen.coordinates, wanted, atol=1e-12)
        earlier, _ = modes_of(model, x, y, mse())


def planted(values: np.ndarray, vectors: np.ndarray) -> Modes:
    """Modes of M = V diag(values) Vᵀ, solved for anew: in order of size, signs at random."""
    n = len(values)
    terms = Terms(0.0, np.ones((n, 1)), np.ones((n, 1)), np.ones((n, 1)))
    return Modes.of((vectors * values) @ vectors.T, terms)


def test_tracks_follow_crossing_eigenvalues() -> None:
    generator = np.random.default_rng(0)
    n, probes = 8, 12
    vectors = np.linalg.qr(generator.normal(size=(n, n)))[0]
    tracks, found, by_rank = Tracks(count=4), [], []
    before = None
    for t in np.linspace(0, 1, probes):
        # Mode 0 falls through modes 1 to 3; the basis turns a little at each probe.
        values = np.array([8 - 6.5 * t, 6.03, 4.51, 3.02, 1, 0.5, 0.2, 0.1])
        wobble = generator.normal(size=(n, n))
        vectors = vectors @ np.linalg.qr(np.eye(n) + 0.02 * (wobble - wobble.T))[0]
        modes = planted(values, vectors)
        found.append(tracks.follow(modes.vectors))
        if before is not None:
            by_rank.append(np.square((before.vectors[:, :4] * modes.vectors[:, :4]).sum(axis=0)).mean())
        before = modes
    assert found[0].identities.tolist() == [0, 1, 2, 3]
    assert np.isnan(found[0].overlaps).all()
    assert found[-1].identities.tolist() == [1, 2, 3, 0]
    assert set(np.concatenate([probe.identities for probe in found])) == {0, 1, 2, 3}
    assert min(probe.overlaps.mean() for probe in found[1:]) > 0.98
    # At each of the three crossings, two of the four ranks hold another mode than before.
    assert sum(overlap < 0.55 for overlap in by_rank) == 3


def test_what_drops_out_for_one_probe_keeps_its_identity_and_what_is_lost_never_returns() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    values = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    tracks = Tracks(count=2)
    assert tracks.follow(planted(values, vectors).vectors).identities.tolist() == [0, 1]
    # Mode 1 falls to rank 3 and comes back.
    assert tracks.follow(planted(np.array([8.0, 5.5, 6, 5, 4, 3, 2, 1]), vectors).vectors).identities.tolist() == [0, 2]
    assert tracks.follow(planted(values, vectors).vectors).identities.tolist() == [0, 1]
    other = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    new = tracks.follow(planted(values, other).vectors)
    assert min(new.identities) >= 4
    assert np.isnan(new.overlaps).all()
    # A probe of another size starts anew, with numbers not used before.
    assert min(tracks.follow(planted(values[:3], np.eye(3)).vectors).identities) > max(new.identities)


@settings(max_examples=20)
@given(st.integers(2, 6), st.floats(0.05, 0.6), st.integers(0, 99))
def test_the_assignment_has_the_largest_overlap_of_all(n: int, size: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    turn = generator.normal(size=(n, n))
    vectors = np.linalg.qr(np.eye(n) + size * (turn - turn.T))[0]
    values = np.arange(n, 0, -1.0)
    tracks = Tracks(count=n, least=0.0)
    first, second = planted(values, np.eye(n)), planted(generator.permutation(values), vectors)
    tracks.follow(first.vectors)
    found = tracks.follow(second.vectors)
    squares = np.square(first.vectors.T @ second.vectors)
    assert found.overlaps.sum() == pytest.approx(twins_modes.assignment(squares), abs=1e-12)
    assert sorted(found.identities) == list(range(n))
