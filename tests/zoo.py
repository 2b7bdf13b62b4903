"""The model zoo: every layer and every use of a parameter an engine must measure exactly, as data.

Complements `cases.py`. Two outputs per sample, a few dozen parameters, float64. Attention and language models are in
`zoo_transformers.py`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.cases import Case, Lambda, N, normal, tokens

Data = Callable[[torch.dtype], Any]


def two(h: Tensor) -> Tensor:
    """Read everything a network computed off in two fixed, different ways: (N, ...) → (N, 2)."""
    h = h.flatten(1)
    i = torch.arange(h.shape[1], dtype=h.dtype, device=h.device)
    return torch.stack([(h * torch.cos(i)).sum(1), (torch.tanh(h) * torch.sin(i + 1)).sum(1)], 1)


def lively(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move vectors (biases, scales of norms) and running statistics away from the zeros and ones they start with."""
    for p in model.parameters():
        if p.dim() <= 1 and p.requires_grad and p.is_floating_point():
            p.data.add_(scale * torch.randn_like(p))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_(0.0, 0.5)
        if name.endswith("running_var"):
            b.uniform_(0.5, 2.0)
    return model


def _part(given: Any) -> Any:
    return nn.Parameter(torch.randn(given)) if isinstance(given, tuple) else given()


VECTORS = normal(4)


def written(
    name: str, function: Callable[..., Any], data: Data = VECTORS, *, coupled: bool = False, **parts: Any
) -> Case:
    """A network written as a function (m, inputs) of its parts: shapes of parameters, or makers of modules."""

    def make() -> nn.Module:
        return lively(Lambda(function, **{key: _part(part) for key, part in parts.items()}))

    return Case(name, make, data, _whole, coupled)


def _whole(model: nn.Module, inputs: Any) -> Tensor:
    return two(model(inputs))


def stacked(name: str, data: Data, *layers: Callable[[], nn.Module], coupled: bool = False) -> Case:
    return Case(name, lambda: lively(nn.Sequential(*(layer() for layer in layers))), data, _whole, coupled)


linear, square = partial(nn.Linear, 4, 2), partial(nn.Linear, 4, 4)
relu = partial(nn.ReLU, inplace=True)
conv = partial(nn.Conv2d, 2, 4, 3)
images, rows, series = normal(2, 5, 5), normal(3, 4), normal(2, 7)


NORMS = [
    stacked("batch norm of vectors", normal(4), partial(nn.Linear, 4, 5), partial(nn.BatchNorm1d, 5), nn.Tanh),
    stacked("batch norm of series", series, partial(nn.Conv1d, 2, 4, 3), partial(nn.BatchNorm1d, 4), relu),
    stacked("batch norm of images", images, conv, partial(nn.BatchNorm2d, 4), relu, partial(nn.Conv2d, 4, 2, 2)),
    stacked("batch norm of volumes", normal(2, 3, 3, 3), partial(nn.BatchNorm3d, 2), nn.Tanh),
    stacked("batch norm without affine", images, conv, partial(nn.BatchNorm2d, 4, affine=False), nn.Tanh),
    stacked(
        "batch norm without running statistics",
        images,
        conv,
        partial(nn.BatchNorm2d, 4, track_running_stats=False),
        coupled=True,
    ),
    stacked("instance norm", images, conv, partial(nn.InstanceNorm2d, 4, affine=True), relu),
    stacked("instance norm of series", series, partial(nn.InstanceNorm1d, 2, affine=True), nn.Tanh),
    stacked(
        "instance norm with running statistics",
        images,
        conv,
        partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True),
    ),
    stacked("group norm of one group", images, conv, partial(nn.GroupNorm, 1, 4), relu),
    stacked("group norm of vectors", normal(4), square, partial(nn.GroupNorm, 2, 4), nn.Tanh),
    stacked("rms norm of sequences", rows, square, partial(nn.RMSNorm, 4, eps=1e-6)),
    stacked("rms norm over two axes", rows, partial(nn.RMSNorm, (3, 4)), square),
    stacked("layer norm", rows, square, partial(nn.LayerNorm, 4)),
    stacked("layer norm without bias", rows, square, partial(nn.LayerNorm, 4, bias=False)),
    stacked("layer norm without affine", rows, square, partial(nn.LayerNorm, 4, elementwise_affine=False)),
    stacked("layer norm over two axes", rows, partial(nn.LayerNorm, (3, 4)), square),
    stacked("local response norm", images, conv, partial(nn.LocalResponseNorm, 2)),
    written("layer norm of channels", lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), images,
            norm=partial(nn.LayerNorm, 2)),
    written("norms by function", lambda m, x: F.layer_norm(F.group_norm(x, 2, m.a, m.b), (4,), m.c, m.d), normal(4),
            a=(4,), b=(4,), c=(4,), d=(4,)),
    written("rms norm by hand", lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), rows,
            w=(4,)),
]  # fmt: skip

