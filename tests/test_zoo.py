"""Every network of the zoo, by every engine, against plain autograd one sample at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ntk_monitor.errors import NetworkError, NTKMonitorError
from ntk_monitor.kernel import empirical_ntk
from tests import reference
from tests.cases import Case, answer, samples
from tests.zoo import AUTOCAST, ZOO, reentrant
from tests.zoo_transformers import TRANSFORMERS

ENGINES = ("rows",)

REFUSED = {"torchscript": "TorchScript hides its operations"}
"""What no engine measures: name → the sentence that says so."""


def twin(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The Jacobian of the case, name → (N, C, p): an untouched network for every sample, or the batch if coupled."""
    inputs = case.inputs(dtype)
    parts = []
    for batch in [inputs] if case.coupled else list(samples(inputs)):
        model = case.model(dtype).eval()
        parts.append(reference.rows(model, answer(case, model, batch)))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: torch.view_as_real(j).flatten(2) if j.is_complex() else j for name, j in joined.items()}


def gram(jacobian: dict[str, Tensor]) -> Tensor:
    """The full kernel (N, C, N, C): as `reference.ntk`, in one product."""
    j = torch.cat(list(jacobian.values()), 2).double()
    n, c, p = j.shape
    flat = j.reshape(n * c, p)
    return (flat @ flat.T).reshape(n, c, n, c)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, floor: float = 0.0) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max()) + floor


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [*ZOO, *TRANSFORMERS], ids=str)
def test_the_kernel_is_exact(case: Case, engine: Any) -> None:
    def ntk(**options: Any) -> Any:
        return empirical_ntk(case.model(), case.inputs(), forward=case.forward, engine=engine, **options)

    if case.name in REFUSED:
        with pytest.raises(NTKMonitorError, match=REFUSED[case.name]):
            ntk()
        return
    jacobian = twin(case)
    wanted = gram(jacobian)
    size = float(wanted.abs().max())
    assert size > 0
    assert_close(ntk(), wanted, 1e-10)
    assert_close(ntk(outputs="trace"), torch.einsum("ncmc->nm", wanted), 1e-10)
    layers = ntk(by_layer=True)
    expected = _by_layer(jacobian)
    assert layers.keys() == expected.keys()
    for name, kernel in layers.items():
        # A layer may have no gradient but rounding's (the bias of attention's keys).
        assert_close(kernel, gram(expected[name]), 1e-10, floor=1e-14 * size)
    assert_close(sum(layers.values()), wanted, 1e-10)


def _by_layer(jacobian: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, part in jacobian.items():
        layers.setdefault(name.rpartition(".")[0] or name, {})[name] = part
    return layers


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", AUTOCAST, ids=str)
def test_the_kernel_under_autocast_is_that_of_its_rounded_products(case: Case, engine: Any) -> None:
    got = empirical_ntk(case.model(torch.float32), case.inputs(torch.float32), forward=case.forward, engine=engine)
    # Gradients are sums of products rounded to bfloat16's 2⁻⁹, in an order the engine chooses.
    assert_close(got, gram(twin(case, torch.float32)), 2e-2)


@pytest.mark.xfail(reason="parameters inside count as zero, or torch's own error comes through")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", [False, True])
def test_reentrant_checkpoints_are_exact_or_refused(before: bool, engine: Any) -> None:
    case = reentrant(before=before, used=True)
    got, refusal = None, ""
    try:
        got = empirical_ntk(case.model(), case.inputs(), forward=case.forward, engine=engine)
    except NetworkError as error:
        refusal = str(error)
    if got is None:
        assert "use_reentrant" in refusal
    else:
        assert_close(got, gram(twin(reentrant(before=before, used=False))), 1e-10)
