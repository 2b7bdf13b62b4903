"""Every network of the zoo, by every engine, against plain autograd one sample at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ntk_monitor.errors import NetworkError, NTKMonitorError
from ntk_monitor.kernel import Kernel, empirical_ntk, measured
from tests import reference
from tests.cases import Case, answer, samples
from tests.zoo import AUTOCAST, ZOO, reentrant
from tests.zoo_transformers import ATTENTION, MODELS, TRANSFORMERS

ENGINES = ("structured", "auto")

NOBODY = {"torchscript": "TorchScript hides its operations"}
"""What no engine measures: name → the sentence that says so."""

_COUPLED = r"samples of the batch depend on each other in \w+ \(.*{}"
_GRADIENTS = "takes gradients itself"
_TRANSFORMS = "uses torch.func transforms"
_CHECKPOINTS = "activation checkpointing computes operations again"

REFUSED = {
    "batch norm without running statistics": _COUPLED.format("0.weight"),
    "linear of a constant": _COUPLED.format("a.weight"),
    "solved": _COUPLED.format("w"),
    "ode, dopri5": _COUPLED.format("field.body.weight"),
    "checkpoints in a row": _CHECKPOINTS,
    "complex parameters": "complex parameters",
    "residual of a heat equation": _GRADIENTS,
    "forces of an energy": _GRADIENTS,
    "gradient penalty": _GRADIENTS,
    "inner gradient step": _GRADIENTS,
    "func.grad": _TRANSFORMS,
    "func.jvp": _TRANSFORMS,
    "func.vmap": _TRANSFORMS,
}
"""What the structured engine leaves to the next one: name → why."""

ROWS = {
    "tensordot": {"w"},
    "output that is a parameter": {"w"},
    "spectral filter": {"re", "im"},
    "spectral filter of images": {"w"},
    "convolution by fourier": {"w"},
    "parameters in place": {"s"},
    "mask token": {"token"},
    "views changed in place": {"b.bias"},
    "function with a weight": {"w"},
    "ode, adjoint": {"field.body.weight", "field.body.bias"},
    "func.vmap over parameters": {"w"},
    "attention with a bias position": {"attention.bias_k", "attention.bias_v"},
}
"""Parameters whose gradients take one backward pass per row, because no rule knows how they are used."""


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


@pytest.mark.parametrize("case", [*ZOO, *ATTENTION], ids=str)
def test_the_kernel_is_exact(case: Case) -> None:
    exact(case)


@pytest.mark.usefixtures("unchecked")  # type checks of every value copied would take most of the time
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_kernel_of_a_model_of_a_library_is_exact(case: Case) -> None:
    exact(case)


def exact(case: Case) -> None:
    model, inputs = case.model(), case.inputs()

    def kernel(engine: Any, **options: Any) -> Kernel:
        return measured(model, inputs, forward=case.forward, engine=engine, **options)

    if case.name in NOBODY:
        for engine in ENGINES:
            with pytest.raises(NTKMonitorError, match=NOBODY[case.name]):
                kernel(engine)
        return
    jacobian = twin(case)
    wanted = gram(jacobian)
    size = float(wanted.abs().max())
    assert size > 0
    first = kernel("auto", by_layer=True)
    expected = _by_layer(jacobian)
    assert first.layers.keys() == expected.keys()
    for name, layer in first.layers.items():
        # A layer may have no gradient but rounding's (the bias of attention's keys).
        assert_close(layer, gram(expected[name]), 1e-10, floor=1e-14 * size)
    assert_close(first.values, wanted, 1e-10)
    assert {line.parameter for line in first.lines if line.route == "rows"} == ROWS.get(case.name, set())
    if case.name in REFUSED:
        assert first.engine in ("batched", "rows")
        with pytest.raises(NetworkError, match=f'engine="structured" is not exact here: .*{REFUSED[case.name]}'):
            kernel("structured")
        return
    assert first.engine == "structured"
    _exact_in_other_layouts(kernel, wanted)


def _exact_in_other_layouts(kernel: Callable[..., Kernel], wanted: Tensor) -> None:
    assert_close(kernel("structured", outputs="trace").values, torch.einsum("ncmc->nm", wanted), 1e-10)
    blocks = kernel("structured", outputs="per_output").values
    # Blocks of single outputs may be small next to the largest.
    floor = 1e-12 * float(wanted.abs().max())
    assert_close(blocks, torch.einsum("ncmc->cnm", wanted), 1e-10, floor=floor)


def test_the_lists_name_cases_of_the_zoo() -> None:
    names = [case.name for case in (*ZOO, *TRANSFORMERS)]
    assert len(names) == len(set(names))
    assert {*NOBODY, *REFUSED, *ROWS} <= set(names)


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


@pytest.mark.parametrize("engine", ["auto", "structured", "reference", "rows", "operator"])
@pytest.mark.parametrize("before", [False, True])
def test_reentrant_checkpoints_are_refused(before: bool, engine: Any) -> None:
    case = reentrant(before=before, used=True)
    with pytest.raises(NetworkError, match="pass use_reentrant=False"):
        empirical_ntk(case.model(), case.inputs(), forward=case.forward, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_reentrant_checkpoints_around_frozen_layers_are_measured(engine: Any) -> None:
    with_it, without = (reentrant(before=False, used=used) for used in (True, False))
    got = empirical_ntk(with_it.model(), with_it.inputs(), forward=with_it.forward, engine=engine, params="head")
    assert_close(got, gram({name: j for name, j in twin(without).items() if name.startswith("head")}), 1e-10)
