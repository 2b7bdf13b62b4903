"""Networks of the audit, each as its own community writes it, small enough for one core."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def cnn(norm: Norm | None, *, dropout: float = 0.0) -> nn.Sequential:
    """Three convolutions and a linear head for 10 classes."""
    layers: list[nn.Module] = []
    for inward, outward, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inward, outward, 3, stride, padding=1, bias=norm is None)]
        layers += [*([norm(outward)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(128, 10))


class Block(nn.Module):
    """A residual block of two convolutions, the shortcut projected where the shape changes."""

    def __init__(self, inward: int, outward: int, stride: int, norm: Norm, *, zero: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outward)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1, bias=False)
        self.norm2 = norm(outward)
        same = stride == 1 and inward == outward
        project = nn.Conv2d(inward, outward, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(project, norm(outward))
        if zero:
            nn.init.zeros_(self.norm2.weight)  # type: ignore[arg-type] # each block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(norm: Norm = nn.BatchNorm2d, *, zero: bool = False) -> nn.Sequential:
    """Stem, three blocks of 12, 24 and 32 channels, global pooling, head."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        norm(12),
        nn.ReLU(),
        Block(12, 12, 1, norm, zero=zero),
        Block(12, 24, 2, norm, zero=zero),
        Block(24, 32, 2, norm, zero=zero),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Attention(nn.Module):
    """A pre-norm transformer block: attention, then two linear layers, each added to what came in."""

    def __init__(self, width: int, expansion: int, dropout: float = 0.0, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        self.drop = nn.Dropout(dropout)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(n, t, width)))
        y: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return y


class ViT(nn.Module):
    """Patches of 2 x 2, learned positions, mean over the patches."""

    def __init__(self, width: int = 32, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.7 * torch.randn(1, 16, width))  # as long as sines and cosines
        self.body = nn.Sequential(*(Attention(width, 2, dropout) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.places
        y: Tensor = self.head(self.body(x).mean(1))
        return y


class GPT(nn.Module):
    """A decoder whose head is tied to the table of tokens."""

    def __init__(self, tokens: int, length: int, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.body = nn.Sequential(*(Attention(width, 4, causal=True) for _ in range(depth)), nn.LayerNorm(width))
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.table(ids) + self.places)
        return hidden @ self.table.weight.T


def gpt2(tokens: int, length: int) -> nn.Module:
    """GPT-2 of the transformers library, two layers, dropout 0.1 as it ships."""
    import transformers

    options: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    config = transformers.GPT2Config(vocab_size=tokens, n_positions=length, n_embd=48, n_layer=2, n_head=4, **options)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


class LSTM(nn.Module):
    """Rows of an image as a sequence."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x.squeeze(1))[0][:, -1])
        return y


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with an activation between them; images are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inward, outward in pairwise(widths):
        layers += [nn.Linear(inward, outward), activation()]
    return nn.Sequential(*layers[:-1])


Equation = Callable[[Tensor, Tensor, Tensor], Tensor]


class PINN(nn.Module):
    """Residual of a differential equation inside, of its border condition on the border (last column 1), (N, 1).

    Args:
        equation: (u (N, 1), gradient (N, D), points (N, D)) → residual inside (N, 1); may differentiate further.
        dimensions: D.
        weight: of the border's squared residuals against those inside.
    """

    def __init__(self, equation: Equation, dimensions: int, width: int = 24, weight: float = 1.0) -> None:
        super().__init__()
        self.u = mlp([dimensions, width, width, 1], nn.Tanh)
        self.equation, self.weight = equation, weight

    def forward(self, points: Tensor) -> Tensor:
        x, border = points[:, :-1], points[:, -1:]
        x = x.detach().requires_grad_()
        u = self.u(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        inside = self.equation(u, slope, x)
        return torch.where(border > 0, self.weight**0.5 * u, inside)


def second(slope: Tensor, x: Tensor, axis: int) -> Tensor:
    """Second derivative along an axis, (N, 1), from the gradient (N, D)."""
    (curvature,) = torch.autograd.grad(slope[:, axis].sum(), x, create_graph=True)
    return curvature[:, axis : axis + 1]
