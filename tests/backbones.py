"""Networks of the matrix of identity: one of each kind people train, on images of 8 × 8 with 10 classes."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.modules import Attention, Recurrent, TwoPaths, cnn, mlp


class FrozenBackbone(nn.Module):
    """A convolutional backbone that no longer trains, its BatchNorm in evaluation mode, and a head that does."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(cnn())[:-1])  # type: ignore[call-overload]
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 10))

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x))
        return y


class Shared(TwoPaths):
    """One layer reachable by two paths, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(super().forward(x))))
        return y


class Rows(Recurrent):
    """An LSTM kept out of autocast, as many processors have none in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            states = self.rnn(x.squeeze(1).float())[0][:, -1]
        y: Tensor = self.head(states)
        return y


def tokens(x: Tensor) -> Tensor:
    """Every fourth pixel as one of 17 grey levels (N, 16)."""
    return (16 * x).round().clamp(0, 16).long().flatten(1)[:, ::4]


class Language(nn.Module):
    """A tiny GPT-2 whose next word is the class."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or gpt2()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens(x)).logits
        return logits[:, -1, :10]


def gpt2() -> nn.Module:
    """A GPT-2 with 17 words, input and output embedding tied, dropout on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {
        "vocab_size": 17,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "use_cache": False,
    }
    options |= {"bos_token_id": 0, "eos_token_id": 0}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**options))
    return model


class Vision(nn.Module):
    """A tiny ViT, dropout on."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        options: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        drops: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        self.model = ViTForImageClassification(ViTConfig(**options, **sizes, **drops))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(pixel_values=x).logits
        return y


def lora() -> nn.Module:
    """The GPT-2, frozen, with low-rank adapters by peft."""
    import peft

    options = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice for language models that are saved
        return Language(peft.get_peft_model(gpt2(), options))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn, batchnorm, dropout": cnn,
    "frozen batchnorm backbone": FrozenBackbone,
    "tied and shared": Shared,
    "lstm": Rows,
    "transformer encoder": Attention,
    "gpt-2": Language,
    "vit": Vision,
    "lora": lora,
}

# The submodule that the setting "compiled" compiles, a cheap one; "" is the whole network.
COMPILED = {
    "mlp": "",
    "cnn, batchnorm, dropout": "",
    "frozen batchnorm backbone": "head",
    "tied and shared": "first",
    "lstm": "head",
    "transformer encoder": "encoder.linear1",
    "gpt-2": "model.transformer.ln_f",
    "vit": "model.vit.layernorm",
    "lora": "model.base_model.model.transformer.ln_f",
}
