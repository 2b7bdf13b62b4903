"""Networks that break measurements, as data. Small, seeded, float32 until a test casts them; all in training mode.

Each case breaks (or used to break) something: batching rules, hidden state, shared parameters, other outputs.
"""

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

N = 3
"""Samples of every case: enough for a first, a middle and a last one."""


@dataclass(frozen=True)
class Case:
    """A network, its inputs in any floating dtype, and how to call it."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[torch.dtype], Any]
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    coupled: bool = False
    """True when the outputs of a sample depend on the others even in evaluation mode."""

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the same network each time, in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = self.make()
        for value in vars(model).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.data = value.data.to(dtype)
        return model.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> Any:
        """Return the same inputs each time."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return self.data(dtype)


def normal(*shape: int) -> Callable[[torch.dtype], Tensor]:
    # Drawn in float32 for every dtype, so that precisions are compared on the same samples.
    return lambda dtype: torch.randn(N, *shape).to(dtype)


def tokens(*shape: int, kinds: int = 6) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randint(kinds, (N, *shape))


class Lambda(nn.Module):
    """A network written as one function of its parts."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def perturbed(model: nn.Module) -> nn.Module:
    """Give normalisation layers weights and running statistics that are not those of initialisation."""
    for layer in model.modules():
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)):
            for name, p in layer.named_parameters():
                nn.init.normal_(p, float(name == "weight"), 0.3)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0.0, 0.5)
            layer.running_var.uniform_(0.5, 2.0)
    return model


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def cnn_batchnorm() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(4, 3, 3))
    return perturbed(nn.Sequential(*layers, nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return perturbed(
        Lambda(
            lambda m, x: m.head(m.encoder(x).mean(1)),
            encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            head=nn.Linear(8, 2),
        )
    )


def _attention(batch_first: bool) -> Callable[[], nn.Module]:
    return lambda: Lambda(
        lambda m, x: m.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=batch_first),
    )


def _recurrent(kind: type[nn.LSTM | nn.GRU], **options: Any) -> Callable[[], nn.Module]:
    width = 4 * (2 if options.get("bidirectional") else 1)
    return lambda: Lambda(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]),
        rnn=kind(3, 4, batch_first=True, **options),
        head=nn.Linear(width, 2),
    )


def _tied() -> nn.Module:
    return Lambda(
        lambda m, x: m.body(m.embedding(x).mean(1)) @ m.embedding.weight.T, embedding=_table(), body=_square()
    )


def _table(**options: Any) -> nn.Embedding:
    return nn.Embedding(6, 4, **options)


def _square() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def _twice() -> nn.Module:
    return Lambda(lambda m, x: m.head(m.block(m.block(x))), block=_square(), head=nn.Linear(4, 2))


def _two_paths() -> nn.Module:
    shared = nn.Linear(4, 4)
    return Lambda(
        lambda m, x: m.right(torch.tanh(m.left(x)))[:, :2], left=nn.Sequential(shared), right=nn.Sequential(shared)
    )


def _loose() -> nn.Module:
    return Lambda(
        lambda m, x: torch.einsum("ni,ij->nj", m.body(x), m.matrix) * m.scale,
        body=_square(),
        matrix=nn.Parameter(torch.randn(4, 2)),
        scale=nn.Parameter(torch.tensor(1.5)),
    )


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _unused() -> nn.Module:
    return Lambda(lambda m, x: m.used(x), used=nn.Linear(4, 2), unused=nn.Linear(4, 2))


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 2))


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))


def _spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))


def _groupnorm() -> nn.Module:
    return perturbed(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)),
    )


def _rmsnorm() -> nn.Module:
    return perturbed(nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.GELU(), nn.Linear(6, 2)))


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Softplus(), nn.AvgPool2d(4), nn.Flatten())


def _bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 2))


def _branches() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.one(row) if row.sum() > 0 else m.other(row) for row in x[:, None]])

    return Lambda(forward, one=nn.Linear(4, 2), other=nn.Linear(4, 2))


def _writes() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 2, dtype=x.dtype)
        y[:, 0] = m.body(x).sum(1)
        y[:, 1:] = m.head(x)
        y.mul_(2)
        return y

    return Lambda(forward, body=_square(), head=nn.Linear(4, 1))


class _Cube(torch.autograd.Function):
    """Old style: context in forward, no batching rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = 3 * x**2 * gradient
        return result


