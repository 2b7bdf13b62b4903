"""The zoo's attention, mixtures of experts and models of the transformers library, from tiny configurations.

Libraries are imported by the cases that need them, which skip where they are missing.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import Case, N, normal, tokens
from tests.zoo import Data, lively, square, two, written

rows = normal(3, 4)
VOCABULARY = 17


def _itself(**options: Any) -> Callable[..., Any]:
    return lambda m, x: m.attention(x, x, x, **options)[0]


def _turned(m: Any, x: Tensor) -> Any:
    return m.body(x.transpose(0, 1)).transpose(0, 1)


def _attention_turned(m: Any, x: Tensor) -> Any:
    x = x.transpose(0, 1)
    return m.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


def _crossed(m: Any, inputs: tuple[Tensor, Tensor]) -> Any:
    x, memory = inputs
    return m.attention(x, memory, memory.cos(), need_weights=True)[0]


def _crossed_values(m: Any, inputs: tuple[Tensor, Tensor]) -> Any:
    x, memory = inputs
    return m.attention(x, memory, memory[:, :, :3], need_weights=False)[0]


def _weights(m: Any, x: Tensor) -> Any:
    y, weights = m.attention(x, x, x, average_attn_weights=False)
    return torch.cat([y.flatten(1), weights.flatten(1)], 1)


def _padded(m: Any, x: Tensor) -> Any:
    return m.attention(x, x, x, key_padding_mask=_padding(len(x), x), need_weights=False)[0]


def _padding(n: int, x: Tensor) -> Tensor:
    # The last position of a sample is padding where its first number says so.
    mask = torch.zeros(n, x.shape[1], dtype=torch.bool)
    mask[:, -1] = x[:, 0, 0] > 0
    return mask


def _encoded_with_padding(m: Any, x: Tensor) -> Any:
    return m.body(x, src_key_padding_mask=_padding(len(x), x))


def _decoded(m: Any, inputs: tuple[Tensor, Tensor]) -> Any:
    x, memory = inputs
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return m.body(x, memory, tgt_mask=mask)


def _pair(*widths: int) -> Data:
    # Sequences of other lengths: 3 and 4 positions.
    return lambda dtype: (torch.randn(N, 3, widths[0]).to(dtype), torch.randn(N, 4, widths[-1]).to(dtype))


def _heads(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    n, t, _ = x.shape
    return tuple(part.view(n, t, 2, 2).transpose(1, 2) for part in m.qkv(x).chunk(3, 2))


def _product_attention(m: Any, x: Tensor) -> Any:
    q, k, v = _heads(m, x)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(y.transpose(1, 2).reshape(x.shape))


def _written_attention(m: Any, x: Tensor) -> Any:
    q, k, v = _heads(m, x)
    scores = (q @ k.transpose(2, 3)) / 2**0.5 + m.bias
    return m.out((scores.softmax(3) @ v).transpose(1, 2).reshape(x.shape))


def _einsum_attention(m: Any, x: Tensor) -> Any:
    q, k, v = torch.einsum("ntd,pdhk->pnthk", x, m.qkv)
    weights = torch.einsum("nthk,nshk->nhts", q, k).softmax(3)
    return torch.einsum("nhts,nshk,hkd->ntd", weights, v, m.out)


def _grouped_queries(m: Any, x: Tensor) -> Any:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, 2, 2).transpose(1, 2)
    k, v = (part(x).view(n, t, 1, 2).transpose(1, 2).repeat_interleave(2, 1) for part in (m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def _linear_attention(m: Any, x: Tensor) -> Any:
    q, k, v = m.qkv(x).chunk(3, 2)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("ntk,ntv->nkv", k, v)
    return torch.einsum("ntk,nkv->ntv", q, state) / (q * k.sum(1, keepdim=True)).sum(2, keepdim=True)


_PLACES = torch.tensor([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
"""Of two pixels of a window of 2 × 2: the row of the table of relative positions."""


def _windows(samples_inside: bool) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor) -> Any:
        n = len(x)
        order = (1, 3, 0, 2, 4, 5) if samples_inside else (0, 1, 3, 2, 4, 5)
        split = torch.roll(x, (1, 1), (1, 2)).view(n, 2, 2, 2, 2, 4).permute(order).reshape(4 * n, 4, 4)
        q, k, v = m.qkv(split).chunk(3, 2)
        bias = m.places[_PLACES.flatten()].view(4, 4)
        y = m.out((q @ k.transpose(1, 2) + bias).softmax(2) @ v)
        y = y.view(2, 2, n, 2, 2, 4).permute(2, 0, 1, 3, 4, 5) if samples_inside else y.view(n, 2, 2, 2, 2, 4)
        return y.permute(0, 1, 3, 2, 4, 5)

    return forward


def _routed(k: int) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor) -> Any:
        flat = x.reshape(-1, 4)
        weights, chosen = m.router(flat).softmax(1).topk(k, 1)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(m.experts):
            token, slot = torch.where(chosen == e)
            if len(token):
                y.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return y.view(x.shape)

    return forward


def _routed_by_mask(m: Any, x: Tensor) -> Any:
    weights, chosen = m.router(x).softmax(2).max(2)
    y = torch.zeros_like(x)
    for e in range(3):
        mask = chosen == e
        y[mask] = torch.tanh(x[mask] @ m.up[e] + m.bias[e]) @ m.down[e] * weights[mask][:, None]
    return y


def _gathered(m: Any, x: Tensor) -> Any:
    weights, chosen = m.router(x).softmax(2).topk(2, 2)
    h = torch.tanh(torch.einsum("nti,ntkih->ntkh", x, m.up[chosen]) + m.bias[chosen])
    return torch.einsum("ntkh,ntkho,ntk->nto", h, m.down[chosen], weights)


def _dispatched(m: Any, x: Tensor) -> Any:
    flat = x.reshape(-1, 4)
    gates = m.router(flat).softmax(1)
    seats = F.one_hot(gates.argmax(1), 3).to(gates)
    # Every token has a seat at every expert, filled with zeros where it was sent to another.
    groups = torch.einsum("te,ti->eti", seats, flat)
    h = torch.baddbmm(m.bias[:, None], groups, m.up).tanh()
    return torch.einsum("eto,te->to", torch.bmm(h, m.down), seats * gates).view(x.shape)


def _soft(m: Any, x: Tensor) -> Any:
    logits = x @ m.slots
    inward = torch.einsum("nts,nti->nsi", logits.softmax(1), x)
    return torch.einsum("nts,nsi->nti", logits.softmax(2), torch.einsum("nsi,sij->nsj", inward, m.up).tanh())


_STACKED: dict[str, Any] = {"router": partial(nn.Linear, 4, 3), "up": (3, 4, 2), "bias": (3, 2), "down": (3, 2, 4)}


def _experts() -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4)) for _ in range(3)])


def _prompted(m: Any, ids: Tensor) -> Any:
    x = m.table(ids)
    x = torch.cat([m.prompt.expand(len(x), -1, -1), x], 1)
    return m.body(x)[:, -1] @ m.table.weight.T


def _block(**options: Any) -> Callable[[], nn.TransformerEncoderLayer]:
    return partial(nn.TransformerEncoderLayer, 4, 2, 6, **{"dropout": 0.0, "batch_first": True, **options})


def _encoder(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoder(_block(**options)(), 2, norm=nn.LayerNorm(4), enable_nested_tensor=False)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), 1)


def _whole() -> nn.Module:
    # nn.Transformer's encoder says at birth why it cannot use nested tensors.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Transformer(4, 2, 1, 1, 6, batch_first=True, norm_first=True)


def _mha(**options: Any) -> Callable[[], nn.Module]:
    return partial(nn.MultiheadAttention, 4, 2, **{"batch_first": True, **options})


_CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)

ATTENTION = [
    written("attention of as many positions as samples", _attention_turned, rows, attention=_mha(batch_first=False)),
    written("attention of one head", _itself(), normal(N, N), attention=partial(nn.MultiheadAttention, N, 1,
            batch_first=True)),
    written("attention with weights", _weights, rows, attention=_mha()),
    written("attention without bias", _itself(need_weights=False), rows, attention=_mha(bias=False)),
    written("attention with a mask", _itself(attn_mask=_CAUSAL), rows, attention=_mha()),
    written("attention, causal", _itself(attn_mask=_CAUSAL, is_causal=True, need_weights=False), rows,
            attention=_mha()),
    written("attention with padding", _padded, rows, attention=_mha()),
    written("attention with a bias position", _itself(), rows, attention=_mha(add_bias_kv=True, add_zero_attn=True)),
    written("cross attention", _crossed, _pair(4), attention=_mha()),
    written("cross attention of other widths", _crossed_values, _pair(4, 5), attention=_mha(kdim=5, vdim=3)),
    written("attention of learned queries", lambda m, x: m.attention(m.queries.expand(len(x), -1, -1), x, x)[0], rows,
            queries=(1, 2, 4), attention=_mha()),
    written("encoder, post-norm", lambda m, x: m.body(x), rows, body=_encoder()),
    written("encoder, pre-norm", lambda m, x: m.body(x), rows, body=_encoder(norm_first=True, activation="gelu")),
    written("encoder, sequence first", _turned, rows, body=_encoder(batch_first=False)),
    written("encoder with padding", _encoded_with_padding, rows, body=_encoder()),
    written("encoder layer", lambda m, x: m.body(x, src_mask=_CAUSAL), rows, body=_block(bias=False)),
    written("decoder", _decoded, _pair(4), body=_decoder),
    written("encoder and decoder", lambda m, xs: m.body(*xs), _pair(4), body=_whole),
    written("attention by its function", _product_attention, rows, qkv=partial(nn.Linear, 4, 12), out=square),
    written("attention written out", _written_attention, rows, qkv=partial(nn.Linear, 4, 12), out=square,
            bias=(1, 2, 3, 3)),
    written("attention by einsum", _einsum_attention, rows, qkv=(3, 4, 2, 2), out=(2, 2, 4)),
    written("grouped queries", _grouped_queries, rows, q=square, k=partial(nn.Linear, 4, 2),
            v=partial(nn.Linear, 4, 2)),
    written("linear attention", _linear_attention, rows, qkv=partial(nn.Linear, 4, 12)),
    written("windows", _windows(False), normal(4, 4, 4), qkv=partial(nn.Linear, 4, 12), out=square, places=(9,)),
    written("windows before samples", _windows(True), normal(4, 4, 4), qkv=partial(nn.Linear, 4, 12), out=square,
            places=(9,)),
    written("prompt", _prompted, tokens(2), table=partial(nn.Embedding, 6, 4), prompt=(1, 2, 4), body=_block()),
    written("one expert", _routed(1), rows, router=partial(nn.Linear, 4, 3), experts=_experts),
    written("two experts", _routed(2), rows, router=partial(nn.Linear, 4, 3), experts=_experts),
    written("experts by mask", _routed_by_mask, rows, **_STACKED),
    written("experts gathered", _gathered, rows, **_STACKED),
    written("experts by dispatch", _dispatched, rows, **_STACKED),
    written("soft experts", _soft, rows, slots=(4, 2), up=(2, 4, 4)),
]  # fmt: skip


def _library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def hugging(name: str, kind: str, data: Data, forward: Callable[[nn.Module, Any], Any], **config: Any) -> Case:
    """A model of the transformers library: class `kind` + `config`'s class, weights large enough to matter."""

    def make() -> nn.Module:
        library = _library("transformers")
        options = {"initializer_range": 0.3, **config}
        configuration = getattr(library, options.pop("config"))
        experts = options.pop("experts", None)
        attention = options.pop("attention", "eager")
        model: Any = getattr(library, kind)._from_config(configuration(**options), attn_implementation=attention)
        if experts:
            model.set_experts_implementation(experts)
        return lively(model)

    return Case(name, make, data, forward)