_CONVOLUTIONS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "convolution": (conv, (2, 5, 5)),
    "convolution without bias": (partial(conv, bias=False), (2, 5, 5)),
    "convolution of one pixel": (partial(nn.Conv2d, 2, 4, 1), (2, 3, 3)),
    "convolution of patches": (partial(nn.Conv2d, 2, 4, 2, stride=2), (2, 4, 4)),
    "convolution of the whole image": (partial(nn.Conv2d, 2, 4, 3), (2, 3, 3)),
    "convolution in groups": (partial(nn.Conv2d, 4, 6, 3, groups=2), (4, 4, 4)),
    "depthwise convolution": (partial(nn.Conv2d, 3, 3, 3, groups=3, padding=1), (3, 4, 4)),
    "depthwise convolution with multiplier": (partial(nn.Conv2d, 3, 6, 3, groups=3), (3, 4, 4)),
    "convolution with stride": (partial(conv, stride=2, padding=1), (2, 6, 6)),
    "convolution with unused pixels": (partial(conv, stride=(4, 3)), (2, 8, 7)),
    "convolution with dilation": (partial(conv, dilation=2, padding=2), (2, 5, 5)),
    "convolution, oblong": (partial(nn.Conv2d, 2, 3, (3, 1), stride=(1, 2), padding=(1, 0)), (2, 4, 5)),
    "convolution, reflected": (partial(conv, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "convolution, circular": (partial(conv, padding=1, padding_mode="circular"), (2, 4, 4)),
    "convolution, replicated": (partial(conv, padding=1, padding_mode="replicate", stride=2), (2, 4, 4)),
    "convolution, same": (partial(conv, padding="same", dilation=(2, 1)), (2, 5, 5)),
    "convolution, valid": (partial(conv, padding="valid"), (2, 4, 4)),
    "convolution of as many channels as samples": (partial(nn.Conv2d, N, N, N, padding=1), (N, N, N)),
    "convolution of series": (partial(nn.Conv1d, 2, 3, 3, padding=1, stride=2), (2, 7)),
    "convolution of series in groups": (partial(nn.Conv1d, 4, 4, 2, groups=2, dilation=2), (4, 6)),
    "convolution of series, circular": (partial(nn.Conv1d, 2, 3, 3, padding=2, padding_mode="circular"), (2, 5)),
    "convolution of series, same": (partial(nn.Conv1d, 2, 3, 3, padding="same", dilation=2), (2, 6)),
    "convolution of volumes": (partial(nn.Conv3d, 2, 2, 2, padding=(1, 0, 0)), (2, 3, 3, 3)),
    "convolution of volumes in groups": (partial(nn.Conv3d, 2, 4, 2, groups=2, stride=2, dilation=2), (2, 4, 4, 4)),
    "transposed convolution of series": (
        partial(nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "transposed convolution of images": (
        partial(nn.ConvTranspose2d, 2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)),
    "transposed convolution in groups": (partial(nn.ConvTranspose2d, 4, 6, 2, groups=2, stride=2), (4, 2, 2)),
    "transposed convolution with dilation": (
        partial(nn.ConvTranspose2d, 2, 3, (2, 3), dilation=(2, 1), bias=False), (2, 3, 3)),
    "transposed convolution of volumes": (
        partial(nn.ConvTranspose3d, 2, 2, 2, stride=(2, 1, 1), output_padding=(1, 0, 0)), (2, 2, 2, 2)),
    "transposed depthwise convolution": (partial(nn.ConvTranspose1d, 3, 3, 3, groups=3, dilation=2), (3, 4)),
}  # fmt: skip


def _lifted(m: Any, x: Tensor) -> Any:
    # A group-equivariant convolution: one kernel in four orientations.
    return F.conv2d(x, torch.cat([m.w.rot90(k, (2, 3)) for k in range(4)]), m.b.repeat(4))


def _standardised(m: Any, x: Tensor) -> Any:
    w = m.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, w, m.conv.bias)


def _own_kernels(m: Any, x: Tensor) -> Any:
    # Samples become groups: every sample has a kernel of its own.
    n, c, h, w = x.shape
    kernels = m.hyper(x.mean((2, 3))).reshape(n * 3, c, 3, 3)
    return F.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n).reshape(n, 3, h - 2, w - 2)


def _pyramid(m: Any, x: Tensor) -> Any:
    return torch.cat([m.conv(x).flatten(1), m.conv(F.avg_pool2d(x, 2)).flatten(1)], 1)


def _excited(m: Any, x: Tensor) -> Any:
    h = m.conv(x)
    return h * torch.sigmoid(m.up(F.relu(m.down(h.mean((2, 3))))))[:, :, None, None]


def _sampled(m: Any, x: Tensor) -> Any:
    # Deformable: a convolution moves the places another one's inputs are read from.
    places = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), 2, 3), [len(x), 2, 5, 5], align_corners=False)
    moved = places + 0.1 * torch.tanh(m.offsets(x)).permute(0, 2, 3, 1)
    return m.conv(F.grid_sample(x, moved, align_corners=False))


def _located(m: Any, x: Tensor) -> Any:
    theta = m.local(x.flatten(1)).reshape(-1, 2, 3)
    return m.conv(F.grid_sample(x, F.affine_grid(theta, [len(x), 2, 5, 5], align_corners=True), align_corners=True))


def _unpooled(m: Any, x: Tensor) -> Any:
    h, places = F.max_pool2d(m.conv(x), 2, return_indices=True)
    return F.max_unpool2d(torch.tanh(h), places, [2, 2])


def _folded(m: Any, x: Tensor) -> Any:
    patches = F.unfold(x, 3, padding=1).transpose(1, 2)
    return F.fold(m.body(patches).transpose(1, 2), (5, 5), 3, padding=1)


IMAGES = [
    *(stacked(name, normal(*shape), layer) for name, (layer, shape) in _CONVOLUTIONS.items()),
    stacked("relu in place", images, conv, relu, partial(nn.Conv2d, 4, 2, 2), relu),
    stacked("other activations in place", images, conv, partial(nn.LeakyReLU, 0.1, inplace=True),
            partial(nn.Conv2d, 4, 4, 2), partial(nn.SiLU, inplace=True), partial(nn.Hardtanh, inplace=True)),
    stacked("maximum and mean of neighbours", images, conv, partial(nn.MaxPool2d, 2, stride=1),
            partial(nn.AvgPool2d, 2), partial(nn.Conv2d, 4, 2, 1), partial(nn.AdaptiveAvgPool2d, 1)),
    stacked("interpolation", normal(2, 3, 3), partial(nn.Upsample, scale_factor=2), conv,
            partial(nn.Upsample, size=(5, 3), mode="bilinear"), partial(nn.Conv2d, 4, 1, 2)),
    stacked("pixel shuffle", normal(2, 4, 4), partial(nn.PixelUnshuffle, 2), partial(nn.Conv2d, 8, 4, 1),
            partial(nn.PixelShuffle, 2), nn.Tanh, partial(nn.Conv2d, 1, 2, 3)),
    stacked("one slope", normal(4), square, nn.PReLU, linear),
    stacked("a slope per channel", images, conv, partial(nn.PReLU, 4), partial(nn.Conv2d, 4, 2, 2)),
    written("convolution, channels last", lambda m, x: m.conv(x.contiguous(memory_format=torch.channels_last)), images,
            conv=conv),
    written("convolution by function", lambda m, x: F.conv2d(x, m.w, stride=2) + m.b[:, None, None], images,
            w=(3, 2, 2, 2), b=(3,)),
    written("convolution without a batch axis", lambda m, x: torch.stack([m.conv(one) for one in x]), images,
            conv=conv),
    written("convolution in four orientations", _lifted, images, w=(2, 2, 3, 3), b=(2,)),
    written("weight standardisation", _standardised, images, conv=conv),
    written("kernels of the samples' own", _own_kernels, normal(2, 4, 4), hyper=partial(nn.Linear, 2, 54)),
    written("convolution at two scales", _pyramid, normal(2, 6, 6), conv=conv),
    written("squeeze and excite", _excited, images, conv=conv, down=partial(nn.Linear, 4, 3),
            up=partial(nn.Linear, 3, 4)),
    written("deformable", _sampled, images, offsets=partial(nn.Conv2d, 2, 2, 3, padding=1), conv=conv),
    written("spatial transformer", _located, images, local=partial(nn.Linear, 50, 6), conv=conv),
    written("unpooling", _unpooled, normal(2, 6, 6), conv=conv),
    written("unfold and fold", _folded, images, body=partial(nn.Linear, 18, 9)),
]  # fmt: skip


