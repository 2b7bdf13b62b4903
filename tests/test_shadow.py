"""The live module before and after: nothing that training depends on has changed, whatever the forward did."""

import gc
import random
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntk_monitor.engines.reference import ReferenceJacobian
from ntk_monitor.engines.rows import RowsJacobian
from ntk_monitor.engines.structured.operations import Matrix
from ntk_monitor.errors import NetworkError
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.kernel import empirical_ntk, measured
from ntk_monitor.network import Network
from ntk_monitor.shadow import Shadow
from tests.cases import CASES, Case, Lambda, answer


class State:
    """Everything about a module that can be compared, by value and by identity. Independent of `harmless`."""

    def __init__(self, module: nn.Module) -> None:
        self.identity: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        for path, child in module.named_modules(remove_duplicate=False):
            for name, value in vars(child).items():
                self.identity[f"{path}.{name}"] = id(value)
                self._contents(f"{path}.{name}", value)
        for name, p in module.named_parameters(remove_duplicate=False):
            self.identity[f"{name}: flags"] = (p.requires_grad, p._version, p.data_ptr(), id(p.grad), p.is_leaf)
            self.values[name] = p.detach().clone()
            if p.grad is not None:
                self.identity[f"{name}: gradient"] = p.grad._version
                self.values[f"{name}: gradient"] = p.grad.clone()
        self.random = (torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())
        self.modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        self.precision = torch.get_float32_matmul_precision()

    def _contents(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.identity[f"{path}: version"] = value._version
            self.values[path] = value.detach().clone()
        elif isinstance(value, torch.Generator):
            self.values[path] = value.get_state()
        elif isinstance(value, np.random.Generator):
            self.identity[f"{path}: state"] = str(value.bit_generator.state)
        elif isinstance(value, dict):
            for key, item in value.items():
                self.identity[f"{path}[{key}]"] = id(item)
                if not isinstance(item, nn.Module):
                    self._contents(f"{path}[{key}]", item)
        elif not isinstance(value, (nn.Module, str)) and hasattr(value, "__len__"):
            self.identity[f"{path}: items"] = [id(item) for item in value]
        else:
            self.identity[f"{path}: value"] = repr(value) if isinstance(value, (bool, int, float)) else None

    def assert_same(self, other: "State") -> None:
        assert self.identity == other.identity
        assert self.values.keys() == other.values.keys()
        for name, value in self.values.items():
            assert torch.equal(value, other.values[name]), name
        assert torch.equal(self.random[0], other.random[0])
        np.testing.assert_equal(self.random[1], other.random[1])
        assert self.random[2] == other.random[2]
        assert self.modes == other.modes
        assert self.precision == other.precision


def with_gradients(case: Case) -> nn.Module:
    """The module in the middle of training: gradients there, one of them accumulated twice."""
    model = case.model(torch.float32)
    for i, p in enumerate(model.parameters()):
        if p.requires_grad and i % 2 == 0:
            p.grad = torch.ones_like(p)
    return model


def unchanged(model: nn.Module, action: Callable[[], Any]) -> None:
    fingerprint, state = Fingerprint.of(model), State(model)
    action()
    state.assert_same(State(model))
    assert fingerprint.changes(Fingerprint.of(model)) == []


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_live_module_is_only_read(case: Case, mode: Any) -> None:
    model, inputs = with_gradients(case), case.inputs(torch.float32)
    unchanged(model, lambda: empirical_ntk(model, inputs, forward=case.forward, mode=mode))


class _HalfwayError(RuntimeError):
    pass


@pytest.mark.parametrize("engine", ["auto", "rows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_forward_that_fails_half_way_leaves_no_trace(case: Case, engine: Any) -> None:
    model, inputs = with_gradients(case), case.inputs(torch.float32)

    def failing(m: nn.Module, x: Any) -> Tensor:
        answer(case, m, x)
        torch.rand(1)
        random.random()
        np.random.rand()
        raise _HalfwayError("half-way")

    def measure() -> None:
        with pytest.raises(_HalfwayError, match="half-way"):
            empirical_ntk(model, inputs, forward=failing, engine=engine)

    unchanged(model, measure)


@pytest.mark.parametrize(
    ("owner", "name", "engine"),
    [(RowsJacobian, "row", "rows"), (ReferenceJacobian, "block", "reference"), (Matrix, "gradient", "auto")],
)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_an_interrupt_half_way_leaves_no_trace(
    case: Case, owner: type, name: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, honest = with_gradients(case), case.inputs(torch.float32), getattr(owner, name)
    calls = []

    def interrupted(*arguments: Any) -> Any:
        found = honest(*arguments)
        torch.rand(1)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, interrupted)

    def measure() -> None:
        with pytest.raises(KeyboardInterrupt):
            empirical_ntk(model, inputs, forward=case.forward, engine=engine)

    unchanged(model, measure)


def test_gradient_hooks_of_the_live_module_do_not_fire() -> None:
    model, fired = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), []
    for p in model.parameters():
        p.register_hook(lambda g: fired.append("tensor"))
        p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    for child in model.modules():
        child.register_full_backward_hook(lambda *_: fired.append("backward"))
        child.register_full_backward_pre_hook(lambda *_: fired.append("before backward"))
    unchanged(model, lambda: empirical_ntk(model, torch.ones(2, 3)))
    unchanged(model, lambda: empirical_ntk(model, torch.ones(2, 3), engine="rows"))
    assert fired == []
    model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert set(fired) == {"tensor", "accumulated", "backward", "before backward"}


def test_a_backward_of_training_may_span_a_probe() -> None:
    # The parameters share storage with their shadows: had a probe written to them, autograd would refuse this.
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(2, 3)
    loss = model(x).sum()
    empirical_ntk(model, x)
    loss.backward()
    assert model[0].weight.grad is not None


def test_attributes_that_a_forward_sets_stay_those_of_training() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.hidden, m.fresh = m.layer(x), 1
        m.cache["last"] = m.hidden
        m.trail.append(m.hidden)
        m.trail[0].add_(1)
        m.table.mul_(2)
        m.register_buffer("late", x, persistent=False)
        result: Tensor = m.hidden
        return result

    model: Any = Lambda(forward, layer=nn.Linear(3, 1))
    model.hidden, model.cache, model.trail = kept, _, _ = torch.zeros(1), OrderedDict(first=1), [torch.ones(1)]
    model.table = torch.ones(2)
    unchanged(model, lambda: empirical_ntk(model, torch.ones(2, 3)))
    assert model.hidden is kept
    assert torch.equal(model.table, torch.ones(2))
    assert torch.equal(model.trail[0], torch.ones(1))
    assert not hasattr(model, "fresh")
    assert not hasattr(model, "late")


class _Module(nn.Module):
    """What of a LightningModule counts here: `log`, a property that reads other state, `freeze` by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.logged: list[str] = []

    def log(self, name: str, value: Any) -> None:
        self.logged.append(name)
        raise AssertionError("the probe logged as if it were training")

    def log_dict(self, values: dict[str, Any]) -> None:
        raise AssertionError("the probe logged as if it were training")

    def forward(self, x: Tensor) -> Tensor:
        self.log("mean", x.mean())
        self.log_dict({"mean": x.mean()})
        y: Tensor = self.layer(x)
        return y


def test_logging_inside_forward_is_muted() -> None:
    model = _Module()
    unchanged(model, lambda: empirical_ntk(model, torch.ones(2, 3)))
    with pytest.raises(AssertionError, match="as if it were training"):
        model(torch.ones(2, 3))


def test_a_closure_is_followed_to_the_shadow() -> None:
    layer, factor = nn.Linear(3, 1).double(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    model: Any = Lambda(lambda m, x: m.block(x), layer=layer, factor=factor)
    model.block = lambda x: layer(x) * factor
    x = torch.randn(2, 3, dtype=torch.float64)
    got = empirical_ntk(model, x)[:, 0, :, 0]
    y = layer(x) @ layer(x).T  # ∂f/∂factor is the output of the layer
    torch.testing.assert_close(got, (4 * (x @ x.T + 1) + y).detach(), rtol=1e-12, atol=0)
    unchanged(model, lambda: empirical_ntk(model, x))


class _Helper:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class _Pair(NamedTuple):
    layer: nn.Module
    scale: float


@dataclass
class _Record:
    layer: nn.Module


def _calls(*layers: nn.Module) -> Any:
    held = list(layers)
    return lambda x: held[0](x)  # noqa: PLW0108 - the list is what is closed over


def _default(layer: nn.Module) -> Any:
    def function(x: Tensor, inner: nn.Module = layer) -> Tensor:
        y: Tensor = inner(x)
        return y

    return function


def _weak(layer: nn.Module) -> Any:
    reference = weakref.ref(layer)
    return lambda x: reference()(x)  # type: ignore[misc] # noqa: PLW0108 - the reference is closed over


WRAPS: dict[str, Any] = {
    "object": _Helper,
    "partial": partial,
    "partial of a method": lambda layer: partial(nn.Module.__call__, layer),
    "named tuple": lambda layer: partial(lambda pair, x: pair.layer(x), _Pair(layer, 1.0)),
    "dataclass": lambda layer: partial(lambda record, x: record.layer(x), _Record(layer)),
    "list in a closure": _calls,
    "default argument": _default,
    "weak reference": _weak,
    "bound method": lambda layer: layer.forward,
}


class _Outer(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
        self.helper = wrap(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.helper(x)
        return y


@pytest.mark.parametrize("engine", ["structured", "reference", "rows"])
@pytest.mark.parametrize("name", WRAPS)
def test_a_module_reached_through_an_object_is_followed(name: str, engine: Any) -> None:
    model, x = _Outer(WRAPS[name]), torch.randn(4, 3).double()
    expected = empirical_ntk(model.layer, x, engine=engine)
    statistics = {key: value.clone() for key, value in model.layer.state_dict().items()}
    assert torch.equal(empirical_ntk(model, x, engine=engine), expected)
    assert all(torch.equal(value, statistics[key]) for key, value in model.layer.state_dict().items())


_REGISTRY: dict[str, nn.Module] = {}


def test_a_module_that_cannot_be_followed_is_refused_before_it_runs() -> None:
    model = _Outer(lambda layer: lambda x: _REGISTRY["layer"](x))  # noqa: PLW0108 - looked up late
    _REGISTRY["layer"] = model.layer
    before = model.layer[1].num_batches_tracked.clone()  # type: ignore[operator]
    with pytest.raises(NetworkError, match=r"reaches a live Sequential .* register it as a submodule"):
        empirical_ntk(model, torch.ones(4, 3).double())
    assert torch.equal(model.layer[1].num_batches_tracked, before)  # type: ignore[arg-type]


class _Collector:
    """A hook that keeps activations, as feature extractors and regularisers do."""

    def __init__(self, layer: nn.Module) -> None:
        self.seen: list[Tensor] = []
        layer.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(output)


class _Annealer:
    def __init__(self) -> None:
        self.temperature, self.generator = 1.0, torch.Generator().manual_seed(3)

    def step(self) -> float:
        self.temperature *= 0.9
        return self.temperature + 0.0 * float(torch.rand(1, generator=self.generator))


class _Stateful(nn.Module):
    """State in plain objects, stepped in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.collector = _Collector(self.layer)
        self.annealer = _Annealer()
        self.count = count = {"calls": 0}

        def counted(x: Tensor) -> Tensor:
            count["calls"] += 1
            return x

        self.counted = counted

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.counted(self.layer(x))
        return y * self.annealer.step()


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_state_in_plain_objects_stays_with_the_live_module(engine: Any) -> None:
    model, x = _Stateful(), torch.randn(4, 3).double()
    generator = model.annealer.generator.get_state()
    kernel = empirical_ntk(model, x, engine=engine)
    assert torch.allclose(kernel, 0.81 * empirical_ntk(model.layer, x, engine=engine))
    assert model.collector.seen == []
    assert model.annealer.temperature == 1.0
    assert torch.equal(model.annealer.generator.get_state(), generator)
    assert model.count == {"calls": 0}


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Linear(3, 1), torch.ones(1, 3))
    for model in (scripted, nn.Sequential(scripted, nn.Linear(1, 1))):
        with pytest.raises(NetworkError, match=r"TorchScript hides its operations.*pass the eager module"):
            empirical_ntk(model, torch.ones(2, 3))


def test_an_uninitialised_parameter_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"lazy parameter has no shape yet; run one forward pass before"):
        empirical_ntk(nn.LazyLinear(1), torch.ones(2, 3))