def _custom() -> nn.Module:
    cube: Any = _Cube.apply
    return Lambda(lambda m, x: m.head(cube(m.body(x))), body=nn.Linear(4, 3), head=nn.Linear(3, 2))


def _counter() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.tally = m.tally + 1
        m.recent.append(float(m.calls))
        m.seen.add(m.tally)
        result: Tensor = m.body(x) * (1 + 0.5 * m.calls) + m.tally
        return result

    state = {"calls": torch.zeros(()), "tally": 0, "recent": deque[float](maxlen=2), "seen": set[int]()}
    return Lambda(forward, body=nn.Linear(4, 2), **state)


def _memory() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.body(x) + m.hidden)
        m.hidden = hidden.detach().mean(0)
        y: Tensor = m.head(hidden)
        return y

    model = Lambda(forward, body=nn.Linear(4, 3), head=nn.Linear(3, 2))
    model.hidden = torch.ones(3)
    return model


def _average() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.body(x - m.average)
        with torch.no_grad():
            m.average.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return y

    return Lambda(forward, body=_mlp(), average=torch.ones(4))


def _closure() -> nn.Module:
    model = Lambda(lambda m, x: m.block(x), body=_square(), head=nn.Linear(4, 2))
    body, head = model.get_submodule("body"), model.get_submodule("head")
    model.__dict__["block"] = lambda x: head(body(x))
    return model


def _listed() -> nn.Module:
    a, b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2))
    return Lambda(lambda m, x: x @ m.pair[0] * m.more["b"], a=a, b=b, pair=(a,), more={"b": b})


def _noise() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.body(x) * torch.rand(2, generator=m.generator).to(x) * float(m.other.random())
        return y

    return Lambda(forward, body=_mlp(), generator=torch.Generator().manual_seed(3), other=np.random.default_rng(4))


def _complex() -> nn.Module:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.imaginary = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ torch.complex(self.real, self.imaginary).to(torch.complex128)).abs()

    return Complex()


def _checkpointed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.head(checkpoint(m.body, x, use_reentrant=False))
        return y

    return Lambda(forward, body=_square(), head=nn.Linear(4, 2))


@dataclass
class _Output:
    scores: Tensor
    kind: str = "scores"


@dataclass(slots=True)
class _SlottedOutput:
    scores: Tensor
    index: Tensor


@dataclass
class _Logits:
    logits: Tensor
    hidden: Tensor


@dataclass
class Pair:
    """Inputs of a network as a dataclass."""

    left: Tensor
    right: Tensor


def _wrapped(output: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Lambda(lambda m, x: output(m.body(x)), body=_mlp())


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model


def _centred() -> nn.Module:
    return Lambda(lambda m, x: m.head(torch.tanh(m.body(x) - m.body(x).mean(0))), body=_square(), head=nn.Linear(4, 2))


def _mixed(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"ids": torch.randint(6, (N, 3)), "features": torch.randn(N, 4).to(dtype), "scale": torch.tensor(2.0)}


def _pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4).to(dtype), torch.randn(N, 4).to(dtype)


def _two_inputs() -> nn.Module:
    return Lambda(lambda m, left, right: m.one(left) * m.other(right), one=nn.Linear(4, 2), other=nn.Linear(4, 2))


def _named_inputs() -> nn.Module:
    return Lambda(
        lambda m, ids, features, scale: m.head(m.embedding(ids).mean(1) + features) * scale.to(features),
        embedding=_table(),
        head=nn.Linear(4, 2),
    )


def _sequence_first(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x.transpose(0, 1)).transpose(0, 1)
    return y