def _bags(m: Any, inputs: tuple[Tensor, Tensor]) -> Any:
    ids, lengths = inputs
    kept = ids[torch.arange(ids.shape[1]) < lengths[:, None]]
    return F.embedding_bag(kept, m.table, lengths.cumsum(0) - lengths, mode="mean")


def _weighted_bags(m: Any, ids: Tensor) -> Any:
    return F.embedding_bag(ids, m.table, per_sample_weights=m.importance[ids], mode="sum")


def _ragged(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randint(6, (N, 4)), torch.tensor([2, 4, 1])


table = partial(nn.Embedding, 6, 4)
EMBEDDINGS = [
    stacked("embedding of one token", tokens(), table),
    stacked("embedding of repeated tokens", tokens(5, kinds=2), table, square, nn.Tanh),
    stacked("embedding with padding", tokens(4), partial(table, padding_idx=1), linear),
    stacked("embedding scaled by frequency", tokens(4), partial(table, scale_grad_by_freq=True), coupled=True),
    stacked("embedding bag, summed", tokens(3), partial(nn.EmbeddingBag, 6, 4, mode="sum"), linear),
    stacked("embedding bag, largest", tokens(3), partial(nn.EmbeddingBag, 6, 4, mode="max"), linear),
    stacked("embedding bag with padding", tokens(3), partial(nn.EmbeddingBag, 6, 4, padding_idx=2), linear),
    written("embedding bag with offsets", _bags, _ragged, table=(6, 4)),
    written("embedding bag with learned weights", _weighted_bags, tokens(3), table=(6, 4), importance=(6,)),
    written("embedding twice", lambda m, ids: m.table(ids) * torch.tanh(m.table(ids.flip(1))), tokens(3), table=table),
    written("embedding of a product", lambda m, ids: F.embedding(ids, m.u @ m.v), tokens(3), u=(6, 2), v=(2, 4)),
    written("embedding by index", lambda m, ids: m.table[ids], tokens(3), table=(6, 4)),
    written("embedding by one-hot vectors", lambda m, ids: F.one_hot(ids, 6).to(m.table) @ m.table, tokens(3),
            table=(6, 4)),
    written("embedding by two indices", lambda m, ids: m.table[ids[:, :2], ids[:, 1:]], tokens(3), table=(6, 6, 2)),
    written("embedding tied by linear", lambda m, ids: F.linear(torch.tanh(m.table(ids)), m.table.weight), tokens(3),
            table=table),
    written("embedding tied by product", lambda m, ids: m.body(m.table(ids)) @ m.table.weight.T, tokens(3), table=table,
            body=square),
    written("positions added", lambda m, ids: m.table(ids) + m.places(torch.arange(3)), tokens(3), table=table,
            places=partial(nn.Embedding, 3, 4)),
    written("rows gathered", lambda m, ids: torch.gather(m.table, 0, ids) + m.table.index_select(0, ids[:, 0]),
            tokens(4), table=(6, 4)),
]  # fmt: skip


def _packed(m: Any, inputs: tuple[Tensor, Tensor]) -> Any:
    x, lengths = inputs
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=4)[0]


def _lengths(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4, 3).to(dtype), torch.tensor([2, 4, 1])


def _started(m: Any, x: Tensor) -> Any:
    return m.rnn(x, (m.h.expand(-1, len(x), -1).contiguous(), m.c.expand(-1, len(x), -1).contiguous()))[0]


def _lstm_cell(m: Any, x: Tensor) -> Any:
    state = None
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return torch.cat(state or (), 1)


def _cell(m: Any, x: Tensor) -> Any:
    h = None
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
    return h if h is not None else x


def _elman(m: Any, x: Tensor) -> Any:
    h = x.new_zeros(len(x), 4)
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ m.inward + h @ m.across.T + m.b)
    return h


_RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm of one layer": partial(nn.LSTM, 3, 2),
    "lstm of two layers": partial(nn.LSTM, 3, 2, num_layers=2),
    "lstm, both directions": partial(nn.LSTM, 3, 2, bidirectional=True),
    "lstm with projection": partial(nn.LSTM, 3, 4, proj_size=2),
    "lstm of two layers, both directions, with projection": partial(
        nn.LSTM, 3, 3, num_layers=2, bidirectional=True, proj_size=2),
    "lstm without bias": partial(nn.LSTM, 3, 3, bias=False),
    "gru of two layers": partial(nn.GRU, 3, 2, num_layers=2),
    "rnn": partial(nn.RNN, 3, 3),
    "rnn with relu, both directions": partial(nn.RNN, 3, 2, nonlinearity="relu", bidirectional=True),
}  # fmt: skip


def _recurrent(name: str, rnn: Callable[..., nn.RNNBase]) -> Case:
    return written(name, lambda m, x: m.rnn(x)[0], normal(4, 3), rnn=partial(rnn, batch_first=True))


RECURRENT = [
    *(_recurrent(name, rnn) for name, rnn in _RECURRENT.items()),
    written("gru, sequence first", lambda m, x: m.rnn(x.transpose(0, 1))[1].transpose(0, 1), normal(3, 3),
            rnn=partial(nn.GRU, 3, 3)),
    written("lstm of packed sequences", _packed, _lengths, rnn=partial(nn.LSTM, 3, 2, batch_first=True)),
    written("lstm from a learned state", _started, normal(4, 3), rnn=partial(nn.LSTM, 3, 2, batch_first=True),
            h=(1, 1, 2), c=(1, 1, 2)),
    written("lstm cell in a loop", _lstm_cell, normal(3, 3), cell=partial(nn.LSTMCell, 3, 2)),
    written("gru cell in a loop", _cell, normal(3, 3), cell=partial(nn.GRUCell, 3, 2)),
    written("rnn cell in a loop", _cell, normal(3, 3), cell=partial(nn.RNNCell, 3, 2)),
    written("rnn by hand", _elman, normal(3, 3), inward=(3, 4), across=(4, 4), b=(4,)),
    written("linear rnn by cumulative sum", lambda m, x: torch.cumsum(m.body(x), 1) * torch.sigmoid(m.gate(x)), rows,
            body=square, gate=square),
]  # fmt: skip


