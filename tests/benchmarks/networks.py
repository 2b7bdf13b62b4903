"""The large networks of the benchmark, written out: ResNet-18 for 32 x 32 images, a vision and a causal transformer.

All return (N, C) outputs in eval mode. Dropout is left out, since it does nothing there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the resolution at stride 1; BatchNorm follows, so it has no bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, the basic block of He et al. 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the 3 x 3 stem for 32 x 32 images, P = 11,173,962 at 10 classes.

    BatchNorm gets the statistics and the scales of no particular training, because at its initial values it is the
    identity and hides mistakes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = conv(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        self.blocks = nn.Sequential(
            *(
                block
                for i in range(4)
                for block in (
                    Residual(widths[i], widths[i + 1], 1 if i == 0 else 2),
                    Residual(widths[i + 1], widths[i + 1], 1),
                )
            )
        )
        self.head = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                trained(module)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(h.mean(dim=(2, 3)))  # type: ignore[no-any-return]


@torch.no_grad()
def trained(norm: nn.BatchNorm2d) -> None:
    """Give a BatchNorm statistics and parameters that differ between channels."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(0, 0.1)


class Block(nn.Module):
    """A pre-norm transformer block, mlp ratio 4."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """A vision transformer on 3 x 32 x 32 images in patches of 4: 64 tokens and a class token."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.blocks(h))[:, 0])  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A causal transformer over a vocabulary of 1000; outputs are read off the last token."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4, tokens: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.token = nn.Embedding(1000, width)
        self.position = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def embedded(self, x: Tensor) -> Tensor:
        """Token and position embedding, the input of the first block."""
        return self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))  # type: ignore[no-any-return]

    def read(self, h: Tensor) -> Tensor:
        """What follows the embedding."""
        return self.head(self.norm(self.blocks(h)[:, -1]))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.embedded(x))