CASES = [
    Case("mlp", _mlp, normal(4)),
    Case("cnn with batch norm, in-place relu, dropout", cnn_batchnorm, normal(2, 6, 6)),
    Case("transformer encoder", _transformer, normal(3, 8)),
    Case("attention, batch first", _attention(True), normal(3, 4)),
    Case("attention, sequence first", _attention(False), normal(3, 4), _sequence_first),
    Case("lstm", _recurrent(nn.LSTM), normal(4, 3)),
    Case("lstm of two layers with dropout", _recurrent(nn.LSTM, num_layers=2, dropout=0.5), normal(4, 3)),
    Case("gru, both directions", _recurrent(nn.GRU, bidirectional=True), normal(4, 3)),
    Case("embedding tied to the output", _tied, tokens(3)),
    Case("module applied twice", _twice, normal(4)),
    Case("module on two paths", _two_paths, normal(4)),
    Case("loose parameters", _loose, normal(4)),
    Case("frozen layers", _frozen, normal(4)),
    Case("unused parameters", _unused, normal(4)),
    Case("weight norm", _weight_norm, normal(4)),
    Case("old weight norm", _old_weight_norm, normal(4)),
    Case("spectral norm", _spectral_norm, normal(4)),
    Case("group norm", _groupnorm, normal(2, 4, 4)),
    Case("rms norm", _rmsnorm, normal(4)),
    Case("transposed convolution", _transposed, normal(2, 2, 2)),
    Case("embedding bag", _bag, tokens(3)),
    Case("control flow on data", _branches, normal(4)),
    Case("writes in place", _writes, normal(4)),
    Case("old autograd function", _custom, normal(4)),
    Case("counters", _counter, normal(4)),
    Case("hidden state", _memory, normal(4)),
    Case("running average of inputs", _average, normal(4)),
    Case("closure over modules", _closure, normal(4)),
    Case("parameters in containers", _listed, normal(4)),
    Case("own random generator", _noise, normal(4)),
    Case("complex numbers inside", _complex, normal(4)),
    Case("checkpointing", _checkpointed, normal(4)),
    Case("embedding with max_norm", lambda: nn.Sequential(_table(max_norm=0.5), nn.Flatten()), tokens(2)),
    Case("sparse embedding", lambda: nn.Sequential(_table(sparse=True), nn.Flatten()), tokens(2)),
    Case("forward hooks", _hooked, normal(4)),
    Case("samples coupled", _centred, normal(4), coupled=True),
    Case("dict inputs", _named_inputs, _mixed),
    Case("tuple inputs", _two_inputs, _pair),
    Case("dataclass inputs", _two_inputs, lambda d: Pair(*_pair(d)), lambda m, p: m(p.left, p.right)),
    Case("dict of one entry", _mlp, lambda dtype: {"anything": torch.randn(N, 4).to(dtype)}),
    Case("dict output", _wrapped(lambda y: {"scores": y, "best": y.argmax(1)}), normal(4)),
    Case("logits output", _wrapped(lambda y: _Logits(y, y**2)), normal(4)),
    Case("logits in a dict", _wrapped(lambda y: {"hidden": y**2, "logits": y}), normal(4)),
    Case("dataclass output", _wrapped(_Output), normal(4)),
    Case("slotted dataclass output", _wrapped(lambda y: _SlottedOutput(y, y.argmax(1))), normal(4)),
    Case("one number per sample", _wrapped(lambda y: y[:, 0]), normal(4)),
    Case("outputs of two axes", _wrapped(lambda y: y.reshape(-1, 2, 1)), normal(4)),
]


def samples(inputs: Any) -> Iterator[Any]:
    """Yield the inputs one sample at a time, as batches of one."""
    for n in range(N):
        yield _one(inputs, n)


def _one(inputs: Any, n: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[n : n + 1] if inputs.dim() else inputs
    if isinstance(inputs, dict):
        return {key: _one(value, n) for key, value in inputs.items()}
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        return type(inputs)(**{f.name: _one(getattr(inputs, f.name), n) for f in dataclasses.fields(inputs)})
    return tuple(_one(value, n) for value in inputs)


def answer(case: Case, model: nn.Module, inputs: Any) -> Tensor:
    """Call the network and pick its output tensor by hand, without the package's own rules."""
    if case.forward is not None:
        raw: Any = case.forward(model, inputs)
    elif isinstance(inputs, dict):
        raw = model(**inputs) if len(inputs) > 1 else model(*inputs.values())
    else:
        raw = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if isinstance(raw, dict):
        raw = raw["logits"] if "logits" in raw else raw["scores"]
    if not isinstance(raw, Tensor):
        raw = raw.logits if isinstance(raw, _Logits) else raw.scores
    result: Tensor = raw
    return result
