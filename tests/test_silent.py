"""Networks on which other tools return a wrong kernel without a word: each ends exact, or refused by name.

The twin is plain autograd in float64, one row at a time, on an untouched network of the same seed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ntk_monitor.errors import NetworkError
from ntk_monitor.harmless import Fingerprint
from ntk_monitor.kernel import empirical_ntk, measured
from ntk_monitor.look import Measurement
from ntk_monitor.monitor import Monitor
from tests import reference
from tests.cases import Lambda

Make = Callable[[], nn.Module]


def seeded(make: Make) -> nn.Module:
    torch.manual_seed(7)
    return make().double()


def normal(*shape: int) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plain(make: Make, inputs: Any, forward: Callable[[nn.Module, Any], Tensor] | None = None) -> Tensor:
    """The kernel (N, C, N, C) by plain autograd, in evaluation mode."""
    model = seeded(make).eval()
    y = forward(model, inputs) if forward else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    rows = reference.rows(model, y)
    return reference.ntk({n: torch.view_as_real(g).flatten(2) if g.is_complex() else g for n, g in rows.items()})


def monitored(model: nn.Module, inputs: Any, **options: Any) -> Monitor:
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return Monitor(model, None, (inputs, torch.zeros(len(first), 1)), outputs="full", **options)


def exact(make: Make, inputs: Any, **options: Any) -> Measurement:
    """Measure the network in training mode as the monitor does, compare with the twin, and see it untouched."""
    live = seeded(make).train()
    before = Fingerprint.of(live)
    raw = monitored(live, inputs, **options).measure(0)
    assert before.changes(Fingerprint.of(live)) == []
    wanted = plain(make, inputs, options.get("forward"))
    rows = wanted.shape[0] * wanted.shape[1]
    assert float(wanted.abs().max()) > 0
    error = torch.as_tensor(raw.values) - wanted.reshape(rows, rows)
    assert float(error.abs().max()) <= 1e-11 * float(wanted.abs().max())
    return raw


def refused(make: Make, inputs: Any, **options: Any) -> str:
    snapshot = monitored(seeded(make).train(), inputs, **options).snapshot(0)
    assert snapshot.status == "skipped"
    return snapshot.reason


# Parameters that autograd or torch.func does not see.


@pytest.fixture
def mesh() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_parameters_sharded_by_fsdp2_are_refused_not_zero(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    sharded, x = seeded(net), normal(2)
    for module in (sharded[0], sharded[2], sharded):  # type: ignore[index]
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    sharded(x)
    values = {name: p.detach() for name, p in sharded.named_parameters()}
    silent = jacrev(lambda p: functional_call(sharded, p, (x,)))(values)
    assert not any(bool(j.to_local().any()) for j in silent.values())  # the trap
    snapshot = monitored(sharded, x).snapshot(0)
    assert snapshot.status == "skipped"
    assert "FSDPSequential: its parameters are sharded over processes" in snapshot.reason
    with pytest.raises(NetworkError, match="FSDPSequential: its parameters are sharded over processes"):
        empirical_ntk(sharded, x)


class Checkpointed(nn.Module):
    """A block behind activation checkpointing, after a first layer or as the first."""

    def __init__(self, *, reentrant: bool, first: bool = True) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(3, 3) if first else nn.Identity()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        y: Tensor = self.head(h)
        return y


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpoints_are_refused_with_the_parameters_they_hide(first: bool) -> None:
    model = seeded(lambda: Checkpointed(reentrant=True, first=first))
    if not first:
        block = list(model.get_submodule("block").parameters())
        hidden: Any = torch.autograd.grad(model(normal(3)).sum(), block, allow_unused=True)
        assert hidden == (None, None)  # the trap
    reason = refused(lambda: Checkpointed(reentrant=True, first=first), normal(3))
    assert "block.0.weight, block.0.bias) are out of reach" in reason
    assert "pass use_reentrant=False" in reason
    assert "head" not in reason


def test_other_checkpoints_are_measured() -> None:
    exact(lambda: Checkpointed(reentrant=False), normal(3))


class Switched(nn.Module):
    """A block that gradients pass through always, never, or in training mode only."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when
        self.block = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.when == "always" or (self.when == "training" and self.training)):
            h = torch.tanh(self.block(x))
        y: Tensor = self.head(h + x)
        return y


