"""A Network is the function of the live module: same outputs, policies for modes and precision, parameters by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntk_monitor.errors import InputError, NetworkError
from ntk_monitor.kernel import empirical_ntk
from ntk_monitor.network import Network, call, only_tensor
from tests.cases import CASES, Case, Lambda, answer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_those_of_the_module_in_evaluation_mode(case: Case) -> None:
    got = Network(case.model(), forward=case.forward).outputs(case.inputs())
    wanted = answer(case, case.model().eval(), case.inputs())
    torch.testing.assert_close(got, wanted.reshape(len(wanted), -1), rtol=1e-12, atol=1e-12)


# Embedding(max_norm=...) rewrites the parameters it is given.
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "embedding with max_norm"], ids=str)
def test_the_function_is_one_of_the_parameters_given(case: Case) -> None:
    network = Network(case.model(), forward=case.forward)
    moved = {name: (p * 1.5 + 0.25).detach() for name, p in network.parameters.items()}
    live = case.model().eval()
    with torch.no_grad():
        for name, p in live.named_parameters():
            if name in moved:
                p.copy_(moved[name])
    wanted = answer(case, live, case.inputs())
    got = network.function(moved, case.inputs())
    torch.testing.assert_close(got, wanted.reshape(len(wanted), -1), rtol=1e-12, atol=1e-12)
    untouched = answer(case, case.model().eval(), case.inputs())
    torch.testing.assert_close(network.outputs(case.inputs()), untouched.reshape(got.shape), rtol=1e-12, atol=1e-12)


def test_function_agrees_with_functional_call() -> None:
    case = CASES[0]
    network, x = Network(case.model()), case.inputs()
    values = {name: torch.randn_like(p) for name, p in network.parameters.items()}
    torch.testing.assert_close(network.function(values, x), functional_call(case.model(), values, (x,)))


def test_parameters_are_the_trainable_ones_once_each() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Linear(2, 2).requires_grad_(False), layer)
    network = Network(model)
    assert list(network.parameters) == ["0.weight", "0.bias"]
    assert network.parameter_count == 6
    for name, p in network.parameters.items():
        assert torch.equal(p, model.get_parameter(name))


def test_a_shared_parameter_may_be_selected_by_its_first_name_only() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(NetworkError, match="widen params"):
        Network(nn.Sequential(layer, layer), params=["1.weight"])


@pytest.mark.parametrize(
    ("mode", "live", "wanted"),
    [
        ("eval", True, [False, False, False]),
        ("train", True, [True, False, False]),
        ("train", False, [True, True, False]),
        ("live", True, [True, False, True]),
    ],
)
def test_training_flags_of_each_mode(mode: Any, live: bool, wanted: list[bool]) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout(0.5)).train(live)
    if live:
        model[1].eval()
    seen: list[bool] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        seen.extend(child.training for child in m.children())
        y: Tensor = m(x)
        return y

    Network(model, mode=mode, forward=forward).outputs(torch.ones(2, 1))
    assert seen == wanted


def test_live_mode_keeps_dropout_and_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).bfloat16()
    network = Network(model, mode="live")
    y = network.outputs(network.prepared(torch.ones(2, 4, dtype=torch.bfloat16)))
    assert y.dtype == torch.bfloat16
    assert 0 < int((y == 0).sum()) < y.numel()
    assert not network.promoted


def test_half_precision_is_promoted_with_buffers_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half().eval()
    network = Network(model)
    inputs = network.prepared({"input": torch.ones(2, 4, dtype=torch.float16), "n": torch.tensor([1, 2])})
    assert inputs["input"].dtype == torch.float32
    assert inputs["n"].dtype == torch.int64
    assert network.outputs(inputs["input"]).dtype == torch.float32
    assert network.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float16


def test_the_widest_precision_is_that_of_the_jacobian() -> None:
    mixed = Lambda(lambda m, x: m.b(m.a(x).double()), a=nn.Linear(1, 1), b=nn.Linear(1, 1).double())
    assert Network(mixed).dtype == torch.float64
    assert Network(mixed, params="^a").dtype == torch.float32


def test_an_unknown_mode_is_refused() -> None:
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(InputError, match=r"mode must be \"eval\" or \"train\", got 'test'"):
            Network(nn.Linear(1, 1), mode="test")  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


class _Spread(nn.Module):
    def forward(self, x: Any, *more: Any, **named: Any) -> tuple[Any, ...]:
        return (x, *more, *named.items())


class _One(nn.Module):
    def forward(self, pixels: Any) -> Any:
        return pixels


def test_modules_are_called_as_their_users_do() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    assert call(_Spread(), x) == (x,)
    assert call(_Spread(), (x, y)) == (x, y)
    assert call(_Spread(), [x, y]) == (x, y)
    assert call(_Spread(), {"x": x, "other": y}) == (x, ("other", y))
    assert call(_One(), {"pixels": x}) is x
    assert call(_One(), {"image": x}) is x
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(_One(), {"image": x, "pixels": y})


def test_the_tensor_to_differentiate() -> None:
    y, count = torch.ones(2, 1), torch.tensor([1, 2])
    assert only_tensor(y) is y
    assert only_tensor((count, y)) is y
    assert only_tensor({"loss": None, "deep": {"er": [y]}}) is y
    assert only_tensor({"logits": y, "hidden": y + 1}) is y
    with pytest.raises(InputError, match=r"several floating tensors \['0', '1.a'\]; pass forward="):
        only_tensor((y, {"a": y}))


class Clamped(nn.Linear):
    """Keeps its weights in a box by writing into them, behind autograd's back, in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("engine", ["structured", "reference", "rows"])
def test_a_forward_that_rewrites_its_weights_rewrites_a_copy(engine: Any) -> None:
    model, x = Clamped(5, 3).double(), torch.randn(4, 5).double()
    before = model.weight.detach().clone()
    assert float(before.abs().max()) > 0.1
    kernel = empirical_ntk(model, x, engine=engine)
    assert torch.equal(model.weight, before)
    assert torch.allclose(kernel, torch.einsum("nm,cd->ncmd", x @ x.T + 1, torch.eye(3).double()))