def _untracked(w: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * w


_ALGEBRA: dict[str, tuple[Callable[..., Tensor], Data, dict[str, Any]]] = {
    # einsum
    "einsum ni,ij": (lambda m, x: torch.einsum("ni,ij->nj", x, m.w), normal(4), {"w": (4, 2)}),
    "einsum nti,oi": (lambda m, x: torch.einsum("nti,oi->nto", x, m.w), rows, {"w": (2, 4)}),
    "einsum oi,nti": (lambda m, x: torch.einsum("oi,nti->nto", m.w, x), rows, {"w": (2, 4)}),
    "einsum of heads": (lambda m, x: torch.einsum("nthd,hdk->nthk", x, m.w), normal(3, 2, 2), {"w": (2, 2, 3)}),
    "einsum over heads": (lambda m, x: torch.einsum("nthd,hdk->ntk", x, m.w), normal(3, 2, 2), {"w": (2, 2, 3)}),
    "einsum, pointwise": (lambda m, x: torch.einsum("hd,nthd->nth", m.w, x), normal(3, 2, 2), {"w": (2, 2)}),
    "einsum of three": (lambda m, x: torch.einsum("ni,ij,nj->n", x, m.w, x)[:, None], normal(4), {"w": (4, 4)}),
    "einsum of two parameters": (
        lambda m, x: torch.einsum("ni,ir,rj->nj", x, m.u, m.v), normal(4), {"u": (4, 2), "v": (2, 3)}),
    "einsum with dots": (lambda m, x: torch.einsum("...i,ij->...j", x, m.w), rows, {"w": (4, 2)}),
    "einsum of a diagonal": (lambda m, x: torch.einsum("ni,ii->ni", x, m.w), normal(4), {"w": (4, 4)}),
    "einsum summing an axis": (lambda m, x: torch.einsum("ni,ijk->nj", x, m.w), normal(4), {"w": (4, 2, 3)}),
    "einsum mixing rows": (lambda m, x: torch.einsum("ts,nsd->ntd", m.w, x), rows, {"w": (3, 3)}),
    # products of matrices
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), normal(4), {"w": (4, 2), "b": (2,)}),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), 4, 2)), rows, {"w": (1, 4, 2), "b": (1, 3, 2)}),
    "bmm of an expanded parameter": (lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), rows, {"w": (4, 2)}),
    "bmm per position": (lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), rows, {"w": (3, 4, 2)}),
    "product from the left": (lambda m, x: (m.w @ x.T).T, normal(4), {"w": (2, 4)}),
    "product from both sides": (lambda m, x: m.u @ x @ m.v, rows, {"u": (2, 3), "v": (4, 2)}),
    "product per position": (lambda m, x: (x.unsqueeze(2) @ m.w).squeeze(2), rows, {"w": (3, 4, 2)}),
    "product of as many axes as samples": (lambda m, x: m.w @ torch.tanh(x @ m.w), normal(N, N), {"w": (N, N)}),
    "product with a vector": (lambda m, x: (x @ m.w)[:, None], normal(4), {"w": (4,)}),
    "mv": (lambda m, x: torch.mv(x, m.w)[:, None], normal(4), {"w": (4,)}),
    "vector from the left": (lambda m, x: m.w @ x, rows, {"w": (3,)}),
    "outer": (lambda m, x: torch.outer(x[:, 0], m.w), normal(4), {"w": (3,)}),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, ([1, 2], [1, 0])), rows, {"w": (4, 3, 2)}),
    "inner": (lambda m, x: torch.inner(x, m.w), rows, {"w": (2, 4)}),
    "linear without a bias": (lambda m, x: F.linear(x, m.w), rows, {"w": (2, 4)}),
    "bilinear": (lambda m, x: F.bilinear(x, torch.tanh(x), m.w, m.b), normal(4), {"w": (2, 4, 4), "b": (2,)}),
    "kronecker product": (lambda m, x: x @ torch.kron(m.u, m.v), normal(4), {"u": (2, 1), "v": (2, 3)}),
    "low rank": (lambda m, x: x @ (m.u @ m.v).T, normal(4), {"u": (3, 1), "v": (1, 4)}),
    "lora by hand": (lambda m, x: x @ m.w + 2 * (x @ m.a) @ m.b, rows, {"w": (4, 3), "a": (4, 1), "b": (1, 3)}),
    "autoencoder of one matrix": (lambda m, x: torch.tanh(x @ m.w) @ m.w.T + m.b, rows, {"w": (4, 2), "b": (4,)}),
    "hopfield": (lambda m, x: torch.softmax(x @ m.w.T, 1) @ m.w, normal(4), {"w": (3, 4)}),
    "product of several": (
        lambda m, x: torch.linalg.multi_dot([x, m.u, m.v]), normal(4), {"u": (4, 2), "v": (2, 3)}),
    "linear of the parameter": (lambda m, x: F.linear(m.w, x).T, normal(4), {"w": (3, 4)}),
    "orthogonal by qr": (lambda m, x: x @ torch.linalg.qr(m.w).Q, normal(4), {"w": (4, 3)}),
    "solved": (lambda m, x: torch.linalg.solve(m.w @ m.w.T + torch.eye(4).to(x), x.T).T, normal(4), {"w": (4, 4)}),
    "matrix exponential": (lambda m, x: x @ torch.matrix_exp(m.w - m.w.T), normal(4), {"w": (4, 4)}),
    # elementwise, broadcast in every position
    "scalars": (lambda m, x: m.a * x / m.b - m.c, rows, {"a": (), "b": (), "c": ()}),
    "affine": (lambda m, x: x * m.w + m.b, rows, {"w": (4,), "b": (4,)}),
    "affine per position": (lambda m, x: m.b + m.w * x, rows, {"w": (3, 1), "b": (3, 4)}),
    "affine with a unit batch axis": (lambda m, x: x * m.w - m.b, rows, {"w": (1, 3, 4), "b": (1, 1, 1)}),
    "differences": (lambda m, x: (m.a - x) * (x - m.b) + torch.rsub(x, m.a), normal(4), {"a": (4,), "b": (1,)}),
    "quotients": (lambda m, x: x / (2 + m.a**2) + m.b / (2 + x**2), normal(4), {"a": (4,), "b": (4,)}),
    "broadcast to a new axis": (lambda m, x: x[:, None] * m.w + m.b[:, None], normal(4), {"w": (3, 1), "b": (3,)}),
    "parameter expanded": (lambda m, x: torch.tanh(m.w.expand(len(x), -1) + x), normal(4), {"w": (1, 4)}),
    "parameter repeated": (lambda m, x: m.w.repeat(len(x), 2) * x, normal(4), {"w": (2,)}),
    "addcmul": (lambda m, x: torch.addcmul(m.b, x, m.w, value=0.5), normal(4), {"w": (4,), "b": (4,)}),
    "addcdiv": (lambda m, x: torch.addcdiv(x, m.a, 2 + m.b.abs()), normal(4), {"a": (4,), "b": (4,)}),
    "lerp": (lambda m, x: torch.lerp(x, m.end, torch.sigmoid(m.w)), normal(4), {"end": (4,), "w": (4,)}),
    "powers": (lambda m, x: (0.5 + x.abs()) ** m.w + torch.exp2(m.w), normal(4), {"w": (4,)}),
    "maximum": (lambda m, x: torch.maximum(x, m.a) + torch.minimum(m.b, x), normal(4), {"a": (4,), "b": (4,)}),
    "clamp": (lambda m, x: torch.clamp(x, m.a - 1, m.a + 1), normal(4), {"a": (4,)}),
    "where": (lambda m, x: torch.where(x > 0, x * m.a, m.b), normal(4), {"a": (4,), "b": (4,)}),
    "atan2": (lambda m, x: torch.atan2(x, m.a) + torch.logaddexp(m.a, x), normal(4), {"a": (4,)}),
    "distances": (lambda m, x: torch.cdist(x, m.w), normal(4), {"w": (3, 4)}),
    "radial functions": (
        lambda m, x: torch.exp(-((x[:, None] - m.w) ** 2).sum(2) * m.s.exp()), normal(4), {"w": (3, 4), "s": (3,)}),
    "cosines": (lambda m, x: F.cosine_similarity(x[:, None], m.w, dim=2), normal(4), {"w": (3, 4)}),
    "rotation of pairs": (
        lambda m, x: torch.cat([x[:, :2] * m.a.cos() - x[:, 2:] * m.a.sin(), x[:, 2:] * m.a.cos()], 1),
        normal(4), {"a": (2,)}),
    # a function of the parameter alone comes first
    "positive weights": (
        lambda m, x: F.linear(x, F.softplus(m.w), m.b) @ m.v.exp(), normal(4), {"w": (3, 4), "b": (3,), "v": (3, 2)}),
    "weights that sum to one": (lambda m, x: m.w.softmax(0) @ x, rows, {"w": (3,)}),
    "weights of unit length": (lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), normal(4), {"w": (3, 4)}),
    "cumulative sum of a parameter": (lambda m, x: x * m.w.cumsum(0), normal(4), {"w": (4,)}),
    "triangle of a parameter": (lambda m, x: m.w.tril() @ x, rows, {"w": (3, 3)}),
    "sorted parameter": (lambda m, x: x * m.w.sort().values, normal(4), {"w": (4,)}),
    "slices of a parameter": (
        lambda m, x: x @ m.w[:, :2] + (x * m.b[1:5]) @ m.w[:, 1:3], normal(4), {"w": (4, 3), "b": (6,)}),
    "chunks of a parameter": (
        lambda m, x: torch.sigmoid(x @ m.w.chunk(2)[0].T) * (x @ m.w.chunk(2)[1].T), rows, {"w": (4, 4)}),
    "parameter unbound": (
        lambda m, x: torch.stack([F.linear(x[:, t], w) for t, w in enumerate(m.w.unbind(0))], 1), rows,
        {"w": (3, 2, 4)}),
    "parameter reshaped": (
        lambda m, x: F.linear(x, m.flat[:8].view(2, 4), m.flat[8:]), normal(4), {"flat": (10,)}),
    "parameter rolled and flipped": (
        lambda m, x: x @ torch.roll(m.w, 1, 0) + x @ m.w.flip(1), normal(4), {"w": (4, 2)}),
    "circulant": (
        lambda m, x: x @ torch.stack([m.w.roll(k) for k in range(4)]), normal(4), {"w": (4,)}),
    "parameter without gradients in one use": (
        lambda m, x: x @ _untracked(m.w) + x.cos() @ m.w * m.s, normal(4), {"w": (4, 2), "s": ()}),
    "output that is a parameter": (lambda m, x: m.w.expand(len(x), -1), normal(4), {"w": (3,)}),
    "parameter scattered": (
        lambda m, ids: torch.zeros(len(ids), 6).to(m.w).scatter_add(1, ids, m.w.expand(len(ids), 4)), tokens(4),
        {"w": (4,)}),
    "one parameter twice": (lambda m, x: torch.tanh(x @ m.w) @ m.w, rows, {"w": (4, 4)}),
    "one weight, two biases": (
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.a)), m.w, m.b), normal(4),
        {"w": (4, 4), "a": (4,), "b": (4,)}),
    "gradient stopped in one use": (
        lambda m, x: torch.tanh(x @ m.w) @ m.w.detach() + x @ m.v, normal(4), {"w": (4, 4), "v": (4, 4)}),
    "value straight through": (
        lambda m, x: x @ (m.w + (m.w.round() - m.w).detach()), normal(4), {"w": (4, 2)}),
    "parameter read as a number": (lambda m, x: x * m.a + m.b.item(), normal(4), {"a": (4,), "b": ()}),
    "spectral filter": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.complex(m.re, m.im), n=6), normal(6),
        {"re": (4,), "im": (4,)}),
    "spectral filter of images": (
        lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.w), s=(4, 4)), normal(2, 4, 4),
        {"w": (2, 4, 3, 2)}),
    "convolution by fourier": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, 8) * torch.fft.rfft(m.w, 8), 8)[..., :5], normal(2, 5),
        {"w": (2, 3)}),
}  # fmt: skip