def test_a_block_without_gradients_is_a_constant_and_named() -> None:
    raw = exact(lambda: Switched("never"), normal(3))
    assert dict(raw.coverage.detached) == {"block.weight": 9, "block.bias": 3}
    assert raw.coverage.texts()["detached"] == "block.weight, block.bias"


def test_a_block_without_gradients_in_evaluation_mode_only_is_refused_by_name() -> None:
    reason = refused(lambda: Switched("training"), normal(3))
    assert "gradients reach block.weight, block.bias (12 scalars) in training mode but not" in reason
    raw = exact(lambda: Switched("training"), normal(3), forward=_head_alone, params="head")
    assert raw.coverage.selected == 8


def _head_alone(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.tanh(model.block(x))  # type: ignore[operator]
    y: Tensor = model.head(h + x)  # type: ignore[operator]
    return y


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames the option
def test_gradient_checkpointing_of_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 5, 9]])

    def net(reentrant: bool | None) -> nn.Module:
        model: nn.Module = transformers.GPT2LMHeadModel(config)
        if reentrant is not None:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        return model

    def last(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(input_ids=x).logits[:, -1, :2]
        return y

    wanted = plain(lambda: net(None), ids, last).reshape(6, 6)
    for reentrant in (True, False):  # checkpoints work in training mode only, which is not what is measured
        got = monitored(seeded(lambda r=reentrant: net(r)).train(), ids, forward=last).measure(0)  # type: ignore[misc]
        assert float((torch.as_tensor(got.values) - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())
        assert got.coverage.share == 1
    # In training mode they do: exact, or refused with the way out.
    trained = empirical_ntk(seeded(lambda: net(False)).train(), ids, forward=last, mode="train")
    assert float((trained.reshape(6, 6) - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())
    with pytest.raises(NetworkError, match="pass use_reentrant=False"):
        empirical_ntk(seeded(lambda: net(True)).train(), ids, forward=last, mode="train")


# Parameters used more than once, or through an operation that hides them.


def test_relu_in_place() -> None:
    exact(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.ReLU(inplace=True), nn.Flatten()
        ),
        normal(1, 4, 4),
    )


def test_a_layer_used_in_a_loop_and_a_weight_used_as_its_transpose() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(m.loop(x))
        return F.linear(torch.tanh(F.linear(x, m.tied)), m.tied.T)

    exact(lambda: Lambda(forward, loop=nn.Linear(3, 3), tied=nn.Parameter(torch.randn(2, 3))), normal(3))


def test_tied_weights_count_once() -> None:
    def net() -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return Lambda(lambda m, x: m.parts["head"](torch.tanh(m.parts["embed"](x))).mean(1), parts=model)

    ids = torch.tensor([[0, 1], [2, 2], [4, 3], [1, 4]])
    assert exact(net, ids).coverage.total == 15


def test_batch_statistics_couple_the_samples() -> None:
    def net() -> nn.Module:
        norm = nn.BatchNorm1d(3, track_running_stats=False)
        return nn.Sequential(nn.Conv1d(2, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))

    x, model = normal(2, 5), seeded(net).train()
    wanted = reference.ntk(reference.rows(model, model(x)))
    values = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(jacrev(lambda p, sample: functional_call(model, p, (sample[None],))[0]), (None, 0))(values, x)
    alone = reference.ntk({name: r.flatten(2) for name, r in rows.items()})
    assert float((alone - wanted).abs().max()) > 0.01 * float(wanted.abs().max())  # the trap: another function
    for engine in ("auto", "rows", "operator"):
        got = measured(model, x, mode="train", engine=engine)
        assert float((got.values - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())
    # Without running statistics, evaluation mode couples the samples as well.
    exact(net, x)


def test_attention_by_the_fast_path() -> None:
    def net() -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.2, batch_first=True)
        return Lambda(
            lambda m, x, mask: m.body(x, src_key_padding_mask=mask)[:, 0], body=nn.TransformerEncoder(layer, 1)
        )

    mask = torch.tensor([[False, False, True], [False, True, True], [False, False, False], [False, False, True]])
    exact(net, (normal(3, 4), mask))
    exact(lambda: Lambda(_attention, body=nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)), normal(3, 4))


def _attention(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.body(x, x, x, need_weights=False)[0].mean(1)
    return y


def test_recurrent_layers() -> None:
    exact(
        lambda: Lambda(lambda m, x: m.body(x)[0][:, -1], body=nn.LSTM(3, 2, 2, dropout=0.3, batch_first=True)),
        normal(4, 3),
    )


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_computed_from_parameters(norm: Callable[[nn.Module], nn.Module]) -> None:
    exact(lambda: nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)), normal(3))


