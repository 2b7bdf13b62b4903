"""Spectra say what they can resolve and no more."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor.errors import InputError, NumericsError
from ntk_monitor.kernel import measured
from ntk_monitor.spectrum import Spectrum
from tests import reference
from tests.cases import cnn_batchnorm

EPS32, EPS64 = 2.0**-23, 2.0**-52


def with_eigenvalues(values: list[float], seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    q, _ = np.linalg.qr(generator.normal(size=(len(values), len(values))))
    return (q * np.asarray(values)) @ q.T


def test_known_effective_ranks() -> None:
    spectrum = Spectrum.of(with_eigenvalues([1, 8, 2, 4]))
    np.testing.assert_allclose(spectrum.eigenvalues, [8, 4, 2, 1], rtol=1e-14)
    assert spectrum.effective_rank == pytest.approx(3.117142, abs=5e-7)
    assert spectrum.participation_ratio == pytest.approx(2.647059, abs=5e-7)
    assert spectrum.intrinsic_dimension == pytest.approx(1.875, abs=1e-12)
    assert spectrum.stable_rank == spectrum.intrinsic_dimension
    assert spectrum.condition_number == pytest.approx(8, rel=1e-13)
    assert spectrum.trace == pytest.approx(15, rel=1e-14)
    assert spectrum.lambda_max == pytest.approx(8, rel=1e-14)
    assert (spectrum.rank, spectrum.negative) == (4, 0)
    assert not spectrum.condition_is_lower_bound


@settings(max_examples=30)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.integers(0, 99), st.sampled_from([1e-200, 1, 1e200]))
def test_ranks_lie_between_one_and_n_in_this_order_and_ignore_scale(
    values: list[float], seed: int, unit: float
) -> None:
    spectrum = Spectrum.of(with_eigenvalues(values, seed) * unit)
    n = len(values) * (1 + 1e-9)
    assert 1 - 1e-9 <= spectrum.intrinsic_dimension <= spectrum.participation_ratio * (1 + 1e-9)
    assert spectrum.participation_ratio <= spectrum.effective_rank * (1 + 1e-9) <= n * (1 + 1e-9)
    wanted = reference.effective_rank(spectrum.eigenvalues / unit)
    assert spectrum.effective_rank == pytest.approx(wanted, rel=1e-9)


def test_eigenvectors_diagonalise_the_kernel() -> None:
    kernel = with_eigenvalues([5, 3, 1, 0.1])
    spectrum = Spectrum.of(kernel)
    assert spectrum.eigenvectors is not None
    np.testing.assert_allclose(
        spectrum.eigenvectors.T @ kernel @ spectrum.eigenvectors, np.diag([5, 3, 1, 0.1]), atol=1e-13
    )
    bare = Spectrum.of(kernel, vectors=False)
    assert bare.eigenvectors is None
    np.testing.assert_allclose(bare.eigenvalues, spectrum.eigenvalues, rtol=1e-12)


def test_the_full_layout_is_flattened_sample_major() -> None:
    kernel = torch.tensor(with_eigenvalues([6, 5, 4, 3, 2, 1]))
    np.testing.assert_allclose(
        Spectrum.of(kernel.reshape(3, 2, 3, 2)).eigenvalues, Spectrum.of(kernel).eigenvalues, rtol=0
    )


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0), (2, 2, 2), (2, 1, 2, 2)])
def test_what_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be square, .* got .*; pass x2=None"):
        Spectrum.of(np.ones(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 2), (2, 0), (1, 1)])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_values_that_are_not_finite_are_found_in_either_triangle(bad: float, place: Any, kind: Any) -> None:
    kernel = np.eye(3)
    kernel[place] = bad
    with pytest.raises(NumericsError, match=r"must be finite, got 1 of 9 entries NaN or infinite"):
        Spectrum.of(kind(kernel))


def test_a_zero_kernel_has_no_condition_and_no_rank() -> None:
    spectrum = Spectrum.of(np.zeros((3, 3)))
    assert (spectrum.rank, spectrum.negative, spectrum.noise_floor) == (0, 0, 0.0)
    for value in (spectrum.condition_number, spectrum.effective_rank, spectrum.participation_ratio):
        assert np.isnan(value)
    assert np.isnan(spectrum.intrinsic_dimension)
    assert spectrum.condition_is_lower_bound


def test_a_kernel_of_one_number() -> None:
    spectrum = Spectrum.of(np.array([[7.0]]))
    assert (spectrum.rank, spectrum.condition_number, spectrum.effective_rank) == (1, 1.0, 1.0)
    assert not spectrum.condition_is_lower_bound
    assert spectrum.eigenvectors is not None
    assert abs(spectrum.eigenvectors[0, 0]) == 1


def test_a_matrix_that_is_no_kernel_shows_negative_eigenvalues() -> None:
    assert Spectrum.of(np.diag([4.0, -1.0, -1e-30])).negative == 1
    assert Spectrum.of(-np.eye(2)).negative == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_follows_the_precision_of_the_kernel(dtype: torch.dtype) -> None:
    kernel = torch.diag(torch.tensor([1.0, 1e-5, 1e-9, 1e-13], dtype=torch.float64)).to(dtype)
    spectrum = Spectrum.of(kernel)
    assert spectrum.noise_floor == pytest.approx(4 * torch.finfo(dtype).eps, rel=1e-12)
    assert spectrum.rank == (2 if dtype == torch.float32 else 4)
    assert spectrum.condition_is_lower_bound == (dtype == torch.float32)


def test_the_floor_follows_the_precision_of_the_jacobian() -> None:
    spectrum = Spectrum.of(np.diag([1.0, 1.0]), jacobian_eps=EPS32)
    assert spectrum.noise_floor == pytest.approx(2 * EPS64 + 2 * (8 * EPS32) ** 2, rel=1e-12)


# Float32 Jacobians against the same weights in double precision.


def _mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(40, 2)


def _smooth() -> tuple[nn.Module, Tensor]:
    layers = (nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    return nn.Sequential(*layers), torch.linspace(-1, 1, 40)[:, None]


def _deep() -> tuple[nn.Module, Tensor]:
    hidden = [layer for _ in range(10) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Linear(5, 32), *hidden, nn.Linear(32, 2)), torch.randn(20, 5)


def _cnn() -> tuple[nn.Module, Tensor]:
    return cnn_batchnorm(), torch.randn(20, 2, 1, 1).expand(20, 2, 6, 6).clone()


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 12, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


def _lstm() -> tuple[nn.Module, Tensor]:
    return _Last(), torch.linspace(-1, 1, 20)[:, None, None] * torch.randn(1, 15, 3)


@pytest.mark.parametrize("make", [_mlp, _smooth, _deep, _cnn, _lstm])
def test_what_lies_above_the_floor_is_right_and_what_is_zero_lies_below(
    make: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    """Measured on ten larger models: rounding moves J by 0.1 to 1.4 ε‖J‖ in spectral norm, the floor allows 8."""
    model, x = make()
    single = measured(model, x, engine="rows")
    exact = Spectrum.of(measured(model.double(), x.double(), engine="rows").values).eigenvalues
    spectrum = Spectrum.of(single.values, jacobian_eps=EPS32)
    resolved = spectrum.eigenvalues[: spectrum.rank]
    # At the floor σ = 8 ε‖J‖, an error of 1.4 ε‖J‖ in σ moves λ = σ² by 2 × 1.4/8.
    np.testing.assert_allclose(resolved, exact[: spectrum.rank], rtol=0.35)
    zeros = exact < len(exact) * EPS64 * exact[0]
    assert not (zeros & (spectrum.eigenvalues > spectrum.noise_floor)).any()
    assert spectrum.negative == 0
    # And the floor is not so high that it hides what is there.
    assert spectrum.rank >= (exact > 100 * spectrum.noise_floor).sum()


def test_duplicates_make_the_condition_number_a_lower_bound() -> None:
    model, x = nn.Linear(8, 1), torch.randn(4, 8)
    spectrum = Spectrum.of(measured(model, torch.cat([x, x[:2]])).values, jacobian_eps=EPS32)
    assert (spectrum.rank, len(spectrum.eigenvalues)) == (4, 6)
    assert spectrum.condition_is_lower_bound
    alone = Spectrum.of(measured(model, x).values, jacobian_eps=EPS32)
    assert not alone.condition_is_lower_bound
    assert spectrum.condition_number == pytest.approx(spectrum.eigenvalues[0] / spectrum.eigenvalues[3])