def _in_place(m: Any, x: Tensor) -> Any:
    y = x @ m.w
    y.add_(m.b)
    y.mul_(m.s)
    y += m.b
    y[:, 0] -= m.s[0]
    return y.addcmul_(m.s, m.b)


def _masked(m: Any, x: Tensor) -> Any:
    y = m.body(x)
    y[x[:, :, 0] > 0] = m.token
    return torch.tanh(y) @ m.body.weight


def _prefixed(m: Any, x: Tensor) -> Any:
    y = torch.cat([m.token.expand(len(x), -1, -1), m.body(x)], 1) + m.places
    return torch.tanh(torch.stack([y, m.other.expand_as(y)], 1))


def _filled(m: Any, x: Tensor) -> Any:
    y = torch.zeros_like(x)
    y[:, [0, 2]] = m.head(x)
    y = y.index_copy(1, torch.tensor([1]), m.column.expand(len(x), 1))
    return y.masked_fill(x > 1, 0.5)


ALGEBRA = [
    *(written(name, function, data, **shapes) for name, (function, data, shapes) in _ALGEBRA.items()),
    stacked("bilinear module", normal(4), square, lambda: Lambda(lambda m, x: m.b(x, x.cos()), b=nn.Bilinear(4, 4, 2))),
    written("parameters in place", _in_place, normal(4), w=(4, 3), b=(3,), s=(3,)),
    written("mask token", _masked, rows, token=(4,), body=square),
    written("class token", _prefixed, normal(2, 4), token=(1, 1, 4), places=(3, 4), other=(4,), body=square),
    written("columns assigned", _filled, normal(4), head=linear, column=(1,)),
]