def test_a_compiled_module_is_measured_through_its_original() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(2, 3)
    wanted = empirical_ntk(model, x)
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)
    assert torch.equal(empirical_ntk(compiled, x), wanted)
    assert torch.equal(empirical_ntk(nn.Sequential(compiled), x), wanted)
    model.compile(backend=backend)
    assert torch.equal(empirical_ntk(model, x), wanted)
    assert torch.equal(empirical_ntk(nn.DataParallel(model), x), wanted)
    assert calls == []


def test_shared_tensors_stay_shared_and_storage_is_that_of_the_live_module() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    shadow = Shadow(model)
    one, other = shadow.module.get_submodule("0"), shadow.module.get_submodule("1")
    assert one is other
    assert one is not layer
    assert one.weight is shadow.of(layer.weight)
    assert one.weight is not layer.weight
    assert one.weight.data_ptr() == layer.weight.data_ptr()
    assert shadow.of(torch.ones(1)) is None


def test_a_shadow_keeps_nothing_alive() -> None:
    model = nn.Linear(3, 1)
    gone = weakref.ref(model)
    empirical_ntk(model, torch.ones(2, 3))
    del model
    gc.collect()
    assert gone() is None


def test_every_pass_starts_from_the_state_of_the_live_module() -> None:
    case = next(case for case in CASES if case.name == "counters")
    model, inputs = case.model(), case.inputs()
    network = Network(model)
    first = network.outputs(inputs)
    assert torch.equal(first, network.outputs(inputs))
    assert torch.equal(first, case.model().eval()(inputs))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_random_numbers_inside_are_the_same_at_every_probe(mode: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.layer(x) * torch.rand(()) * random.random() * float(np.random.rand())
        return y

    model, x = Lambda(forward, layer=nn.Linear(3, 1)), torch.ones(2, 3)
    first = measured(model, x, mode=mode).values
    torch.rand(1), random.random(), np.random.rand()
    assert torch.equal(first, measured(model, x, mode=mode).values)
    assert not torch.equal(first, measured(model, x, mode=mode, seed=1).values)