def _last(m: Any, ids: Any) -> Any:
    logits = (m(**ids) if isinstance(ids, dict) else m(ids)).logits
    return logits.flatten(1)[:, -3:] if logits.dim() == 2 else logits[:, -1, :3]


def _state(m: Any, x: Any) -> Any:
    return two(m(**x).last_hidden_state if isinstance(x, dict) else m(x).last_hidden_state)


words = tokens(5, kinds=VOCABULARY)
pictures = normal(3, 16, 16)


def _with_mask(dtype: torch.dtype) -> dict[str, Tensor]:
    mask = torch.ones(N, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": words(dtype), "attention_mask": mask}


def _translation(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_ids": words(dtype), "decoder_input_ids": tokens(3, kinds=VOCABULARY)(dtype)}


_BERT: dict[str, Any] = {"config": "BertConfig", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 8}  # fmt: skip
_GPT2: dict[str, Any] = {
    "config": "GPT2Config",
    "vocab_size": VOCABULARY,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
}
_LLAMA: dict[str, Any] = {"config": "LlamaConfig", "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
          "max_position_embeddings": 8}  # fmt: skip
_MIXTRAL: dict[str, Any] = {**_LLAMA, "config": "MixtralConfig", "num_hidden_layers": 1, "num_local_experts": 3}
_T5: dict[str, Any] = {"config": "T5Config", "vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12,
       "num_layers": 1, "num_heads": 2, "relative_attention_num_buckets": 4, "decoder_start_token_id": 0}  # fmt: skip
_VIT: dict[str, Any] = {"config": "ViTConfig", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 12, "image_size": 16, "patch_size": 8, "num_labels": 2}  # fmt: skip
_SWIN: dict[str, Any] = {"config": "SwinConfig", "image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [2, 1],
         "num_heads": [1, 2], "window_size": 4, "num_labels": 2}  # fmt: skip

MODELS = [
    *(
        case
        for attention in ("eager", "sdpa")
        for case in (
            hugging(f"gpt2, {attention}", "GPT2LMHeadModel", words, _last, attention=attention, **_GPT2),
            hugging(f"bert, {attention}", "BertModel", words, _state, attention=attention, **_BERT),
            hugging(f"bert with a mask, {attention}", "BertModel", _with_mask, _state, attention=attention, **_BERT),
            hugging(f"llama, {attention}", "LlamaForCausalLM", words, _last, attention=attention, **_LLAMA),
            hugging(f"t5, {attention}", "T5ForConditionalGeneration", _translation, _last, attention=attention, **_T5),
            hugging(f"vit, {attention}", "ViTForImageClassification", pictures, _last, attention=attention, **_VIT),
            hugging(f"swin, {attention}", "SwinForImageClassification", pictures, _last, attention=attention, **_SWIN),
            hugging(f"mixtral, {attention}", "MixtralForCausalLM", words, _last, attention=attention,
                    experts="eager", **_MIXTRAL),
        )
    ),
    hugging("bert for masked words", "BertForMaskedLM", words, _last, **_BERT),
    hugging("gpt2 with a mask", "GPT2LMHeadModel", _with_mask, _last, **_GPT2),
    hugging("llama with tied words", "LlamaForCausalLM", words, _last, tie_word_embeddings=True, **_LLAMA),
    hugging("resnet", "ResNetForImageClassification", pictures, _last, config="ResNetConfig", embedding_size=4,
            hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2),
    hugging("convnext", "ConvNextForImageClassification", pictures, _last, config="ConvNextConfig", patch_size=2,
            num_stages=2, hidden_sizes=[4, 6], depths=[1, 1], num_labels=2),
    hugging("mobilenet", "MobileNetV2ForImageClassification", normal(3, 32, 32), _last, config="MobileNetV2Config",
            depth_multiplier=0.05, depth_divisible_by=2, min_depth=2, finegrained_output=True, num_labels=2),
    hugging("efficientnet", "EfficientNetForImageClassification", pictures, _last, config="EfficientNetConfig",
            width_coefficient=0.025, depth_coefficient=1.0, kernel_sizes=[3, 3], in_channels=[32, 16],
            out_channels=[16, 320], strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 2],
            depthwise_padding=[], hidden_dim=32, num_labels=2),
    hugging("mamba", "MambaForCausalLM", words, _last, config="MambaConfig", vocab_size=VOCABULARY, hidden_size=6,
            state_size=3, num_hidden_layers=1, time_step_rank=2),
    hugging("distilbert", "DistilBertModel", words, _state, config="DistilBertConfig", vocab_size=VOCABULARY, dim=8,
            n_layers=1, n_heads=2, hidden_dim=12, max_position_embeddings=8),
]  # fmt: skip


def _checkpointed() -> nn.Module:
    model: Any = next(case for case in MODELS if case.name == "llama, eager").make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name to come
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model  # type: ignore[no-any-return]


def _adapted() -> nn.Module:
    peft = _library("peft")
    model: Any = next(case for case in MODELS if case.name == "gpt2, eager").make()
    options = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: nn.Module = peft.get_peft_model(model, options)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)  # zeros, which would hide the gradients of lora_A
    return adapted


MODELS += [
    Case("llama with checkpoints", _checkpointed, words, _last),
    Case("lora by peft", _adapted, words, _last),
]

TRANSFORMERS = [*ATTENTION, *MODELS]