class ComplexLinear(nn.Module):
    """Holds a complex parameter, which a cast of the network to a real dtype would cut in half."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def _apply(self, fn: Any, recurse: bool = True) -> "ComplexLinear":
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.w) @ self.w.conj()).abs()


def _quietly(make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(*arguments, **options)

    return made


def _pruned() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def _symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return layer


def _cached(m: Any, x: Tensor) -> Any:
    with parametrize.cached():
        return m.layer(torch.tanh(m.layer(x)))


# Both know dim=None, their annotations do not.
_weight_norm: Any = parametrizations.weight_norm
_old_weight_norm: Any = nn.utils.weight_norm

REPARAMETRISED = [
    stacked("weight norm of the whole", normal(4), lambda: _weight_norm(nn.Linear(4, 3), dim=None)),
    stacked("weight norm of a convolution", images, lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3))),
    stacked("old weight norm of the whole", normal(4),
            _quietly(lambda: _old_weight_norm(nn.Linear(4, 3), dim=None))),
    stacked("old weight norm of columns", normal(4), _quietly(lambda: nn.utils.weight_norm(nn.Linear(4, 3), dim=1))),
    stacked("old spectral norm", normal(4), _quietly(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)))),
    stacked("spectral norm of a convolution", images, lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))),
    stacked("orthogonal", normal(4), lambda: parametrizations.orthogonal(square())),
    stacked("orthogonal by reflections", normal(4),
            lambda: parametrizations.orthogonal(nn.Linear(4, 2), orthogonal_map="householder")),
    stacked("symmetric", normal(4), _symmetric, nn.Tanh),
    stacked("pruned", normal(4), _pruned, nn.Tanh),
    written("parametrisation cached", _cached, normal(4), layer=_symmetric),
    stacked("complex parameters", normal(4), ComplexLinear),
]  # fmt: skip


class _Scaling(torch.autograd.Function):
    """A product with a weight, whose gradients are written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w.T, x.T @ gradient