def test_complex_parameters_count_their_real_and_imaginary_parts() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.fft.irfft(torch.fft.rfft(x, dim=1) @ self.w, n=2, dim=1)
            return y

    raw = exact(Spectral, normal(4))
    assert raw.kernel.engine == "rows"
    assert "complex parameters" in raw.kernel.reason


# Hooks, state and outputs.


def test_hooks_on_gradients_are_not_part_of_the_function() -> None:
    fired: list[str] = []

    def clamped(gradient: Tensor) -> Tensor:
        fired.append("tensor")
        return gradient.clamp(-0.001, 0.001)

    def read(module: nn.Module, gradients: Any, outer: Any) -> None:
        fired.append(f"module {outer[0].sum().item()}")  # which vectorised backward passes refuse

    def net(*, hooks: bool = True) -> nn.Module:
        last = nn.Linear(4, 1)
        if hooks:
            last.weight.register_hook(clamped)
            last.register_full_backward_hook(read)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), last)

    live, x = seeded(net).train(), normal(3)
    wanted = plain(lambda: net(hooks=False), x).reshape(4, 4)
    raw = monitored(live, x).measure(0)
    assert float((torch.as_tensor(raw.values) - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())
    assert fired == []
    live(x).sum().backward()  # and they are still there for training
    assert len(fired) == 2


def test_an_embedding_that_rewrites_its_rows() -> None:
    def net() -> nn.Module:
        return Lambda(
            lambda m, x: m.head(m.embed(x).mean(1)), embed=nn.Embedding(6, 3, max_norm=0.5), head=nn.Linear(3, 2)
        )

    exact(net, torch.tensor([[0, 1], [2, 2], [4, 3], [1, 4]]))


def test_buffers_that_forward_replaces() -> None:
    class Averaging(nn.Module):
        average: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)
            self.register_buffer("average", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
            y: Tensor = self.body(x * self.average)
            return y

    exact(Averaging, normal(3))


def test_a_dict_of_outputs_is_refused_with_its_keys() -> None:
    def net() -> nn.Module:
        return Lambda(lambda m, x: {"pde": m.a(x), "boundary": m.b(x)}, a=nn.Linear(3, 1), b=nn.Linear(3, 1))

    reason = refused(net, normal(3))
    assert "several floating tensors ['boundary', 'pde']; pass forward=" in reason
    raw = exact(net, normal(3), forward=lambda m, x: m(x)["pde"])
    assert dict(raw.coverage.detached) == {"b.weight": 3, "b.bias": 1}


def test_a_script_is_refused_by_name() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        scripted = torch.jit.trace(nn.Linear(3, 1).double(), normal(3))
    assert "TorchScript hides its operations" in monitored(scripted, normal(3)).snapshot(0).reason