class _Reversal(torch.autograd.Function):
    """The identity, of gradient −1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


scaling: Any = _Scaling.apply
reversal: Any = _Reversal.apply


def _checkpoints(m: Any, x: Tensor) -> Any:
    for layer in m.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return checkpoint(lambda y: F.linear(torch.tanh(y), m.w), x, use_reentrant=False)


def _doubled() -> nn.Module:
    model = nn.Sequential(square(), nn.Tanh(), linear())
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output + module.bias)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] @ module.weight.T @ module.weight,))
    return model


def _watched(m: Any, x: Tensor) -> Any:
    h = torch.tanh(m.body(x))
    if h.requires_grad:
        h.register_hook(lambda gradient: None)
        h.register_hook(lambda gradient: 2 * gradient)
    return m.body(h)


def _runge_kutta(m: Any, x: Tensor) -> Any:
    for _ in range(2):
        a = m.field(x)
        b = m.field(x + 0.25 * a)
        c = m.field(x + 0.25 * b)
        x = x + (a + 2 * b + 2 * c + m.field(x + 0.5 * c)) / 12
    return x


def _odeint(method: str, adjoint: bool = False) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchdiffeq: Any = pytest.importorskip("torchdiffeq")
        solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        result: Tensor = solve(m.field, x, torch.tensor([0.0, 0.5]).to(x), method=method)[-1]
        return result

    return forward


def _field() -> nn.Module:
    return Lambda(lambda m, t, y: m.body(torch.tanh(m.body(y)) + t), body=square())


def _equilibrium(m: Any, x: Tensor) -> Any:
    z = torch.zeros_like(x)
    for _ in range(4):
        z = torch.tanh(m.across(z) + m.inward(x))
    return z


def _unrolled(m: Any, x: Tensor) -> Any:
    # Sparse coding by a few steps of gradient descent with learned thresholds.
    z = x @ m.w
    for _ in range(3):
        z = F.softshrink(z - 0.1 * (z @ m.w.T - x) @ m.w, 0.05) * m.s
    return z


def _residual(m: Any, x: Tensor) -> Any:
    # The heat equation's u_t − u_xx.
    x = x.detach().clone().requires_grad_()
    first = torch.autograd.grad(m.net(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)[0]
    return first[:, :1] - second[:, 1:]


def _force(m: Any, x: Tensor) -> Any:
    x = x.detach().clone().requires_grad_()
    distances = (x[:, :, None] - x[:, None]).pow(2).sum(3)
    energy = m.net(distances[:, [0, 0, 1], [1, 2, 2]]).sum()
    return -torch.autograd.grad(energy, x, create_graph=True)[0]


def _penalty(m: Any, x: Tensor) -> Any:
    x = x.detach().clone().requires_grad_()
    y = m.net(x)
    slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    return torch.cat([y, (slope.norm(dim=1, keepdim=True) - 1) ** 2], 1)


def _adapted(m: Any, x: Tensor) -> Any:
    # One inner gradient step per sample before the answer.
    answers = []
    for one in x:
        weights = dict(m.net.named_parameters())
        loss = m.net(one).pow(2).sum()
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), slopes, strict=True)}
        answers.append(torch.func.functional_call(m.net, moved, (one,)))
    return torch.stack(answers)


def _directional(m: Any, x: Tensor) -> Any:
    with warnings.catch_warnings():
        # torch's own rules of forward mode are written with torch.jit.script.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.func.jvp(m.net, (x,), (x.cos(),))[1]


def _hyper(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.make(x).reshape(-1, 3, 4), torch.tanh(m.body(x))[:, :, None])[:, :, 0]


def _coded(m: Any, x: Tensor) -> Any:
    return F.linear(x, m.make(m.code).reshape(3, 4), m.bias(m.code))


def _modulated(m: Any, x: Tensor) -> Any:
    scale, shift = m.condition(x.mean(1)).chunk(2, 1)
    return m.body(F.layer_norm(x, (4,)) * (1 + scale[:, None]) + shift[:, None])


def _selected(m: Any, x: Tensor) -> Any:
    h = m.body(x)
    best = h.argmax(2)
    kept = torch.gather(h, 2, best[:, :, None])
    return torch.cat([h.sort(1).values.flatten(1), h.topk(2, 2).values.flatten(1), kept.flatten(1)], 1)


def _collapsed(m: Any, x: Tensor) -> Any:
    scores = m.body(x).log_softmax(2).transpose(0, 1)
    lengths = torch.full((x.shape[0],), x.shape[1])
    labels, wanted = torch.ones(x.shape[0], 2, dtype=torch.long), torch.full((x.shape[0],), 2)
    return F.ctc_loss(scores, labels, lengths, wanted, reduction="none")[:, None]


def _backbone(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        h = torch.tanh(m.backbone(x))
    return m.head(h)


def _numpy(m: Any, x: Tensor) -> Any:
    weights = torch.as_tensor(x.detach().numpy() ** 2)
    return m.body(x) * weights


def _written(m: Any, x: Tensor) -> Any:
    h = m.body(x)
    h[h > 0] = 0.5
    places = (x > 0).nonzero(as_tuple=True)
    return h.index_put(places, m.w[places[1]], accumulate=True)


def _stored(m: Any, x: Tensor) -> Any:
    m.seen.add_(1)
    m.last = m.body(x)
    return m.body(torch.tanh(m.last)) * m.scale + m.seen


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.zeros(1, 4))
    return model


def _averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(nn.Sequential(square(), nn.Tanh()))


def _net(*widths: int) -> Callable[[], nn.Module]:
    i, h, o = widths
    return lambda: nn.Sequential(nn.Linear(i, h), nn.Tanh(), nn.Linear(h, o))


def _adaptive(m: Any, x: Tensor) -> Any:
    return m.head.log_prob(m.body(x))


def _reordered(m: Any, x: Tensor) -> Any:
    order = x[:, 0].argsort()
    return m.b(torch.tanh(m.a(x[order])))[order.argsort()]


def _edited(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    h[:, 1].mul_(2).add_(m.b.bias[0])
    torch.relu_(h.view(len(x), -1)[:, 3:])
    y = m.b(h)
    y[..., :1] *= x[..., :1]
    return y


def _frozen(kind: str, channels: int) -> nn.Module:
    model = nn.Sequential(conv(), nn.GroupNorm(2, channels), nn.ReLU(), nn.Flatten(), nn.Linear(9 * channels, 2))
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith(kind))
    return model


PROGRAMS = [
    written("linear of as many features as samples", lambda m, x: m.b(torch.tanh(m.a(x))), normal(N, N),
            a=partial(nn.Linear, N, N), b=partial(nn.Linear, N, N)),
    written("linear of axes swapped", lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1))).permute(1, 2, 0)),
            normal(N, N), a=partial(nn.Linear, N, N), b=partial(nn.Linear, N, N)),
    written("linear of rows joined", lambda m, x: m.a(x.reshape(-1, 4)).view(len(x), 3, 2), rows, a=linear),
    written("linear of rows joined the other way",
            lambda m, x: m.a(x.transpose(0, 1).reshape(-1, 4)).reshape(3, len(x), 2).transpose(0, 1), rows, a=linear),
    written("linear of samples one by one", lambda m, x: torch.cat([m.a(one[None]) for one in x]), normal(4), a=square),
    written("linear of a batch stacked with itself", lambda m, x: sum(m.a(torch.cat([x, x.cos()])).tanh().chunk(2)),
            normal(4), a=square),
    written("linear of vectors one by one", lambda m, x: torch.stack([m.a(one) for one in x]), a=square),
    written("samples in reverse order", lambda m, x: m.b(torch.tanh(m.a(x.flip(0))).flip(0)), a=square, b=linear),
    written("samples sorted", _reordered, a=square, b=linear),
    written("samples repeated", lambda m, x: m.a(x.repeat_interleave(2, 0).cumsum(1)).tanh().view(len(x), 2, 4),
            a=square),
    written("samples on the second axis", lambda m, x: m.a(torch.stack([x, x.cos(), x.sin()])).tanh().prod(0),
            a=square),
    written("layer that gets no rows", lambda m, x: m.a(x) + m.b(x[x[:, 0] > 99]).sum(), a=square, b=square),
    written("output thrown away", lambda m, x: (m.b(m.a(x)), m.a(x.cos()))[1], a=square, b=square),
    written("views changed in place", _edited, rows, a=square, b=linear),
    written("learned image", lambda m, x: m.conv(m.image) * x, normal(4, 3, 3), conv=conv, image=(1, 2, 5, 5)),
    written("parameter laid out in columns", lambda m, x: (x @ m.w).tanh() @ m.w.T,
            w=lambda: nn.Parameter(torch.randn(2, 4).T)),
    stacked("biases alone trained", images, partial(_frozen, "weight", 4)),
    stacked("biases alone frozen", images, partial(_frozen, "bias", 4)),
    written("linear of pairs", lambda m, x: m.a(torch.cat([x[:, :, None].expand(-1, -1, 3, -1),
            x[:, None].expand(-1, 3, -1, -1)], 3)).relu().sum(2), rows, a=partial(nn.Linear, 8, 2)),
    written("linear of a constant", lambda m, x: x * m.a(torch.ones(1, 4).to(x)), normal(4), a=square),
    written("square layer applied three times", lambda m, x: m.a(torch.tanh(m.a(torch.tanh(m.a(x))))), normal(4),
            a=square),
    written("residual stream", lambda m, x: x + m.b(torch.relu_(m.a(x))), rows, a=square, b=square),
    written("gated", lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), rows, a=square, b=square, c=linear),
    written("mixer", lambda m, x: m.b(torch.tanh(m.a(x.transpose(1, 2)).transpose(1, 2))), rows,
            a=partial(nn.Linear, 3, 3), b=square),
    written("graph layer", lambda m, x: torch.tanh((x @ x.transpose(1, 2)).softmax(2) @ m.a(x)) @ m.w, rows,
            a=square, w=(4, 2)),
    written("parameter list", lambda m, x: sum(x @ w for w in m.ws),
            ws=lambda: nn.ParameterList([nn.Parameter(torch.randn(4, 2)) for _ in range(2)])),
    written("parameter dict", lambda m, x: x @ m.ws["a"] * m.ws["b"],
            ws=lambda: nn.ParameterDict({"a": torch.randn(4, 2), "b": torch.randn(2)})),
    written("buffers mixed in", lambda m, x: m.a(x * m.mask) @ m.mix, a=square,
            mask=lambda: torch.tensor([1.0, 0, 1, 2]), mix=lambda: torch.randn(4, 2)),
    written("checkpoints in a row", _checkpoints, normal(4),
            layers=lambda: nn.ModuleList([square(), nn.Sequential(nn.Tanh(), square())]), w=(2, 4)),
    written("function with a weight", lambda m, x: scaling(scaling(x, m.w).tanh(), m.w), w=(4, 4)),
    written("gradient reversed", lambda m, x: m.b(reversal(m.a(x)).tanh()), a=square, b=square),
    stacked("hooks with parameters", normal(4), _doubled),
    written("hooks of tensors", _watched, normal(4), body=square),
    stacked("data parallel", normal(4), lambda: nn.DataParallel(nn.Sequential(square(), nn.Tanh()))),
    stacked("averaged model", normal(4), _averaged),
    stacked("lazy", normal(4), _lazy),
    written("ode by hand", _runge_kutta, normal(4), field=lambda: nn.Sequential(square(), nn.Tanh(), square())),
    written("ode, rk4", _odeint("rk4"), normal(4), field=_field),
    written("ode, dopri5", _odeint("dopri5"), normal(4), field=_field, coupled=True),
    written("ode, adjoint", _odeint("rk4", adjoint=True), normal(4), field=_field, coupled=True),
    written("equilibrium", _equilibrium, normal(4), across=square, inward=square),
    written("unrolled sparse coding", _unrolled, normal(4), w=(4, 5), s=(5,)),
    written("residual of a heat equation", _residual, normal(2), net=_net(2, 5, 1)),
    written("forces of an energy", _force, normal(3, 2), net=_net(3, 4, 1)),
    written("gradient penalty", _penalty, normal(4), net=_net(4, 3, 1)),
    written("func.grad", lambda m, x: torch.func.vmap(torch.func.grad(lambda z: m.net(z).sum()))(x), net=_net(4, 3, 1)),
    written("func.jvp", _directional, net=_net(4, 3, 2)),
    written("func.vmap", lambda m, x: torch.func.vmap(m.net)(x), net=_net(4, 3, 2)),
    written("func.vmap over parameters", lambda m, x: torch.func.vmap(lambda w: torch.tanh(x @ w), out_dims=1)(m.w),
            w=(3, 4, 2)),
    written("inner gradient step", _adapted, normal(4), net=_net(4, 2, 2)),
    written("weights made from the sample", _hyper, normal(4), make=partial(nn.Linear, 4, 12), body=square),
    written("weights made from a code", _coded, code=(2,), make=partial(nn.Linear, 2, 12),
            bias=partial(nn.Linear, 2, 3)),
    written("modulated", _modulated, rows, condition=partial(nn.Linear, 4, 8), body=square),
    written("selected", _selected, rows, body=square),
    written("ctc", _collapsed, normal(5, 4), body=square),
    written("backbone without gradients", _backbone, backbone=square, head=linear),
    written("branch detached", lambda m, x: m.b(m.a(x).detach()) + m.a(x).tanh(), a=square, b=square),
    written("numpy inside", _numpy, body=square),
    written("indices that depend on data", _written, body=square, w=(4,)),
    written("state kept on the module", _stored, body=square, scale=(), seen=lambda: torch.zeros(())),
    written("adaptive softmax", _adaptive, body=square,
            head=partial(nn.AdaptiveLogSoftmaxWithLoss, 4, 6, [2, 4], div_value=2.0)),
]  # fmt: skip

SCRIPTED = stacked("torchscript", VECTORS, _quietly(lambda: torch.jit.script(nn.Sequential(square(), nn.Tanh()))))


def _lowered(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.head(torch.tanh(m.conv(x)).flatten(1)) * m.scale
    return y.float()


def _lowered_twice(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        h = torch.tanh(m.a(x) @ m.w)
    return m.a(h.float()) @ m.w


AUTOCAST = [
    written("autocast inside", _lowered, images, conv=conv, head=partial(nn.Linear, 36, 2), scale=(2,)),
    written("autocast without its cache", _lowered_twice, a=square, w=(4, 4)),
]
"""To be measured in float32, which autocast lowers to bfloat16; it leaves float64 alone."""


def _reentrant(before: bool, used: bool) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.first(x) if before else x
        return m.head(checkpoint(m.body, h, use_reentrant=True) if used else m.body(h))

    return forward


def reentrant(*, before: bool, used: bool) -> Case:
    """A network around a reentrant checkpoint, whose parameters autograd.grad cannot reach, or around none.

    With a layer before it, the input of the checkpoint requires gradients; without, the output requires none.
    """
    return written("reentrant", _reentrant(before, used), first=square, body=square, head=linear)


ZOO = [*NORMS, *IMAGES, *EMBEDDINGS, *RECURRENT, *ALGEBRA, *REPARAMETRISED, *PROGRAMS, SCRIPTED]
